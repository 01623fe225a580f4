import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prunex
from prunex import PrunexError
from tests.explainers.definitions import opened
from tests.vits import FAMILIES, images, images_for, largest, quick, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
KINDS = ["tokens", "attention", "layercam", "elementwise"]

every = pytest.mark.parametrize("kind", KINDS)


def explain(model, x, target=TARGETS, **options):
    return prunex.explain("grad_cam", model, x, target, **options)


def by_hooks(model, image, target, kind, layer):
    """The map before its last ReLU, [P]: one image, the model's own forward, one patch and channel at a time."""
    found = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda _m, _i, out: found.append(out))
    try:
        logit = model(image[None])[0, target]
    finally:
        handle.remove()
    gradient = torch.autograd.grad(logit, found[0])[0][0, model.num_prefix_tokens :]
    activation = found[0][0, model.num_prefix_tokens :].detach()
    mean = gradient.mean(0)
    cam = []
    for a, g in zip(activation, gradient, strict=True):
        if kind == "tokens":
            cam.append(sum(w * c for w, c in zip(mean, a, strict=True)))
        elif kind == "layercam":
            cam.append(sum(max(w, 0) * c for w, c in zip(g, a, strict=True)))
        else:
            cam.append(sum(max(w * c, 0) for w, c in zip(g, a, strict=True)))
    return torch.stack([torch.as_tensor(c) for c in cam])


@pytest.mark.parametrize("kind", ["tokens", "layercam", "elementwise"])
@pytest.mark.parametrize("layer", [1, -1])
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "clip", "avg_pool", "max_pool"])
def test_equals_the_definition(family, layer, kind):
    model = tiny(family).double()
    x = images_for(model, 2)
    e = explain(model, x, TARGETS[:2], kind=kind, layer=layer)
    for i, image in enumerate(x):
        wanted = by_hooks(model, image, TARGETS[i], kind, layer)
        assert relative(e.raw[i].flatten(), wanted) < 1e-10
        assert relative(e.maps[i].flatten(), wanted.clamp(min=0)) < 1e-10


@pytest.mark.parametrize("layer", [0, 2, -1])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "qk_norm", "avg_pool", "avg_pool_no_class"])
def test_attention_equals_the_definition(family, layer):
    model = tiny(family).double()
    x, prefix = images_for(model), model.num_prefix_tokens
    rows = slice(0, 1) if model.global_pool == "token" else slice(prefix, None)
    e = explain(model, x, kind="attention", layer=layer)
    for i, image in enumerate(x):
        half = [h for h in opened(model, image, TARGETS[i]).halves if h.kind == "attention"][layer]
        a, g = half.matrix[:, rows, prefix:].mean(1), half.grad[:, rows, prefix:].sum(1)
        wanted = torch.stack([g[h].mean() * a[h] for h in range(3)]).mean(0)
        assert relative(e.raw[i].flatten(), wanted) < 1e-10


def test_attention_of_a_model_that_reads_two_tokens():
    model = tiny("deit_distilled").double()
    x, block = images_for(model), model.blocks[-1]
    entered = []
    with torch.no_grad():
        handle = block.register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
        model(x)
        handle.remove()
    e = explain(model, x, kind="attention")
    for i, stream in enumerate(entered[0]):
        q, k, v = block.attn.qkv(block.norm1(stream)).reshape(18, 3, 3, 16).permute(1, 2, 0, 3)
        a = (q @ k.mT / 4).softmax(-1)
        y = stream + block.attn.proj((a @ v).transpose(0, 1).reshape(18, 48))
        y = model.norm(y + block.mlp(block.norm2(y)))
        logits = (model.head(y[0]) + model.head_dist(y[1])) / 2
        g = torch.autograd.grad(logits[TARGETS[i]], a)[0]
        row, total = a[:, :2, 2:].mean(1), g[:, :2, 2:].sum(1)
        assert relative(e.raw[i].flatten(), (total.mean(1, keepdim=True) * row).mean(0)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@every
def test_every_family(family, kind):
    model = tiny(family)
    x = images_for(model)
    e = explain(model, x, kind=kind)
    assert (e.maps >= 0).all()
    assert e.raw.shape == e.maps.shape
    assert e.maps.equal(e.raw.clamp(min=0))
    assert e.raw.abs().amax((1, 2)).min() > 0
    assert not e.signed
    for i in range(3):
        one = explain(model, x[i : i + 1], TARGETS[i : i + 1], kind=kind)
        assert relative(one.raw[0], e.raw[i]) < 1e-5


def test_patches_have_a_gradient_at_this_norm_and_none_behind_its_attention():
    model = tiny()
    found = {}
    block = model.blocks[-1]
    for name in ("norm1", "attn", "norm2", "mlp"):
        getattr(block, name).register_forward_hook(lambda _m, _i, out, name=name: found.setdefault(name, out))
    score = model(images())[:, 1].sum()
    grads = torch.autograd.grad(score, list(found.values()))
    patch = {name: grad[:, 1:].abs().max() for name, grad in zip(found, grads, strict=True)}
    assert patch.pop("norm1") > 0
    assert all(value == 0 for value in patch.values())


@every
def test_ten_times_the_logit_is_the_same_picture(kind):
    model = tiny()

    def picture():
        maps = explain(model, images(), kind=kind).maps
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)

    before = picture()
    with torch.no_grad():
        model.head.weight *= 10
    assert relative(picture(), before) < 1e-5


