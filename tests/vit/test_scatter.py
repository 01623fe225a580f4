"""The dense grid back: TokenTrace.scatter against a slow walk, and forward_intermediates against timm's."""

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

import prunex
from prunex import PrunexError
from prunex.vit import intermediates
from prunex.vit.trace import Stage, TokenTrace
from tests.vit.test_trace import slow_composition
from tests.vits import FAMILIES, assert_same_state, images, images_for, largest, randomise, state_of, tiny

PRUNERS = {
    "topk": {},
    "evit": {},
    "evit, not fused": {"fuse": False},
    "dynamicvit": {"teacher": False},
}


def attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
    pruning = prunex.attach(model, pruner.split(",")[0], keep_ratio=keep_ratio, stages=stages, **PRUNERS[pruner])
    randomise(pruning.pruner)
    return pruning


def slow_scatter(trace, tokens, fill):
    """Token by token and patch by patch; fill is [B, P, D]."""
    full = fill.clone()
    for image in range(trace.batch):
        for token, (members, _) in enumerate(slow_composition(trace, len(trace.stages) - 1, image)):
            for patch in members:
                full[image, patch] = tokens[image, trace.prefix + token]
    return full


@pytest.mark.parametrize("mode", ["removed", "masked", "training"])
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "not_square"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_scatter_equals_the_slow_walk(pruner, family, mode):
    model = tiny(family)
    pruning = attach(model, pruner)
    pruning.masked = True if mode == "masked" else None
    model.train(mode == "training")
    tokens = model.forward_features(images_for(model)).detach()
    trace, (gh, gw) = pruning.trace, model.patch_embed.grid_size
    feature = torch.randn(3, gh, gw, 48, generator=torch.Generator().manual_seed(0))
    wanted = slow_scatter(trace, tokens, feature.flatten(1, 2)).unflatten(1, (gh, gw))
    full = trace.scatter(tokens, feature)
    assert torch.equal(full, wanted)
    assert torch.equal(trace.scatter(tokens[:, trace.prefix :], feature), wanted)
    assert torch.equal(trace.scatter(tokens, feature.flatten(1, 2)), wanted)
    nchw = trace.scatter(tokens, feature.permute(0, 3, 1, 2), channels_first=True)
    assert torch.equal(nchw, wanted.permute(0, 3, 1, 2))
    assert nchw.is_contiguous()
    gone = trace.share() == 0
    assert gone.any() == (pruner != "evit")
    assert torch.equal(trace.scatter(tokens), torch.where(gone[..., None], 0.0, wanted))
    mask_token = torch.randn(1, 1, 48)
    for fill in (mask_token, mask_token.view(48)):
        assert torch.equal(trace.scatter(tokens, fill), torch.where(gone[..., None], mask_token, wanted))
        assert torch.equal(
            trace.scatter(tokens, fill, channels_first=True),
            torch.where(gone[..., None], mask_token, wanted).permute(0, 3, 1, 2),
        )
    assert torch.equal(trace.scatter(tokens, torch.tensor(2.0)), trace.scatter(tokens, 2))
    assert trace.scatter(tokens, float("nan")).isnan().any(-1).equal(gone)


