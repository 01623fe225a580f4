"""Weights that make up for removed units: against their definition, step by step, and where nothing may change."""

import copy

import pytest
import torch
from timm.layers import SwiGLU
from timm.models.swin_transformer import window_reverse
from torch import nn

import prunex
from prunex import PrunexError, WidthSpec
from prunex.units.batches import about, entering
from prunex.units.correction import Correction, Mended, check_correct, cuts_of, make_up
from prunex.units.moments import Moments
from prunex.vit.units import last_layer
from tests.units.units import swin
from tests.vits import assert_same_state, gated, images, images_for, relative, state_of, tiny

SPEC = WidthSpec(heads={0: (0, 2), 2: (1,)}, channels={0: tuple(range(0, 192, 2)), 3: tuple(range(40))})
FAMILIES = {
    "vit": ({}, SPEC),
    "deit_distilled": ({"family": "deit_distilled"}, SPEC),
    "dinov2_reg": ({"family": "dinov2_reg"}, SPEC),
    "res_post": ({"family": "res_post"}, SPEC),
    "siglip": ({"family": "siglip"}, SPEC),
    "swiglu": ({"family": "dinov2", "mlp_layer": SwiGLU, "act_layer": nn.SiLU}, SPEC),
    "glu": ({"family": "dinov2_giant"}, WidthSpec(heads={1: (0,)}, channels={0: range(30)})),
    "eva": ({"family": "eva02", "scale_mlp": False}, WidthSpec(channels={0: range(10), 3: range(1, 60)})),
    "beit": ({"family": "beit"}, WidthSpec(channels={1: range(100)})),
}


def double(family):
    """A tiny model of a family in float64, the widths that are left of it, and images."""
    args, spec = FAMILIES[family]
    model = tiny(**args).double()
    return model, spec, images_for(model, 12)


def rows(model, x, layer, real=None):
    """What enters a layer and what comes out, in float64: [n, F] and [n, D]."""
    seen = []
    hook = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(x)
    hook.remove()
    h, y = seen[0]
    return h.flatten(0, -2), y.flatten(0, -2)


def by_definition(h, weight, bias, kept, ridge):
    """The affine refit from all rows at once."""
    kept = torch.tensor(kept)
    lost = torch.tensor([i for i in range(h.shape[1]) if i not in set(kept.tolist())])
    mean = h.mean(0)
    c = (h - mean).T @ (h - mean) / len(h)
    among = c[kept][:, kept] + ridge * c.diagonal().mean() * torch.eye(len(kept)).double()
    b = torch.linalg.solve(among, c[kept][:, lost])
    new = weight[:, kept] + weight[:, lost] @ b.T
    return new, bias + weight[:, lost] @ (mean[lost] - b.T @ mean[kept])


def inputs_of(cut):
    return cut.kept.repeat_interleave(cut.branch.width).nonzero().flatten().tolist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_refit_is_its_definition(family):
    model, spec, x = double(family)
    twin = copy.deepcopy(model)
    cuts = [c for c in cuts_of(model, spec) if c.lost.any()]
    done = make_up(model, cuts, x.split(5), "refit")
    assert done.images == 12
    assert len(done.branches) == len(cuts) == len(spec.heads) + len(spec.channels)
    for cut, row in zip(cuts, done.branches, strict=True):
        b, kept = cut.branch, inputs_of(cut)
        before, after = (last_layer(m.get_submodule(b.path), b.kind) for m in (twin, model))
        h, y = rows(twin, x, before)
        weight, bias = by_definition(h, before.weight, before.bias, kept, 1e-2)
        assert relative(after.weight[:, kept], weight) < 1e-9
        assert relative(after.bias, bias) < 1e-9
        assert after.weight.detach().count_nonzero() <= len(kept) * len(bias)
        none = (h[:, kept] @ before.weight[:, kept].T + before.bias - y).square().mean()
        some = (h[:, kept] @ weight.T + bias - y).square().mean()
        assert row.before == pytest.approx(none.item(), rel=1e-9)
        assert row.after == pytest.approx(some.item(), rel=1e-9)
        assert row.variance == pytest.approx(float(y.var(0, correction=0).mean()), rel=1e-9)
        assert (row.units, row.lost) == (b.units, int(cut.lost.sum()))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("correct", ["bias", "refit"])