@every
def test_nothing_to_see_is_zero_and_never_nan(kind):
    model = tiny()
    with torch.no_grad():
        for p in model.blocks[-1].norm1.parameters():
            p.zero_()
        if kind == "attention":  # the same values everywhere: attention is uniform, and nothing depends on it
            model.blocks[-1].attn.qkv.bias.zero_()
    e = explain(model, images(), kind=kind)
    assert (e.maps == 0).all()
    assert (e.raw == 0).all()


@pytest.mark.parametrize("kind", ["tokens", "attention"])
def test_the_opposite_class_has_the_opposite_map(kind):
    model = tiny().double()
    x = images_for(model)
    for target in range(5):
        e = explain(model, x, target, kind=kind)
        with torch.no_grad():
            model.head.weight[target] *= -1
        against = explain(model, x, target, kind=kind)
        assert relative(against.raw, -e.raw) < 1e-10
        assert ((e.maps == 0) | (against.maps == 0)).all()


@every
def test_permuting_patches_with_their_positions_permutes_the_map(kind):
    model = tiny().double()
    x = images_for(model)
    before = explain(model, x, kind=kind).raw.flatten(1)
    order = torch.randperm(16)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # [B, 3, 16, 8, 8]
    moved = patches[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape_as(x)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    assert relative(explain(model, moved, kind=kind).raw.flatten(1), before[:, order]) < 1e-12


# --------------------------------------------------------------------------------------------------------------- pruned


@every
@pytest.mark.parametrize("layer", [1, 2, -1])
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("family", quick(["vit", "dinov2_reg", "avg_pool"], ["vit"]))
def test_masked_equals_removed_and_what_left_before_is_zero(family, pruner, layer, kind):
    model = tiny(family).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, x, kind=kind, layer=layer)
        pruning.masked = True
        masked = explain(model, x, kind=kind, layer=layer)
        pruning.masked = None
        singles = [explain(model, x[i : i + 1], TARGETS[i : i + 1], kind=kind, layer=layer) for i in range(3)]
    assert relative(masked.raw, removed.raw) < 1e-12
    assert relative(torch.cat([s.raw for s in singles]), removed.raw) < 1e-12
    inside = pruner != "dynamicvit"  # these decide behind the attention of their block
    gone = torch.zeros_like(removed.maps, dtype=torch.bool)
    for stage, block in enumerate((1, 3)):
        if block < layer % 4 + (not inside):
            gone |= ~removed.trace.kept(stage)
    assert gone.any() == (layer != 1 or not inside)
    for e in (removed, masked):
        assert (e.raw[gone] == 0).all()
        assert (e.maps[gone] == 0).all()
        assert (e.raw[~gone] != 0).all() or kind == "elementwise"