def test_without_stages_the_grid_is_the_tokens():
    model = tiny()
    pruning = attach(model, "evit", keep_ratio=1.0)
    tokens = model.forward_features(images())
    assert torch.equal(pruning.trace.scatter(tokens, 7.0).flatten(1, 2), tokens[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_tokens_is_kept(dtype):
    model = tiny()
    pruning = attach(model, "topk")
    tokens = model.forward_features(images())
    for fill in (0.5, torch.zeros(48), torch.zeros(3, 4, 4, 48, dtype=torch.float64)):
        assert pruning.trace.scatter(tokens.to(dtype), fill).dtype == dtype


@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_gradients_reach_tokens_and_fill(pruner):
    model = tiny().double()
    pruning = attach(model, pruner)
    tokens = model.forward_features(images(dtype=torch.float64)).detach().requires_grad_()
    fill = torch.randn(48, dtype=torch.float64, requires_grad=True)
    few = tokens.detach()[:, :, :2].requires_grad_(), fill.detach()[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda t, f: pruning.trace.scatter(t, f).square(), few)
    pruning.trace.scatter(tokens, fill).sum().backward()
    gone = (pruning.trace.share() == 0).sum()
    assert largest(fill.grad, torch.full((48,), float(gone))) < 1e-12
    times = torch.zeros(3, tokens.shape[1])  # how many patches show each token
    for image in range(3):
        for token, (members, _) in enumerate(slow_composition(pruning.trace, 1, image)):
            times[image, 1 + token] = len(members)
    assert largest(tokens.grad, times[..., None].expand_as(tokens)) < 1e-12


def test_overlapping_pools_give_a_patch_the_mean_of_its_tokens():
    """A stage whose tokens go to two tokens at most, [B, n, 2]: here windows of three over a row of five patches."""
    pool = Stage(0, torch.tensor([[[0, -1], [0, -1], [0, 1], [1, -1], [1, -1]]]), torch.ones(1, 5, 2) / 3, 2)
    trace = TokenTrace((1, 5), 0, 1, torch.device("cpu"), [pool])
    tokens = torch.tensor([[[1.0, 10.0], [3.0, 30.0]]], requires_grad=True)
    full = trace.scatter(tokens)
    assert full[0, 0].tolist() == [[1, 10], [1, 10], [2, 20], [3, 30], [3, 30]]
    full.sum().backward()
    assert tokens.grad.tolist() == [[[2.5, 2.5], [2.5, 2.5]]]
    cut = Stage(1, torch.tensor([[-1, 0]]), torch.tensor([[0.0, 1.0]]), 1)  # the first pooled token leaves
    trace.stages.append(cut)
    full = trace.scatter(torch.tensor([[[5.0]]]), fill=-1.0)
    assert full.flatten().tolist() == [-1, -1, 5, 5, 5]  # the patch in both is known by the one that is left


@pytest.mark.parametrize(
    "tokens", [None, torch.zeros(3, 17), torch.zeros(3, 9, 48), torch.zeros(2, 7, 48), torch.zeros(3, 7, 48).long()]
)
def test_tokens_of_another_forward_are_refused(tokens):
    model = tiny()
    pruning = attach(model, "topk")
    model(images())
    assert pruning.counts() == [10, 6]
    wanted = r"not of this trace's forward: give floats \[3, 7, D\].*\[3, 6, D\]"
    with pytest.raises(PrunexError, match=wanted) as caught:
        pruning.trace.scatter(tokens)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fill", [None, "zeros", True, torch.zeros(47), torch.zeros(3, 48, 4, 4), torch.zeros(2, 16, 48), torch.zeros(48, 1)]
)
def test_a_fill_that_does_not_fit_is_refused(fill):
    model = tiny()
    pruning = attach(model, "topk")
    tokens = model.forward_features(images())
    with pytest.raises(PrunexError, match="fill") as caught:
        pruning.trace.scatter(tokens, fill)
    assert "\n" not in str(caught.value)


CALLS = {
    "all": {},
    "last two": {"indices": 2},
    "chosen": {"indices": [-1, 1], "norm": True},
    "sequence": {"output_fmt": "NLC", "indices": (0, 3)},
    "prefix": {"return_prefix_tokens": True, "norm": True},
    "early": {"indices": [1], "stop_early": True},
    "only": {"intermediates_only": True, "indices": 1},
    "prefix only": {"intermediates_only": True, "return_prefix_tokens": True, "output_fmt": "NLC"},
    "dictionary": {"output_dict": True, "return_prefix_tokens": True},
    "dictionary only": {"output_dict": True, "intermediates_only": True},
}


def same(ours, theirs):
    """The same nesting of the same numbers."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        assert largest(ours, theirs) <= 1e-6
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            same(ours[key], theirs[key])
    else:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool_no_class", "not_square", "dynamic"])
def test_without_pruning_the_results_are_timm_s(family, call):
    model = tiny(family)
    x = images_for(model) if family != "dynamic" else images(2, (48, 24))
    with torch.no_grad():
        try:
            theirs = model.forward_intermediates(x, **CALLS[call])
        except TypeError:
            pytest.skip("this timm's forward_intermediates has no such option")
        attach(model, "evit", keep_ratio=1.0)
        same(model.forward_intermediates(x, **CALLS[call]), theirs)


def spied(monkeypatch):
    """Patch tokens before every stage, as a list that fills while the model runs."""
    before, apply = [], prunex.vit.turns.apply

    def applied(answer, block, when, state, entered):
        if answer is not None:
            before.append(state.patches.detach().clone())
        return apply(answer, block, when, state, entered)

    monkeypatch.setattr("prunex.vit.turns.apply", applied)
    return before


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_removed_patches_keep_their_last_value(pruner, masked, norm, monkeypatch):
    model = tiny("dinov2_reg")
    x = images_for(model)
    with torch.no_grad():
        dense = model.forward_intermediates(x, norm=norm, output_fmt="NLC", intermediates_only=True)
        pruning = attach(model, pruner)
        pruning.masked = masked
        before = spied(monkeypatch)
        final, grids = model.forward_intermediates(x, norm=norm, output_fmt="NLC")
        trace = pruning.trace
        raw = []  # what the final norm is given
        handle = model.norm.register_forward_pre_hook(lambda m, args: raw.append(args[0]))
        assert torch.equal(model.forward_features(x), final)
        handle.remove()
        wanted = slow_left(trace, final if norm else raw[0], [model.norm(b) if norm else b for b in before[:2]])
        assert largest(grids[3], wanted) < 1e-6
        assert largest(grids[0], dense[0]) < 1e-6  # before any stage
        zeros = model.forward_intermediates(x, norm=norm, output_fmt="NLC", intermediates_only=True, fill=0.0)
        gone = (trace.share() == 0).flatten(1)
        assert largest(zeros[3], torch.where(gone[..., None], 0.0, wanted)) < 1e-6


def slow_left(trace, tokens, before):
    """Patch by patch: walk the stages until the patch is removed, else take its token."""
    full = torch.zeros(trace.batch, trace.grid[0] * trace.grid[1], tokens.shape[2])
    for image in range(trace.batch):
        for patch in range(full.shape[1]):
            at = patch
            for stage, values in zip(trace.stages, before, strict=True):
                after = int(stage.group[image, at])
                if after < 0:
                    full[image, patch] = values[image, at]
                    break
                at = after
            else:
                full[image, patch] = tokens[image, trace.prefix + at]
    return full


@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed_and_batches_equal_singles(pruner):
    model = tiny()
    x = images_for(model)
    with torch.no_grad():
        pruning = attach(model, pruner)
        removed = model.forward_intermediates(x, intermediates_only=True)
        for i in range(3):
            alone = model.forward_intermediates(x[i : i + 1], intermediates_only=True)
            assert max(largest(a[0], r[i]) for a, r in zip(alone, removed, strict=True)) < 1e-5
        pruning.masked = True
        masked = model.forward_intermediates(x, intermediates_only=True)
        assert max(largest(a, b) for a, b in zip(masked, removed, strict=True)) < 1e-5


@pytest.mark.parametrize("pruner", PRUNERS)
def test_dense_heads_train_through_it(pruner):
    model = tiny().train()
    pruning = attach(model, pruner)
    mask = torch.zeros(48, requires_grad=True)
    (grid,) = model.forward_intermediates(images(), 1, norm=True, intermediates_only=True, fill=mask)
    losses = pruning.losses()
    assert set(losses) == ({"ratio"} if pruner == "dynamicvit" else set())
    (grid.square().sum() + grid.sum() + sum(losses.values())).backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert (mask.grad.abs().sum() > 0) == (pruner != "evit")


@pytest.mark.parametrize("fill", [None, 0.5])
def test_a_policy_learns_from_the_grid_what_its_patches_would_have_become(fill, monkeypatch):
    """Where attention hands nothing on, the gradient of a mixture of what stays and what left is all there is."""
    model, seen = tiny().double().train(), []
    pruning, x = attach(model, "dynamicvit"), images(4).double()
    for block in model.blocks:
        block.attn.proj.weight.detach().zero_()
    mixed = intermediates._mixed

    def noted(body, policies, left):
        for policy in policies:
            policy.retain_grad()
        seen.append((body, policies, left))
        return mixed(body, policies, left)

    monkeypatch.setattr(intermediates, "_mixed", noted)
    (grid,) = model.forward_intermediates(x, 1, output_fmt="NLC", intermediates_only=True, fill=fill)
    r = torch.randn(grid.shape, generator=torch.Generator().manual_seed(0), dtype=grid.dtype)
    (grid * r).sum().backward()
    [(body, policies, left)] = seen
    there = pruning.trace.kept(0).flatten(1)
    wanted = (r * (body - left[-1])).sum(2)
    assert largest(policies[-1].grad[there], wanted[there]) < 1e-5  # policies are float32
    assert policies[-1].grad[there].abs().min() > 0
    if fill is None:
        # Who had left before is no matter of the second stage.
        assert not policies[1].grad[~there].any()
        assert policies[0].grad[~there].abs().min() > 0
    predictors = [p for p in pruning.pruner.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictors)


def test_stop_early_runs_no_further_block_and_traces_what_ran():
    model = tiny()
    pruning = attach(model, "topk", stages=(1, 3))
    ran = []
    for i, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    final, grids = model.forward_intermediates(images(), [1], stop_early=True)
    assert ran == [0, 1]
    assert len(pruning.trace.stages) == 1
    assert final.shape == (3, 1 + 10, 48)
    assert grids[0].shape == (3, 48, 4, 4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_whole_grids(family):
    model = tiny(family)
    before = state_of(model)
    with attach(model, "evit"), torch.no_grad():
        grids = model.get_intermediate_layers(images_for(model), 4, reshape=True, norm=True)
        assert [g.shape for g in grids] == [(3, 48, *model.patch_embed.grid_size)] * 4
        assert all(g.isfinite().all() for g in grids)
    assert_same_state(model, before)


@pytest.mark.parametrize("order", ["wrapped, then pruned", "pruned, then wrapped"])
@pytest.mark.parametrize("norm", [False, True])
def test_timm_s_feature_wrapper(order, norm):
    x = images()
    with torch.no_grad():
        wanted = FeatureGetterNet(tiny(), out_indices=[1, 2], norm=norm)(x)
        model = tiny()
        if order == "wrapped, then pruned":
            net = FeatureGetterNet(model, out_indices=[1, 2], norm=norm)
            pruning = prunex.attach(net, "topk", keep_ratio=0.6, stages=(1, 2))
        else:
            pruning = prunex.attach(model, "topk", keep_ratio=0.6, stages=(1, 2))
            net = FeatureGetterNet(model, out_indices=[1, 2], norm=norm)
        assert len(model.blocks) == 3
        features = net(x)
        kept = pruning.trace.kept()
        assert [f.shape for f in features] == [w.shape for w in wanted] == [(3, 48, 4, 4)] * 2
        assert int(kept.sum()) == 3 * 6
        assert largest(features[1], wanted[1]) > 1e-3
        net.eval()
        pruning.detach()
        same(net(x), wanted)


def test_timm_s_features_only_models():
    net = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), depth=3, embed_dim=48, num_heads=3, img_size=64
    ).eval()
    x = images(2, (64, 64))
    with torch.no_grad():
        dense = net(x)
        with prunex.attach(net, "evit", keep_ratio=1.0, stages=(1,)):
            same(net(x), dense)
        with prunex.attach(net, "evit", keep_ratio=0.5, stages=(1,)) as pruning:
            features = net(x)
            assert [f.shape for f in features] == [(2, 48, 4, 4)] * 2
            assert largest(features[0], dense[0]) < 1e-6
            assert int(pruning.trace.kept().sum()) == 2 * 8
        same(net(x), dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_fmt": "NHWC"}, "output_fmt='NHWC'.*NCHW, NLC"),
        ({"indices": 5}, "indices=5.*of 4"),
        ({"indices": 0}, "indices=0"),
        ({"indices": [4]}, r"indices=\[4\]"),
        ({"indices": [-5]}, r"indices=\[-5\]"),
        ({"indices": []}, r"indices=\[\]"),
        ({"indices": True}, "indices=True"),
        ({"indices": "last"}, "indices='last'"),
        ({"indices": 1.5}, "indices=1.5"),
        ({"fill": torch.zeros(7)}, r"fill of shape \[7\]"),
        ({"fill": "zeros"}, "fill='zeros'"),
        ({"attn_mask": torch.zeros(17, 17)}, r"attn_mask .*detach\(\)"),
        ({"is_causal": True}, r"is_causal .*detach\(\)"),
    ],
)
def test_bad_calls_are_refused_in_one_line(options, message):
    model = tiny()
    attach(model, "topk")
    with pytest.raises(PrunexError, match=message) as caught:
        model.forward_intermediates(images(), **options)
    assert "\n" not in str(caught.value)
    model(images())  # nothing is left half done