def test_the_mean_of_the_output_stays_and_errors_fall(family, correct):
    model, spec, x = double(family)
    twin = copy.deepcopy(model)
    cuts = [c for c in cuts_of(model, spec) if c.lost.any()]
    done = make_up(model, cuts, [x], correct)
    for cut, row in zip(cuts, done.branches, strict=True):
        b, kept, lost = cut.branch, inputs_of(cut), inputs_of(cut._replace(kept=cut.lost))
        before, after = (last_layer(m.get_submodule(b.path), b.kind) for m in (twin, model))
        h, y = rows(twin, x, before)
        now = h[:, kept] @ after.weight[:, kept].T + after.bias
        assert relative(now.mean(0), y.mean(0)) < 1e-10
        covariance = torch.cov(h[:, lost].T, correction=0)
        left = float((before.weight[:, lost] @ covariance * before.weight[:, lost]).sum()) / len(after.bias)
        if correct == "bias":
            assert row.after == pytest.approx(left, rel=1e-9)
            assert torch.equal(after.weight[:, kept], before.weight[:, kept])
        else:
            assert row.after < left * (1 + 1e-9)
        assert row.after <= row.before


def test_one_batch_or_many_are_the_same():
    results = []
    for size in (1, 5, 12):
        model, spec, x = double("vit")
        make_up(model, cuts_of(model, spec), x.split(size), "refit")
        results.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert relative(results[0], results[2]) < 1e-10
    assert relative(results[1], results[2]) < 1e-10


def test_constant_channels_are_exactly_in_the_bias():
    model = tiny().double()
    fc1 = model.blocks[1].mlp.fc1
    with torch.no_grad():
        fc1.weight[60:] = 0
    x = images_for(model, 4)
    wanted = model(x)
    for correct in ("bias", "refit"):
        again = copy.deepcopy(model)
        done = make_up(again, cuts_of(again, WidthSpec(channels={1: range(60)})), [x], correct)
        assert relative(again(x), wanted) < 1e-12
        assert done.branches[0].before > 1e-4
        assert done.branches[0].after < 1e-24


def test_copies_of_channels_and_heads_are_taken_over_exactly():
    model = tiny().double()
    mlp, attn, x = model.blocks[2].mlp, model.blocks[0].attn, images_for(model, 12)
    with torch.no_grad():
        for layer in (mlp.fc1.weight, mlp.fc1.bias):
            layer[100:150] = layer[:50]
        for layer in (attn.qkv.weight, attn.qkv.bias):
            parts = layer.view(3, 3, 16, *layer.shape[1:])
            parts[:, 2] = parts[:, 0]
    spec = WidthSpec(channels={2: (*range(100), *range(150, 192))}, heads={0: (0, 1)})
    wanted = model(x)
    bare = prunex.slim(model, widths=spec)(x)
    done = make_up(model, cuts_of(model, spec), [x], "refit", ridge=0.0)
    assert relative(bare, wanted) > 1e-3
    assert relative(model(x), wanted) < 1e-9
    assert all(row.after < 1e-12 < 1e-4 < row.before for row in done.branches)


def test_an_endless_ridge_is_the_bias_alone():
    ridged, folded = (double("vit")[0] for _ in range(2))
    x = images_for(ridged, 8)
    make_up(ridged, cuts_of(ridged, SPEC), [x], "refit", ridge=1e12)
    make_up(folded, cuts_of(folded, SPEC), [x], "bias")
    for (name, p), q in zip(ridged.named_parameters(), folded.parameters(), strict=True):
        assert relative(p, q) < 1e-9, name


@pytest.mark.parametrize("correct", ["bias", "refit"])
def test_where_nothing_is_lost_nothing_changes(correct):
    model = tiny()
    before = state_of(model)
    everything = WidthSpec(heads={0: range(3)}, channels={1: range(192)})
    assert make_up(model, cuts_of(model, everything), iter(()), correct).branches == ()
    assert_same_state(model, before)
    # Taken out are channels whose columns are zero: kept weights are those that were there, bit for bit.
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, 50:] = 0
    before = state_of(model)
    done = make_up(model, cuts_of(model, WidthSpec(channels={1: range(50)})), [images()], correct)
    assert_same_state(model, before)
    assert done.branches[0].before == done.branches[0].after == 0


