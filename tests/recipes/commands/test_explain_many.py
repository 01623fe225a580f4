"""prunex explain of many images: stopped and gone on, each image once, in one process and in several."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import prunex
from prunex import PrunexError, registry
from prunex.explainers.rollout import rollout
from prunex.recipes.commands import cli, shards
from prunex.recipes.commands.sheets import sheets_of
from prunex.recipes.given import image_names
from tests.recipes.commands.starting import ended, killed, started
from tests.vits import tiny


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", 9)


def make_photos(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return folder


@pytest.fixture
def model(tmp_path):
    return prunex.save(tiny(), tmp_path / "slim")


@pytest.fixture
def seen(monkeypatch):
    """How many images each call of the method "seen" was given; it stops where ``stop`` says."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    class Calls(list):
        stop = None

    calls = Calls()

    def method(model, images, target=None):
        if calls.stop is not None and len(calls) >= calls.stop:
            raise KeyboardInterrupt
        calls.append(len(images))
        return rollout(model, images, target)

    registry.register("explainer", "seen", "nobody", "one forward")(method)
    return calls


def run(*arguments):
    return cli.run(["explain", *map(str, arguments), "--device", "cpu", "--methods", "seen"])


def stopped(seen, after, *arguments):
    seen.stop = after
    assert run(*arguments) == 130
    seen.stop = None
    done = sum(seen)
    seen.clear()
    return done


def test_a_stopped_run_goes_on_where_it_was(model, photos, tmp_path, seen, capsys):
    out = tmp_path / "out"
    assert run(model, "--images", photos, "--out", tmp_path / "whole", "--batch", 2) == 0
    whole = prunex.open_maps(tmp_path / "whole")
    seen.clear()
    assert stopped(seen, 3, model, "--images", photos, "--out", out, "--batch", 2) == 5
    assert "interrupted: maps of 5 of 9 images are in" in capsys.readouterr().err
    assert len(prunex.open_maps(out)) == 5
    assert run(model, "--images", photos, "--out", out, "--batch", 2) == 0
    assert seen == [2, 2]
    opened = prunex.open_maps(out)
    assert opened.names == whole.names == [f"{n}.png" for n in range(9)]
    # Batches are those of a run that was not stopped, so that nothing differs by rounding.
    assert all(np.array_equal(opened[:, name], whole[:, name]) for name in whole.columns)
    seen.clear()
    assert run(model, "--images", photos, "--out", out, "--batch", 4) == 0
    assert seen == []
    with np.load(out / "maps.npz") as arrays:
        assert arrays["files"].tolist() == whole.names
        assert np.array_equal(arrays["seen"], whole[:, "seen"])


def test_what_is_done_is_known_by_name_and_content(model, photos, tmp_path, seen):
    command = (model, "--images", photos, "--out", tmp_path / "out", "--batch", 4)
    run(*command)
    before = prunex.open_maps(tmp_path / "out")[:, "seen"]
    seen.clear()
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(photos / "3.png")
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(photos / "new.png")
    (photos / "8.png").unlink()
    run(*command)
    assert seen == [1, 1]
    opened = prunex.open_maps(tmp_path / "out")
    # What was explained stays; what is new comes last.
    assert opened.names == [f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7, 8)] + ["3.png", "new.png"]
    assert not np.array_equal(opened["3.png", "seen"], before[3])
    assert np.array_equal(opened["4.png", "seen"], before[4])
    os.utime(photos / "4.png")
    seen.clear()
    run(*command)
    assert seen == [1]


