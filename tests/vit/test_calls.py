"""Hooks of blocks and of what is in them, where a pruner or an explainer acts inside."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import prunex
from prunex.vit.calls import inside
from tests.vits import images, largest, randomise, state_of, tiny

OPENERS = {
    "evit": {"keep_ratio": 0.5, "stages": (1, 3)},
    "topk": {"keep_ratio": 0.5, "stages": (1, 3)},
    "dynamicvit": {"keep_ratio": 0.5, "stages": (1, 3)},  # masked below: its blocks run under a policy
    "tome": {"r": 3},
    "diffrate": {"keep_ratio": 0.7},
    "ppt": {"r": 3, "tau": 0.01},
    "adaptive": {"keep_ratio": 0.5, "stages": (1, 2), "count": "adaptive"},
}
PLACES = ("blocks.1", "blocks.3", "blocks.1.attn", "blocks.3.mlp", "blocks.1.norm1", "blocks.2.drop_path2", "blocks")


def pruned(name, family="vit", **more):
    torch.manual_seed(0)  # of predictors
    model = tiny(family, **more).eval()
    pruning = prunex.attach(model, "dynamicvit" if name == "adaptive" else name, **OPENERS[name])
    randomise(pruning.pruner)
    if name == "dynamicvit":
        pruning.masked = True
    return model, pruning


def counted(model, names):
    """Counts of what fires on each of the named modules, pre-hooks and hooks apart."""
    counts = {name: [0, 0] for name in names}
    for name in names:
        module = model.get_submodule(name)

        def before(module, args, name=name, mine=module):
            assert module is mine
            counts[name][0] += 1

        def after(module, args, out, name=name, mine=module):
            assert module is mine
            counts[name][1] += 1

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return counts


def no_switches(model):
    return all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("family", ["vit", "dinov2_giant", "eva02", "beit", "res_post", "avg_pool_no_class"])
@pytest.mark.parametrize("name", OPENERS)
def test_hooks_fire_once_a_forward_and_change_nothing(name, family):
    model, _ = pruned(name, family)
    x = images(3)
    with torch.no_grad():
        wanted = model(x)
        paths = [f"blocks.{i}{part}" for i in range(4) for part in ("", ".attn", ".mlp", ".norm1", ".norm2")]
        counts = counted(model, paths)
        assert largest(model(x), wanted) < 1e-5
    assert counts == {path: [1, 1] for path in paths}
    assert no_switches(model)


@pytest.mark.parametrize("method", ["rollout", "generic_attention", "lrp", "tokentm", "partial_lrp"])
def test_hooks_fire_while_a_dense_model_is_explained(method):
    model = tiny().eval()
    before = prunex.explain(method, model, images(2), target=1)
    paths = [f"blocks.{i}{part}" for i in range(4) for part in ("", ".attn", ".mlp")] + ["patch_embed", "blocks"]
    counts = counted(model, paths)
    attributes = state_of(model)["attributes"]
    e = prunex.explain(method, model, images(2), target=1)
    assert all(a == b > 0 for a, b in counts.values())
    assert largest(e.maps, before.maps) < 1e-5
    assert state_of(model)["attributes"] == attributes


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize("place", ["block", "attn", "mlp", "block, before"])
def test_what_a_hook_changes_is_obeyed(name, place):
    """The same change made in weights, or to what the next block is given."""
    (hooked, _), (other, _) = pruned(name), pruned(name)
    with torch.no_grad():
        if place == "attn":
            hooked.blocks[1].attn.register_forward_hook(lambda m, args, out: out * 0.5)
            proj = other.blocks[1].attn.proj
            proj.weight.mul_(0.5), proj.bias.mul_(0.5)
        elif place == "mlp":
            hooked.blocks[1].mlp.register_forward_hook(lambda m, args, out: out * 0.5)
            fc2 = other.blocks[1].mlp.fc2
            fc2.weight.mul_(0.5), fc2.bias.mul_(0.5)
        elif place == "block":
            hooked.blocks[3].register_forward_hook(lambda m, args, out: out + 0.3)
            other.norm.register_forward_pre_hook(lambda m, args: (args[0] + 0.3,))
        else:
            hooked.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
            other.norm_pre.register_forward_hook(lambda m, args, out: out * 0.5)
        x = images(3)
        assert largest(hooked(x), other(x)) < 1e-5
        if place != "block, before":  # what is explained is that model
            logits = prunex.explain("rollout", hooked, x).logits
            assert largest(logits, hooked(x)) < 1e-5


@pytest.mark.parametrize("place", PLACES)
def test_an_explained_dense_model_is_the_one_with_its_hooks(place):
    model, x = tiny().eval(), images(2)
    plain = model(x)
    model.get_submodule(place).register_forward_hook(lambda m, args, out: 0.2 * out + out.roll(1, -1))
    assert largest(model(x), plain) > 1e-3
    for method in ("rollout", "generic_attention", "integrated_gradients"):
        assert largest(prunex.explain(method, model, x).logits, model(x)) < 1e-5


def test_hooks_see_all_tokens_where_only_some_are_needed():
    model = tiny().eval()
    seen = []
    for part in (model.blocks[3], model.blocks[3].attn, model.blocks[3].mlp.fc1):
        part.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    prunex.explain("integrated_gradients", model, images(1), steps=2)
    assert set(seen) == {17}
    seen.clear()
    pruning = prunex.attach(model, "patch_slimming")
    pruning.calibrate(images(4))
    seen.clear()
    model(images(1))
    entering = 1 + pruning.counts()[-2]
    assert seen[0] == entering  # the attention of the last block gives all that enter it


@pytest.mark.parametrize("name", OPENERS)
def test_backward_hooks(name):
    model, pruning = pruned(name)
    model.train()
    pruning.masked = None
    fired = []
    for part in (model.blocks[1], model.blocks[1].attn, model.blocks[3].mlp):
        part.register_full_backward_hook(lambda m, given, got: fired.append((m, got[0].shape[-1], given[0] is None)))
    model(images(2)).sum().backward()
    assert len(fired) == 3
    assert {m for m, _, _ in fired} == {model.blocks[1], model.blocks[1].attn, model.blocks[3].mlp}
    assert all(width == 48 and not none for _, width, none in fired)


def test_global_hooks_see_every_module_once():
    model, _ = pruned("evit")
    called = []
    handles = [
        register_module_forward_hook(lambda m, args, out: called.append(m)),
        register_module_forward_pre_hook(lambda m, args: None),
    ]
    try:
        model(images(2))
    finally:
        for handle in handles:
            handle.remove()
    for block in model.blocks:
        for part in (block, block.attn, block.mlp, block.norm1):
            assert sum(m is part for m in called) == 1


@pytest.mark.parametrize("attached", [False, True])
def test_threads_share_a_model_with_hooks(attached):
    """Some explain it, some run it; each hook call belongs to one of them, and nothing is left behind."""
    model = pruned("evit")[0] if attached else tiny().eval()
    model.blocks[1].register_forward_hook(lambda m, args, out: out * 0.9)
    model.blocks[1].attn.register_forward_hook(lambda m, args, out: out * 1.1)
    before = state_of(model)["attributes"]

    def work(job):
        kind, x = job
        if kind == "run":
            with torch.no_grad():
                return model(x)
        return prunex.explain(kind, model, x, target=1).maps

    jobs = [(kind, images(n, seed=n)) for n in (1, 2, 3) for kind in ("run", "rollout", "generic_attention")] * 6
    wanted = [work(job) for job in jobs[:9]] * 6
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, jobs))
    assert max(largest(a, b) for a, b in zip(results, wanted, strict=True)) < 1e-5
    assert state_of(model)["attributes"] == before


def test_an_exception_inside_leaves_nothing_behind():
    model, pruning = pruned("evit")
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    handle = model.blocks[1].mlp.fc2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(1))
    assert no_switches(model)
    handle.remove()
    wanted = model(images(1))
    for copied in (copy.deepcopy(model.blocks[0]),):
        assert no_switches(copied)
    assert largest(wanted, model(images(1))) == 0
    model.blocks[1]._forward_hooks.clear(), model.blocks[1].attn._forward_hooks.clear()
    assert largest(pickle.loads(pickle.dumps(model))(images(1)), wanted) < 1e-6


@pytest.mark.parametrize("name", ["evit", "dynamicvit"])
def test_gradient_checkpointing_with_hooks(name):
    grads = []
    for saves in (False, True):
        model, pruning = pruned(name)
        pruning.masked = None
        for part in (model.blocks[1], model.blocks[1].attn):
            part.register_forward_hook(lambda m, args, out: out * 0.9)
        model.train().set_grad_checkpointing(saves)
        torch.manual_seed(3)
        (model(images(2)).square().sum() + sum(pruning.losses().values())).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert max(largest(grads[0][n], grads[1][n]) for n in grads[0]) < 1e-5


def test_compiled_with_hooks():
    model, _ = pruned("evit")
    model.blocks[1].register_forward_hook(lambda m, args, out: out * 0.9)
    x = images(2)
    with torch.no_grad():
        wanted = model(x)
        torch._dynamo.reset()
        assert largest(torch.compile(model, backend="eager")(x), wanted) < 1e-6
        torch._dynamo.reset()
        with pytest.raises(Exception, match="hooks see the call"):
            torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "path"),
    [("parallel_scaling", "blocks.1.in_norm"), ("parallel_scaling", "blocks.1.ls"), ("things", "blocks.1.attns.0")],
)
def test_hooks_that_parallel_blocks_cannot_honour_are_refused(family, path):
    from timm.models.vision_transformer import ParallelThingsBlock

    model = tiny(block_fn=ParallelThingsBlock).eval() if family == "things" else tiny(family).eval()
    prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,))
    counts = counted(model, ["blocks.0", "blocks.1"])
    model(images(1))
    assert counts == {"blocks.0": [1, 1], "blocks.1": [1, 1]}
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(prunex.PrunexError, match=f"hooks on {path.split('.', 2)[2]} of a Parallel"):
        model(images(1))


class Doubles(torch.nn.Module):
    def forward(self, x, more=0):
        return 2 * x + more


def test_inside():
    module, x = Doubles(), torch.ones(2)
    assert inside(module, lambda x: x + 1, x).tolist() == [2, 2]
    module.register_forward_pre_hook(lambda m, args, kwargs: (args, {"more": 5}), with_kwargs=True)
    module.register_forward_hook(lambda m, args, out: out + module.forward(x))  # whoever calls it gets its own forward
    assert inside(module, lambda x, more: x + more, x).tolist() == [8, 8]
    assert inside(module, lambda x, more: module(x) + more, x).tolist() == [16, 16]
    assert module(x).tolist() == [9, 9]
    assert "forward" not in vars(module)
    module.forward = lambda x, more=0: -x  # somebody's own stays
    assert inside(module, lambda x, more: x + more, x).tolist() == [5, 5]
    assert module(x).tolist() == [-2, -2]
