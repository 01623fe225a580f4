"""Units are taken out whole or not at all: what cannot be cut is refused before the first change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import prunex
from prunex import PrunexError
from prunex.slim.files import check_savable
from prunex.vit import cuts, widths
from tests.vit.test_effective_weights import Bent, adapted, doubled, hooked, lora, masked, vit_of, weight_normed
from tests.vits import images, relative, state_of, tiny

X = images(2)


def tied(block, twin):
    twin.mlp.fc1.weight = block.mlp.fc1.weight


def quantised(block, twin):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(block, quantization.Int8WeightOnlyConfig())


def float8(block, twin):
    block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


ON = {
    "weight_norm": (weight_normed, "reparametrised.*remove_parametrizations"),
    "masked": (masked, "pruning mask.*prune.remove"),
    "hooked": (hooked, "computes with more than its weight"),
    "doubled": (doubled, "computes with more than its weight"),
    "tied": (tied, "is the same tensor as"),
    "quantised": (quantised, "quantised"),
    "float8": (float8, "quantised"),
}


def everything(model, optimizer=None):
    """What a failed removal might leave half-done, down to the tensors themselves."""
    own = state_of(model)
    own["ids"] = {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)}
    own["sizes"] = {n: (getattr(m, "in_features", 0), getattr(m, "num_heads", 0)) for n, m in model.named_modules()}
    own["classes"] = [type(m) for m in model.modules()]
    if optimizer is not None:
        own["groups"] = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        own["states"] = {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    return own


def assert_nothing_happened(model, before, optimizer=None):
    after = everything(model, optimizer)
    wanted = before["tensors"]
    for name, value in after.pop("tensors").items():
        if type(value) is torch.Tensor:  # of packed ones the identity says it
            assert torch.equal(value.view(torch.uint8), wanted[name].view(torch.uint8)), name
    assert after == {k: v for k, v in before.items() if k != "tensors"}


def refused(model, pruning, match, optimizers=()):
    before = [everything(model, o) for o in optimizers or (None,)]
    for again in range(2):  # nothing of the first failure makes the second one different
        with pytest.raises(PrunexError, match=match) as caught:
            pruning.remove(optimizers) if again else pruning.check_removable(optimizers)
        assert "\n" not in str(caught.value)
    for o, b in zip(optimizers or (None,), before, strict=True):
        assert_nothing_happened(model, b, o)
    return str(caught.value)


def chosen(model):
    """Units chosen, some of each kind closed in every block, by scores that need no weights."""
    pruning = prunex.attach(model, "random", budget=0.5)
    pruning.calibrate()
    return pruning


@pytest.mark.parametrize("kind", ON)
def test_removal_is_refused_whole(kind):
    put, match = ON[kind]
    model = tiny(depth=2)
    put(model.blocks[1], model.blocks[0])
    pruning = chosen(model)
    path = refused(model, pruning, match)
    assert path.startswith("blocks.")
    pruning.detach()
    assert prunex.attached(model, units=True) is None


@pytest.mark.parametrize("target", ["qkv", "proj", "fc1", "fc2"])
def test_under_an_adapter_on_any_layer_removal_is_refused_and_slim_is_right(tmp_path, target):
    peft = pytest.importorskip("peft")
    model = lora(peft, tiny(depth=2), rf".*\.{target}").eval()
    merged = copy.deepcopy(model).merge_and_unload()
    pruning = chosen(model)
    assert {b.kind for b in pruning.pruner.branches} == {"heads", "channels"}
    with torch.no_grad():
        wanted = model(X)
    assert rf".{target} (peft" in refused(vit_of(model), pruning, r"model\.merge_and_unload\(\)")
    with torch.no_grad():
        assert torch.equal(model(X), wanted)
    check_savable(model)
    small = prunex.slim(model)
    assert prunex.cost(small).macs < prunex.cost(merged).macs
    assert not any("lora" in name for name, _ in small.named_parameters())
    with torch.no_grad():
        assert relative(small(X), wanted) < 1e-4
        assert relative(prunex.load(prunex.save(model, tmp_path / "slim"))(X), wanted) < 1e-4
    assert widths.widths_of(small) == pruning.widths
    # The merged copy with the same units taken out is the same model.
    narrow = widths.narrow(merged, pruning.widths)
    with torch.no_grad():
        assert relative(narrow(X), small(X)) < 1e-4


@pytest.mark.parametrize("kind", ["dora", "two_active", "masked", "weight_norm", "own_adapter", "hooked"])
def test_slim_and_save_fold_what_is_linear(tmp_path, kind):
    model, plain = adapted(kind)
    small = prunex.slim(model)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    with torch.no_grad():
        assert relative(small(X), plain(X)) < 1e-4
        assert relative(prunex.load(prunex.save(model, tmp_path / "slim"))(X), plain(X)) < 1e-4
    check_savable(model)


def test_hooks_that_only_watch_change_nothing():
    model, plain = adapted("watched")
    assert torch.equal(prunex.slim(model)(X), plain(X))
    pruning = chosen(model)
    with torch.no_grad():
        wanted = model(X)
        assert relative(pruning.remove()(X), wanted) < 1e-5


def test_what_is_not_linear_is_not_saved(tmp_path):
    model = tiny(depth=2)
    model.blocks[0].mlp.fc2 = Bent(192, 48)
    for refuses in (check_savable, prunex.slim, lambda m: prunex.save(m, tmp_path / "slim")):
        with pytest.raises(PrunexError, match=r"blocks\.0\.mlp\.fc2 .*is not linear"):
            refuses(model)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("where", "fails"), [(cuts, "_take_channels"), (widths, "follow")])
def test_whatever_is_raised_half_way_leaves_no_trace(monkeypatch, where, fails):
    model = tiny(depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(X).sum().backward()
    optimizer.step()
    pruning = chosen(model)
    before, whole = everything(model, optimizer), getattr(where, fails)
    calls = []

    def out_of_memory(*args):
        calls.append(args)
        if len(calls) == (2 if fails == "_take_channels" else 1):
            if fails == "follow":
                whole(*args)
            raise MemoryError("no room")
        return whole(*args)

    monkeypatch.setattr(where, fails, out_of_memory)
    with pytest.raises(MemoryError):
        pruning.remove([optimizer])
    assert_nothing_happened(model, before, optimizer)
    monkeypatch.undo()
    with torch.no_grad():
        wanted = model(X)
        assert relative(pruning.remove([optimizer])(X), wanted) < 1e-5


def test_frozen_layers_are_cut_and_stay_frozen():
    model = tiny(depth=2).requires_grad_(False)
    pruning = chosen(model)
    with torch.no_grad():
        wanted = model(X)
        assert relative(pruning.remove()(X), wanted) < 1e-5
    assert not any(p.requires_grad for p in model.parameters())


def test_the_embedding_is_cut_whole_or_not_at_all():
    for put, match in (
        (lambda m: parametrizations.weight_norm(m.blocks[1].mlp.fc1), r"blocks\.1\.mlp\.fc1 .*reparametrised"),
        (lambda m: prune.random_unstructured(m.norm, "weight", 0.5), r"norm .*mask"),
        (lambda m: setattr(m, "head", nn.Sequential(nn.Linear(48, 5))), "head is a Sequential"),
    ):
        model = tiny(depth=2)
        put(model)
        before = everything(model)
        with pytest.raises(PrunexError, match=match):
            widths.narrow(model, prunex.WidthSpec(embedding=tuple(range(24))))
        assert_nothing_happened(model, before)


def test_gates_that_were_wrapped_or_lost_are_noticed():
    peft = pytest.importorskip("peft")
    for put_first in (True, False):
        model = tiny(depth=2)
        adapter = None if put_first else lora(peft, model)
        pruning = prunex.attach(model, "random", budget=0.5)
        if put_first:
            lora(peft, model, r".*\.proj")  # the gate is now inside, in front of the base layer alone
        else:
            adapter.merge_and_unload()  # and here it went with the adapter
        with pytest.raises(PrunexError, match=r"blocks\.0\.(attn\.proj|mlp\.fc2) was replaced or wrapped"):
            pruning.calibrate()
        pruning.detach()
        model = model if put_first else vit_of(model)
        assert prunex.attach(model, "random", budget=0.5).calibrate() is not None


@pytest.mark.parametrize("method", ["magnitude", "taylor", "relevance"])
def test_criteria_score_what_the_layers_compute(method):
    batches = [(X, torch.tensor([0, 1]))]
    found = []
    for model in adapted("lora"):
        found.append(prunex.attach(model, method, budget=0.6))
        found[-1].calibrate(batches)
    scores = [p.pruner.scores(p.model, batches) for p in found]
    # Relevance is divided by layer outputs that may be close to 0.
    assert all(relative(scores[0][k], scores[1][k]) < 5e-3 for k in scores[1])
    assert found[0].widths == found[1].widths
