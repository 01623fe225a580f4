"""prunex.slim(model, correct=..., images=...): who closed units, what is beside them, files, and what is refused."""

import importlib.util
import json
import warnings

import pytest
import torch
from timm.layers import SwiGLU
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex import PrunexError, WidthSpec
from prunex.slim.files import CARD, CONFIG
from prunex.units.correction import cuts_of, make_up
from tests.units.units import batches, swin
from tests.vit.narrowed import hard, masked, tiny_of
from tests.vits import assert_same_state, images, images_for, randomise, relative, state_of, tiny

SPEC = WidthSpec(heads={0: (0, 2), 2: (1,)}, channels={0: tuple(range(0, 192, 2)), 3: tuple(range(40))})
METHODS = ("xpruner", "magnitude", "taylor", "random", "relevance")


def closed(model, method):
    """Gate a float64 model's units by a method, and choose."""
    if method == "xpruner":
        return hard(model)
    pruning = prunex.attach(model, method, budget=0.6)
    pruning.calibrate(batches(dtype=torch.float64))
    return pruning


def loader(count=16, batch=5):
    return DataLoader(TensorDataset(images(count), torch.arange(count) % 5), batch, shuffle=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_criterion_can_be_corrected(method):
    model, x = tiny().double(), images(16).double()
    dense = model(x)
    pruning = closed(model, method)
    before = state_of(model)
    bare, folded, refitted = (prunex.slim(model, correct=c, images=x if c else None) for c in (None, "bias", "refit"))
    assert_same_state(model, before)
    errors = [(small(x) - dense).square().mean().item() for small in (bare, refitted)]
    assert errors[1] < 0.8 * errors[0]
    rows = [prunex.correction(small).branches for small in (folded, refitted)]
    assert prunex.correction(bare) is None
    for mean, refit in zip(*rows, strict=True):
        assert (mean.before, mean.lost) == (refit.before, refit.lost)
        assert refit.after < mean.after <= mean.before
    lost = {key: n for key, n in pruning.pruner.closed().items() if n}
    assert {f"{m.block}.{m.kind}": m.lost for m in rows[0]} == lost


@pytest.mark.parametrize("family", ["vit", "dinov2_giant", "res_post", "swin", "beit", "siglip"])
def test_a_slim_model_is_the_masked_one_with_corrected_weights(family, tmp_path):
    model = tiny_of(family)
    x = images_for(model, 8)
    spec = hard(model).widths
    small = prunex.slim(model, correct=True, images=x)
    prunex.attached(model, units=True).detach()
    make_up(model, cuts_of(model, spec), [x], "refit")
    wanted = masked(model, spec)(x)
    assert relative(small(x), wanted) < 1e-5
    prunex.save(small, tmp_path / "slim")
    again = prunex.load(tmp_path / "slim")
    assert torch.equal(again(x), small(x))
    assert prunex.correction(again) == prunex.correction(small)
    card = (tmp_path / "slim" / CARD).read_text()
    assert f"| corrected | {prunex.correction(small).summary()} |" in card


@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra prunex-vit[onnx]",
)
def test_the_graph_is_the_corrected_model(tmp_path):
    import onnxruntime

    model = tiny()
    small = prunex.slim(model, widths=SPEC, correct="refit", images=images(16))
    path = prunex.export(small, tmp_path / "model.onnx")
    x = images(3, seed=4)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    written = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    assert relative(written, small(x)) < 1e-5
    assert relative(written, prunex.slim(model, widths=SPEC)(x)) > 1e-2


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("evit", {"keep_ratio": 0.6}),
        ("dynamicvit", {"keep_ratio": 0.6}),
        ("tome", {"r": 3}),
        ("topk", {"keep_ratio": 0.6, "count": "adaptive"}),
    ],
)
def test_beside_a_token_pruner_dropped_tokens_do_not_count(method, options):
    model = tiny()
    tokens = prunex.attach(model, method, **options)
    randomise(tokens.pruner)
    tokens.masked = True
    hard(model, budget=0.5)
    small = prunex.slim(model, correct="refit", images=images(12).split(4))
    seen = []
    prunex.attached(model, units=True).detach()
    tokens.masked = False
    for image in images(12).split(1):
        hook = model.blocks[3].mlp.fc2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(image)
        hook.remove()
    row = next(m for m in prunex.correction(small).branches if (m.block, m.kind) == (3, "channels"))
    h = torch.cat([s.flatten(0, 1) for s in seen]).double()
    assert len(h) < 12 * 17
    y = h @ model.blocks[3].mlp.fc2.weight.detach().double().T
    assert row.variance == pytest.approx(float(y.var(0, correction=0).mean()), rel=1e-4)


