"""Whatever save writes, load reads; what it could not read is refused before anything is written."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunex
from prunex import PrunexError
from prunex.slim.files import CONFIG, check_savable, read_config
from prunex.slim.metadata import as_read, class_names, known_cfg
from tests.slim.models import pixels
from tests.vits import tiny

SHAPES = {
    "no_head": {"num_classes": 0},
    "one_class": {"num_classes": 1},
    "not_square": {"img_size": (40, 24)},
    "one_token_wide": {"img_size": (8, 40)},
    "distilled": {"family": "deit_distilled"},
    "registers": {"family": "dinov2_reg"},
    "dynamic": {"family": "dynamic"},
    "no_positions": {"family": "no_pos_embed"},
    "avg": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "unpooled": {"global_pool": ""},
    "dropping": {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3},
    "eva": {"family": "eva02", "in_chans": 4},
    "beit": {"family": "beit", "in_chans": 5},
}


def again(model, folder, **told):
    """The model after one way out and back, weights and logits compared."""
    loaded = prunex.load(prunex.save(model, folder, **told))
    found = loaded.state_dict()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    x = pixels(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))  # where tensors lie in memory may change the last bit
    return loaded


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_any_number_of_channels(tmp_path, channels):
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, embed_dim=48, depth=2, in_chans=channels
    ).eval()
    check_savable(model)
    loaded = again(model, tmp_path / "own")
    # Of more channels than colours timm's three numbers say nothing.
    assert ("mean" in loaded.pretrained_cfg) == (channels <= 3)
    told = again(model, tmp_path / "told", mean=[0.1] * channels, std=0.5)
    assert told.pretrained_cfg["mean"] == [0.1] * channels
    assert told.pretrained_cfg["std"] == [0.5] * channels
    assert again(told, tmp_path / "twice").pretrained_cfg["mean"] == [0.1] * channels


@pytest.mark.parametrize("name", SHAPES)
def test_any_shape(tmp_path, name):
    model = tiny(**SHAPES[name])
    check_savable(model)
    again(model, tmp_path / "slim")


@pytest.mark.parametrize(
    "given_mean",
    [0.25, torch.tensor(0.25), torch.tensor([0.25] * 3), np.full(3, 0.25), (0.25, 0.25, 0.25), [np.float32(0.25)] * 3],
)
def test_a_mean_of_any_make(tmp_path, given_mean):
    assert again(tiny(depth=1), tmp_path / "slim", mean=given_mean).pretrained_cfg["mean"] == [0.25] * 3


@pytest.mark.parametrize(
    "told",
    [
        {"mean": [0.5, 0.5]},
        {"mean": [math.nan] * 3},
        {"mean": lambda: 0.5},
        {"std": 0.0},
        {"std": [1.0, -1.0, 1.0]},
        {"std": math.inf},
        {"labels": "abcde"},
        {"labels": [0, 1, 2, 3, 4]},
        {"labels": ["a"] * 4},
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, told):
    with pytest.raises(PrunexError, match=next(iter(told))) as caught:
        prunex.save(tiny(depth=1), tmp_path / "slim", **told)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@given(
    names=st.lists(st.text(st.characters(), max_size=8), min_size=3, max_size=3),
    channels=st.integers(1, 12),
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    spread=st.floats(1e-30, 1e30),
)
@settings(max_examples=100, deadline=None)
def test_names_and_numbers_of_any_kind(names, channels, numbers, spread):
    class Vit:
        label_names = names
        pretrained_cfg = {"mean": tuple(numbers), "std": torch.tensor([spread], dtype=torch.float64)}

    cfg = known_cfg(Vit, channels)
    written = {"prunex": {"model": {"args": {"in_chans": channels}}}, "pretrained_cfg": cfg}
    read = as_read(written | {"label_names": class_names(Vit, 3)})
    assert read["label_names"] == names
    assert read["pretrained_cfg"]["std"] == [spread]
    assert read["pretrained_cfg"].get("mean", numbers) == numbers


def test_odd_names_of_classes(tmp_path):
    names = ["", "\udcff", "a\nb", '"', "\N{CAT FACE}" * 300]
    loaded = again(tiny(depth=1), tmp_path / "slim", labels=names)
    assert loaded.label_names == [n.encode("utf-8", "backslashreplace").decode() for n in names]


def test_names_of_another_head_are_left_out(tmp_path):
    model = again(tiny(depth=1), tmp_path / "five", labels=list("abcde"))
    assert model.label_names == list("abcde")
    model.reset_classifier(2)
    assert again(model, tmp_path / "two").label_names == []


def test_a_configuration_that_is_no_json_is_refused(tmp_path):
    model = tiny(depth=1)
    model.pretrained_cfg = {"crop_pct": {1, 2}}
    with pytest.raises(PrunexError, match="cannot be written as JSON"):
        prunex.save(model, tmp_path / "slim")
    assert not any(tmp_path.iterdir())


def test_an_infinite_tolerance_is_no_number_of_json(tmp_path):
    model = tiny(depth=2)
    prunex.attach(model, "patch_slimming", epochs=0).calibrate(pixels(model), tolerance=math.inf)
    loaded = again(model, tmp_path / "slim")
    assert prunex.attached(loaded).counts() == [0]


def test_layers_that_share_their_weights_are_written_twice(tmp_path):
    model = tiny(depth=2)
    model.blocks[1].mlp = model.blocks[0].mlp
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    again(model, tmp_path / "slim")


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "avg_pool"])
def test_a_head_put_on_by_assignment_says_how_many_classes_there_are(tmp_path, name):
    model = tiny(name)
    model.head = nn.Linear(48, 3)
    if name == "deit_distilled":
        model.head_dist = nn.Linear(48, 3)
    assert prunex.vit.anatomy.read(model).classes == 3
    assert prunex.cost(model).macs == prunex.cost(_reset(name)).macs
    check_savable(model)
    loaded = again(model, tmp_path / "slim", labels=["a", "b", "c"])
    assert loaded.num_classes == 3
    assert read_config(tmp_path / "slim")["num_classes"] == 3
    pruning = prunex.attach(model, "evit", keep_ratio=0.5)
    assert pruning._attached.current(model).classes == 3
    assert prunex.attach(model, "taylor").pruner.classes == 3


def _reset(name):
    model = tiny(name)
    model.reset_classifier(3)
    return model


def test_a_head_taken_off_by_assignment(tmp_path):
    model = tiny()
    model.head = nn.Identity()
    assert prunex.vit.anatomy.read(model).classes == 0
    again(model, tmp_path / "slim")


@pytest.mark.parametrize(
    "head",
    [nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Linear(48, 3, bias=False), nn.Bilinear(48, 48, 3)],
    ids=["sequential", "no_bias", "bilinear"],
)
def test_another_head_is_refused_by_name_before_training(tmp_path, head):
    model = tiny()
    model.head = head
    for refused in (check_savable, lambda m: prunex.save(m, tmp_path / "slim")):
        with pytest.raises(PrunexError, match=r"head.*reset_classifier") as caught:
            refused(model)
        assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_nobody_computes_with_are_refused(tmp_path, dtype):
    model = tiny(depth=1)
    model.blocks[0].mlp.fc1.weight = nn.Parameter(model.blocks[0].mlp.fc1.weight.to(dtype), requires_grad=False)
    with pytest.raises(PrunexError, match=r"blocks\.0\.mlp\.fc1 "):
        check_savable(model)
    with pytest.raises(PrunexError, match=r"blocks\.0\.mlp\.fc1 "):
        prunex.save(model, tmp_path / "slim")
    assert not any(tmp_path.iterdir())


def test_a_head_that_has_not_seen_its_input_is_refused():
    model = tiny(depth=1)
    model.head = nn.LazyLinear(3)
    with pytest.raises(PrunexError, match=r"head .*UninitializedParameter"):
        check_savable(model)


def test_a_model_without_memory_is_refused(tmp_path):
    with pytest.raises(PrunexError, match="meta device"):
        prunex.save(tiny(depth=1).to("meta"), tmp_path / "slim")


def test_a_graph_says_of_itself_what_the_folder_does(tmp_path):
    model = tiny(depth=1, in_chans=4)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": torch.ones(4)}
    model.label_names = ["too", "few"]
    extra = {"prunex.json": ""}
    torch.export.load(prunex.export(model, tmp_path / "model.pt2"), extra_files=extra)
    told = json.loads(extra["prunex.json"])
    folder = json.loads((prunex.save(model, tmp_path / "slim") / CONFIG).read_text())
    assert (told["mean"], told["std"], told["labels"]) == (None, [1.0] * 4, None)
    assert folder["pretrained_cfg"]["std"] == [1.0] * 4
    assert "mean" not in folder["pretrained_cfg"]
