"""Compiled models: pruned, explained and slimmed as eager ones are, or refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunex
from prunex import PrunexError
from tests.vits import images, quick, relative, tiny

X, Y = images(2), torch.tensor([0, 1])
EVIT = {"keep_ratio": 0.6, "stages": (0,)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Holds(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, x):
        return self.vit((x - 0.1) / 0.9)


def compiled(model, **more):
    return torch.compile(model, **more)


def in_place(model, **more):
    model.compile(**more)
    return model


def on_the_object(model, **more):
    model.forward = torch.compile(model.forward, **more)
    return model


def blocks_in_place(model, **more):
    for block in model.blocks:
        block.compile(**more)
    return model


def halves_in_place(model, **more):
    for block in model.blocks:
        block.attn.compile(**more)
        block.mlp.compile(**more)
    return model


def inside(model, **more):
    return Holds(torch.compile(model, **more))


def round_it(model, **more):
    return torch.compile(Holds(model), **more)


WAYS = [compiled, in_place, on_the_object, blocks_in_place, halves_in_place, inside, round_it]


def pair(way, backend="eager"):
    """A compiled model, and its twin as the user would call it without."""
    model = tiny(depth=2)
    twin = copy.deepcopy(model)
    return way(model, backend=backend), Holds(twin) if way in (inside, round_it) else twin


@pytest.mark.parametrize("way", quick(WAYS, [in_place, halves_in_place, round_it]))
@torch.no_grad()
def test_a_graph_from_before_shows_neither_a_dense_nor_a_pruned_model_that_is_gone(way):
    model, twin = pair(way)
    dense = model(X)
    assert relative(dense, twin(X)) < 1e-6
    pruning, other = (prunex.attach(m, "evit", **EVIT) for m in (model, twin))
    wanted = twin(X)
    assert relative(wanted, dense) > 1e-3
    for _ in range(2):
        assert relative(model(X), wanted) < 1e-6
    assert torch.equal(pruning.trace.kept(), other.trace.kept())
    units, of_twin = (prunex.attach(m, "magnitude", budget=0.5) for m in (model, twin))
    for each in (units, of_twin):
        each.calibrate()
    wanted = twin(X)
    assert relative(model(X), wanted) < 1e-6
    assert relative(prunex.slim(model)((X - 0.1) / 0.9 if isinstance(twin, Holds) else X), wanted) < 1e-5
    for each in (units, of_twin):
        each.remove()
    assert relative(model(X), twin(X)) < 1e-6
    for each in (pruning, other, units, of_twin):
        each.detach()
    assert relative(model(X), twin(X)) < 1e-6


@pytest.mark.parametrize("way", [compiled, in_place, blocks_in_place])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step_has_the_losses_and_gradients_of_an_eager_one(way, backend):
    model, twin = pair(way, backend)
    prunings = [prunex.attach(m, "dynamicvit", teacher=False, **EVIT) for m in (model, twin)]
    prunings[1].pruner.load_state_dict(prunings[0].pruner.state_dict())
    sums = []
    for each, pruning in zip((model, twin), prunings, strict=True):
        torch.manual_seed(0)
        sums.append(F.cross_entropy(each.train()(X), Y) + sum(pruning.losses(Y).values()))
        sums[-1].backward()
    assert relative(*sums) < 1e-6
    whole = dict(twin.named_parameters())
    for name, p in prunings[0].model.named_parameters():
        if whole[name].grad is not None:
            assert relative(p.grad, whole[name].grad) < 1e-5, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pruned", [False, True])
def test_explanations_are_those_of_the_eager_model(way, pruned):
    model, twin = pair(way)
    if pruned:
        for each in (model, twin):
            prunex.attach(each, "evit", **EVIT)
    with torch.no_grad():
        model(X)
    for method, options in (("generic_attention", {}), ("lrp", {}), ("lrp", {"rule": "attnlrp"}), ("rollout", {})):
        a, b = (prunex.explain(method, m, X, None if method == "rollout" else 1, **options) for m in (model, twin))
        assert relative(a.maps, b.maps) < 1e-6
        assert relative(a.logits, b.logits) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_is_timms_own(tmp_path, way):
    model, twin = pair(way)
    prunex.attach(model, "evit", **EVIT)
    small = prunex.load(prunex.save(model, tmp_path / "slim"))
    assert not any("_orig_mod" in name for name in small.state_dict())
    assert all(m._compiled_call_impl is None for m in prunex.slim(model).modules())
    prunex.attach(twin, "evit", **EVIT)
    with torch.no_grad():
        assert relative(small((X - 0.1) / 0.9 if isinstance(twin, Holds) else X), twin(X)) < 1e-5


@pytest.mark.parametrize("way", [in_place, blocks_in_place, halves_in_place])
def test_units_are_scored_as_in_the_eager_model(way):
    batches = [(X, Y)]
    model, twin = pair(way)
    with torch.no_grad():
        model(X)
    scores = [prunex.attach(m, "taylor", budget=0.6).pruner for m in (model, twin)]
    scores = [pruner.scores(m, batches) for pruner, m in zip(scores, (model, twin), strict=True)]
    assert all(relative(scores[0][key], scores[1][key]) < 1e-5 for key in scores[1])
    for each in (model, twin):
        prunex.attached(each, units=True).calibrate(batches)
    with torch.no_grad():
        assert relative(model(X), twin(X)) < 1e-5


def wrap_blocks(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return r"blocks\.1 "


def wrap_mlp(model):
    model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")
    return r"blocks\.0\.mlp "


def wrap_layer(model):
    model.blocks[0].attn.qkv = torch.compile(model.blocks[0].attn.qkv, backend="eager")
    return r"blocks\.0\.attn\.qkv "


@pytest.mark.parametrize("wrap", [wrap_blocks, wrap_mlp, wrap_layer])
def test_parts_in_wrappers_are_refused_with_the_remedy(tmp_path, wrap):
    model = tiny(depth=2)
    match = wrap(model) + r"of this VisionTransformer is wrapped by torch\.compile: .*\.compile\(\)"
    for refused in (
        lambda: prunex.attach(model, "evit"),
        lambda: prunex.attach(model, "magnitude"),
        lambda: prunex.attach(model, "mean_patch"),
        lambda: prunex.explain("lrp", nn.Sequential(model), X, 1),
        lambda: prunex.slim(model),
        lambda: prunex.save(model, tmp_path / "slim"),
    ):
        with pytest.raises(PrunexError, match=match) as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["forward_features", "forward_head"])
def test_a_compiled_method_would_be_lost_and_is_refused(name):
    model = tiny(depth=2)
    method = torch.compile(getattr(model, name), backend="eager")
    setattr(model, name, method)
    for method_name in ("evit", "mean_patch"):
        with pytest.raises(PrunexError, match=rf"{name} of this VisionTransformer is compiled .*model\.compile\(\)"):
            prunex.attach(model, method_name)
    assert vars(model)[name] is method
    assert prunex.explain("rollout", model, X).maps.shape == (2, 4, 4)


@pytest.mark.slow
def test_with_inductor(tmp_path):
    """The real compiler, where there is one."""
    model, twin = pair(compiled, "inductor")
    prunings = [prunex.attach(m, "evit", **EVIT) for m in (model, twin)]
    try:
        logits = model(X)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no compiler that inductor can use: {error}"[:120])
    assert relative(logits, twin(X)) < 1e-4
    assert torch.equal(prunings[0].trace.kept(), prunings[1].trace.kept())
    F.cross_entropy(model.train()(X), Y).backward()
    F.cross_entropy(twin.train()(X), Y).backward()
    for (name, p), q in zip(prunings[0].model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            assert relative(p.grad, q.grad) < 1e-3, name
