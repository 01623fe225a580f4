"""Damaged, foreign and later folders end in one line; failed saves leave what was there."""

import json
import os
import shutil

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import prunex
from prunex import PrunexError
from prunex.slim import files
from prunex.slim.files import CONFIG, WEIGHTS, _sha256
from tests.slim.models import model_of
from tests.vits import images, randomise, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "slim"
    return prunex.save(prunex.slim(model_of("vit", "dynamicvit")), folder)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "slim")


def refused(folder, match):
    with pytest.raises(PrunexError, match=match) as caught:
        prunex.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_missing_folder_and_files(folder, tmp_path):
    assert "prunex.save" in refused(tmp_path / "nowhere", "is no folder")
    refused(folder / CONFIG, "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    (folder / WEIGHTS).unlink()
    refused(folder, "has no model.safetensors")


def test_truncated_weights(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        refused(folder, "damaged")


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_one_flipped_bit(folder, at):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    refused(folder, "damaged")


def test_weights_of_another_kind_behind_a_right_checksum(folder):
    (folder / WEIGHTS).write_bytes(b"\x80\x04not safetensors at all")
    edit(folder, lambda c: c["prunex"].update(sha256=_sha256(folder / WEIGHTS)))
    refused(folder, "damaged")
    torch.save(tiny().state_dict(), folder / WEIGHTS)
    edit(folder, lambda c: c["prunex"].update(sha256=_sha256(folder / WEIGHTS)))
    refused(folder, "damaged")


def test_weights_of_another_model_behind_a_right_checksum(folder):
    save_file(tiny().state_dict(), folder / WEIGHTS)
    edit(folder, lambda c: c["prunex"].update(sha256=_sha256(folder / WEIGHTS)))
    refused(folder, "does not fit")  # no predictors in it


EDITS = {
    "width": (lambda c: c["prunex"]["model"]["args"].update(embed_dim=96), "does not fit"),
    "depth": (lambda c: c["prunex"]["model"]["args"].update(depth=5), "does not fit"),
    "classes": (lambda c: c["prunex"]["model"]["args"].update(num_classes=6), "does not fit"),
    "heads": (lambda c: c["prunex"]["model"]["args"].update(num_heads=5), "cannot build"),
    "patch": (lambda c: c["prunex"]["model"]["args"].update(patch_size="x"), "cannot build"),
    "unknown argument": (lambda c: c["prunex"]["model"]["args"].update(colour="red"), "cannot build"),
    "no argument": (lambda c: c["prunex"]["model"]["args"].pop("norm_layer"), "cannot build"),
    "class": (lambda c: c["prunex"]["model"].update({"class": "Swin"}), "cannot build"),
    "no args": (lambda c: c["prunex"]["model"].pop("args"), "cannot build"),
    "activation": (lambda c: c["prunex"]["model"]["args"].update(act_layer="os.system"), "cannot build"),
    "norm": (lambda c: c["prunex"]["model"]["args"].update(norm_layer=["nothing", 1e-6]), "cannot build"),
    "method": (lambda c: c["prunex"]["pruning"].update(method="dynamicvitt"), "unknown pruner"),
    "option": (lambda c: c["prunex"]["pruning"].update(keep=0.5), "unknown option"),
    "keep ratio": (lambda c: c["prunex"]["pruning"].update(keep_ratio=1.5), "keep_ratio"),
    "stages": (lambda c: c["prunex"]["pruning"].update(stages=[1, 2]), "does not fit"),
    "dense": (lambda c: c["prunex"].update(pruning=None), "does not fit"),
    "no method": (lambda c: c["prunex"]["pruning"].pop("method"), "not written by prunex"),
    "pruning a list": (lambda c: c["prunex"].update(pruning=["evit"]), "not written by prunex"),
    "model a name": (lambda c: c["prunex"].update(model="vit"), "not written by prunex"),
    "no model": (lambda c: c["prunex"].pop("model"), "not written by prunex"),
    "no prunex": (lambda c: c.pop("prunex"), "not written by prunex"),
    "prunex a number": (lambda c: c.update(prunex=1), "not written by prunex"),
    "no version": (lambda c: c["prunex"].pop("version"), "not written by prunex"),
    "cfg": (lambda c: c.update(pretrained_cfg=3), "not written by prunex"),
    "later version": (lambda c: c["prunex"].update(version=4), "upgrade"),
    "no checksum": (lambda c: c["prunex"].pop("sha256"), "checksum"),
}


@pytest.mark.parametrize("what", list(EDITS))
def test_edited_configs(folder, what):
    change, match = EDITS[what]
    edit(folder, change)
    refused(folder, match)


def test_a_later_version_is_told_whatever_else_it_holds(folder):
    (folder / CONFIG).write_text(json.dumps({"prunex": {"version": 7, "layout": "unheard of"}}))
    refused(folder, "format 7.*upgrade")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"prunex"', "\x00\x01", '{"prunex": {}}'])
def test_configs_that_are_none(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, "damaged|not written by prunex")


def test_a_config_in_no_encoding(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe{\x00")
    refused(folder, "damaged")


def test_a_folder_of_timms_own(tmp_path):
    from timm.models import save_for_hf
    from timm.models._hub import has_hf_hub

    if not has_hf_hub():
        pytest.skip("this timm finds no huggingface_hub that it knows")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    save_for_hf(model, tmp_path, safe_serialization=True)
    refused(tmp_path, "not written by prunex")


# --- saves that fail


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def raising(error, after=0):
    calls = []

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise error
        return real(*args, **kwargs)

    real = os.replace
    return function


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "match"), [(FULL, "No space left"), (SafetensorError("I/O error: No space left on device"), "No space")]
)
def test_a_full_disk_leaves_the_old_files(folder, monkeypatch, error, match):
    before = everything(folder.parent)
    monkeypatch.setattr(files, "save_file", raising(error))
    with pytest.raises(PrunexError, match=match):
        prunex.save(randomise(tiny()), folder)
    with pytest.raises(PrunexError, match=match):
        prunex.save(randomise(tiny()), folder.parent / "new")
    assert everything(folder.parent) == before
    assert [p.name for p in folder.parent.iterdir()] == ["slim"]
    prunex.load(folder)


@pytest.mark.parametrize("after", range(6))
def test_a_move_that_fails_half_way_is_taken_back(folder, monkeypatch, after):
    before = everything(folder.parent)
    real, calls = os.replace, []

    def once(*args):
        calls.append(args)
        if len(calls) == after + 1:
            raise OSError(13, "Permission denied")
        real(*args)

    monkeypatch.setattr(files.os, "replace", once)
    with pytest.raises(PrunexError, match="Permission denied"):
        prunex.save(randomise(tiny()), folder)
    assert everything(folder.parent) == before
    monkeypatch.undo()
    prunex.load(folder)


@pytest.mark.parametrize("after", range(3))
def test_a_first_save_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, after):
    monkeypatch.setattr(files.os, "replace", raising(OSError(5, "Input/output error"), after))
    with pytest.raises(PrunexError, match="Input/output error"):
        prunex.save(tiny(), tmp_path / "slim")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_old_files(folder, monkeypatch):
    before = everything(folder.parent)
    monkeypatch.setattr(files, "_card", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prunex.save(randomise(tiny()), folder)
    assert everything(folder.parent) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target(folder):
    before = everything(folder)
    folder.chmod(0o500)
    try:
        with pytest.raises(PrunexError, match="cannot write"):
            prunex.save(randomise(tiny()), folder)
    finally:
        folder.chmod(0o700)
    assert everything(folder) == before


def test_targets_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PrunexError, match="is a file"):
        prunex.save(tiny(), tmp_path / "file")
    with pytest.raises(PrunexError, match="cannot write"):
        prunex.save(tiny(), tmp_path / "file" / "slim")
    with pytest.raises(PrunexError, match="cannot write"):
        prunex.save(tiny(), "/proc/prunex/slim")
    assert everything(tmp_path) == {"file": b"mine"}


class Odd(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("part", ["act", "norm", "heads"])
def test_a_model_that_cannot_be_described_leaves_the_old_files(folder, part):
    before = everything(folder.parent)
    model = tiny()
    if part == "act":
        model.blocks[0].mlp.act = Odd()
    elif part == "norm":
        model.blocks[0].norm1 = Odd()
    else:
        model.blocks[1].attn.num_heads = 1
    with pytest.raises(PrunexError, match="cannot save"):
        prunex.save(model, folder)
    assert everything(folder.parent) == before


def test_saving_over_a_slim_folder_replaces_it_and_leaves_its_neighbours(folder):
    (folder / "model.onnx").write_bytes(b"kept")
    new = randomise(tiny())
    prunex.save(new, folder)
    assert torch.equal(prunex.load(folder)(images()), new(images()))
    assert (folder / "model.onnx").read_bytes() == b"kept"
    assert [p.name for p in folder.parent.iterdir()] == ["slim"]
