"""prunex score of many images: read when they are needed, gone on by image, and shared among processes."""

import csv

import numpy as np
import pytest
import timm
import torch
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

import prunex
from prunex import PrunexError
from prunex.metrics.scoring import scores
from prunex.recipes.commands import cli, score_data, score_row
from prunex.recipes.commands.score_data import from_folder, from_run
from prunex.recipes.commands.score_record import Rows
from tests.recipes.commands.starting import ended, killed, started

METRICS = "perturbation,deletion,energy_inside,mean_iou,kept_auc,infidelity,max_sensitivity,sparseness"


@pytest.fixture
def photos(tmp_path):
    """Eleven images in two class folders, and masks beside them."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for number in range(11):
        name = f"{'ant' if number % 2 else 'bee'}/{number}"
        for folder in ("val", "masks/val"):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (36, 32, 3), dtype=np.uint8)).save(root / f"val/{name}.png")
        shape = np.zeros((36, 32), dtype=np.uint8)
        shape[: 8 + number, 5:20] = 255
        Image.fromarray(shape).save(root / f"masks/val/{name}.png")
    return root


@pytest.fixture
def slim(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    prunex.attach(model, "evit", keep_ratio=0.6)
    return prunex.save(prunex.slim(model), tmp_path / "slim")


def wanted(slim, photos, out, *more, methods="generic_attention", metrics="deletion,mean_iou,kept_auc"):
    more = ["--batch", 2, "--out", out, *more]
    return [slim, "--data", photos, "--methods", methods, "--metrics", metrics, *more]


def everything(slim, photos, out, *more):
    more = ["--option", "shap.budget=34", *more]
    return wanted(slim, photos, out, *more, methods="rollout,generic_attention,shap", metrics=METRICS)


def score(*arguments):
    return cli.run(["score", *map(str, arguments), "--device", "cpu"])


def table(out):
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    fields = ("mean", "low", "high", "images", "removal", "judge", "forwards_per_image")
    return {(r["model"], r["method"], r["metric"]): [r[f] for f in fields] for r in rows}


def values(out):
    files = {path.relative_to(out): np.load(path) for path in sorted((out / "values").rglob("*.npz"))}
    return {f"{path}/{name}": arrays[name] for path, arrays in files.items() for name in arrays if name != "about"}


def assert_alike(out, other, exactly=True):
    assert table(out).keys() == table(other).keys()
    mine, theirs = values(out), values(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=0 if exactly else 1e-6, err_msg=name)
    if exactly:
        assert table(out) == table(other)


def test_who_was_stopped_goes_on_by_image(slim, photos, tmp_path, monkeypatch, capsys):
    images, stop = [], [0]

    def counted(names, model, some, *args, **kwargs):
        if stop[0] and len(images) >= stop[0]:
            raise KeyboardInterrupt
        images.extend([names[0]] * len(some))
        return scores(names, model, some, *args, **kwargs)

    monkeypatch.setattr(score_row, "scores", counted)
    assert score(*wanted(slim, photos, tmp_path / "whole")) == 0
    whole = len(images)
    out = tmp_path / "out"
    done = 0
    for step in (5, 22, 31):
        stop[0] = step
        images.clear()
        assert score(*wanted(slim, photos, out)) == 130
        assert "the same command continues there" in capsys.readouterr().err
        done += len(images)
    stop[0] = 0
    images.clear()
    assert score(*wanted(slim, photos, out)) == 0
    assert done + len(images) == whole
    assert_alike(out, tmp_path / "whole")
    assert [path.name for path in (out / "values" / "slim").iterdir() if path.is_dir()] == []
    # Other batches go on as well.
    stop[0] = 25
    images.clear()
    score(*wanted(slim, photos, tmp_path / "other"))
    done, stop[0] = len(images), 0
    images.clear()
    assert score(*wanted(slim, photos, tmp_path / "other", "--batch", 5)) == 0
    assert done + len(images) == whole
    assert_alike(tmp_path / "other", tmp_path / "whole", exactly=False)


def test_images_that_do_not_fit_into_memory_are_read_again(slim, photos, tmp_path, monkeypatch):
    assert score(*wanted(slim, photos, tmp_path / "held")) == 0
    monkeypatch.setattr(score_data, "HELD", 3 * 32 * 32 * 4 * 5 // 2)
    assert score(*wanted(slim, photos, tmp_path / "read")) == 0
    assert_alike(tmp_path / "held", tmp_path / "read")


def test_images_and_masks_are_those_of_the_files(slim, photos):
    scenes = from_folder(photos, None, prunex.load(slim), 100)
    whole, some = scenes[:], scenes[torch.tensor([7, 2])]
    assert len(scenes) == len(whole.images) == 11
    for part, given in zip(some, whole, strict=True):
        assert part.equal(given[[7, 2]])
    assert len(set(map(tuple, whole.stamps().tolist()))) == 11
    assert whole.stamps()[[7, 2]].equal(some.stamps())


class Images(Dataset):
    """Images of which one is drawn anew each time it is asked for."""

    def __init__(self, count=6, changing=None):
        self.images, self.changing = torch.randn(count, 3, 32, 32), changing

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        image = torch.randn(3, 32, 32) if place == self.changing else self.images[place]
        return {"image": image, "label": place % 2}


class Module(LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def val_dataloader(self):
        return self.loader


def test_images_that_change_are_refused(monkeypatch):
    monkeypatch.setattr(score_data, "HELD", 0)
    scenes = from_run(Module(DataLoader(Images(changing=4), batch_size=2)), 6)
    scenes.stamps = scenes[:].stamps()
    scenes[torch.tensor([0, 3])]
    with pytest.raises(PrunexError, match=r"give other images at 3\.\.4 when they are read again.*seed a random split"):
        scenes[torch.tensor([3, 4])]


def test_a_stream_is_read_once():
    class Stream(IterableDataset):
        read = 0

        def __iter__(self):
            for n in range(50):
                Stream.read += 1
                yield torch.full((3, 8, 8), float(n)), n % 3

    scenes = from_run(Module(DataLoader(Stream(), batch_size=4)), 6)
    assert len(scenes) == 6
    assert scenes[torch.tensor([5, 1])].images[:, 0, 0, 0].tolist() == [5, 1]
    assert scenes[:].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert Stream.read == 8
    assert "the first 6" in scenes.notes[0]


def test_data_that_lose_images_or_have_none():
    def lossy(samples):
        return torch.utils.data.default_collate(samples[:1])

    scenes = from_run(Module(DataLoader(Images(), batch_size=2, collate_fn=lossy)), 6)
    with pytest.raises(PrunexError, match="collate_fn made 1 images of 3: give one of each"):
        scenes[:3]
    with pytest.raises(PrunexError, match="no validation images to score on"):
        from_run(Module(DataLoader(Images(0), batch_size=2)), 6)


def test_rows_that_are_damaged_or_of_other_images_are_made_anew(tmp_path):
    rows = Rows(tmp_path / "rows", 4)
    rows.add(torch.tensor([2]), {"deletion": torch.tensor([0.5])})
    rows.add(torch.tensor([3]), {"deletion": torch.tensor([0.25])})
    first, second = sorted((tmp_path / "rows").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:50])
    (tmp_path / "rows" / "9.safetensors").write_bytes(second.read_bytes().replace(b"deletion", b"DELETION"))
    assert Rows(tmp_path / "rows", 4).done().tolist() == [False, False, False, True]
    assert not first.exists()
    assert Rows(tmp_path / "rows", 3).done().tolist() == [False] * 3  # of more images than there are
    assert list((tmp_path / "rows").iterdir()) == []
    rows = Rows(tmp_path / "rows", 2)
    for place in (1, 0, 1):
        rows.add(torch.tensor([place]), {"deletion": torch.tensor([place / 2])})
    assert rows.whole()["deletion"].tolist() == [0, 0.5]
    rows.remove()
    assert not (tmp_path / "rows").exists()


def test_mistakes_about_processes(slim, photos, tmp_path):
    with pytest.raises(PrunexError, match="--devices 0 is not allowed"):
        score(*wanted(slim, photos, tmp_path / "out", "--devices", 0))
    with pytest.raises(PrunexError, match="--device and --accelerator say the same"):
        score(*wanted(slim, photos, tmp_path / "out", "--accelerator", "cpu"))
    with pytest.raises(PrunexError, match="unrecognized arguments: --workers 2"):
        score(*wanted(slim, photos, tmp_path / "out", "--workers", 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # processes that import everything
def test_two_processes_score_as_one_does(slim, photos, tmp_path):
    said = ended(tmp_path, "score", *everything(slim, photos, tmp_path / "one"))
    log = ended(tmp_path, "score", *everything(slim, photos, tmp_path / "two"), processes=2)
    assert log.count("best explainer of the model") == said.count("best explainer of the model") == 1
    ended(tmp_path, "score", *everything(slim, photos, tmp_path / "lightning"), "--devices", 2)
    for name in ("two", "lightning"):
        assert_alike(tmp_path / name, tmp_path / "one")


@pytest.mark.slow  # processes that import everything
@pytest.mark.parametrize("processes", [None, 2])
def test_a_killed_run_goes_on(slim, photos, tmp_path, processes):
    command, out = everything(slim, photos, tmp_path / "out"), tmp_path / "out"
    ended(tmp_path, "score", *everything(slim, photos, tmp_path / "whole"))

    def shards():
        return [path.name for path in out.rglob("*.safetensors") if path.name[0] != "."]

    for goal in (3, 9, 15):
        process, seen = started(tmp_path, "score", *command, processes=processes), set()
        killed(tmp_path, process, lambda goal=goal, seen=seen: seen.update(shards()) or len(seen) >= goal)
    ended(tmp_path, "score", *command, processes=processes)
    assert_alike(out, tmp_path / "whole")
    assert not list(out.rglob(".*"))


@pytest.mark.slow  # processes that import everything
def test_a_method_that_refuses_is_left_out_in_all_processes(slim, photos, tmp_path):
    model = prunex.load(slim)
    model.reset_classifier(0)
    bare = prunex.save(model, tmp_path / "bare")
    command = [bare, "--data", photos, "--images", 5, "--metrics", "energy_inside,kept_auc"]
    for name, processes in (("one", None), ("two", 2)):
        log = ended(tmp_path, "score", *command, "--out", tmp_path / name, processes=processes)
        assert log.count("skipped grad_cam: ") == 1
    assert_alike(tmp_path / "two", tmp_path / "one")
