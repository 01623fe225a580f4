import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.explainers.beyond_intuition import _head_shares, beyond_intuition  # noqa: F401  (registers it)
from tests.explainers import definitions
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
VARIANTS = ["token", "head"]
STEPS = 4
PRUNERS = ["topk", "evit", "dynamicvit"]


def bi(model, x, **options):
    return prunex.explain("beyond_intuition", model, x, TARGETS[: len(x)], **({"steps": STEPS} | options))


def attention_halves(record):
    return [h for h in record.halves if h.kind == "attention"]


def slow_perception(model, record, variant, start):
    """The whole P of one image, [n_last, N]."""
    p = torch.eye(len(record.embedded), dtype=record.embedded.dtype)
    for half in record.halves:
        if half.kind == "reduce":
            p = half.matrix @ p
        elif half.kind == "attention" and half.block >= start - 1:
            a = half.matrix
            if variant == "head":
                size = torch.stack([(m.T @ g).abs().mean() for m, g in zip(a, half.grad, strict=True)])
                abar = sum(s * m for s, m in zip(size / size.sum(), a, strict=True))
            else:
                block = model.blocks[half.block]
                gamma = getattr(block.ls1, "gamma", torch.ones(1, dtype=a.dtype)).detach()
                given = gamma * (half.value.permute(1, 0, 2).flatten(1) @ block.attn.proj.weight.detach().T)
                ratio = torch.stack([b.norm() / e.norm() for e, b in zip(half.before, given, strict=True)])
                abar = a.mean(0) @ torch.diag(ratio)
            p = p + abar @ p
    return p


def slow_feedback(model, image, target, steps, prune=None, block=-1):
    """F of one image by whole backward passes of every image on the path, [n, n]."""
    alphas = torch.linspace(0, 1, steps, dtype=image.dtype) if steps > 1 else [1]
    grads = [attention_halves(definitions.opened(model, alpha * image, target, prune))[block].grad for alpha in alphas]
    return torch.stack(grads).mean(0).clamp(min=0).mean(0)


def to_patches(record, f, block):
    """Columns of F given to every first token inside them."""
    inside = torch.eye(len(record.embedded), dtype=f.dtype)
    for half in record.halves:
        if half.kind == "reduce":
            inside = (half.matrix @ inside > 0).to(f.dtype)
        elif half.kind == "attention" and half.block == block:
            return f @ inside, inside.amax(0)
    raise AssertionError


def given(trace, image):
    """The kept positions of one image before blocks 1 and 3, as ``opened`` takes them."""
    first, second = (trace.kept(s)[image].flatten().nonzero().flatten().tolist() for s in (0, 1))
    return ("given", {1: first, 3: [first.index(j) for j in second]})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "qk_norm", "layer_scale", "avg_pool", "avg_pool_no_class"])
def test_equals_whole_matrices_and_whole_backward_passes(family, start, variant):
    model = tiny(family).double()
    x = images_for(model, 2)
    e = bi(model, x, variant=variant, start_layer=start)
    alone = bi(model, x, variant=variant, start_layer=start, feedback="none")
    for i, image in enumerate(x):
        record = definitions.opened(model, image, TARGETS[i])
        p, f = slow_perception(model, record, variant, start), slow_feedback(model, image, TARGETS[i], STEPS)
        assert relative(e.raw[i], record.readout @ (p * f)) < 1e-12
        assert relative(alone.raw[i], record.readout @ p) < 1e-12
        if model.global_pool == "token":
            assert (f[1:] == 0).all()  # no row but the class token's feels anything
    assert (e.raw >= 0).all()
    assert not e.signed


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["vit", "avg_pool"])
def test_pruned_equals_whole_matrices_with_the_selection_of_the_image_itself(family, variant):
    model = tiny(family).double()
    x = images_for(model, 2)
    with prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        found = {f: bi(model, x, variant=variant, feedback=f) for f in ("survivor", "none")}
    trace = found["none"].trace
    assert not trace.kept()[0].equal(trace.kept()[1])
    for i, image in enumerate(x):
        prune = given(trace, i)
        record = definitions.opened(model, image, TARGETS[i], prune)
        p = slow_perception(model, record, variant, 1)
        f, _ = to_patches(record, slow_feedback(model, image, TARGETS[i], STEPS, prune), 3)
        assert relative(found["none"].raw[i], record.readout @ p) < 1e-12
        assert relative(found["survivor"].raw[i], record.readout @ (p * f)) < 1e-12
    gone = ~trace.kept()
    assert (found["survivor"].maps[gone] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_perception_of_reordered_tokens_equals_whole_matrices(pruner, variant):
    model = tiny().double()
    x = images_for(model, 2)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)):
        e = bi(model, x, variant=variant, feedback="none")
    for i, image in enumerate(x):
        record = definitions.opened(model, image, TARGETS[i], (pruner, 0.6, (1, 3)))
        assert relative(e.raw[i], record.readout @ slow_perception(model, record, variant, 1)) < 1e-12


