import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunex
from prunex import PrunexError
from prunex.explainers.integrated_gradients import quadrature
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
RULES = ["gausslegendre", "middle", "trapezoid", "left", "right"]
SPACES = ["pixels", "tokens"]

both = pytest.mark.parametrize("space", SPACES)


def explain(model, x, target=TARGETS, **options):
    return prunex.explain("integrated_gradients", model, x, target, **options)


# -------------------------------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 7, 50, 200])
def test_weights_sum_to_one_so_that_a_linear_model_is_exact(rule, steps):
    # The gradient of a linear model is the same at all points: IG = w (x - x0) times the sum of the weights.
    nodes, weights = quadrature(rule, steps)
    assert nodes.dtype == weights.dtype == torch.float64
    assert nodes.shape == weights.shape == (steps,)
    assert abs(float(weights.sum()) - 1) < 1e-13
    assert ((nodes >= 0) & (nodes <= 1)).all()
    assert (nodes.diff() > 0).all()


def test_where_the_points_lie():
    assert quadrature("left", 4)[0].tolist() == [0, 0.25, 0.5, 0.75]
    assert quadrature("right", 4)[0].tolist() == [0.25, 0.5, 0.75, 1]
    assert quadrature("middle", 4)[0].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert quadrature("trapezoid", 5)[0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert quadrature("trapezoid", 5)[1].tolist() == [0.125, 0.25, 0.25, 0.25, 0.125]
    for rule in ("gausslegendre", "middle"):
        assert quadrature(rule, 1)[0].tolist() == [0.5]
        assert quadrature(rule, 1)[1].tolist() == [1]


@pytest.mark.parametrize(
    ("rule", "steps", "degree"),
    [("gausslegendre", 1, 1), ("gausslegendre", 4, 7), ("middle", 1, 1), ("middle", 9, 1), ("trapezoid", 6, 1)],
)
def test_polynomials_up_to_a_degree_are_exact(rule, steps, degree):
    # Degree 1 is the gradient of f = sum x^2, whose attributions are x^2 - x0^2.
    nodes, weights = quadrature(rule, steps)
    for power in range(degree + 1):
        assert abs(float((weights * nodes**power).sum()) - 1 / (power + 1)) < 1e-13
    beyond = degree + 1 + (degree + 1) % 2
    assert abs(float((weights * nodes**beyond).sum()) - 1 / (beyond + 1)) > 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_more_steps_come_nearer(rule):
    errors = []
    for steps in (4, 8, 16):
        nodes, weights = quadrature(rule, steps)
        errors.append(abs(float((weights * (3 * nodes).exp()).sum()) - (torch.tensor(3.0).double().exp() - 1) / 3))
    order = {"left": 1.7, "right": 1.7, "middle": 3.8, "trapezoid": 3.8}.get(rule, 1000)
    assert errors[0] > order * errors[1]
    assert errors[1] > order * errors[2] or errors[2] < 1e-12


# ------------------------------------------------------------------------------------------------------ the definition


def slow(model, image, start, target, steps, space, kept=None):
    """One image, one step at a time, by timm's own modules; patches leave before the blocks that ``kept`` names."""
    prefix = model.num_prefix_tokens
    nodes, weights = quadrature("middle", steps)
    if space == "pixels":
        end, enter = image[None], model.patch_embed
    else:
        end, start, enter = model.patch_embed(image[None]).detach(), model.patch_embed(start).detach(), nn.Identity()

    def logit(moved):
        x = model.norm_pre(model._pos_embed(enter(moved)))
        for i, block in enumerate(model.blocks):
            if kept and i in kept:
                x = torch.cat([x[:, :prefix], x[:, prefix:][:, kept[i]]], 1)
            x = block(x)
        return model.forward_head(model.norm(x))[0, target]

    total = torch.zeros_like(end)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        point = (start + node * (end - start)).detach().requires_grad_()
        total += weight * torch.autograd.grad(logit(point), point)[0]
    with torch.no_grad():
        return ((end - start) * total)[0], logit(end) - logit(start)


@both
@pytest.mark.parametrize("baseline", [0.0, -1.5])
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "clip", "avg_pool_no_class", "no_pos_embed"])
def test_equals_the_definition(family, baseline, space):
    model = tiny(family).double()
    x = images_for(model, 2)
    e = explain(model, x, TARGETS[:2], space=space, baseline=baseline, steps=6, rule="middle", chunk=5)
    assert e.signed
    for i, image in enumerate(x):
        wanted, difference = slow(model, image, torch.full_like(x[:1], baseline), TARGETS[i], 6, space)
        assert abs(e.info["difference"][i] - difference) < 1e-10
        assert abs(e.info["delta"][i] - (wanted.sum() - difference)) < 1e-10
        if space == "pixels":
            assert relative(e.raw[i], wanted) < 1e-10
            assert relative(e.pixels[i], wanted.sum(0)) < 1e-10
            assert relative(e.maps[i], wanted.unfold(1, 8, 8).unfold(2, 8, 8).sum((0, 3, 4))) < 1e-10
        else:
            assert relative(e.maps[i].flatten(), wanted.flatten(0, -2).sum(-1)) < 1e-10
            assert (e.raw[i, : model.num_prefix_tokens] == 0).all()
            assert e.raw[i, model.num_prefix_tokens :].equal(e.maps[i].flatten())
            assert e.pixels.equal(e.upsample())


