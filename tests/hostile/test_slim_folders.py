"""Slim folders and trained explainers that lie: refused before anything large is allocated, and never run."""

import json
from time import perf_counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prunex
from prunex import PrunexError
from prunex.learned.diffmask import load_explainer as load_diffmask
from prunex.learned.vit_shapley import load_explainer as load_shapley
from prunex.vit import rebuild
from tests.hostile.kinds import signed
from tests.vits import tiny

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def edit(folder, change, sign=True):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    if sign:
        signed(folder)


def refused(load, folder, says):
    begun = perf_counter()
    with pytest.raises(PrunexError, match=says) as caught:
        load(folder)
    assert perf_counter() - begun < 20  # and not after hours
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


LIES = {
    "a wide model": ({"embed_dim": 3 * 10**6}, "bytes"),
    "a wide model of few blocks": ({"embed_dim": 3 * 2**30, "depth": 1}, "bytes|build"),
    "a deep model": ({"depth": 10**9}, "more blocks"),
    "many classes": ({"num_classes": 10**12}, "bytes"),
    "many registers": ({"reg_tokens": 10**12}, "bytes"),
    "large images": ({"img_size": 2**20}, "too large"),
    "large images without positions": ({"img_size": 2**20, "pos_embed": "none"}, "too large"),
    "large patches": ({"img_size": 2**16, "patch_size": 2**16}, "too large"),
    "no patches": ({"patch_size": 0}, "patch_size"),
    "a wide MLP": ({"mlp_ratio": 1e300}, "build|bytes"),
    "parallel blocks": ({"block_fn": ["ParallelThingsBlock", {"num_parallel": 10**9}]}, "more blocks"),
    "another device": ({"device": "meta"}, "unknown argument 'device'"),
    "code as a layer": ({"act_layer": "os.system"}, "cannot build"),
    "a class as a layer": ({"norm_layer": {"class_path": "os.system"}}, "cannot build"),
    "no number": ({"norm_layer": ["layernorm", "x"]}, "no norm"),
    "true as a number": ({"depth": True}, "no whole"),
    "a block of ones own": ({"block_fn": ["ResPostBlock", {"mlp_layer": "os.system"}]}, "no block"),
}


@pytest.mark.parametrize("what", LIES)
def test_descriptions_that_lie(room, what):
    change, says = LIES[what]
    folder = room.copy("slim")
    edit(folder, lambda c: c["prunex"]["model"]["args"].update(change))
    refused(prunex.load, folder, says)


@pytest.mark.parametrize("what", ["a wide model", "many classes"])
def test_they_are_refused_where_timm_cannot_build_without_memory(room, monkeypatch, what):
    monkeypatch.setattr(rebuild, "build", raising("Tensor.item() cannot be called on meta tensors"))
    test_descriptions_that_lie(room, what)


def raising(text):
    def build(*_):
        raise PrunexError(text)

    return build


def test_a_model_that_is_narrowed_from_a_huge_one(room):
    folder = room.copy("slim")
    widths = {"channels": {str(i): list(range(192)) for i in range(4)}}
    edit(folder, lambda c: c["prunex"]["model"].update(widths=widths))
    edit(folder, lambda c: c["prunex"]["model"]["args"].update(mlp_ratio=1e9))
    refused(prunex.load, folder, "bytes")


def test_a_described_model_of_few_weights_may_be_narrowed_from_a_larger_one(tmp_path):
    small = prunex.slim(tiny(mlp_ratio=20), widths=prunex.WidthSpec(channels={i: range(4) for i in range(4)}))
    again = prunex.load(prunex.save(small, tmp_path / "slim"))
    assert again.blocks[0].mlp.fc1.out_features == 4


PRUNINGS = {
    "another folder": ({"method": "diffmask", "explainer": "/etc"}, "may not name 'explainer'"),
    "a budget": ({"method": "topk", "budget": 0.5}, "may not name 'budget'"),
    "units": ({"method": "xpruner"}, "prunes no tokens"),
    "stages of text": ({"method": "topk", "keep_ratio": 0.6, "stages": ["x"]}, "stages"),
    "a mapping": ({"method": "topk", "keep_ratio": {"a": 1}}, "keep_ratio"),
    "no number": ({"method": "topk", "keep_ratio": [[]]}, "keep_ratio"),
    "a path": ({"method": "../../x"}, "unknown pruner"),
    "a list": ({"method": "topk", "count": ["adaptive"]}, "count"),
}