def test_members_of_a_fused_token_feel_what_it_feels():
    model = tiny().double()
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,)):
        e = bi(model, images(dtype=torch.float64))
        p = bi(model, images(dtype=torch.float64), feedback="none")
    for i in range(3):
        members = ~e.trace.kept()[i]
        f = e.maps[i][members] / p.maps[i][members]
        assert members.sum() == 8
        assert relative(f, f[:1].expand_as(f)) < 1e-10


def test_values_as_long_as_their_streams_give_the_product_of_a_and_i():
    # A norm that does nothing, the identity as value and output projection: every ratio is 1.
    class Same(torch.nn.Module):
        def forward(self, x):
            return x

    model = tiny(depth=3, num_heads=1).double()
    for block in model.blocks:
        block.norm1 = Same()
        with torch.no_grad():
            block.attn.qkv.weight[:96] *= 0.2
            block.attn.qkv.weight[96:] = torch.eye(48)
            block.attn.qkv.bias[96:] = 0
            block.attn.proj.weight.copy_(torch.eye(48))
    x = images_for(model)
    found = {v: bi(model, x, variant=v, feedback="none").raw for v in VARIANTS}
    for i, image in enumerate(x):
        r = torch.eye(17, dtype=torch.float64)
        for half in attention_halves(definitions.opened(model, image, TARGETS[i])):
            r = (half.matrix[0] + torch.eye(17)) @ r
        assert relative(found["token"][i], r[0]) < 1e-12
        assert relative(found["head"][i], r[0]) < 1e-12  # one head has the whole share


def test_one_step_is_the_plain_gradient():
    model = tiny().double()
    x = images_for(model)
    e, p = bi(model, x, steps=1), bi(model, x, feedback="none")
    for i, image in enumerate(x):
        half = attention_halves(definitions.opened(model, image, TARGETS[i]))[-1]
        assert relative(e.raw[i], p.raw[i] * half.grad.clamp(min=0).mean(0)[0]) < 1e-12


def test_distilled_models_are_read_at_both_tokens():
    model = tiny("deit_distilled")
    with torch.no_grad():
        model.head_dist.weight.copy_(model.head.weight)
        model.head_dist.bias.copy_(model.head.bias)
        model.dist_token.copy_(model.cls_token)
        model.pos_embed[:, 1] = model.pos_embed[:, 0]
    raw = bi(model, images()).raw
    assert relative(raw[:, 0], raw[:, 1]) < 1e-4


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("pruner", [None, "evit"])
def test_chunks_do_not_matter(pruner, chunk):
    model = tiny()
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3))
    assert relative(bi(model, images(), chunk=chunk).raw, bi(model, images()).raw) < 1e-5


@pytest.mark.parametrize("options", [{}, {"variant": "head"}, {"feedback": "none"}])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", ["vit", "avg_pool"])
def test_masked_equals_removed_and_one_equals_many(family, pruner, options):
    model = tiny(family).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        removed = bi(model, x, **options)
        for i in range(3):
            one = prunex.explain("beyond_intuition", model, x[i : i + 1], TARGETS[i : i + 1], steps=STEPS, **options)
            assert relative(one.raw, removed.raw[i : i + 1]) < 1e-12
        pruning.masked = True
        assert relative(bi(model, x, **options).raw, removed.raw) < 1e-12


