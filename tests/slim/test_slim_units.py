"""Slim models without the closed units: same logits, saved and loaded by name, exported, Swin among them."""

import copy
import importlib.util
import json
import subprocess
import sys
import warnings

import pytest
import torch
from timm.layers import SwiGLU
from torch import nn

import prunex
from prunex import PrunexError, WidthSpec
from prunex.slim.files import CARD, CONFIG, WEIGHTS
from prunex.vit.cost import tally
from prunex.vit.describe import describe
from prunex.vit.rebuild import build
from prunex.vit.widths import widths_of
from tests.vit.narrowed import SWIN, hard, tiny_of, tiny_swin
from tests.vits import assert_same_state, images, images_for, relative, state_of, tiny

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra prunex-vit[onnx]",
)
FAMILIES = ["vit", "deit_distilled", "dinov2_giant", "res_post", "qk_norm", "siglip", "no_qkv_bias", "swin"]
BY_HAND = {
    "heads": ("vit", {}, WidthSpec(heads={0: (0, 2), 1: ()}, channels={0: range(50), 2: ()})),
    "head widths": ("vit", {}, WidthSpec(query_dims={2: [[1, 2]] * 3}, value_dims={2: [[0, 5]] * 3})),
    "embedding and blocks": ("deit_distilled", {}, WidthSpec(heads={3: (1,)}, embedding=range(24), blocks=(0, 3))),
    "swiglu": ("dinov2", {"mlp_layer": SwiGLU, "act_layer": nn.SiLU}, WidthSpec(channels={0: (1,)}, heads={1: (1,)})),
    "glu": ("dinov2_giant", {}, WidthSpec(channels={0: (1,)}, embedding=range(30))),
    "eva": ("eva02", {"scale_mlp": False}, WidthSpec(channels={0: range(10), 3: ()})),
    "beit": ("beit", {}, WidthSpec(channels={1: range(10)})),
    "things": ("parallel_scaling", {}, WidthSpec(blocks=(0, 1))),
    "swin": ("swin", {}, WidthSpec(heads={0: (1,), 3: (0, 2, 3)}, channels={1: range(20), 2: ()})),
    "swin, other windows": ("swin", {"window_size": (4, 2), "mlp_ratio": 3.0}, WidthSpec(heads={1: (0,)})),
    "swin, any size": ("swin", {"strict_img_size": False}, WidthSpec(heads={1: (0,)})),
    "swin, partitioned": ("swin", {"window_size": 4, "always_partition": True}, WidthSpec(heads={2: (0,)})),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_were_closed_are_gone_and_the_logits_stay(family):
    model = tiny_of(family)
    x, dense = images_for(model), model(images_for(model))
    pruning = hard(model)
    before, wanted = state_of(model), model(x)
    small = prunex.slim(model)
    assert not torch.allclose(wanted, dense, atol=1e-2)
    assert torch.allclose(small(x), wanted, atol=1e-6, rtol=1e-5)
    assert widths_of(small) == pruning.widths
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert prunex.cost(small).macs <= 0.6 * pruning_dense(model)
    assert not any("prunex" in n for n in small.state_dict())
    assert not small._load_state_dict_pre_hooks
    assert not any(m._forward_pre_hooks for m in small.modules())
    assert prunex.attached(small, units=True) is None
    assert_same_state(model, before)


def pruning_dense(model):
    return tally(model, gates=False, tokens=False).macs


def test_a_slim_model_is_the_removed_one():
    model = tiny()
    pruning = hard(model)
    small = prunex.slim(model)
    pruning.remove()
    again = prunex.slim(model)
    for other in (model, again):
        assert torch.equal(small(images()), other(images()))
    assert widths_of(again) == widths_of(small)
    assert prunex.attached(again, units=True) is None


@pytest.mark.parametrize("stage", ["masks", "thresholds"])
def test_slimming_before_units_were_chosen_has_those_open_now(stage):
    model = tiny()
    pruning = prunex.attach(model, "xpruner", budget=0.6)
    with torch.no_grad():
        pruning.pruner.masks()[1][:, :100] = 0
    pruning.pruner.stage = stage
    with torch.no_grad():
        pruning.pruner.thresholds.fill_(0.5)
    with pytest.warns(UserWarning, match="has not chosen units yet"):
        small = prunex.slim(model)
    assert torch.allclose(small(images()), model(images()), atol=1e-6)
    assert small.blocks[0].mlp.fc2.in_features == (192 if stage == "masks" else 92)
    assert not hasattr(small, "prunex_units")


def test_widths_by_hand_are_taken_beside_those_a_pruner_closed():
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.6)
    pruning = hard(model, closed={"0.heads": [1]})
    kept = pruning.widths.channels[0][:20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = prunex.slim(model, widths=WidthSpec(channels={0: kept}))
    assert small.blocks[0].mlp.fc1.out_features == 20
    assert small(images()).shape == (3, 5)
    assert prunex.attached(small).trace.kept().shape == (3, 4, 4)
    with pytest.raises(PrunexError, match="has no 1"):
        prunex.slim(model, widths=WidthSpec(heads={0: (0, 1, 2)}))
    with pytest.raises(PrunexError, match="detach"):
        prunex.slim(model, widths=WidthSpec(blocks=(0, 1)))


def test_slim_models_go_on_training():
    model = tiny()
    hard(model)
    small = prunex.slim(model).train()
    small(images()).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("what", list(BY_HAND))
def test_saved_and_loaded_bit_for_bit(tmp_path, what):
    family, more, spec = BY_HAND[what]
    dense = tiny_of(family, **more)
    small = prunex.slim(dense, widths=spec)
    prunex.save(small, tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim")
    x = images_for(small)
    # Weights read from a file lie elsewhere in memory, where a processor may sum them in another order.
    assert relative(loaded(x), small(x)) < 1e-6
    assert widths_of(loaded) == widths_of(small)
    assert describe(loaded) == describe(small)
    assert prunex.cost(loaded) == prunex.cost(small)
    prunex.save(loaded, tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "slim" / name).read_bytes()


def test_a_dense_swin_is_saved_and_loaded(tmp_path):
    model = tiny_swin()
    prunex.save(model, tmp_path / "slim", labels=list("abcde"))
    loaded = prunex.load(tmp_path / "slim")
    assert torch.equal(loaded(images()), model(images()))
    config = json.loads((tmp_path / "slim" / CONFIG).read_text())
    assert config["pretrained_cfg"]["classifier"] == "head.fc"
    assert config["prunex"]["version"] == 2
    assert config["prunex"]["widths_per_block"][0] == {"heads": 2, "head_width": 8, "hidden": 64}


@pytest.mark.parametrize("method", ["evit", "tome", "dynamicvit"])
def test_tokens_and_units_together(tmp_path, method):
    model = tiny()
    prunex.attach(model, method, **({"r": 2} if method == "tome" else {"keep_ratio": 0.6}))
    hard(model, closed={"2.heads": [0]})
    x, wanted = images(), model(images())
    prunex.save(model, tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim")
    assert torch.allclose(loaded(x), wanted, atol=1e-6)
    assert torch.equal(loaded(x), prunex.slim(model)(x))
    assert torch.equal(prunex.attached(loaded).trace.kept(), prunex.attached(model).trace.kept())
    assert prunex.cost(loaded) == prunex.cost(model)


def test_card_and_config_tell_the_widths(tmp_path):
    spec = WidthSpec(heads={0: (0, 2), 1: ()}, channels={2: range(7)})
    prunex.save(prunex.slim(tiny(), widths=spec), tmp_path / "slim")
    ours = json.loads((tmp_path / "slim" / CONFIG).read_text())["prunex"]
    assert ours["version"] == 2
    assert ours["model"]["widths"] == spec.plain()
    assert [w["heads"] for w in ours["widths_per_block"]] == [2, 0, 3, 3]
    card = (tmp_path / "slim" / CARD).read_text()
    assert "| heads in each block | 2, 0, 3, 3 |\n| width of a head | 16, 16, 16, 16 |\n" in card
    assert "| MLP channels in each block | 192, 192, 7, 192 |\n\n" in card
    prunex.save(tiny(), tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / CONFIG).read_text())["prunex"]["version"] == 1


TAMPER = {
    "a head less": (lambda w: w["heads"].update({"0": [0]}), "does not fit"),
    "another head": (lambda w: w["heads"].update({"0": [0, 1]}), "does not fit"),
    "a block more": (lambda w: w["heads"].update({"1": [0, 1]}), "does not fit"),
    "no such head": (lambda w: w["heads"].update({"0": [0, 7]}), "has no 7"),
    "channels": (lambda w: w["channels"]["2"].pop(), "does not fit"),
    "no such block": (lambda w: w["channels"].update({"9": [1]}), "blocks 0 to 3"),
    "words": (lambda w: w.update(heads="all"), "no widths"),
    "no such part": (lambda w: w.update(depth=[1]), "no widths"),
    "head widths": (lambda w: w.update(query_dims={"0": [[0]] * 2}, value_dims={"0": [[0]] * 2}), "does not fit"),
}


@pytest.mark.parametrize("what", list(TAMPER))
def test_a_tampered_width_is_an_error_and_never_another_model(tmp_path, what):
    spec = WidthSpec(heads={0: (0, 2)}, channels={2: tuple(range(7))})
    prunex.save(prunex.slim(tiny(), widths=spec), tmp_path / "slim")
    change, match = TAMPER[what]
    path = tmp_path / "slim" / CONFIG
    config = json.loads(path.read_text())
    change(config["prunex"]["model"]["widths"])
    path.write_text(json.dumps(config))
    with pytest.raises(PrunexError, match=match):
        prunex.load(tmp_path / "slim")


def test_equal_shapes_cut_into_other_heads_are_no_other_model(tmp_path):
    prunex.save(tiny(), tmp_path / "slim")
    path = tmp_path / "slim" / CONFIG
    config = json.loads(path.read_text())
    config["prunex"]["model"]["args"]["num_heads"] = 6
    path.write_text(json.dumps(config))
    with pytest.raises(PrunexError, match="its model entry was changed"):
        prunex.load(tmp_path / "slim")


def test_folders_from_before_there_were_widths_still_load(tmp_path):
    model = tiny()
    prunex.save(model, tmp_path / "slim")
    path = tmp_path / "slim" / CONFIG
    config = json.loads(path.read_text())
    for name in ("model_sha256", "widths_per_block"):
        del config["prunex"][name]
    path.write_text(json.dumps(config))
    assert torch.equal(prunex.load(tmp_path / "slim")(images()), model(images()))


FRESH = """
import pickle, sys, timm, torch
import prunex

def refuse(*args, **kwargs):
    raise RuntimeError("something was unpickled")

torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
from safetensors.torch import load_file
folder = sys.argv[1]
given = load_file(folder + "/given.safetensors")
for name in ("vit", "swin"):
    model = prunex.load(folder + "/" + name)
    with torch.no_grad():
        assert torch.equal(model(given["images"]), given[name]), name
assert "callbacks" not in sys.modules and "lightning" not in sys.modules
print("equal")
"""


def test_a_fresh_process_loads_them_without_unpickling_or_training_code(tmp_path):
    from safetensors.torch import save_file

    given = {"images": images(dtype=torch.float32)}
    for name in ("vit", "swin"):
        small = prunex.slim(tiny_of(name), widths=WidthSpec(heads={0: (1,), 3: (0, 2)}, channels={1: (), 2: (0, 5)}))
        prunex.save(small, tmp_path / name)
        with torch.no_grad():
            given[name] = small(given["images"])
    save_file(given, tmp_path / "given.safetensors")
    code = "import torch; torch.set_num_threads(1)\n" + FRESH
    torch.set_num_threads(1)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout


@pytest.mark.parametrize(
    ("family", "suffix"),
    [
        pytest.param("vit", ".onnx", marks=needs_onnx),
        pytest.param("swin", ".pt2", marks=pytest.mark.slow),
        pytest.param("vit", ".pt2", marks=pytest.mark.slow),
        pytest.param("swin", ".onnx", marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_exported_graphs_agree_at_every_batch(tmp_path, family, suffix):
    if family == "vit":
        model = tiny(depth=2, embed_dim=24)
        prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
        spec = WidthSpec(heads={0: (), 1: (0, 2)}, channels={0: range(5), 1: ()})
    else:
        model, spec = tiny_swin(depths=(1, 2)), WidthSpec(heads={0: (1,), 2: (0, 2, 3)}, channels={1: range(9), 2: ()})
    small = prunex.slim(model, widths=spec)
    path = prunex.export(small, tmp_path / f"model{suffix}")
    for batch in (1, 2, 5):
        x = images(batch, seed=batch)
        with torch.no_grad():
            wanted = small(x)
        if suffix == ".pt2":
            found = torch.export.load(path).module()(x)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_swin_has_no_kept_map(tmp_path):
    with pytest.raises(PrunexError, match="no kept map"):
        prunex.export(tiny_swin(), tmp_path / "model.pt2", kept=True)


def test_swins_that_plain_values_cannot_name():
    windows = tiny_swin()
    block = windows.layers[1].blocks[0]
    block.shift_size = (1, 1)
    odd = tiny_swin()
    odd.layers[0].blocks[0].mlp.act = nn.Tanh()
    for model, match in ((windows, "windows of their own"), (odd, "activation Tanh")):
        with pytest.raises(PrunexError, match=match):
            describe(model)


def test_a_description_is_of_the_dense_model_and_what_is_left():
    small = prunex.slim(tiny_swin(), widths=WidthSpec(heads={0: (1,)}))
    spec = describe(small)
    assert spec["args"]["num_heads"] == list(SWIN["num_heads"])
    assert spec["widths"] == {"heads": {"0": [1]}}
    small.reset_classifier(7)
    assert build(describe(small)).head.fc.out_features == 7
    assert describe(copy.deepcopy(small)) == describe(small)