def test_a_branch_that_is_emptied_gives_its_mean():
    model = tiny().double()
    x, spec = images_for(model, 4), WidthSpec(heads={1: ()}, channels={2: ()})
    twin = copy.deepcopy(model)
    make_up(model, cuts_of(model, spec), [x], "refit")
    for path, kind in (("blocks.1", "heads"), ("blocks.2", "channels")):
        before, after = (last_layer(m.get_submodule(path), kind) for m in (twin, model))
        assert relative(after.bias, rows(twin, x, before)[1].mean(0)) < 1e-10
        assert not after.weight.any()


def test_a_layer_without_a_bias_has_no_intercept():
    model = tiny(proj_bias=False).double()
    x, kept = images_for(model, 8), list(range(0, 192, 2))
    layer = model.blocks[1].mlp.fc2
    h, y = rows(model, x, layer)
    gram = h.T @ h
    ridged = gram + 1e-2 * gram.diagonal().mean() * torch.eye(192).double()
    wanted = torch.linalg.solve(ridged[kept][:, kept], (ridged @ layer.weight.T)[kept]).T
    done = make_up(model, cuts_of(model, WidthSpec(channels={1: kept})), x.split(3), "refit")
    assert relative(layer.weight[:, kept], wanted) < 1e-9
    assert layer.bias is None
    error = (h[:, kept] @ wanted.T - y).square().mean()
    assert done.branches[0].after == pytest.approx(error.item(), rel=1e-8)


def test_padding_of_windows_is_no_token():
    """Stages of 8 x 8 and 4 x 4 tokens in windows of 3 x 3: what pads them never reaches the stream."""
    model = swin(window_size=3).double()
    block, x = model.layers[0].blocks[1], torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    assert any(block.shift_size)
    with torch.no_grad():
        windows, _ = (r.view(3 * 9, 9, -1) for r in rows(model, x, block.attn.proj))
    grid = window_reverse(windows.view(-1, 3, 3, 24), (3, 3), 9, 9)[:, :8, :8].reshape(-1, 24)
    weight, bias = by_definition(grid, block.attn.proj.weight, block.attn.proj.bias, list(range(12, 24)), 1e-2)
    make_up(model, cuts_of(model, WidthSpec(heads={1: (1,)})), x.split(2), "refit")
    assert relative(block.attn.proj.weight[:, 12:], weight) < 1e-9
    assert relative(block.attn.proj.bias, bias) < 1e-9


def test_gated_attention_and_single_precision():
    model = gated()
    wide, x = copy.deepcopy(model).double(), images(8)
    for m in (model, wide):
        make_up(m, cuts_of(m, SPEC), [x.to(next(m.parameters()))], "refit")
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert relative(p, q) < 1e-4, name


def test_means_far_from_zero_do_not_cancel():
    """Inputs of mean 1000 and standard deviation 1, in float32: squares less the squared mean would be noise."""
    generator = torch.Generator().manual_seed(0)
    h = 1000 + torch.randn(4000, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    kept = torch.arange(8)
    moments = Moments(weight, kept, torch.arange(8, 12), True)
    for some in h.split(300):
        moments.add(some, some @ weight.T)
    c = torch.cov(h.double().T, correction=0)
    assert relative(moments.among, c[:8, :8]) < 1e-4
    assert relative(moments.across, c[:8, 8:] @ weight[:, 8:].double().T) < 1e-4


def test_of_many_tokens_every_nth_is_enough_and_the_mean_is_of_all(monkeypatch):
    monkeypatch.setattr(prunex.units.moments, "ENOUGH", 200)
    monkeypatch.setattr(prunex.units.moments, "EACH", 0)
    model = tiny().double()
    twin, x = copy.deepcopy(model), images_for(model, 48)
    layer, kept = model.blocks[1].mlp.fc2, list(range(20))
    done = make_up(model, cuts_of(model, WidthSpec(channels={1: kept})), x.split(12), "refit", expected=48)
    h, y = rows(twin, x, twin.blocks[1].mlp.fc2)
    now = h[:, kept] @ layer.weight[:, kept].T + layer.bias
    assert relative(now.mean(0), y.mean(0)) < 1e-10
    # 816 tokens: every fourth, from another one on in each batch of 204.
    batches = [part[i % 4 :: 4] for i, part in enumerate(h.split(204))]
    used, before = torch.cat(batches), twin.blocks[1].mlp.fc2
    weight, _ = by_definition(used, before.weight, before.bias, kept, 1e-2)
    assert relative(layer.weight[:, kept], weight) < 1e-9
    assert done.branches[0].after == pytest.approx(float((now - y).square().mean().detach()), rel=0.2)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        (images(7), 7),
        ((images(7), torch.arange(7)), 7),
        ([images(5), images(2)], 10),
        (torch.utils.data.DataLoader(images(7), 3), 9),
        (iter([images(7)]), None),
        ([], None),
    ],
)
def test_about_how_many_images_there_will_be(source, count):
    assert about(source) == count