def test_with_a_head_that_explains_itself():
    model = tiny()
    prunex.attach(model, "concept_transformer", concepts=4)
    hard(model)
    small = prunex.slim(model, correct="refit", images=images(12))
    x = images(12)
    bare = prunex.slim(model)
    with prunex.attached(model, units=True).pruner.all_open():
        dense = model(x)
    assert (small(x) - dense).square().mean() < 0.8 * (bare(x) - dense).square().mean()


def test_by_hand_and_by_gates_at_once():
    model = tiny().double()
    x = images(12).double()
    pruning = hard(model, budget=0.8)
    kept = next(b for b in pruning.pruner.branches if b.kind == "heads" and int(pruning.pruner.open(b.key).sum()) > 1)
    heads = pruning.pruner.open(kept.key).nonzero().flatten().tolist()[:1]
    by_hand = WidthSpec(heads={kept.block: heads})
    small = prunex.slim(model, widths=by_hand, correct="refit", images=x)
    both = WidthSpec(heads={**pruning.widths.heads, kept.block: heads}, channels=pruning.widths.channels)
    pruning.detach()
    at_once = prunex.slim(model, widths=both, correct="refit", images=x)
    assert relative(small(x), at_once(x)) < 1e-10


def test_a_module_round_the_model_prepares_the_images():
    class Prepared(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit, self.seen = vit, []

        def forward(self, x):
            self.seen.append(self.training)
            return self.vit((nn.functional.interpolate(x, size=32) - 0.5) / 0.25)

    vit, x = tiny(), torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    module = Prepared(vit).train()
    small = prunex.slim(module, widths=SPEC, correct="refit", images=x.split(5))
    prepared = (nn.functional.interpolate(x, size=32) - 0.5) / 0.25
    alone = prunex.slim(vit, widths=SPEC, correct="refit", images=prepared)
    assert relative(small(prepared), alone(prepared)) < 1e-5
    assert module.training
    assert not any(module.seen)


def test_loaders_pairs_and_what_is_in_a_batch():
    model, results = tiny().double(), []
    x, y = images(12).double(), torch.arange(12) % 5
    for source in (
        x,
        (x, y),
        [x[:5], x[5:]],
        [{"image": x, "label": y}],
        iter([(x, y)]),
        DataLoader(x, 5, shuffle=True),
    ):
        small = prunex.slim(model, widths=SPEC, correct="refit", images=source)
        results.append(small(x))
        assert prunex.correction(small).images == 12
    assert all(relative(r, results[0]) < 1e-9 for r in results)


def test_a_generator_is_walked_once_and_the_random_state_stays():
    taken = []

    def walk():
        for x in images(9).split(3):
            taken.append(len(x))
            yield x

    model = tiny()
    prunex.slim(model, widths=SPEC, correct="refit", images=walk())
    assert taken == [3, 3, 3]
    state = torch.random.get_rng_state()
    prunex.slim(model, widths=SPEC, correct="refit", images=loader())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["inference", "autocast", "training", "half", "frozen"])