def test_other_options_are_refused_by_name_or_start_over(model, photos, tmp_path, seen):
    out = tmp_path / "out"
    run(model, "--images", photos, "--out", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    other = prunex.save(tiny(num_classes=4), tmp_path / "other")
    for arguments, said in (
        ((model, "--target", 2), r"target \(predicted, now 2\) differ; give another --out, or --again to start over"),
        ((model, "--mean", 0.1), "mean"),
        ((model, "--range", 4095), r"range \(None, now 4095\)"),
        ((other,), "the model"),
    ):
        with pytest.raises(PrunexError, match=f"holds maps that were made otherwise: .*{said}"):
            run(*arguments, "--images", photos, "--out", out)
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    run(model, "--images", photos, "--out", out, "--target", 2, "--again")
    opened = prunex.open_maps(out)
    assert opened[:, "target"].tolist() == [2] * 9
    assert len(list(opened.folder.glob("*.safetensors"))) == 1


def test_starting_over_with_what_is_refused_leaves_what_is_there(model, photos, tmp_path, seen):
    out = tmp_path / "out"
    run(model, "--images", photos, "--out", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    options = ["--methods", "rollout", "--option", "rollout.head_fusion=median"]
    with pytest.raises(PrunexError, match="unknown head_fusion"):
        cli.run(["explain", str(model), "--images", str(photos), "--out", str(out), "--again", *options])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_the_first_images_get_a_sheet(model, photos, tmp_path, seen):
    def sheets(out):
        return sorted(p.name for p in out.glob("*.png"))

    command = (model, "--images", photos, "--out", tmp_path / "out", "--sheets")
    run(*command, 2)
    assert sheets(tmp_path / "out") == ["0.png", "1.png"]
    assert len(prunex.open_maps(tmp_path / "out")) == 9
    seen.clear()
    run(*command, "all")
    assert len(sheets(tmp_path / "out")) == 9
    assert sum(seen) == 7  # those without one
    assert len(prunex.open_maps(tmp_path / "out")) == 9
    run(*command[:-2], tmp_path / "none", "--sheets", 0)
    assert sheets(tmp_path / "none") == []
    with pytest.raises(PrunexError, match="--sheets some is not allowed: give a whole number, or all"):
        run(*command, "some")


def test_batches_become_larger_files_and_large_runs_no_npz(model, photos, tmp_path, seen, monkeypatch, capsys):
    monkeypatch.setattr(shards, "ROWS", 4)
    out = tmp_path / "out"
    run(model, "--images", photos, "--out", out, "--batch", 1)
    assert (out / "maps.npz").is_file()
    assert len(list((out / "maps").glob("*.safetensors"))) == 3
    monkeypatch.setattr(shards, "SMALL", 8)
    run(model, "--images", photos, "--out", out, "--batch", 1)
    assert not (out / "maps.npz").exists()
    said = f"maps of 9 images lie in {out / 'maps'}, for prunex.open_maps: too many for a maps.npz"
    assert said in capsys.readouterr().out.splitlines()
    assert len(prunex.open_maps(out)) == 9


def test_a_folder_of_somebody_else(model, photos, tmp_path, seen):
    (tmp_path / "out" / "maps").mkdir(parents=True)
    (tmp_path / "out" / "maps" / "weights.safetensors").write_bytes(b"theirs")
    with pytest.raises(PrunexError, match=r"holds safetensors files, but no about\.json: give another --out"):
        run(model, "--images", photos, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", 0], "--devices 0 is not allowed: give a whole number of at least 1"),
        (["--num_nodes", -1], "--num-nodes -1 is not allowed"),
        (["--workers", -1], "--workers -1 is not allowed: give a whole number of at least 0"),
        (["--accelerator", "cpu"], "--device and --accelerator say the same: give one of them"),
    ],
)
def test_mistakes_about_processes(model, photos, tmp_path, seen, arguments, said):
    with pytest.raises(PrunexError, match=said):
        run(model, "--images", photos, "--out", tmp_path / "out", *arguments)
    with pytest.raises(PrunexError, match="--accelerator, --devices or --num_nodes cannot be used: .*abacus"):
        cli.run(["explain", str(model), "--images", str(photos), "--accelerator", "abacus"])


class Counted(str):
    """Text that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_names_take_time_by_their_number():
    counts = []
    for count in (500, 1000):
        Counted.compared = 0
        names = [Counted(f"folder/{n // 2}.{'jpg' if n % 2 else 'png'}") for n in range(count)]
        assert len(set(sheets_of(names))) == count
        counts.append(Counted.compared)
    assert counts[1] <= 2 * counts[0] + 100


def test_a_folder_is_listed_in_the_order_of_paths(tmp_path):
    names = ["a.png", "a/z.png", "a-b/c.png", "a/b/c.png", "Z.JPG", "no.txt", ".hidden.png", "out/x.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path / "out" / "x.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    paths = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() in (".png", ".jpg") and p.is_file())
    assert [tmp_path / name for name in image_names(tmp_path)] == [p for p in paths if "loop" not in p.parts]
    besides = [p for p in paths if not p.resolve().is_relative_to(tmp_path / "out") and "loop" not in p.parts]
    assert [tmp_path / name for name in image_names(tmp_path, tmp_path / "out")] == besides


@pytest.mark.slow  # processes that import everything
def test_two_processes_do_each_image_once_and_as_one_does(model, tmp_path):
    photos = make_photos(tmp_path / "photos", 23)
    command = (model, "--images", photos, "--methods", "rollout,tokentm", "--batch", 4, "--sheets", 3)
    ended(tmp_path, "explain", *command, "--out", tmp_path / "one")
    ended(tmp_path, "explain", *command, "--out", tmp_path / "two", processes=2)
    ended(tmp_path, "explain", *command, "--out", tmp_path / "lightning", "--devices", 2)
    one = prunex.open_maps(tmp_path / "one")
    for name in ("two", "lightning"):
        several = prunex.open_maps(tmp_path / name)
        assert several.names == one.names == image_names(photos)
        rows = [row for path in several.folder.glob("*.safetensors") for row in load_file(path)["index"].tolist()]
        assert sorted(rows) == list(range(23))
        for column in one.columns:
            assert np.array_equal(several[:, column], one[:, column]), column
        assert sorted(p.name for p in (tmp_path / name).glob("*.png")) == ["0.png", "1.png", "10.png"]
        with np.load(tmp_path / name / "maps.npz") as arrays:
            assert arrays["files"].tolist() == one.names


@pytest.mark.slow  # processes that import everything
@pytest.mark.parametrize("processes", [None, 2])
def test_a_killed_run_loses_no_more_than_what_was_at_work(model, tmp_path, processes):
    photos = make_photos(tmp_path / "photos", 120)
    command = (model, "--images", photos, "--methods", "rollout,tokentm", "--batch", 4, "--sheets", "all")
    ended(tmp_path, "explain", *command, "--out", tmp_path / "whole")
    whole, out = prunex.open_maps(tmp_path / "whole"), tmp_path / "out"
    before = 0
    for goal in range(6, 106, 10):
        process = started(tmp_path, "explain", *command, "--out", out, processes=processes)
        killed(tmp_path, process, lambda goal=goal: len(list(out.glob("[0-9]*.png"))) >= goal)
        # A sheet is written before its image's maps: those of a batch a process may have no maps yet.
        sheets = list(out.glob("[0-9]*.png"))
        done = prunex.open_maps(out)
        assert len(sheets) - 4 * (processes or 1) <= len(done) <= len(sheets)
        assert len(done) > before
        before = len(done)
        for sheet in sheets:
            Image.open(sheet).load()
        for name in done.names:
            assert np.array_equal(done[name, "rollout"], whole[name, "rollout"])
    ended(tmp_path, "explain", *command, "--out", out, processes=processes)
    done = prunex.open_maps(out)
    assert done.names == whole.names
    assert all(np.array_equal(done[:, column], whole[:, column]) for column in whole.columns)
    assert not list(out.rglob(".*"))
    assert json.loads((out / "maps" / "about.json").read_text())["methods"] == ["rollout", "tokentm"]
