"""prunex explain: what it writes is what prunex.explain says, whole or not at all, and mistakes end in one line."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import prunex
from prunex import PrunexError, registry
from prunex.explainers.rollout import rollout
from prunex.recipes.commands import cli, sheets
from prunex.recipes.commands import explain as explain_command
from prunex.recipes.commands.explain import Explainers, batches, read_options
from prunex.recipes.commands.sheets import sheet_names
from prunex.recipes.data.images import preparation, read_image
from prunex.recipes.given import image_files
from prunex.recipes.runs import as_the_data_tell, open_model_or_name
from prunex.targets import parse
from tests.vits import images_for, tiny

LABELS = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def photos(tmp_path):
    """Five photos, two of one stem and one in a subfolder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "b.png", "c.jpg", "sub/a.png"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def slim(tmp_path):
    model = tiny()
    prunex.attach(model, "topk", keep_ratio=0.6)
    return prunex.save(prunex.slim(model), tmp_path / "slim", labels=LABELS, mean=[0.4] * 3, std=[0.3] * 3)


@pytest.fixture
def methods(monkeypatch):
    """Registers explainers for one test."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    def add(name, make, needs="one forward"):
        registry.register("explainer", name, "nobody", needs)(make)

    return add


def run(*arguments):
    return cli.run(["explain", *map(str, arguments), "--device", "cpu"])


def arrays(out):
    with np.load(out / "maps.npz", allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def written(out):
    """What lies there beside the shards."""
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    return [name for name in files if not name.startswith("maps/")]


def times(out):
    with open(out / "times.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_everything_is_written_and_is_what_explain_says(slim, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(slim, "--images", photos, "--out", out, "--batch", 2) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(out)
    assert any(line.startswith("skipped vit_shapley: ") for line in said)
    assert written(out) == ["a.png", "b.jpg.png", "b.png.png", "c.png", "maps.npz", "sub/a.png", "times.csv"]
    found = arrays(out)
    names = [m.name for m in prunex.methods("explainer")]
    known = {name for name in names if name in found}
    assert {"rollout", "raw_attention", "generic_attention", "tokentm"} <= known
    assert set(found) == {"files", "predicted", "target", "kept", *known}
    assert found["files"].tolist() == ["a.png", "b.jpg", "b.png", "c.jpg", "sub/a.png"]
    model = prunex.load(slim)
    prepare = preparation(model)
    images = torch.stack([prepare(read_image(photos / name))[1] for name in found["files"]])
    for name in ("rollout", "tokentm"):
        e = prunex.explain(name, model, images)
        assert np.allclose(found[name], e.maps.numpy(), atol=1e-6)
    assert found["predicted"].tolist() == found["target"].tolist() == e.logits.argmax(1).tolist()
    assert np.array_equal(found["kept"], e.trace.kept().numpy())
    table = times(out)
    assert set(table) == known
    assert all(float(row["seconds_per_image"]) > 0 and row["images"] == "5" for row in table.values())
    assert float(table["rollout"]["forwards_per_image"]) == 1
    assert table["rollout"]["needs"] == "one forward"


def test_the_batch_size_changes_nothing(slim, photos, tmp_path):
    found = []
    for size in (1, 3, 100):
        run(slim, "--images", photos, "--out", tmp_path / str(size), "--batch", size, "--methods", "tokentm")
        found.append(arrays(tmp_path / str(size)))
    for other in found[1:]:
        assert all(np.allclose(found[0][k], other[k], atol=1e-6) for k in found[0] if k != "files")


def test_target_and_options_reach_the_methods(slim, photos, tmp_path):
    out, model = tmp_path / "out", prunex.load(slim)
    options = ["--option", "rollout.head_fusion=max", "--option", "rollout.discard_ratio=5e-1"]
    run(
        slim,
        "--images",
        photos / "a.png",
        "--out",
        out,
        "--methods",
        "rollout, generic_attention",
        "--target",
        3,
        *options,
    )
    image = preparation(model)(read_image(photos / "a.png"))[1][None]
    found = arrays(out)
    assert found["target"].tolist() == [3]
    for name, chosen in (("rollout", {"head_fusion": "max", "discard_ratio": 0.5}), ("generic_attention", {})):
        assert np.allclose(found[name], prunex.explain(name, model, image, 3, **chosen).maps.numpy(), atol=1e-6)


@pytest.mark.parametrize("spelling", ["contrast:3,1", "margin", "margin:2", "entropy", "regression:4"])
def test_any_number_of_the_output_is_explained(slim, photos, tmp_path, spelling, monkeypatch):
    headings = []
    drawn = sheets.contact_sheet
    monkeypatch.setattr(sheets, "contact_sheet", lambda *a, **k: headings.append(k["heading"]) or drawn(*a, **k))
    out, model = tmp_path / "out", prunex.load(slim)
    run(slim, "--images", photos / "a.png", "--out", out, "--methods", "rollout,tokentm", "--target", spelling)
    image = preparation(model)(read_image(photos / "a.png"))[1][None]
    want = prunex.explain("tokentm", model, image, parse(spelling))
    found = arrays(out)
    assert set(found) == {"files", "value", "kept", "rollout", "tokentm"}
    assert np.allclose(found["tokentm"], want.maps.numpy(), atol=1e-6)
    assert found["value"][0] == pytest.approx(float(want.logits), abs=1e-5)
    assert headings[0][1] == f"explained: {spelling} = {float(want.logits):.4g} · of no class: rollout"


def test_several_labels_have_a_map_each(slim, photos, tmp_path, monkeypatch):
    headings = []
    drawn = sheets.contact_sheet
    monkeypatch.setattr(sheets, "contact_sheet", lambda *a, **k: headings.append(k["heading"]) or drawn(*a, **k))
    out, model = tmp_path / "out", prunex.load(slim)
    run(slim, "--images", photos, "--out", out, "--methods", "rollout,tokentm", "--target", "labels:1,4")
    found = arrays(out)
    assert set(found) == {"files", "predicted", "kept", "rollout", "tokentm:1", "tokentm:4"}
    image = preparation(model)(read_image(photos / "a.png"))[1][None]
    for label in (1, 4):
        want = prunex.explain("tokentm", model, image, label).maps.numpy()
        assert np.allclose(found[f"tokentm:{label}"][0], want[0], atol=1e-6)
    assert "explained: bee (" in headings[0][1]
    assert ", eel (" in headings[0][1]


def test_targets_that_the_model_has_not_are_refused_before_anything_is_explained(slim, photos, tmp_path):
    for spelling in ("5", "labels:1,7", "contrast:1,9", "margin:8", "regression:6"):
        with pytest.raises(PrunexError, match="0..4"):
            run(slim, "--images", photos, "--out", tmp_path / "out", "--target", spelling)
    assert not (tmp_path / "out").exists()


def test_a_number_is_shown_as_one(photos, tmp_path, monkeypatch):
    headings = []
    drawn = sheets.contact_sheet
    monkeypatch.setattr(sheets, "contact_sheet", lambda *a, **k: headings.append(k["heading"]) or drawn(*a, **k))
    model = tiny(num_classes=1).eval()
    run(
        prunex.save(model, tmp_path / "one"),
        "--images",
        photos / "a.png",
        "--out",
        tmp_path / "out",
        "--methods",
        "tokentm",
    )
    image = preparation(model)(read_image(photos / "a.png"))[1][None]
    assert headings[0][1] == f"predicted and explained: {float(model(image)):.4g}"


def test_a_second_call_does_not_explain_the_first_ones_sheets(slim, photos):
    for _ in range(2):
        run(slim, "--images", photos, "--out", photos / "explained", "--methods", "raw_attention")
        assert len(arrays(photos / "explained")["files"]) == 5


def test_dense_models_have_no_kept_maps_and_headless_ones_no_classes(photos, tmp_path, capsys):
    dense = prunex.save(tiny(num_classes=0), tmp_path / "headless")
    run(dense, "--images", photos, "--out", tmp_path / "out")
    found = arrays(tmp_path / "out")
    assert "kept" not in found
    assert found["predicted"].tolist() == found["target"].tolist() == [-1] * 5
    assert "rollout" in found
    assert "tokentm" not in found
    said = capsys.readouterr().out
    assert said.count("skipped tokentm: this model has no classifier") == 1
    with pytest.raises(PrunexError, match="tokentm: this model has no classifier"):
        run(dense, "--images", photos, "--out", tmp_path / "o", "--methods", "rollout,tokentm")
    with pytest.raises(PrunexError, match="--target 1: this model has no classifier"):
        run(dense, "--images", photos, "--out", tmp_path / "o", "--target", 1)


def test_all_means_every_method_this_model_can_take(slim, photos, tmp_path, capsys, methods):
    def needy(model, images, target=None, *, network=None):
        raise PrunexError("needs a trained network: give network=")

    def signed(model, images, target=None):
        answer = rollout(model, images, target)
        answer.maps, answer.signed = answer.maps - answer.maps.mean(), True
        return answer

    methods("needy", needy)
    methods("signed_one", signed)
    run(slim, "--images", photos, "--out", tmp_path / "out")
    assert "skipped needy: needs a trained network" in capsys.readouterr().out
    found = arrays(tmp_path / "out")
    assert "needy" not in found
    assert "needy" not in times(tmp_path / "out")
    assert found["signed_one"].min() < 0
    for asked in (["--methods", "rollout,needy"], ["--option", "needy.network=x"]):
        with pytest.raises(PrunexError, match="needy: needs a trained network"):
            run(slim, "--images", photos, "--out", tmp_path / "other", *asked)
    assert not (tmp_path / "other").exists()


def test_no_method_left(methods):
    def needy(model, images, target=None):
        raise PrunexError("needs a trained network")

    registry.METHODS.clear()
    methods("needy", needy)
    with pytest.raises(PrunexError, match="no explainer can take this model; the last one said: needs a trained"):
        Explainers()(tiny(), images_for(tiny()))


def test_expensive_methods_are_announced_with_measured_passes(slim, photos, tmp_path, capsys, methods, monkeypatch):
    def thrice(model, images, target=None):
        with torch.no_grad():
            model(images.repeat(2, 1, 1, 1))
        return rollout(model, images, target)

    methods("thrice", thrice)
    run(slim, "--images", photos, "--out", tmp_path / "out", "--methods", "rollout,thrice")
    assert float(times(tmp_path / "out")["thrice"]["forwards_per_image"]) == 3
    assert "forwards an image" not in capsys.readouterr().out
    monkeypatch.setattr(explain_command, "MANY", 2)
    run(slim, "--images", photos, "--out", tmp_path / "out", "--methods", "rollout,thrice", "--again")
    said = [line for line in capsys.readouterr().out.splitlines() if "forwards an image" in line]
    assert len(said) == 1
    assert said[0].startswith("thrice takes 3 forwards an image: about ")
    assert said[0].endswith("for the other 4")


def test_counting_leaves_nothing_on_the_model():
    model = tiny()
    Explainers("rollout")(model, images_for(model))
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_what_was_written_before_a_failure_is_whole(slim, photos, tmp_path, methods):
    calls = []

    def fails_later(model, images, target=None):
        calls.append(len(images))
        if len(calls) == 3:
            raise PrunexError("too many tokens")
        return rollout(model, images, target)

    methods("fails_later", fails_later)
    out = tmp_path / "out"
    with pytest.raises(PrunexError, match="fails_later: too many tokens"):
        run(slim, "--images", photos, "--out", out, "--batch", 2)
    assert calls == [1, 2, 2]
    assert written(out) == ["a.png", "b.jpg.png", "b.png.png", "maps.npz", "times.csv"]
    assert {len(v) for v in arrays(out).values()} == {3}
    assert times(out)["fails_later"]["images"] == "3"
    assert not list(out.rglob(".*"))


def test_a_full_disk_leaves_the_old_files(slim, photos, tmp_path, monkeypatch):
    def files(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    run(slim, "--images", photos / "a.png", "--out", out, "--methods", "rollout")
    before = files(out)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PrunexError, match="cannot write to .*out: No space left on device; choose another --out"):
        run(slim, "--images", photos / "a.png", "--out", out, "--methods", "rollout", "--again")
    assert files(out) == before


def test_a_broken_image_is_named_before_anything_is_explained(slim, photos, tmp_path):
    whole = (photos / "c.jpg").read_bytes()
    (photos / "z.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PrunexError, match=r"cannot read image '.*z\.jpg'"):
        run(slim, "--images", photos, "--out", tmp_path / "out", "--methods", "rollout")
    assert not (tmp_path / "out").exists()


def test_images_are_turned_as_their_camera_said_and_cropped_to_the_models_shape(tmp_path):
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[:, :20] = 255  # left half white; turned by 90 degrees it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    shown, tensor = preparation(tiny("not_square"))(read_image(tmp_path / "turned.png"))
    assert shown.shape == (40, 24, 3)
    assert tensor.shape == (3, 40, 24)
    assert shown[:18].min() > 240
    assert shown[-18:].max() < 15
    assert torch.allclose(tensor.amax(), torch.tensor(1.0), atol=0.05)


def test_grey_models_see_grey(photos):
    model = tiny(in_chans=1)
    shown, tensor = preparation(model)(read_image(photos / "a.png"))
    assert tensor.shape == (1, 32, 32)
    assert (shown == shown[..., :1]).all()
    with pytest.raises(PrunexError, match="takes 4 channels"):
        preparation(tiny(in_chans=4))


def weights_of(model, path, metadata=None):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=metadata)
    return str(path)


def test_a_timm_name_with_local_weights(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64).eval()
    path = weights_of(source, tmp_path / "w.safetensors")
    model = open_model_or_name("vit_tiny_patch16_224", path)
    assert model.num_classes == 7
    assert model.patch_embed.img_size == (64, 64)  # told by the position embeddings
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(x), source(x), atol=1e-6)
    assert open_model_or_name("vit_tiny_patch16_224", path, image_size=32).patch_embed.img_size == (32, 32)
    headless = weights_of(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64), tmp_path / "h.st")
    assert open_model_or_name("vit_tiny_patch16_224", headless).num_classes == 0


def test_the_shipped_weights_tell_their_own_arguments(photos, tmp_path):
    run(
        "vit_tiny_patch16_224",
        "--weights",
        "digits",
        "--images",
        photos,
        "--out",
        tmp_path / "o",
        "--methods",
        "rollout",
    )
    assert arrays(tmp_path / "o")["rollout"].shape == (5, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["vit_tiny_patch16_224"], "is a timm model name without weights: give --weights FILE.safetensors .nothing is"),
        (["vit_tinny", "--weights", "digits"], "unknown architecture 'vit_tinny': did you mean"),
        (["nowhere"], "nowhere is neither a path nor a timm model name: give a run folder"),
        (["vit_tiny_patch16_224", "--weights", "nowhere.st"], "weights='nowhere.st' is neither a file nor shipped"),
        (["resnet18", "--weights", "digits"], "do not fit the model"),
        (["vit_tiny_patch16_224", "--weights", "digits", "--pretrained"], "not allowed with argument"),
        (["SLIM", "--weights", "digits"], "--weights goes with a timm model name, and .*slim is a path"),
        (["SLIM", "--img-size", "64"], "--img-size goes with a timm model name"),
        (["SLIM", "--batch", "0"], "--batch 0 is not allowed: give a whole number of at least 1"),
        (["SLIM", "--target", "9"], r"target=9 is out of range: this model has classes 0\.\.4"),
        (["SLIM", "--methods", "rolout"], "unknown explainer 'rolout': did you mean 'rollout'"),
        (["SLIM", "--methods", " , "], "names no explainer"),
        (
            ["SLIM", "--option", "rollout.head_fusio=max"],
            "unknown option of rollout 'head_fusio': did you mean 'head_f",
        ),
        (["SLIM", "--option", "rolout.head_fusion=max"], "unknown explainer 'rolout': did you mean 'rollout'"),
        (["SLIM", "--option", "rollout=max"], "give METHOD.NAME=VALUE"),
        (["SLIM", "--option", "rollout.head_fusion=[a"], "is no YAML value"),
        (["SLIM", "--option", "rollout.head_fusion=median"], "rollout: unknown head_fusion 'median'"),
        (["SLIM", "--methods", "rollout", "--option", "tokentm.variant=per_head"], "an option was given for tokentm"),
        (["SLIM", "--images", "nowhere"], "no images in nowhere"),
        (["SLIM", "--out", "PHOTO"], "cannot write to"),
        (["SLIM", "--device", "gpu"], "--device gpu cannot be used"),
        (["SLIM", "--colour", "red"], "prunex explain: unrecognized arguments"),
    ],
)
def test_mistakes_end_in_one_line(slim, photos, tmp_path, arguments, match):
    known = {"SLIM": str(slim), "PHOTO": str(photos / "a.png")}
    arguments = [known.get(a, a) for a in arguments]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(PrunexError, match=match) as error:
        cli.run(["explain", "--images", str(photos), "--out", str(tmp_path / "out"), *arguments])
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_download_is_tried_only_when_asked_for(monkeypatch):
    asked = []

    def offline(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(PrunexError, match="without weights"):
        open_model_or_name("vit_tiny_patch16_224")
    assert asked == []
    with pytest.raises(PrunexError, match="pretrained=True for 'vit_tiny_patch16_224' failed"):
        open_model_or_name("vit_tiny_patch16_224", pretrained=True)
    assert asked == [True]


def test_a_checkpoint_gets_its_datas_names_and_normalisation(tmp_path):
    spec = {"class_path": "prunex.recipes.DigitScenes"}
    digits = as_the_data_tell(tiny(num_classes=10), spec)
    assert digits.label_names == [str(digit) for digit in range(10)]
    assert digits.pretrained_cfg["mean"] == digits.pretrained_cfg["std"] == [0.5, 0.5, 0.5]
    assert as_the_data_tell(tiny(num_classes=5), spec).label_names == []  # names of other classes
    gone = {"class_path": "prunex.recipes.ImageFolder", "init_args": {"root": str(tmp_path / "gone"), "std": [0.2] * 3}}
    model = as_the_data_tell(tiny(), gone)
    assert model.label_names == []
    assert model.pretrained_cfg["std"] == [0.2] * 3


def test_options_are_yaml():
    texts = ["rollout.discard_ratio=1e-3", "rollout.start_layer=-1", "rollout.head_fusion='max'", "tokentm.necc_scale="]
    assert read_options(texts) == {
        "rollout": {"discard_ratio": 1e-3, "start_layer": -1, "head_fusion": "max"},
        "tokentm": {"necc_scale": None},
    }
    assert read_options(["generic_attention.full=true"]) == {"generic_attention": {"full": True}}


def test_batches_and_files(photos):
    assert list(batches(1, 8)) == [range(0, 1)]
    assert sum(map(list, batches(20, 7)), []) == list(range(20))
    assert image_files(photos / "a.png") == [photos / "a.png"]
    files = image_files(photos)
    assert len(set(sheet_names(files, photos))) == len(files)
    assert sheet_names([Path("d/a.jpg")], Path("d/a.jpg")) == ["a.png"]


def test_ctrl_c_ends_in_one_line_that_says_what_is_there(photos, slim, tmp_path, methods, capsys):
    calls = []

    def make(model, images, target=None):
        calls.append(len(images))
        if len(calls) > 2:
            raise KeyboardInterrupt
        return rollout(model, images, target)

    methods("stopped", make)
    out = tmp_path / "out"
    assert run(slim, "--images", photos, "--methods", "stopped", "--batch", 2, "--out", out) == 130
    assert f"interrupted: maps of 3 of 5 images are in {out}" in capsys.readouterr().err
    assert len(arrays(out)["stopped"]) == 3
    assert len(list(out.rglob("*.png"))) == 3
    calls += [0, 0]
    assert run(slim, "--images", photos, "--methods", "stopped", "--out", tmp_path / "none") == 130
    assert "interrupted: maps of 0 of 5 images" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_that_says_nothing_is_refused(photos, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0] = torch.nan
    folder = prunex.save(model, tmp_path / "nan")
    with pytest.raises(PrunexError, match="the model's outputs are NaN or infinite"):
        run(folder, "--images", photos, "--methods", "rollout", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_outside_a_run_is_told_by_name(photos, tmp_path):
    stray = tmp_path / "stray.ckpt"
    torch.save({"state_dict": {}}, stray)
    with pytest.raises(PrunexError, match=r"stray\.ckpt does not lie in a run: its config\.yaml says what to build"):
        run(stray, "--images", photos)


def test_a_trained_explainer_that_is_missing_is_asked_for_as_the_command_line_takes_it(photos, slim):
    with pytest.raises(PrunexError, match=r"^vit_shapley needs .*--option vit_shapley\.explainer=FOLDER"):
        run(slim, "--images", photos, "--methods", "vit_shapley")


def test_photos_are_never_replaced_by_their_sheets(slim, photos):
    def everything():
        return {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}

    before = everything()
    for images, out, said in (
        (photos, photos, "the folder of the images"),
        (photos, photos / "sub" / "..", "the folder of the images"),
        (photos / "a.png", photos, "a.png is there already"),
        (photos / "b.jpg", photos, "b.png is there already"),  # another photo, and its sheet's name
    ):
        with pytest.raises(PrunexError, match=said):
            run(slim, "--images", images, "--out", out, "--methods", "rollout")
        assert everything() == before
    assert run(slim, "--images", photos / "c.jpg", "--out", photos, "--methods", "rollout") == 0
    assert run(slim, "--images", photos / "c.jpg", "--out", photos, "--methods", "rollout") == 0  # its own sheet may go
    assert {p: everything()[p] for p in before} == before
    with pytest.raises(PrunexError, match=r"a\.png is there already"):  # though maps.npz is there now
        run(slim, "--images", photos / "a.png", "--out", photos, "--methods", "rollout")


def test_the_normalisation_can_be_told(slim, photos, tmp_path):
    """A slim folder of somebody's own script says what its timm model said, whatever that script used."""
    other = prunex.save(prunex.load(slim), tmp_path / "other", mean=[0.1, 0.2, 0.3], std=[0.5] * 3)
    told = ["--mean", "0.1", "0.2", "0.3", "--std", "0.5"]
    assert run(other, "--images", photos, "--out", tmp_path / "a", "--methods", "rollout") == 0
    assert run(slim, "--images", photos, "--out", tmp_path / "b", "--methods", "rollout", *told) == 0
    assert run(slim, "--images", photos, "--out", tmp_path / "c", "--methods", "rollout") == 0
    a, b, c = (arrays(tmp_path / name)["rollout"] for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(b, c)
    for wrong, said in (
        (["--mean", "0.1", "0.2"], r"--mean 0\.1 0\.2 is not allowed: give 3 numbers, or one"),
        (["--mean", "nan"], "--mean nan is not allowed"),
        (["--std", "0"], r"--std 0\.0 is not allowed: give numbers above 0"),
    ):
        with pytest.raises(PrunexError, match=said):
            run(slim, "--images", photos, "--out", tmp_path / "d", *wrong)
    assert not (tmp_path / "d").exists()
