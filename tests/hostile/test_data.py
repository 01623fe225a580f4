"""Weights, checkpoints and traces that lie, and that class names and image names decide where nothing is written."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import prunex
from prunex import PrunexError
from prunex.callbacks import load_from_checkpoint
from prunex.files import readable
from prunex.recipes import ImageClassifier
from prunex.recipes.commands.score_record import Record
from prunex.recipes.modules.backbone import create_model, load_weights, model_from_weights
from prunex.untrusted import read_npz
from prunex.vit.trace import Stage, TokenTrace
from tests.hostile.room import SMALL, Canary
from tests.hostile.test_report import Page

# --- weights of timm models


def weights(room, args, **more):
    """A file whose metadata describe a model."""
    path = room.copy("weights.safetensors")
    told = {"architecture": "vit_tiny_patch16_224", "model_args": args if isinstance(args, str) else json.dumps(args)}
    save_file(load_file(path) | more, path, metadata=told)
    return str(path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (SMALL | {"embed_dim": 3 * 10**6}, "bytes"),
        (SMALL | {"depth": 10**9}, "more blocks"),
        (SMALL | {"checkpoint_path": "evil.ckpt"}, "checkpoint_path is not allowed"),
        (SMALL | {"pretrained_cfg": {"url": "http://localhost:1"}}, "pretrained_cfg is not allowed"),
        (SMALL | {"device": "meta"}, "device is not allowed"),
        (SMALL | {"pretrained": True}, "does not accept"),
        ("[" * 100_000, "metadata are damaged"),
        ("3", "metadata are damaged"),
        ("[1, 2]", "metadata are damaged"),
    ],
)
def test_metadata_that_lie(room, args, says):
    (room.work / "evil.ckpt").write_bytes(pickle.dumps(Canary(room.canary)))
    with pytest.raises(PrunexError, match=says):
        model_from_weights("vit_tiny_patch16_224", weights(room, args))


@pytest.mark.parametrize("shape", [(), (0,), (1, 5), (2, 3, 4, 5), (1, 1, 48), (1, 99, 7)])
def test_position_embeddings_of_any_shape(room, shape):
    path = weights(room, SMALL, pos_embed=torch.zeros(shape))
    with pytest.raises(PrunexError):
        load_weights(create_model("vit_tiny_patch16_224", 5, SMALL), path)


# --- checkpoints


@pytest.mark.parametrize("content", [[], 3, {"prunex": {"pruning": {}}}, {"state_dict": 3, "prunex": {"units": 1}}])
def test_checkpoints_of_other_things(room, content):
    torch.save(content, room.work / "x.ckpt")
    with pytest.raises(PrunexError):
        load_from_checkpoint(ImageClassifier, str(room.work / "x.ckpt"))


PRUNED = {
    "no path": lambda c: c["prunex"].pop("path"),
    "no version": lambda c: c["prunex"].update(version="x"),
    "options of text": lambda c: c["prunex"]["pruning"].update(keep_ratio="x"),
    "a method that is none": lambda c: c["prunex"]["pruning"].update(method=["topk"]),
    "classes of text": lambda c: c["hyper_parameters"].update(num_classes="many"),
    "no weights": lambda c: c.update(state_dict={}),
    "weights of text": lambda c: c["state_dict"].update({"model.head.weight": "x"}),
    "a progress of text": lambda c: c["prunex"].update(progress="late"),
}


@pytest.mark.parametrize("what", PRUNED)
def test_checkpoints_that_do_not_fit(room, what):
    checkpoint = torch.load(room.good / "pruned.ckpt", weights_only=True)
    PRUNED[what](checkpoint)
    torch.save(checkpoint, room.work / "x.ckpt")
    with pytest.raises(PrunexError):
        load_from_checkpoint(ImageClassifier, str(room.work / "x.ckpt"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"architecture": "hf-hub:nobody/nothing"}, "would be looked up elsewhere"),
        ({"model_args": SMALL | {"embed_dim": 3 * 10**6}}, "bytes"),
        ({"model_args": SMALL | {"depth": 10**9}}, "more blocks"),
        ({"model_args": SMALL | {"img_size": 2**20}}, "images of|bytes"),
        ({"num_classes": 10**12}, "bytes"),
        ({"model_args": SMALL | {"checkpoint_path": "evil.ckpt"}}, "checkpoint_path is not allowed"),
    ],
)
def test_hyperparameters_that_lie(room, more, says):
    checkpoint = torch.load(room.good / "pruned.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= more
    torch.save(checkpoint, room.work / "x.ckpt")
    with pytest.raises(PrunexError, match=says):
        load_from_checkpoint(ImageClassifier, str(room.work / "x.ckpt"))


def test_a_checkpoint_downloads_and_reads_nothing(room, monkeypatch):
    """What the trainer saves says so already, but anyone may have written the file."""
    import timm

    real = timm.create_model

    def create(name, pretrained=False, **args):
        assert not pretrained
        return real(name, **args)

    monkeypatch.setattr(timm, "create_model", create)
    checkpoint = torch.load(room.good / "pruned.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= {"pretrained": True, "weights": "nowhere.safetensors"}
    torch.save(checkpoint, room.work / "x.ckpt")
    assert load_from_checkpoint(ImageClassifier, str(room.work / "x.ckpt")).model.num_classes == 5


def test_pickles_are_not_opened(room):
    for held in (Canary(room.canary), {"state_dict": Canary(room.canary)}, [Canary(room.canary)]):
        torch.save(held, room.work / "x.ckpt")
        (room.work / "y.ckpt").write_bytes(pickle.dumps(held))
        for name in ("x.ckpt", "y.ckpt"):
            with pytest.raises(PrunexError, match="no checkpoint that loads safely"):
                load_from_checkpoint(ImageClassifier, str(room.work / name))


# --- arrays


def test_arrays_are_read_back_and_objects_are_not(room):
    path = room.work / "x.npz"
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array("text"), "c/d": np.zeros((0, 2)), "e": np.array([True])}
    np.savez_compressed(path, **arrays)
    found = read_npz(path)
    assert all(np.array_equal(found[k], v) for k, v in arrays.items())
    np.savez(path, a=np.array([Canary(room.canary)], dtype=object))
    with pytest.raises(PrunexError, match="is damaged: Object arrays"):
        read_npz(path)


def test_a_bomb_is_not_unpacked(room, monkeypatch):
    path = room.work / "x.npz"
    np.savez_compressed(path, a=np.zeros(10**6))
    assert path.stat().st_size < 10**5
    monkeypatch.setattr("prunex.untrusted.NPZ_BYTES", 10**6)
    with pytest.raises(PrunexError, match="unpacks to more"):
        read_npz(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04N."])
def test_scores_that_are_damaged_are_computed_anew(room, content):
    path = room.work / "rollout.npz"
    path.write_bytes(content)
    assert not Record(path, "key").has_maps


FORGED = {
    "as it is": (lambda a: a, True),
    "of more images": (lambda a: a | {"maps": np.zeros((3, 4, 4), np.float32)}, False),
    "of another grid": (lambda a: a | {"maps": np.zeros((2, 9, 4), np.float32)}, False),
    "of text": (lambda a: a | {"deletion": np.array(["x", "y"])}, False),
    "of one number": (lambda a: a | {"deletion": np.array(1.0)}, False),
    "of no class": (lambda a: a | {"target": np.array([0.5, 1])}, False),
    "of no maps": (lambda a: {k: v for k, v in a.items() if k != "maps"}, False),
    "of odd conditions": (lambda a: a | {"about": np.array("[" * 99_999)}, False),
}


@pytest.mark.parametrize("what", FORGED)
def test_scores_that_lie_are_computed_anew(room, what):
    """Whoever writes a file can make its key right."""
    change, taken = FORGED[what]
    path = room.work / "rollout.npz"
    record = Record(path, "key", images=2, grid=(4, 4))
    record.maps(torch.zeros(2, 4, 4), torch.tensor([0, 1]), False, {})
    record.add({"deletion": torch.zeros(2)}, {"deletion": ""})
    np.savez(path, **change(read_npz(path)))
    assert Record(path, "key", images=2, grid=(4, 4)).has_maps is taken


# --- traces

GROUPS = st.lists(st.lists(st.integers(-3, 7), min_size=1, max_size=6), min_size=1, max_size=3)
SHARES = st.lists(st.lists(st.floats(width=32), min_size=1, max_size=6), min_size=1, max_size=3)


def ragged(rows, dtype):
    width = min(map(len, rows))
    return torch.tensor([row[:width] for row in rows], dtype=dtype)


@settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(GROUPS, SHARES, st.one_of(st.integers(-2, 8), st.none(), st.text(max_size=2)), st.booleans())
def test_stages_are_refused_or_can_be_read(groups, shares, n_out, fused):
    try:
        stage = Stage(0, ragged(groups, torch.int64), ragged(shares, torch.float32), n_out, fused)
        trace = TokenTrace((1, 6), 1, len(groups), torch.device("cpu"), [stage]).check()
    except PrunexError:
        return
    assert trace.kept().shape == (len(groups), 1, 6)
    assert trace.composition().shape == (len(groups), 6, n_out)
    assert torch.allclose(trace.composition().sum(1)[trace.composition().sum(1) > 0], torch.ones(()), atol=2e-2)


@pytest.mark.parametrize(
    ("group", "weight", "n_out", "says"),
    [
        ([[0, 1, 2]], [[1.0, 1.0, 1.0]], 2, "groups 0 to 2"),
        ([[0, -2, 1]], [[1.0, 1.0, 1.0]], 2, "groups -2 to 1"),
        ([[0, 0, 1]], [[1.0, 1.0, 1.0]], 2, "do not sum to 1"),
        ([[0, 1, 1]], [[1.0, float("nan"), 1.0]], 2, "no numbers"),
        ([[0, 1, 1]], [[1.0, 2.0, -1.0]], 2, "no numbers of at least 0"),
        ([[0, 1]], [[1.0, 1.0]], 2, "maps"),
        ([[0, 1, -1]], [[1.0, 1.0, 1.0]], "2", "n_out='2'"),
    ],
)
def test_maps_that_lie_are_told_by_number(group, weight, n_out, says):
    stage = Stage(0, torch.tensor(group), torch.tensor(weight), n_out)
    with pytest.raises(PrunexError, match=f"stage 0.*{says}"):
        TokenTrace((1, 3), 1, 1, torch.device("cpu"), [stage]).check()


def test_nothing_comes_after_a_stage_that_leaves_no_tokens():
    none = Stage(0, torch.full((1, 3), -1), torch.zeros(1, 3), 0)
    trace = TokenTrace((1, 3), 1, 1, torch.device("cpu"), [none])
    assert not trace.check().kept().any()
    assert trace.composition().shape == (1, 3, 0)
    trace.stages.append(Stage(1, torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0), 0))
    with pytest.raises(PrunexError, match="stage 1 comes after one that left no tokens"):
        trace.check()


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit", "tome", "ppt", "hvt", "diffrate"])
def test_what_pruners_leave_passes(room, method):
    from tests.vits import tiny

    model = tiny()
    options = {"r": 3} if method in ("tome", "ppt") else {} if method == "hvt" else {"keep_ratio": 0.6}
    pruning = prunex.attach(model, method, **options)
    for masked in (False, True) if method not in ("tome", "ppt", "hvt") else (False,):
        pruning.masked = masked
        model(room.images)
        trace = pruning.trace
        if not masked:
            assert trace.check() is trace


# --- names

CLASSES = ["{{7}}", "<b>", "$x", "x..%2f..%2fx", "né", "${oc.env:HOME}", "a b'\"", "-x", "%s{0}"]
FILES = ["<img src=x>.png", "x..%2f..%2fx.png", "$(touch x).png", os.fsdecode(b"\xff.png"), "x\n.png"]

CONFIG = """
model:
  class_path: prunex.recipes.ImageClassifier
  init_args:
    architecture: vit_tiny_patch16_224
    num_classes: null
    model_args: {img_size: 32, patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}
    from_scratch: true