@both
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool"])
def test_complete_and_more_so_with_more_steps(family, space):
    model = tiny(family).double()
    x = images_for(model)
    errors = []
    for steps in (100, 200):
        e = explain(model, x, space=space, steps=steps, chunk=100)
        assert relative(e.raw.flatten(1).sum(1) - e.info["difference"], e.info["delta"]) < 1e-6
        errors.append(e.info["delta"].abs().max() / e.info["difference"].abs().max())
    assert errors[0] < 1e-3
    assert errors[1] < 0.02 * errors[0]


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, space):
    model = tiny(family).double()
    x = images_for(model)
    e = explain(model, x, space=space, baseline=0.8 * x, steps=10)
    for i in range(3):
        one = explain(model, x[i : i + 1], TARGETS[i : i + 1], space=space, baseline=0.8 * x[i], steps=10)
        assert relative(one.raw[0], e.raw[i]) < 1e-10
    # Where the largest is pooled, another patch becomes it along the way: a kink, which no rule meets exactly.
    limit = 0.3 if "max" in family else 1e-4
    assert e.info["delta"].abs().max() / e.info["difference"].abs().max() < limit


@both
def test_both_spaces_start_and_end_at_the_same_outputs(space):
    model = tiny().double()
    x = images_for(model)
    e = explain(model, x, space=space, steps=1, baseline=0.5)
    with torch.no_grad():
        wanted = model(x) - model(torch.full_like(x, 0.5))
    assert relative(e.info["difference"], wanted.gather(1, TARGETS[:, None])[:, 0]) < 1e-10


@both
def test_an_image_that_is_its_baseline_has_nothing(space):
    model, x = tiny(), images()
    e = explain(model, x, space=space, baseline=x, steps=3)
    assert (e.raw == 0).all()
    assert largest(e.info["delta"], torch.zeros(3)) < 1e-6
    x[1] = 0.25
    e = explain(model, x, space=space, baseline=0.25, steps=3)
    assert (e.maps[1] == 0).all()
    assert (e.maps[[0, 2]] != 0).all()
    half = images()
    half[:, :, :, :16] = 0  # what equals the baseline gets 0
    assert (explain(model, half, steps=3).pixels[:, :, :16] == 0).all()


