"""What is saved loads again with equal logits, in plain files that others can read."""

import inspect
import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import prunex
from prunex import PrunexError
from prunex.slim.files import CARD, CONFIG, WEIGHTS, read_config
from tests.slim.models import FAMILIES, METHODS, model_of, pixels
from tests.vits import images, tiny


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_equal_after_saving_and_loading(tmp_path, family, method):
    small = prunex.slim(model_of(family, method))
    assert prunex.save(small, tmp_path / "slim") == tmp_path / "slim"
    assert sorted(p.name for p in (tmp_path / "slim").iterdir()) == sorted((WEIGHTS, CONFIG, CARD))
    loaded = prunex.load(tmp_path / "slim")
    assert not loaded.training
    assert type(loaded) is type(small)
    x = pixels(small)
    assert torch.equal(loaded(x), small(x))
    if method is not None:
        ours, theirs = prunex.attached(small), prunex.attached(loaded)
        assert theirs.spec == ours.spec
        assert torch.equal(theirs.trace.kept(), ours.trace.kept())
    else:
        assert prunex.attached(loaded) is None


@pytest.mark.parametrize("method", list(METHODS))
def test_dynamic_sizes_still_work_after_loading(tmp_path, method):
    small = prunex.slim(model_of("dynamic", method))
    prunex.save(small, tmp_path / "slim")
    loaded = prunex.load(str(tmp_path / "slim"))
    for size in ((32, 32), (48, 24), (64, 64)):
        assert torch.equal(loaded(images(2, size)), small(images(2, size)))


@pytest.mark.parametrize("method", [None, "dynamicvit"])
def test_a_model_that_was_not_slimmed_is_saved_without_its_teacher(tmp_path, method):
    model = model_of("vit", method)
    prunex.save(model, tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim")
    assert torch.equal(loaded(pixels(model)), model(pixels(model)))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    if method is not None:
        assert prunex.attached(loaded).pruner._teacher == ()


@pytest.mark.parametrize("progress", [0.3, 0.5])
def test_a_scheduled_model_that_was_not_slimmed_keeps_its_logits(tmp_path, progress):
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.4, shrink_length=1.0).progress = progress
    prunex.save(model, tmp_path / "slim")
    assert torch.equal(prunex.load(tmp_path / "slim")(images()), model(images()))


def test_bfloat16_weights_keep_their_dtype(tmp_path):
    small = prunex.slim(model_of("vit", "dynamicvit")).bfloat16()
    prunex.save(small, tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(pixels(small)), small(pixels(small)))