def test_whatever_is_round_the_call(mode):
    model, x = tiny(), images(12)
    wanted = prunex.slim(model, widths=SPEC, correct="refit", images=x)(x)
    if mode == "inference":
        with torch.inference_mode():
            small = prunex.slim(model, widths=SPEC, correct="refit", images=x)
    elif mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            small = prunex.slim(model, widths=SPEC, correct="refit", images=x)
    elif mode == "half":
        small = prunex.slim(tiny().bfloat16(), widths=SPEC, correct="refit", images=x).float()
    else:
        model.train(mode == "training").requires_grad_(mode != "frozen")
        small = prunex.slim(model, widths=SPEC, correct="refit", images=x)
    with torch.no_grad():
        assert relative(small(x), wanted) < (0.1 if mode == "half" else 1e-6)
    assert all(p.requires_grad == (mode != "frozen") for p in small.parameters())


def test_adapters_are_folded_before_they_are_corrected():
    class Added(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.more = nn.Parameter(0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))

        def forward(self, weight):
            return weight + self.more

    model, x = tiny(), images(12)
    plain = tiny()
    layer = model.blocks[0].mlp.fc2
    parametrize.register_parametrization(layer, "weight", Added(layer.weight.shape))
    with torch.no_grad():
        plain.blocks[0].mlp.fc2.weight.copy_(layer.weight)
    small, wanted = (prunex.slim(m, widths=SPEC, correct="refit", images=x) for m in (model, plain))
    assert relative(small(x), wanted(x)) < 1e-5


def test_a_model_without_a_classifier_and_one_without_biases():
    for args in ({"num_classes": 0}, {"qkv_bias": False, "proj_bias": False}):
        model, x = tiny(**args), images(12)
        bare, small = prunex.slim(model, widths=SPEC), prunex.slim(model, widths=SPEC, correct=True, images=x)
        assert (small(x) - model(x)).square().mean() < 0.8 * (bare(x) - model(x)).square().mean()
        assert list(small.state_dict()) == list(bare.state_dict())
    with pytest.raises(PrunexError, match=r"blocks\.0\.attn\.proj has no bias.*refit"):
        prunex.slim(model, widths=SPEC, correct="bias", images=x)


def test_swin_and_swiglu():
    swiglu = tiny("dinov2", mlp_layer=SwiGLU, act_layer=nn.SiLU)
    for model, spec in ((swin(), WidthSpec(heads={0: (1,), 3: (0, 2)}, channels={1: range(40)})), (swiglu, SPEC)):
        x = images_for(model, 16)
        bare, small = prunex.slim(model, widths=spec), prunex.slim(model, widths=spec, correct=True, images=x)
        assert (small(x) - model(x)).square().mean() < 0.9 * (bare(x) - model(x)).square().mean()