@pytest.mark.parametrize("what", PRUNINGS)
def test_prunings_that_lie(room, what):
    pruning, says = PRUNINGS[what]
    folder = room.copy("slim")
    edit(folder, lambda c: c["prunex"].update(pruning=pruning))
    refused(prunex.load, folder, says)


TOLD = {
    "names that are none": (lambda c: c.update(label_names=5), "label_names"),
    "names of numbers": (lambda c: c.update(label_names=[1, 2]), "label_names"),
    "a mean of text": (lambda c: c["pretrained_cfg"].update(mean="grey"), "mean"),
    "a mean of two": (lambda c: c["pretrained_cfg"].update(mean=[0.5, 0.5]), "mean"),
    "no deviation": (lambda c: c["pretrained_cfg"].update(std=[0.0, 1, 1]), "std"),
    "an architecture of lists": (lambda c: c["pretrained_cfg"].update(architecture=[]), "architecture"),
}


@pytest.mark.parametrize("what", TOLD)
def test_what_pictures_and_tables_show_is_checked(room, what):
    change, says = TOLD[what]
    folder = room.copy("slim")
    edit(folder, change)
    refused(prunex.load, folder, says)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"prunex": NaN}', '{"prunex": 1e999}', '{"prunex": ' + "1" * 5000 + "}"]
)
@pytest.mark.parametrize("kind", ["slim", "vit_shapley", "diffmask"])
def test_json_that_is_none(room, text, kind):
    folder = room.copy(kind)
    (folder / "config.json").write_text(text)
    load = {"slim": prunex.load, "vit_shapley": load_shapley, "diffmask": load_diffmask}[kind]
    refused(load, folder, "is damaged")


def test_the_last_of_two_equal_keys_counts_and_must_fit(room):
    folder = room.copy("slim")
    text = (folder / "config.json").read_text().replace('"depth": 4', '"depth": 4, "depth": 5')
    (folder / "config.json").write_text(text)
    signed(folder)
    refused(prunex.load, folder, "does not fit")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_no_layer_computes_with(room, dtype):
    folder = room.copy("slim")
    tensors = load_file(folder / "model.safetensors")
    try:
        save_file(tensors | {"head.weight": tensors["head.weight"].to(dtype)}, folder / "model.safetensors")
    except KeyError:
        pytest.skip(f"this safetensors cannot write {dtype}")
    signed(folder)
    refused(prunex.load, folder, "does not fit|holds torch.float8|holds torch.complex|is damaged")


def test_a_model_of_whole_numbers(room):
    folder = room.copy("slim")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.to(torch.uint8) for k, v in tensors.items()}, folder / "model.safetensors")
    signed(folder)
    refused(prunex.load, folder, "does not fit")


def test_names_of_any_length_and_letters(room):
    for name in ("a" * 5000, "\x00", "né\ud800", ""):
        with pytest.raises(PrunexError):
            prunex.load(name)
        with pytest.raises(PrunexError):
            load_shapley(name)
    with pytest.raises(PrunexError, match="is no path"):
        load_shapley("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("vit_shapley", {"mlp_ratio": 10**9}, "does not fit"),
        ("diffmask", {"gates": {"width": 10**9, "depth": 4}}, "does not fit"),
        ("diffmask", {"gates": {"width": 48, "depth": 10**12}}, "fewer gates"),
        ("diffmask", {"gates": {"width": "x", "depth": 4}}, "width"),
        ("diffmask", {"gates": {"width": 48, "depth": 4, "mul": 1, "os": 2}}, "is damaged"),
    ],
)
def test_explainers_that_lie(room, kind, change, says):
    folder = room.copy(kind)
    edit(folder, lambda c: c["prunex"].update(change), sign=False)
    refused({"vit_shapley": load_shapley, "diffmask": load_diffmask}[kind], folder, says)


@pytest.mark.parametrize("kind", ["vit_shapley", "diffmask"])
def test_explainers_of_huge_models(room, kind):
    folder = room.copy(kind)
    model = {"vit_shapley": "surrogate", "diffmask": "model"}[kind]
    edit(folder, lambda c: c["prunex"][model]["args"].update(embed_dim=3 * 10**6), sign=False)
    refused({"vit_shapley": load_shapley, "diffmask": load_diffmask}[kind], folder, "bytes")


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["img_size", "depth", "mlp_ratio", "norm_layer", "block_fn", "pos_embed", "qkv_bias"]), JSON)
def test_any_value_of_any_argument(room, name, value):
    path = room.fresh() and room.copy("slim")
    edit(path, lambda c: c["prunex"]["model"]["args"].update({name: value}))
    room.judge(lambda: prunex.load(path))