data:
  class_path: prunex.recipes.ImageFolder
  init_args: {root: photos, image_size: 32, batch_size: 8}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: runs, name: hostile}
  callbacks:
    - class_path: prunex.callbacks.TokenPruning
      init_args: {method: topk, keep_ratio: 0.7}
    - class_path: prunex.callbacks.MaskPruning
      init_args: {method: xpruner, budget: 0.9}
    - class_path: prunex.callbacks.UnitMonitor
    - class_path: prunex.callbacks.KeptTokenMonitor
    - class_path: prunex.callbacks.RelevancyMonitor
      init_args: {methods: [raw_attention]}
    - class_path: prunex.callbacks.SlimExport
      init_args: {formats: []}
"""


def photos(root, classes, files):
    """An image folder of hostile class and file names, as far as a file system allows them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for file in files:
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / file)
    return root


def test_explained_images_stay_in_the_chosen_folder(room):
    root = photos(room.work / "photos", CLASSES[:4], FILES) / "val"
    slim = str(room.good / "slim")
    room.command(["explain", slim, "--images", str(root), "--methods", "rollout", "--device", "cpu", "--out", "out"])
    assert sorted(p.name for p in room.work.iterdir()) == ["out", "photos"]
    sheets = {p.relative_to(room.work / "out") for p in room.work.joinpath("out").rglob("*.png")}
    assert sheets == {p.relative_to(root) for p in root.rglob("*.png")}


@pytest.mark.skipif(os.name != "posix", reason="names that are no text")
def test_a_run_on_hostile_names_writes_in_its_folder_alone(room):
    names = [*CLASSES, os.fsdecode(b"\xff\xfe")]
    photos(room.work / "photos", names, FILES[:1])
    (room.work / "config.yaml").write_text(CONFIG)
    before = set(room.work.rglob("*"))
    room.command(["fit", "--config", "config.yaml"])
    (run,) = (room.work / "runs" / "hostile").iterdir()
    room.command(["report", str(run)])
    assert all(p.is_relative_to(room.work / "runs") for p in set(room.work.rglob("*")) - before)
    assert prunex.load(run / "slim").label_names == [readable(name) for name in sorted(names)]
    assert not Page((run / "report.html").read_text(encoding="utf-8")).strange()
    assert (run / "units.csv").is_file()
