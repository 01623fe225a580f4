"""The script that times narrow models: what it takes out, and what it prints."""

import sys
from pathlib import Path

import pytest
import timm
import torch

import prunex
from prunex.vit.widths import widths_of

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 6}


@pytest.fixture
def slim(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    import slim

    yield slim
    torch.set_num_threads(threads)
    for name in ("slim", "measure"):
        sys.modules.pop(name, None)


def test_halves_of_a_vit_and_a_swin(slim):
    model = slim.halves(timm.create_model("vit_tiny_patch16_224", **SIZES))
    assert [b.attn.num_heads for b in model.blocks] == [3] * 4
    assert [b.mlp.fc1.out_features for b in model.blocks] == [48] * 4
    assert widths_of(model).heads[1] == (0, 2, 4)
    swin = slim.halves(timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, img_size=56))
    assert [stage.blocks[0].attn.num_heads for stage in swin.layers] == [1, 3, 6, 12]
    heads = slim.halves(timm.create_model("vit_tiny_patch16_224", **SIZES), ("heads",))
    assert {b.mlp.fc1.out_features for b in heads.blocks} == {96}


def test_the_tables(slim, monkeypatch, capsys):
    create = timm.create_model
    monkeypatch.setattr(slim.timm, "create_model", lambda name: create(name, **SIZES))
    slim.main(["--model=vit_tiny_patch16_224", "--threads=1", "--repeats=2", "--batches", "2", "--swin=", "--no-onnx"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    names = [line.split("|")[2].strip() for line in lines]
    assert names == [
        "dense (timm)", "half the heads", "half the channels", "half of both", "evit 0.7", "evit 0.7, half of both"
    ]  # fmt: skip
    dense = prunex.cost(create("vit_tiny_patch16_224", **SIZES)).macs
    both = prunex.cost(slim.halves(create("vit_tiny_patch16_224", **SIZES))).macs
    assert lines[3].split("|")[7].strip() == f"{both / dense:.3f}"
    assert all(("holds" in line or "does not hold" in line) for line in lines[1:])
