"""Folders that save_pretrained wrote, and folders that nobody should open."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunex
from prunex import PrunexError
from tests.sources.models import SIZE, images, made, transformers
from tests.vits import relative

MEANS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


def written(folder, name="vit_classes", processor=True, **how):
    """A model's folder, and the model."""
    model = made(name)
    model.save_pretrained(folder, **how)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(MEANS | {"resample": 2}))
    return model


def altered(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["vit_classes", "vit_no_pooler", "dinov2_classes", "clip_whole", "siglip2", "beit"])
@pytest.mark.parametrize("given", [str, lambda path: path])
def test_a_folder_is_its_model(name, given, tmp_path):
    model, x = written(tmp_path, name), images()
    want = prunex.from_transformers(model, processor=MEANS)
    twin = prunex.from_transformers(given(tmp_path))
    with torch.no_grad():
        assert relative(twin(x), want(x)) < 1e-6
    assert twin.pretrained_cfg["mean"] == (0.4, 0.5, 0.6)
    assert twin.pretrained_cfg["interpolation"] == "bilinear"


def test_in_shards_and_at_another_size(tmp_path):
    model = written(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    twin = prunex.from_transformers(tmp_path, img_size=96)
    x = images(96)
    with torch.no_grad():
        assert relative(twin(x), model(x, interpolate_pos_encoding=True).logits) < 1e-5


def test_half_precision_is_opened_in_single(tmp_path):
    made("vit").bfloat16().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="nothing says how"):
        assert prunex.from_transformers(tmp_path).cls_token.dtype == torch.float32


def test_the_processor_of_the_folder_a_model_came_from(tmp_path):
    written(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert prunex.from_transformers(model).pretrained_cfg["std"] == (0.2, 0.25, 0.3)


def test_a_processor_within_another(tmp_path):
    written(tmp_path, processor=False)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": MEANS}))
    assert prunex.from_transformers(tmp_path).pretrained_cfg["mean"] == (0.4, 0.5, 0.6)


def spoil_pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def spoil_tensorflow(folder):
    (folder / "model.safetensors").rename(folder / "tf_model.h5")


def spoil_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def spoil_missing(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("layernorm.weight"))
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})


def spoil_shape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"classifier.weight": torch.zeros(5, 47)}, path, metadata={"format": "pt"})


def spoil_index(folder):
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SPOILT = {
    "pickled": (spoil_pickled, "has no model.safetensors, but pickled weights, which are not read"),
    "tensorflow": (spoil_tensorflow, "TensorFlow's weights, which are not read"),
    "truncated": (spoil_truncated, "is damaged"),
    "missing": (spoil_missing, "is missing or of another shape"),
    "shape": (spoil_shape, "cannot be opened|of another shape"),
    "index": (spoil_index, "is not whole"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors: save"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "is damaged"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "is no JSON object"),
    "another class": (lambda folder: altered(folder, architectures=["SwinModel"]), "SwinModel has no timm twin"),
    "no class": (lambda folder: altered(folder, architectures=None), "None has no timm twin"),
    "a module": (lambda folder: altered(folder, architectures=["__loader__"]), "__loader__ has no timm twin"),
    "quantised": (lambda folder: altered(folder, quantization_config={"quant_method": "bnb"}), "is quantised"),
    "deep": (lambda folder: altered(folder, num_hidden_layers=10**9), "tells of 1000000000 blocks"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter: merge it"),
    "a strange number": (lambda folder: altered(folder, hidden_size="wide"), "cannot be opened"),
    "nothing there": (shutil.rmtree, "is no folder: give a local one"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_refused_in_one_line(what, tmp_path):
    folder = tmp_path / "model"
    written(folder, processor=False)
    spoil, wrong = SPOILT[what]
    spoil(folder)
    with pytest.raises(PrunexError, match=wrong) as told:
        prunex.from_transformers(folder)
    assert "\n" not in str(told.value)


def test_nothing_of_a_folder_is_run(tmp_path, monkeypatch):
    written(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    entry = {"AutoModel": "evil.ViTForImageClassification", "AutoConfig": "evil.Config"}
    altered(tmp_path, auto_map=entry, attn_implementation="someone/kernel", _attn_implementation="someone/kernel")

    def fetched(*args, **kwargs):
        raise AssertionError(f"fetched {args}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr("socket.socket.connect", fetched)
    twin = prunex.from_transformers(tmp_path)
    assert twin.patch_embed.img_size == (SIZE, SIZE)


def test_a_hub_name_is_not_fetched(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("connected"))
    with pytest.raises(PrunexError, match="'google/vit-base-patch16-224' is no folder: give a local one"):
        prunex.from_transformers("google/vit-base-patch16-224")