def test_training_state_random_numbers_and_hooks_are_as_they_were():
    model = tiny(drop_path_rate=0.5).train()
    prunex.attach(model, "evit", keep_ratio=0.7).masked = True
    before, state = state_of(model), torch.random.get_rng_state()
    cuts = cuts_of(model, WidthSpec(channels={0: range(50)}))
    loader = torch.utils.data.DataLoader(images(8), 3, shuffle=True)
    make_up(model, cuts, entering(loader, model), "bias")
    for name in ("blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias"):
        assert not torch.equal(before["tensors"].pop(name), model.state_dict()[name])
    after = state_of(model)
    assert {k: v for k, v in after.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}
    assert all(torch.equal(after["tensors"][n], v) for n, v in before["tensors"].items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert prunex.attached(model).masked is True


def test_what_is_not_finite_is_refused_and_nothing_is_changed():
    model = tiny()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.bias[3] = float("nan")
    before = state_of(model)
    spec = WidthSpec(channels={0: range(50), 2: range(50)})
    with pytest.raises(PrunexError, match=r"blocks\.2\.mlp\.fc2 is NaN"):
        make_up(model, cuts_of(model, spec), [images()], "refit")
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before["tensors"][name].nan_to_num()), name


def test_a_singular_fit_without_a_ridge_is_refused():
    model = tiny().double()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[:4] = 0
    with pytest.raises(PrunexError, match="without a ridge"):
        make_up(model, cuts_of(model, WidthSpec(channels={0: range(50)})), [images_for(model)], "refit", ridge=0.0)


def test_few_tokens_are_told():
    model = tiny()
    with pytest.warns(UserWarning, match=r"1 layers .* blocks\.0\.mlp\.fc2 \(17 for 150\)"):
        make_up(model, cuts_of(model, WidthSpec(channels={0: range(150)})), [images(1)], "refit")


def test_plain_values_and_words():
    done = Correction("refit", 3, (Mended(0, "heads", 4, 1, 2.0, 1.0, 0.5), Mended(1, "channels", 8, 4, 0.0, 0.0, 0.0)))
    assert Correction.read(done.plain()) == done
    assert done.summary() == (
        "refit on 3 images: the error of 2 branches is on average 12.5 % of its variance, 25.0 % before"
    )
    assert done.table().splitlines()[2] == "| 0 | 1 of 4 heads | 50.0 % | 25.0 % |"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "mean"},
        {"images": "3"},
        {"images": -1},
        {"branches": [{"block": 0}]},
        {"branches": [[1, 2]]},
        {"branches": None},
        {"branches": [{**vars(Mended(0, "heads", 4, 1, 2.0, 1.0, 0.5)), "kind": "rows"}]},
        {"branches": [{**vars(Mended(0, "heads", 4, 1, 2.0, 1.0, 0.5)), "after": "low"}]},
    ],
)
def test_other_values_are_no_correction(change):
    values = Correction("refit", 3, ()).plain() | change
    with pytest.raises(PrunexError, match="no correction"):
        Correction.read(values)
    with pytest.raises(PrunexError, match="no correction"):
        Correction.read([values])


@pytest.mark.parametrize("wrong", ["mean", "Refit", 1, ["bias"], 0.5])
def test_kinds_that_are_none(wrong):
    with pytest.raises(PrunexError, match="correct"):
        check_correct(wrong)


def test_kinds():
    assert [check_correct(c) for c in (None, False, True, "bias", "refit")] == [None, None, "refit", "bias", "refit"]
