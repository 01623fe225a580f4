"""Folders of transformers on the command line: a ViT as its timm twin, a wrapper's timm model as it was saved."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.commands import cli
from prunex.recipes.commands.multimodal_options import KINDS, folder_at
from prunex.recipes.runs import open_model
from prunex.sources.classes import CLASSES, WRAPPERS
from prunex.vit.anatomy import find
from tests.sources.models import images, made
from tests.sources.test_folders import written
from tests.sources.test_pretrained import wrapper


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 70, 70, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def test_a_vit_of_transformers_is_explained(tmp_path, photos):
    written(tmp_path / "model")
    out = tmp_path / "out"
    given = [str(tmp_path / "model"), "--images", str(photos), "--methods", "rollout", "--out", str(out)]
    assert cli.run(["explain", *given, "--device", "cpu"]) == 0
    with np.load(out / "maps.npz") as arrays:
        assert any(array.shape[-2:] == (4, 4) for array in arrays.values())


def test_the_model_that_is_opened(tmp_path):
    written(tmp_path / "vit")
    model = wrapper()
    model.config.id2label = {i: f"kind {i}" for i in range(5)}
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    model.save_pretrained(tmp_path / "pruned")
    x = images()
    twin, vit = open_model(tmp_path / "vit"), open_model(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(twin(x), prunex.from_transformers(tmp_path / "vit")(x))
        assert torch.equal(find(vit)[1](x), model(x).logits)
    assert prunex.attached(vit).method == "evit"
    assert vit.label_names == [f"kind {i}" for i in range(5)]


def test_mistakes_are_told(tmp_path, photos):
    made("vit").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    given = ["explain", str(tmp_path / "model"), "--images", str(photos), "--device", "cpu"]
    with pytest.raises(PrunexError, match="has no model.safetensors"):
        cli.run(given)
    with pytest.raises(PrunexError, match="--img-size goes with a timm model name"):
        cli.run([*given, "--img-size", "96"])


def test_who_opens_which_folder(tmp_path):
    for name in (*CLASSES, *WRAPPERS, *KINDS):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert (folder_at(str(tmp_path)) is None) == (name not in KINDS)