@every
def test_the_mean_is_over_patches_that_are_there(kind):
    # What dynamicvit leaves behind its stage is what the plain blocks do with fewer tokens.
    model = tiny().double()
    x = images_for(model)
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(2,))
    randomise(pruning.pruner)
    e = explain(model, x, kind=kind)
    pruning.detach()
    for i, image in enumerate(x):
        kept = e.trace.kept()[i].flatten().nonzero().flatten()
        record = opened(model, image, TARGETS[i], ("given", {2: kept.tolist()}))
        half = [h for h in record.halves if h.kind == "attention"][-1]
        if kind == "attention":
            a, g = half.matrix[:, 0, 1:], half.grad[:, 0, 1:]
            wanted = (g.mean(1, keepdim=True) * a).mean(0)
        else:
            y = model.blocks[-1].norm1(half.before[None]).detach().requires_grad_()
            block, last = model.blocks[-1], half.before[None]
            last = last + block.attn(y)
            last = last + block.mlp(block.norm2(last))
            logit = model.head(model.norm(last)[:, 0])[0, TARGETS[i]]
            a, g = y.detach()[0, 1:], torch.autograd.grad(logit, y)[0][0, 1:]
            weighted = {
                "tokens": a * g.mean(0),
                "layercam": a * g.clamp(min=0),
                "elementwise": (a * g).clamp(min=0),
            }
            wanted = weighted[kind].sum(1)
        assert relative(e.raw[i].flatten()[kept], wanted) < 1e-10


@every
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_keep_ratio_one_is_the_dense_map(pruner, kind):
    model = tiny()
    dense = explain(model, images(), kind=kind)
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)):
        assert explain(model, images(), kind=kind).raw.equal(dense.raw)


# ----------------------------------------------------------------------------------------------------------------- cost


@every
def test_only_blocks_from_the_layer_on_are_on_the_graph(kind):
    model = tiny()
    seen = dict.fromkeys(range(4), False)  # the model's own forward, to compare with, has no graph anywhere
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda _m, _i, out, i=i: seen.update({i: seen[i] or out.requires_grad}))
    explain(model, images(), kind=kind, layer=2)
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert all(p.grad is None for p in model.parameters())


class Shapes(TorchDispatchMode):
    """The last two sizes of every tensor made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.seen.add(tuple(t.shape[-2:]))
        return out


@every
@pytest.mark.parametrize("layer", [1, -1])
def test_no_matrix_is_formed(kind, layer):
    model = tiny(img_size=40)  # 26 tokens, a number that no width here has
    with Shapes() as shapes:
        explain(model, images(2, (40, 40)), TARGETS[:2], kind=kind, layer=layer)
    assert (26, 48) in shapes.seen
    assert ((26, 26) in shapes.seen) == (kind == "attention" and layer == 1)


# ------------------------------------------------------------------------------------------------------ modes and input


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_training_and_half_precision(kind, mode):
    model = tiny(drop_path_rate=0.2)
    wanted = explain(model, images(), kind=kind)
    model.train()
    with mode():
        e = explain(model, images(), kind=kind)
    assert e.raw.equal(wanted.raw)
    assert not e.raw.is_inference()
    assert model.training
    half = explain(copy.deepcopy(model).bfloat16(), images(), kind=kind)
    assert half.raw.dtype == half.maps.dtype == torch.float32
    assert relative(half.raw, wanted.raw) < 0.25
    assert explain(model.requires_grad_(False), images(), kind=kind).raw.equal(wanted.raw)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "token"}, "unknown kind 'token': did you mean 'tokens'"),
        ({"kind": None}, "unknown kind None"),
        ({"layer": 4}, r"layer=4 does not exist: this model has blocks 0\.\.3"),
        ({"layer": 1.0}, "does not exist"),
        ({"layer": True}, "does not exist"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        explain(tiny(), images(), **options)


def test_a_class_needs_a_head():
    with pytest.raises(PrunexError, match="no classifier"):
        explain(tiny(num_classes=0), images(), None)


@every
def test_classes_differ(kind):
    model = tiny()
    a, b = (explain(model, images(), t, kind=kind).raw for t in (0, 3))
    assert largest(a, b) > 0.05 * float(b.abs().max())


@every
def test_a_block_whose_heads_are_gone(kind):
    model = tiny(seed=4)
    pruning = prunex.attach(model, "magnitude", budget=0.3, min_heads=0)
    pruning.calibrate()
    slim = prunex.slim(model)
    x = images(2)
    for layer in range(len(slim.blocks)):
        assert explain(slim, x, None, kind=kind, layer=layer).maps.isfinite().all()
    bare = [i for i, b in enumerate(slim.blocks) if getattr(b.attn, "num_heads", 1) == 0 or not hasattr(b.attn, "qkv")]
    assert bare  # else this tests nothing
    if kind == "attention":
        assert not explain(slim, x, None, kind=kind, layer=bare[0]).maps.any()