@both
def test_baselines(space):
    model, x = tiny(), images()
    number = explain(model, x, space=space, baseline=1, steps=3)
    for tensor in (
        torch.tensor(1.0),
        torch.tensor(1),
        torch.ones(3, 1, 1),
        torch.ones(1, 1, 32, 32),
        torch.ones(3, 3, 32, 32, dtype=torch.float64),
    ):
        assert explain(model, x, space=space, baseline=tensor, steps=3).raw.equal(number.raw)
    each = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    e = explain(model, x, space=space, baseline=each, steps=3)
    for i in range(3):
        one = explain(model, x[i : i + 1], TARGETS[i : i + 1], space=space, baseline=float(i), steps=3)
        assert relative(one.raw[0], e.raw[i]) < 1e-5
    assert e.options["baseline"] is each
    assert number.options == {
        "steps": 3,
        "baseline": 1,
        "space": space,
        "rule": "gausslegendre",
        "chunk": None,
    }


@both
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_change_nothing(chunk, space):
    model = tiny()
    sizes = []
    model.blocks[1].register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    model.blocks[1].mlp.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    wanted = explain(model, images(), space=space, steps=5)
    sizes.clear()
    e = explain(model, images(), space=space, steps=5, chunk=chunk)
    assert max(sizes[2:]) == min(chunk, 15)  # the first two are the clean run of the whole batch, block and MLP
    assert relative(e.raw, wanted.raw) < 1e-5
    assert relative(e.info["difference"], wanted.info["difference"]) < 1e-5


def test_the_class_is_chosen_once():
    model = tiny()
    x = images()
    with torch.no_grad():
        own, middle = model(x).argmax(1), model(0.1 * x).argmax(1)
    assert not own.equal(middle)  # on the way another class wins
    e = explain(model, x, None, steps=5)
    assert e.target.equal(own)
    assert e.raw.equal(explain(model, x, own, steps=5).raw)