def test_thresholds_in_search_are_corrected_against_the_whole_model():
    """X-Pruner before it has chosen: hard gates are what an evaluation has, and half-open ones play no part."""
    model = tiny().double()
    x = images(12).double()
    pruning = prunex.attach(model, "xpruner", budget=0.6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mask in pruning.pruner.masks():
            mask.copy_(torch.rand(mask.shape, generator=generator))
        pruning.pruner.stage = "thresholds"
        pruning.pruner.thresholds.fill_(0.9)
    model.train()
    with pytest.warns(UserWarning, match="has not chosen units yet"):
        small = prunex.slim(model, correct="refit", images=x)
    spec = pruning.pruner.present()
    assert spec.plain()
    pruning.detach()
    wanted = prunex.slim(model.eval(), widths=spec, correct="refit", images=x)
    assert relative(small(x), wanted(x)) < 1e-10


def test_nothing_to_correct_is_said_and_no_image_is_looked_at():
    model = tiny()
    with pytest.warns(UserWarning, match="no units are taken out") as told:
        small = prunex.slim(model, correct="refit", images=iter(()))
    assert told[0].filename == __file__
    assert prunex.correction(small) is None
    assert torch.equal(small(images()), model(images()))


def test_units_that_were_closed_in_training_are_warned_of():
    model = tiny()
    hard(model)
    model.train()(images())
    with pytest.warns(UserWarning, match="trained while xpruner had closed units"):
        prunex.slim(model, correct="refit", images=images(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prunex.slim(model)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"correct": "refit"}, "images=loader"),
        ({"correct": "mean", "images": images()}, "unknown correct 'mean'"),
        ({"correct": 1, "images": images()}, "unknown correct 1"),
        ({"images": images()}, "give correct='refit'"),
        ({"correct": False, "images": images()}, "give correct='refit'"),
        ({"correct": "refit", "images": []}, "no images"),
        ({"correct": "refit", "images": images()[:0]}, "empty batch"),
        ({"correct": "refit", "images": images(size=(40, 40))}, "40 x 40 pixels"),
        ({"correct": "refit", "images": images()[:, :1]}, "takes .*3, 32, 32"),
        ({"correct": "refit", "images": (255 * images()).byte()}, "uint8"),
        ({"correct": "refit", "images": images() * float("nan")}, "NaN"),
        ({"correct": "refit", "images": 3}, "give a data loader"),
        ({"correct": "refit", "images": "photos"}, "give a data loader"),
        ({"correct": "refit", "images": [torch.arange(3)]}, "found no images"),
        ({"correct": "bias", "images": images(), "widths": {"heads": {0: (0,)}}}, "give a prunex.WidthSpec"),
        ({"correct": "bias", "images": images(), "widths": WidthSpec(channels={9: (0,)})}, "block 9"),
        ({"correct": "bias", "images": images(), "widths": WidthSpec(embedding=tuple(range(24)))}, "embedding"),
        ({"correct": "bias", "images": images(), "widths": WidthSpec(blocks=(0, 1))}, "blocks"),
    ],
)
def test_what_cannot_be_corrected_by(given, match):
    model = tiny()
    before = state_of(model)
    with pytest.raises(PrunexError, match=match) as refused:
        prunex.slim(model, **{"widths": SPEC, **given})
    assert "\n" not in str(refused.value)
    assert_same_state(model, before)


def test_models_that_cannot_be_corrected():
    x = images(12)
    shared = tiny()
    shared.blocks[1].mlp.fc2.weight = shared.blocks[0].mlp.fc2.weight
    with pytest.raises(PrunexError, match="is the same tensor as"):
        prunex.slim(shared, widths=WidthSpec(channels={0: range(9)}), correct="refit", images=x)
    parallel = tiny("parallel_scaling")
    with pytest.raises(PrunexError, match="cannot be taken out one by one"):
        prunex.slim(parallel, widths=WidthSpec(heads={0: (0,)}), correct="refit", images=x)
    normed = tiny("attn_norm")
    with pytest.raises(PrunexError, match="cannot be taken out one by one"):
        prunex.slim(normed, widths=WidthSpec(channels={0: (0,)}), correct="refit", images=x)


def test_shared_layers_that_lose_nothing_do_no_harm():
    model = tiny()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    small = prunex.slim(model, widths=WidthSpec(channels={3: range(90)}), correct="refit", images=images(12))
    assert small.blocks[1].mlp.fc2.weight is small.blocks[0].mlp.fc2.weight


def test_other_attention_is_refused_by_name():
    eva = tiny("eva02")
    with pytest.raises(PrunexError, match="block 0"):
        prunex.slim(eva, widths=WidthSpec(heads={0: (0,)}), correct="refit", images=images())
    with pytest.raises(PrunexError, match="block 0"):
        prunex.slim(eva, widths=WidthSpec(channels={0: (0,)}), correct="refit", images=images())


def test_a_damaged_note_is_refused(tmp_path):
    small = prunex.slim(tiny(), widths=SPEC, correct="bias", images=images(12))
    prunex.save(small, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["prunex"]["correction"]["branches"][0]["after"] = "little"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(PrunexError, match="correction entry"):
        prunex.load(tmp_path)