@pytest.mark.parametrize("options", [{}, {"variant": "head"}])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_keep_ratio_one_is_dense(pruner, options):
    model = tiny()
    dense = bi(model, images(), **options)
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)) as pruning:
        assert relative(bi(model, images(), **options).raw, dense.raw) < 1e-6
        pruning.masked = True
        assert relative(bi(model, images(), **options).raw, dense.raw) < 1e-6


@pytest.mark.parametrize("pruner", ["topk", "dynamicvit"])
@pytest.mark.parametrize("stages", [(0,), (0, 1, 2, 3)])
def test_stages_at_both_ends(stages, pruner):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.8, stages=stages) as pruning:
        removed = bi(model, images(dtype=torch.float64))
        pruning.masked = True
        masked = bi(model, images(dtype=torch.float64))
    assert torch.isfinite(removed.raw).all()
    assert relative(masked.raw, removed.raw) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_one_equals_many(family, variant):
    model = tiny(family)
    x = images_for(model)
    e = bi(model, x, variant=variant)
    assert e.maps.shape == (3, *model.patch_embed.grid_size)
    assert (e.maps >= 0).all()
    assert (e.maps > 0).any()
    for i in range(3):
        one = prunex.explain("beyond_intuition", model, x[i : i + 1], TARGETS[i : i + 1], steps=STEPS, variant=variant)
        assert relative(one.maps, e.maps[i : i + 1]) < 2e-6


def test_shares_of_heads_are_equal_where_nothing_is_felt():
    attention = torch.rand(2, 3, 5, 5)
    grad = torch.zeros(2, 3, 5, 5)
    grad[1, 0] = 1
    shares = _head_shares(attention, grad)
    assert largest(shares, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]])) < 1e-6


def test_perception_of_tokens_knows_no_class():
    model = tiny()
    a, b = (prunex.explain("beyond_intuition", model, images(), t, feedback="none") for t in (0, 3))
    assert a.maps.equal(b.maps)
    headless = tiny()
    headless.reset_classifier(0)
    assert prunex.explain("beyond_intuition", headless, images(), feedback="none").maps.equal(a.maps)
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("beyond_intuition", headless, images())


def count_sequences(model, **options):
    seen = []
    handle = model.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    prunex.explain("beyond_intuition", model, images(), TARGETS, **options)
    seen.clear()  # the first explanation also asks the model itself for one image
    prunex.explain("beyond_intuition", model, images(), TARGETS, **options)
    handle.remove()
    return sum(seen) / 3


def test_one_forward_a_step():
    assert count_sequences(tiny()) == 21
    assert count_sequences(tiny(), steps=3, chunk=2) == 4
    assert count_sequences(tiny(), feedback="none") == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_last_block_is_part_of_the_graph(frozen):
    model = tiny().requires_grad_(not frozen)
    inputs = []
    handles = [
        b.norm1.register_forward_hook(lambda m, args, out: inputs.append(out.requires_grad)) for b in model.blocks
    ]
    bi(model, images(), steps=1)
    for handle in handles:
        handle.remove()
    compared = [False] * 4  # the model's own forward, behind the others
    assert inputs == [False] * 4 + [False, False, False, not frozen] + compared


def test_half_precision_models_are_read_in_float32():
    model = tiny()
    wanted = bi(model, images()).raw
    e = bi(model.bfloat16(), images())
    assert e.raw.dtype == torch.float32
    assert largest(e.raw, wanted) < 0.2 * float(wanted.max())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "tokens"}, "did you mean 'token'"),
        ({"variant": ["head"]}, "Known: head, token"),
        ({"feedback": "survivors"}, "did you mean 'survivor'"),
        ({"feedback": None}, "Known: none, survivor"),
        ({"start_layer": 0}, r"count from 1.*1\.\.4"),
        ({"start_layer": 5}, r"1\.\.4"),
        ({"start_layer": True}, r"1\.\.4"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.0}, "at least 1"),
        ({"chunk": 0}, "at least 1"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("beyond_intuition", tiny(), images(), **options)