def test_tensors_of_mixed_dtypes_keep_theirs(tmp_path):
    model = tiny()
    model.head.half()
    prunex.save(model, tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim")
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_a_loaded_model_trains(tmp_path):
    prunex.save(prunex.slim(model_of("vit", "dynamicvit")), tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim").train()
    assert all(p.requires_grad for p in loaded.parameters())
    (loaded(images()).sum() + sum(prunex.attached(loaded).losses().values())).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_weights_are_a_plain_safetensors_file_of_the_models_own_names(tmp_path):
    small = prunex.slim(model_of("vit", "dynamicvit"))
    prunex.save(small, tmp_path / "slim")
    found, own = load_file(tmp_path / "slim" / WEIGHTS), small.state_dict()
    assert set(found) == set(own)
    assert all(torch.equal(found[k], own[k]) for k in own)
    assert set(tiny().state_dict()) < set(found)


FRESH = """
import pickle, sys, timm, torch
import prunex

def refuse(*args, **kwargs):
    raise RuntimeError("something was unpickled")

torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
from safetensors.torch import load_file
folder = sys.argv[1]
given = load_file(folder + "/given.safetensors")
model = prunex.load(folder + "/slim")
with torch.no_grad():
    gap = (model(given["images"]) - given["logits"]).abs().max().item()
assert torch.equal(prunex.attached(model).trace.kept(), given["kept"])
print("gap", gap)
"""


def test_a_fresh_process_loads_it_without_unpickling(tmp_path):
    from safetensors.torch import save_file

    small = prunex.slim(model_of("dinov2_reg", "dynamicvit"))
    x = pixels(small)
    with torch.no_grad():
        logits = small(x)
    prunex.save(small, tmp_path / "slim")
    kept = prunex.attached(small).trace.kept()
    save_file({"images": x, "logits": logits, "kept": kept}, tmp_path / "given.safetensors")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("gap ")[1]) < 1e-6


def test_random_numbers_of_the_caller_are_left_alone(tmp_path):
    prunex.save(prunex.slim(model_of("vit", "dynamicvit")), tmp_path / "slim")
    state = torch.random.get_rng_state()
    prunex.load(tmp_path / "slim")
    assert torch.equal(torch.random.get_rng_state(), state)
    prunex.save(prunex.slim(model_of("vit", "evit")), tmp_path / "again")
    model = model_of()
    state = torch.random.get_rng_state()
    prunex.save(prunex.slim(model), tmp_path / "dense")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_config_has_timms_keys_and_one_of_ours(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=4)
    prunex.attach(model, "evit", keep_ratio=0.7)
    prunex.save(
        prunex.slim(model), tmp_path / "slim", labels=["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=[0.4, 0.5, 0.6]
    )
    config = json.loads((tmp_path / "slim" / CONFIG).read_text())
    assert config == read_config(tmp_path / "slim")
    timms = {
        "architecture",
        "num_classes",
        "num_features",
        "global_pool",
        "model_args",
        "pretrained_cfg",
        "label_names",
    }
    assert set(config) == timms | {"prunex"}
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (3, 192, "token")
    assert config["label_names"] == ["a", "b", "c"]
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 64, 64]
    assert (cfg["mean"], cfg["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    ours, cost = config["prunex"], prunex.cost(model)
    assert ours["version"] == 1
    assert (ours["macs"], ours["params"], ours["tokens_per_block"]) == (cost.macs, cost.params, cost.tokens)
    assert prunex.attach(tiny(), **{**ours["pruning"], "stages": [1]}).options["keep_ratio"] == 0.7
    assert set(ours["made_with"]) == {"prunex", "torch", "timm"}


def test_labels_and_normalisation_survive_loading_and_saving_again(tmp_path):
    prunex.save(tiny(), tmp_path / "one", labels=list("abcde"), mean=[0.1] * 3, std=[0.2] * 3)
    loaded = prunex.load(tmp_path / "one")
    assert loaded.label_names == list("abcde")
    assert loaded.pretrained_cfg["mean"] == [0.1] * 3
    prunex.save(prunex.slim(loaded), tmp_path / "two")
    one, two = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("one", "two"))
    assert one == two


def test_labels_of_the_wrong_number_are_refused(tmp_path):
    for wrong in ({"labels": ["a"]}, {"mean": [0.5] * 2}, {"std": [0.5] * 4}):
        with pytest.raises(PrunexError, match="give one"):
            prunex.save(tiny(), tmp_path / "slim", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timm_opens_the_folder_by_its_own_means(tmp_path, name):
    if "safetensors" not in inspect.getsource(timm.models._hub.load_state_dict_from_path):
        pytest.skip("this timm reads nothing but pickles from a folder")
    model = timm.create_model(name, num_classes=7, depth=2, img_size=64).eval()
    pruning = prunex.attach(model, "evit", stages=(1,))
    prunex.save(prunex.slim(model), tmp_path / "slim")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'slim'}", pretrained=True).eval()
    x = images(2, (64, 64))
    assert torch.equal(theirs(x), pruning.detach()(x))


def test_the_card_tells_what_it_is_and_how_to_load_it(tmp_path):
    prunex.save(prunex.slim(model_of("vit", "evit")), tmp_path / "slim", mean=[0.5] * 3, std=[0.25] * 3)
    card = (tmp_path / "slim" / CARD).read_text()
    for part in (
        "evit",
        "keep_ratio=0.6",
        "3 x 32 x 32",
        "mean [0.5, 0.5, 0.5]",
        "prunex.load",
        "tokens in each block",
    ):
        assert part in card
    prunex.save(tiny(), tmp_path / "dense")
    assert "dense" in (tmp_path / "dense" / CARD).read_text()
    assert "attached" not in (tmp_path / "dense" / CARD).read_text()  # a dense model has no trace to read
