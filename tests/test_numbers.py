"""No NaN and no infinity where formulas divide, take logarithms or run out of half precision's range."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import prunex
from prunex import pictures
from prunex.learned.diffmask import log_keep, log_votes, sample
from prunex.metrics.localization import foreground_auc, mean_ap
from prunex.metrics.scoring import MEASURES, interval, scores
from prunex.vit.attention import KeyWeights, fused, latent, rows
from prunex.vit.policy import under_policy
from tests.explainers.quick import EXPLAINERS, explain
from tests.vits import images, quick, tiny

INPUTS = {
    "black": torch.zeros(3, 3, 32, 32),
    "one_constant": torch.stack([images()[0], torch.zeros(3, 32, 32), torch.full((3, 32, 32), -2.0)]),
}
PRECISIONS = {"float32": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
FEWEST = {
    "dynamicvit": {"keep_ratio": 0.1},
    "evit": {"keep_ratio": 0.1},
    "topk": {"keep_ratio": 0.1},
    "ia_red2": {"keep_ratio": 0.1},
    "diffmask": {"keep_ratio": 0.1, "count": "fixed", "layer": 2},
    "tome": {"r": 99},
    "diffrate": {"keep_ratio": 0.1},
    "ppt": {"r": 99},
    "hvt": {},
    "patch_slimming": {"keep": [[0]] * 3},
}
ADAPTIVE = ("dynamicvit", "ia_red2", "diffmask", "evit", "topk")  # they may keep nothing at all, or one patch
CLASSLESS = ("ia_red2", "patch_slimming")  # need a class token


def pruned(model, method, nothing=False):
    """The model keeping as few patches as the method can; or with a pruner that wants to keep none."""
    options = dict(FEWEST[method])
    if nothing:
        options |= {"count": "adaptive"} | ({"threshold": 0.0} if method in ("evit", "topk") else {})
    pruning = prunex.attach(model, method, **options)
    if nothing:
        with torch.no_grad():
            for predictor in getattr(pruning.pruner, "predictors", ()):
                predictor.score[-1].weight.zero_()
                predictor.score[-1].bias.copy_(torch.tensor([-1e4, 1e4]))
            for interpreter in getattr(pruning.pruner, "interpreters", ()):
                interpreter.qk.weight.zero_()
                interpreter.qk.bias.copy_(40.0 * (1 - 2 * (torch.arange(2 * 48) >= 48).float()))
            for gate in getattr(getattr(pruning.pruner, "gates", None), "gates", ()):
                gate.add.fill_(-1e4)
    return pruning


def finite(*tensors):
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def cases():
    """Every family, method and way to keep little that there is; one family quickly, and what failed once."""
    for family in ("vit", "avg_pool_no_class", "siglip"):
        for method in FEWEST:
            if family != "vit" and method in CLASSLESS:
                continue
            for nothing in (False, True) if method in ADAPTIVE else (False,):
                quickly = (nothing and family == "vit") or (family, method, nothing) == ("siglip", "dynamicvit", True)
                yield pytest.param(family, method, nothing, marks=[] if quickly else pytest.mark.slow)


@pytest.mark.parametrize(("family", "method", "nothing"), cases())
def test_training_and_inference(family, method, nothing):
    x = INPUTS["one_constant"]
    for precision, dtype in PRECISIONS.items():
        model = tiny(family)
        pruning = pruned(model, method, nothing)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            with torch.no_grad():
                still = model.eval()(x)
            left = pruning.trace.left()
            logits = model.train()(x)
            loss = F.cross_entropy(logits.float(), torch.tensor([0, 1, 2])) + sum(pruning.losses().values())
        loss.backward()
        where = (family, method, nothing, precision)
        assert finite(still, logits, loss, pruning.trace.share()), where
        assert finite(*(p.grad for p in model.parameters() if p.grad is not None)), where
        assert not any(s.score is not None and s.score.isnan().any() for s in pruning.trace.stages), where
        if nothing and family == "vit" and method in ("dynamicvit", "ia_red2", "diffmask"):
            assert left.max() == 0, where  # it did drop all of them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", list(FEWEST))
def test_weights_of_half_precision(method, dtype):
    model = tiny().to(dtype)
    pruning = pruned(model, method, nothing=method in ADAPTIVE)
    with torch.no_grad():
        assert finite(model(INPUTS["one_constant"].to(dtype)), pruning.trace.share())


@pytest.mark.parametrize("method", list(FEWEST))
def test_a_grid_of_one_patch(method):
    if method in ("hvt", "patch_slimming"):
        pytest.skip("has sizes of its own")
    model = tiny(img_size=8)
    pruning = pruned(model, method, nothing=method in ADAPTIVE)
    logits = model.train()(images(size=(8, 8)))
    (logits.sum() + sum(pruning.losses().values())).backward()
    assert finite(logits, *(p.grad for p in model.parameters() if p.grad is not None))
    assert finite(explain("rollout", model.eval(), images(size=(8, 8))).maps)


# --------------------------------------------------------------------------------------------------------- explainers

# Of which the model has few, or none, or one that is all alike.
ODD = ["few", "none", "constant", "one_class", "half", "mixed", "flat", "saturated"]


def odd(kind):
    """A model and images that leave little to divide by."""
    model, x = tiny(num_classes=1 if kind == "one_class" else 5), INPUTS["one_constant"]
    if kind == "few":
        pruned(model, "topk")
    elif kind == "none":
        pruned(model, "dynamicvit", nothing=True)
    elif kind == "constant":
        x = INPUTS["black"]
    elif kind == "half":
        pruned(model, "tome")
        model, x = model.half(), x.half()
    elif kind == "flat":  # every logit 0 and no gradient anywhere
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" not in name:
                    p.zero_()
    elif kind == "saturated":  # every row of attention looks at one token
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.mul_(30)
    return model, x


@pytest.mark.parametrize("kind", quick(ODD, ["none", "flat"]))
@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.filterwarnings("ignore:attention_flow")
def test_explainers(explainer, kind):
    model, x = odd(kind)
    if kind == "one_class" and explainer in ("atman", "r_cut"):
        with pytest.raises(prunex.PrunexError, match=r"one output|single class"):  # a probability that is always 1
            explain(explainer, model, x)
        return
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "mixed"):
        e = explain(explainer, model, x)
    assert finite(e.maps, e.raw, e.logits, e.upsample())
    shown = e.overlay(np.zeros((3, 32, 32, 3), np.uint8))
    assert shown.dtype == np.uint8


# ---------------------------------------------------------------------------------------------------------- attention


def by_definition(q, k, v, policy, scale, sizes=None):
    """out_i = sum_j W_ij v_j / sum_j W_ij, W_ij = exp(A_ij) E_ij s_j, in double precision over the keys that count."""
    scores = (q * scale) @ k.transpose(-2, -1)
    n = policy.shape[1]
    weight = torch.where(torch.eye(n, dtype=torch.bool), 1.0, policy[:, None, None, :])
    weight = weight if sizes is None else weight * sizes[:, None, None, :]
    top = scores.masked_fill(weight <= 0, -torch.inf).amax(-1, keepdim=True)
    raised = torch.where(weight > 0, (scores - top).clamp(max=0).exp() * weight, 0)
    return raised @ v / raised.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("height", [0.0, 1e2, 1e4])
def test_a_dropped_key_that_dominates(height, dtype, tolerance):
    """A masked key's logit is far above the others': the output holds nothing of it, and nothing is divided by 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    q[..., 0] = 4.0
    k[:, :, 5, 0] = height  # a logit of height * 4 / 4
    policy = torch.ones(2, 9, dtype=torch.float64)
    policy[:, 5] = 0
    policy[1, 2:] = 0  # nearly all are gone
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    p = policy.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = under_policy(q, k, v, p, 0.25)
    truth = by_definition(*(t.detach().double() for t in (q, k, v)), policy, 0.25)
    assert (out.detach().double() - truth).abs().max() < tolerance
    out.float().sum().backward()
    assert finite(q.grad, k.grad, v.grad, p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_of_any_range(dtype):
    """Proportional attention adds log sizes: 1, and as many as no image has patches."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 16, generator=generator).to(dtype) for _ in range(3))
    sizes = torch.tensor([[1.0, 1, 1, 1, 1], [1, 3, 1e5, 1, 7e4]])
    truth = by_definition(q.double(), k.double(), v.double(), torch.ones(2, 5).double(), 0.25, sizes.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for got in (
        fused(q, k, v, keys=KeyWeights(sizes=sizes)),
        under_policy(q, k, v, torch.ones(2, 5), 0.25, sizes=sizes),
    ):
        assert (got.double() - truth).abs().max() < tolerance
    assert finite(rows(q, k, 0.25, keys=KeyWeights(sizes=sizes)))


def test_attention_pooling_of_nothing_has_gradients():
    """An image without any token is pooled to 0; what each of them would have changed is still a number."""
    pool = tiny("siglip").attn_pool
    x, weight = torch.randn(2, 6, 48, requires_grad=True), torch.ones(2, 6)
    weight[1] = 0
    weight.requires_grad_()
    pooled, seen = latent(pool, x, weight)
    (pooled.square().sum() + seen.square().sum()).backward()
    assert finite(pooled, x.grad, weight.grad)
    assert seen[1].abs().max() == 0
    assert torch.allclose(seen[0].sum(), torch.ones(()))
    alone, _ = latent(pool, x[:1], weight[:1])
    assert torch.allclose(alone, pooled[:1], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hard_concrete_gates(dtype):
    logits = torch.tensor([-6e4, -100.0, -1.0, 0.0, 1.0, 100.0, 6e4]).to(dtype).repeat(2, 3, 50).requires_grad_()
    drawn = sample(logits)
    assert finite(drawn, log_keep(logits), log_keep(logits).exp())
    assert 0 <= float(drawn.detach().min()) <= float(drawn.detach().max()) <= 1
    drawn.float().sum().backward()
    assert finite(logits.grad)
    assert not log_votes(logits).isnan().any()
    assert log_votes(logits).exp().max() <= 1


# --------------------------------------------------------------------------------------------------- metrics, pictures

MAPS = {
    "constant": torch.full((4, 4, 4), 0.3),
    "zero": torch.zeros(4, 4, 4),
    "negative": -torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)),
    "one_patch": torch.eye(16)[:4].view(4, 4, 4),
    "tiny": torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e-40,
    "huge": torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) * 3e38,
    "half": (torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) * 6e4).half(),
}
REGIONS = {"nothing": torch.zeros(4, 4, 4, dtype=torch.bool), "all": torch.ones(4, 4, 4, dtype=torch.bool)}
REGIONS["some"] = torch.arange(16).view(4, 4).expand(4, 4, 4) < 5
# Correlations with a map that does not vary.
UNDEFINED = ("saco", "faithfulness_correlation", "sensitivity_n")


@pytest.mark.parametrize("classes", [5, 1])
@pytest.mark.parametrize("name", list(MAPS))
def test_localisation_and_agreement(name, classes):
    """A number, or NaN where there is nothing to say (an object that is not there); never infinity."""
    model, maps, wanted = tiny(num_classes=classes), MAPS[name], among("localisation", "agreement")
    for region in REGIONS.values():
        masks = region.repeat_interleave(8, 1).repeat_interleave(8, 2)
        more = {"masks": masks, "kept": region, "judge": maps}
        for metric, values in scores(wanted, model, images(4), maps, torch.zeros(4, dtype=torch.long), **more).items():
            summed = interval(metric, values)
            assert not values.isinf().any(), metric
            assert not np.isinf([summed.mean, summed.low, summed.high]).any(), metric
            if bool(region.any()) and not bool(region.all()) and name in ("one_patch", "huge", "half"):
                assert not np.isnan(summed.mean), metric


def among(*groups):
    return [n for n, m in MEASURES.items() if m.group in groups]


@pytest.mark.parametrize("classes", [5, 1])
@pytest.mark.parametrize("name", quick(list(MAPS), ["constant"]))
def test_faithfulness(name, classes):
    """A number, on black images, for labels that are all the same and with a single class, too."""
    model, maps = tiny(num_classes=classes), MAPS[name]
    x, labels = torch.cat([images(2), torch.zeros(2, 3, 32, 32)]), torch.zeros(4, dtype=torch.long)
    more = {"labels": labels, "explainer": "rollout", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    wanted = among("faithfulness")
    if classes == 1:
        with pytest.raises(prunex.PrunexError, match="one output"):
            scores(["perturbation_positive"], model, x, maps, labels, **more)
        wanted = [n for n in wanted if not n.startswith("perturbation")]
    for metric, values in scores(wanted, model, x, maps, labels, **more).items():
        flat = name in ("constant", "zero") and metric in UNDEFINED
        if metric == "saco":  # in black images a patch of their mean colour changes nothing
            assert values[2:].isnan().all()
            values = values[:2]
        assert values.isnan().all() if flat else finite(values), metric
        assert not np.isinf(interval(metric, values).mean)


def test_areas_and_precision_of_one_class():
    """Where all pixels are object, or none is, there is nothing to tell apart."""
    for name, region in REGIONS.items():
        masks = region.repeat_interleave(8, 1).repeat_interleave(8, 2)
        for maps in (torch.ones(4, 32, 32), torch.rand(4, 32, 32)):
            assert foreground_auc(maps, masks).isnan().all() == (name != "some")
            assert finite(mean_ap(maps, masks))
        assert torch.allclose(mean_ap(torch.ones(4, 32, 32), masks).float(), torch.tensor(0.5))
    assert torch.allclose(foreground_auc(torch.ones(4, 32, 32), masks).float(), torch.tensor(0.5))


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "relevance", "random"])
@pytest.mark.parametrize("weights", ["usual", "zero"])
def test_unit_criteria_on_one_class(criterion, classes, weights):
    """With one class the cross-entropy is always 0, and with weights of 0 every score is: all alike, none NaN."""
    for dtype in (torch.float32, torch.float16):
        model = tiny(num_classes=classes).to(dtype)
        if weights == "zero":
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.mul_("norm" in name)
        x = INPUTS["one_constant"].to(dtype)
        pruning = prunex.attach(model, criterion, budget=0.6)
        pruning.calibrate([(x, torch.zeros(3, dtype=torch.long))])
        with torch.no_grad():
            assert finite(model(x))
        assert prunex.cost(model).macs <= 0.605 * prunex.cost(tiny(num_classes=classes)).macs


@pytest.mark.parametrize("classes", [1, 5])
def test_class_masks_when_all_labels_are_the_same(classes):
    model = tiny(num_classes=classes).train()
    pruning = prunex.attach(model, "xpruner", budget=0.6)
    pruner, labels = pruning.pruner, torch.zeros(3, dtype=torch.long)
    for stage in ("masks", "thresholds"):
        pruner.stage = stage
        with pruning.labelled(labels):
            loss = F.cross_entropy(model(INPUTS["one_constant"]), labels) + sum(pruning.losses().values())
        loss.backward()
        pruner.saw(labels)
        learned = pruner.masks() if stage == "masks" else [pruner.thresholds]
        assert finite(loss, *(t.grad for t in learned))
        if stage == "masks":  # as if learning had gone on until a mask was nothing at all
            with torch.no_grad():
                pruner.mask(pruner.branches[0]).zero_()
    pruning.conclude()
    table = pruning.relevance_table()
    assert finite(*table.heads.values(), *table.channels.values())
    assert table.updates.tolist() == [3] + [0] * (classes - 1)
    assert finite(functional_call(model.eval(), {}, (INPUTS["black"],)))


@pytest.mark.parametrize("brightness", quick([0, 200], [0]))
def test_pictures(brightness):
    """Nothing divides by a spread that is not there; a map's NaN is a patch without colour."""
    picture = np.full((4, 32, 32, 3), brightness, np.uint8)
    none, heat = np.zeros((4, 4, 4), bool), {n: m.float().numpy() for n, m in MAPS.items()}
    heat |= {"nan": np.full((4, 4, 4), np.nan), "infinite": np.full((4, 4, 4), np.inf), "wide": heat["huge"] - 1.5e38}
    labels, masks = np.zeros(4, int), np.zeros((4, 32, 32), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, maps in heat.items():
            for signed in (None, True, False):
                shown = pictures.overlay(picture, maps, signed=signed, smooth=name != "tiny")
                assert shown.shape == picture.shape
                if name in ("nan", "infinite"):
                    assert (shown == shown[0, 0, 0]).all()
        told = (none, dict.fromkeys(heat, labels), labels, labels, None, masks)
        pictures.relevancy_mosaic(picture, heat, *told)
        pictures.contact_sheet(picture, heat)
        pictures.head_attention(picture, heat["nan"][:, None], [["a"]] * 4)
        pictures.kept_mosaic(picture, none[None], labels, labels, None, masks)
        pictures.share_mosaic(picture, none[None].astype(float), [0])
        pictures.dim_dropped(picture, none)
        pictures.class_heads(np.zeros((1, 3)), ["a"], ["0.0", "0.1", "0.2"])
        with pytest.raises(prunex.PrunexError, match="finite numbers"):
            pictures.class_heads(np.full((2, 3), np.nan), ["a", "b"], ["0.0", "0.1", "0.2"])
        pictures.unit_widths(np.zeros((2, 2), int), np.zeros((2, 2), int))
        for values in ([1.0], [2.0, 2.0], [np.inf, 1.0], [np.nan, 1.0]):
            pictures.curves({"loss": (list(range(len(values))), values)})
        with pytest.raises(prunex.PrunexError, match="at least one finite number"):
            pictures.curves({"loss": ([0, 1], [np.nan, np.nan])})