@both
def test_permuting_patches_with_their_positions_permutes_the_map(space):
    model = tiny().double()
    x = images_for(model)
    before = explain(model, x, space=space, steps=4).maps.flatten(1)
    order = torch.randperm(16)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # [B, 3, 16, 8, 8]
    moved = patches[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape_as(x)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    assert relative(explain(model, moved, space=space, steps=4).maps.flatten(1), before[:, order]) < 1e-12


@both
@pytest.mark.parametrize("size", [(32, 56), (30, 50)])
def test_other_sizes_and_padding(size, space):
    model = tiny("dynamic", dynamic_img_pad=True).double()
    x = images(2, size, dtype=torch.float64)
    e = explain(model, x, TARGETS[:2], space=space, baseline=0.8 * x, steps=10)
    assert e.maps.shape == (2, 4, 7)
    assert e.pixels.shape == (2, *size)
    assert relative(e.maps.sum((1, 2)), e.info["difference"]) < 1e-4
    if space == "pixels":
        assert e.raw.shape == x.shape
        for i in range(4):
            for j in range(7):
                own = e.pixels[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].sum((1, 2))
                assert largest(e.maps[:, i, j], own) < 1e-12


# --------------------------------------------------------------------------------------------------------------- pruned


def attach(model, pruner, **options):
    extra = {"fuse": False} if pruner == "evit_unfused" else {}
    pruning = prunex.attach(model, pruner.removesuffix("_unfused"), **(options | extra))
    randomise(pruning.pruner)
    return pruning


@both
@pytest.mark.parametrize("pruner", ["topk", "evit", "evit_unfused", "dynamicvit"])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
def test_frozen_selection_is_complete_and_masked_equals_removed(family, pruner, space):
    model = tiny(family).double()
    x = images_for(model)
    with attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        removed = explain(model, x, space=space, baseline=0.6 * x, steps=20)
        pruning.masked = True
        masked = explain(model, x, space=space, baseline=0.6 * x, steps=20)
        pruning.masked = None
        one = explain(model, x[1:2], TARGETS[1:2], space=space, baseline=0.6 * x[1], steps=20)
    assert (removed.info["delta"] / removed.info["difference"]).abs().max() < 1e-3
    assert relative(masked.raw, removed.raw) < 1e-10
    assert relative(masked.info["difference"], removed.info["difference"]) < 1e-10
    assert relative(one.raw[0], removed.raw[1]) < 1e-10
    gone = ~removed.trace.kept()
    assert gone.any()
    assert (removed.maps[gone] != 0).all()  # they met the others before they left


@both
def test_frozen_selection_equals_the_definition(space):
    model = tiny().double()
    x = images_for(model)
    pruning = attach(model, "dynamicvit", keep_ratio=0.5, stages=(0, 2))
    e = explain(model, x, space=space, steps=5, rule="middle")
    pruning.detach()
    for i, image in enumerate(x):
        first, second = (e.trace.kept(stage)[i].flatten().nonzero().flatten() for stage in (0, 1))
        kept = {0: first, 2: torch.isin(first, second)}
        wanted, difference = slow(model, image, torch.zeros_like(x[:1]), TARGETS[i], 5, space, kept)
        assert abs(e.info["difference"][i] - difference) < 1e-10
        got = e.raw[i] if space == "pixels" else e.raw[i, 1:]
        assert relative(got, wanted if space == "pixels" else wanted.sum(-1)) < 1e-10


@both
@pytest.mark.parametrize("masked", [None, True])
def test_a_patch_dropped_before_it_met_another_has_exactly_none(masked, space):
    model = tiny()
    with attach(model, "dynamicvit", keep_ratio=0.5, stages=(0, 2)) as pruning:
        pruning.masked = masked
        e = explain(model, images(), space=space, steps=4)
    first, last = e.trace.kept(0), e.trace.kept()
    assert (~first).sum() == 3 * 8
    # In its slot a dropped key keeps a weight of rounding, e^-40.
    assert e.maps[~first].abs().max() <= (1e-15 if masked else 0)
    assert (e.maps[first & ~last] != 0).all()
    assert (e.maps[last] != 0).all()


def test_choosing_anew_at_every_step_would_not_add_up():
    # Why the selection is frozen: the same sum over the model as it is.
    model = tiny().double()
    x = images_for(model)
    nodes, weights = quadrature("middle", 100)
    with attach(model, "topk", keep_ratio=0.3, stages=(0, 1)):
        total = torch.zeros_like(x)
        for node, weight in zip(nodes, weights, strict=True):
            point = (node * x).requires_grad_()
            score = model(point).gather(1, TARGETS[:, None]).sum()
            total += weight * torch.autograd.grad(score, point)[0]
        with torch.no_grad():
            jumps = (model(x) - model(0 * x)).gather(1, TARGETS[:, None])[:, 0]
        e = explain(model, x, steps=100, rule="middle")
    anew = ((x * total).sum((1, 2, 3)) - jumps).abs() / jumps.abs()
    assert anew.max() > 0.05
    assert (e.info["delta"] / e.info["difference"]).abs().max() < 1e-3


@both
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_keep_ratio_one_is_the_dense_map(pruner, space):
    model = tiny()
    dense = explain(model, images(), space=space, steps=3)
    for masked in (None, True):
        with attach(model, pruner, keep_ratio=1.0, stages=(1, 2)) as pruning:
            pruning.masked = masked
            assert explain(model, images(), space=space, steps=3).raw.equal(dense.raw)


# ------------------------------------------------------------------------------------------------------ modes and input


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_training_and_half_precision(mode, space):
    model = tiny(drop_path_rate=0.2)
    wanted = explain(model, images(), space=space, steps=4)
    model.train()
    with mode():
        e = explain(model, images(), TARGETS.clone(), space=space, steps=4, baseline=torch.zeros(3, 1, 1))
    assert e.raw.equal(wanted.raw)
    for tensor in (e.raw, e.maps, e.pixels, *e.info.values()):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    half = explain(copy.deepcopy(model).bfloat16(), images(), space=space, steps=4)
    for tensor in (half.raw, half.maps, half.pixels, *half.info.values()):
        assert tensor.dtype == torch.float32
    assert relative(half.maps, wanted.maps) < 0.25
    assert relative(explain(model.requires_grad_(False), images(), space=space, steps=4).raw, wanted.raw) < 1e-6


class Made(TorchDispatchMode):
    """The last two sizes of every tensor made, and of every weight gradient's shape."""

    def __init__(self):
        super().__init__()
        self.last, self.whole = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.last.add(tuple(t.shape[-2:]))
                if "mm" in str(func) or "convolution_backward" in str(func):
                    self.whole.add(tuple(t.shape))
        return out


@both
def test_attention_stays_fused_and_no_parameter_is_differentiated(space):
    model = tiny(img_size=40, num_heads=3)  # 26 tokens, a number that no width here has
    with Made() as made:
        explain(model, images(2, (40, 40)), TARGETS[:2], space=space, steps=3)
    assert (26, 48) in made.last
    assert (26, 26) not in made.last
    weights = {tuple(w.shape) for w in (model.blocks[0].mlp.fc1.weight, model.blocks[0].attn.qkv.weight)}
    transposed = {shape[::-1] for shape in weights}
    assert not made.whole & (weights | transposed | {tuple(model.patch_embed.proj.weight.shape)})
    with Made() as made:  # and the detector does detect
        model(images(2, (40, 40))).sum().backward()
    assert made.whole & (weights | transposed)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps=0 is not allowed: gausslegendre takes an integer of at least 1"),
        ({"steps": 1, "rule": "trapezoid"}, "steps=1 is not allowed: trapezoid takes an integer of at least 2"),
        ({"steps": 5.0}, "steps=5.0 is not allowed"),
        ({"steps": True}, "steps=True is not allowed"),
        ({"rule": "trapezoidal"}, "unknown rule 'trapezoidal': did you mean 'trapezoid'"),
        ({"rule": None}, "unknown rule None"),
        ({"space": "patches"}, "unknown space 'patches'.*Known: pixels, tokens"),
        ({"chunk": 0}, "chunk=0 is not allowed"),
        ({"baseline": float("nan")}, "baseline=nan is not finite in torch.float32"),
        ({"baseline": 1e39}, r"baseline=1e\+39 is not finite in torch.float32"),
        ({"baseline": 10**400}, "is not finite"),
        ({"baseline": "black"}, "baseline='black' is not allowed: give a finite number"),
        ({"baseline": None}, "baseline=None is not allowed"),
        ({"baseline": True}, "baseline=True is not allowed"),
        ({"baseline": torch.zeros(3, 1, 1).bool()}, "baseline has dtype torch.bool"),
        ({"baseline": torch.zeros(3, 1, 1) * 1j}, "baseline has dtype torch.complex64"),
        ({"baseline": torch.full((3, 1, 1), float("inf"))}, "baseline is not finite"),
        ({"baseline": torch.zeros(3)}, r"baseline has shape \[3\] for images \[3, 3, 32, 32\].*such as \[C, 1, 1\]"),
        ({"baseline": torch.zeros(2, 3, 32, 32)}, r"baseline has shape \[2, 3, 32, 32\]"),
        ({"baseline": torch.zeros(1, 1, 3, 1, 1)}, "baseline has shape"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says) as error:
        explain(tiny(), images(), **options)
    assert "\n" not in str(error.value)


def test_a_class_needs_a_head():
    with pytest.raises(PrunexError, match="no classifier"):
        explain(tiny(num_classes=0), images(), None)


def test_a_baseline_that_is_a_number_has_the_precision_of_the_images():
    x = torch.full((1, 3, 32, 32), 0.1, dtype=torch.float64)
    assert not explain(tiny().double(), x, TARGETS[:1], baseline=0.1, steps=3).maps.any()
