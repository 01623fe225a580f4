"""Vision DiffMask as an explainer: its definition, what it leaves alone, and what it learns."""

import json
import math

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.learned.diffmask import (
    DiffMaskExplainer,
    MaskGates,
    Terms,
    divergence,
    load_explainer,
    log_keep,
    log_votes,
    sample,
)
from tests.vits import FAMILIES, assert_same_state, images, images_for, largest, relative, state_of, tiny

SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "clip", "not_square", "no_embed_class"]


def explainer(model=None, seed=3, **options):
    """An explainer with lively gates, whose probabilities are neither 0 nor 1."""
    model = tiny() if model is None else model
    found = DiffMaskExplainer(model, **options)
    return liven(found, seed).eval()


def liven(found, seed):
    """Weights of gates from a seed, logits around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in found.gates.gates:
            for name, p in gate.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(2 + 0.1 * noise if "original0" in name else noise * (1 if "weight" in name else 0.3))
            gate.add.fill_(1.0)
            gate.mul = 3.0
    return found


def force(found, logit):
    """Gates that all say the same, whatever they see."""
    with torch.no_grad():
        for gate in found.gates.gates:
            gate.mul = 0.0
            gate.add.fill_(logit)
    return found


# ----------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_nothing_and_closed_ones_show_nothing(family):
    model = tiny(family).double()
    a, b = images_for(model, 2), images_for(model, 2, seed=5)
    found = force(explainer(model), 50.0)
    layer = found.layers - 1
    with torch.no_grad():
        terms = found.terms(a, layer)
        assert largest(terms.masked, model(a)) < 1e-5
        assert float(terms.divergence.abs().max()) < 1e-8
        assert float(terms.log_keep.exp().min()) > 1 - 1e-9
        force(found, -50.0)
        closed = [found.terms(x, layer).masked for x in (a, b)]
        assert largest(*closed) < 1e-5
        assert relative(closed[0], model(a)) > 1e-3


@pytest.mark.parametrize(("logit", "probability"), [(-2.0, 0.157), (0.0, 0.580), (2.0, 0.911)])
def test_a_hard_concrete_variable_is_zero_as_often_as_is_said(logit, probability):
    logits = torch.full((400_000,), logit, dtype=torch.float64)
    drawn = sample(logits, torch.Generator().manual_seed(0))
    told = log_keep(logits[:1]).exp()
    assert float(told) == pytest.approx(1 / (1 + math.exp(-(logit + 0.2 * math.log(5)))), abs=1e-9)
    assert float(told) == pytest.approx(probability, abs=1e-3)
    assert float((drawn != 0).double().mean()) == pytest.approx(float(told), abs=3e-3)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    if logit <= 0:
        assert float((drawn == 1).double().mean()) < 1e-3  # r = 1: ones come by saturation only


def test_extreme_logits_stay_finite():
    logits = torch.tensor([-200.0, -50.0, 50.0, 200.0]).requires_grad_()
    drawn, told = sample(logits), log_keep(logits)
    assert torch.isfinite(told).all()
    assert drawn.detach().tolist() == [0, 0, 1, 1]
    (drawn.sum() + told.sum()).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool_no_class"])
def test_keeping_gets_less_likely_with_every_vote(family):
    model = tiny(family)
    with torch.no_grad():
        votes = explainer(model)(images_for(model)).exp()
    assert votes.shape == (3, 6, 16)
    assert (votes.diff(dim=1) <= 0).all()
    assert (votes.diff(dim=1) < 0).float().mean() > 0.9
    assert 0 < float(votes.min()) < float(votes.max()) <= 1


def slow_gate(gate, first, state):
    """One gate on one token, from its raw parameters."""

    def linear(layer, x):
        g, v = (getattr(layer.parametrizations.weight, f"original{i}").double() for i in (0, 1))
        out = []
        for row in range(len(v)):
            length = math.sqrt(sum(float(t) ** 2 for t in v[row]))
            out.append(float(g[row]) / length * float(v[row] @ x) + float(layer.bias[row]))
        return torch.tensor(out, dtype=torch.float64)

    hidden = linear(gate.hidden, torch.cat([first, state])).tanh()
    return gate.mul * math.tanh(float(linear(gate.vote, hidden))) + float(gate.add)


def slow_states(model, x):
    """h_0 .. h_{L+1} of patches, by timm's own modules."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for block in model.blocks]
    hooks.append(model.blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out)))
    logits = model(x)
    for hook in hooks:
        hook.remove()
    patches = model.patch_embed(x)
    return patches, [patches, *(h[:, model.num_prefix_tokens :] for h in seen)], logits


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool", "avg_pool_no_class", "not_square"])
def test_gates_votes_and_loss_are_those_of_a_slow_walk(family):
    model = tiny(family).double()
    x = images_for(model, 2)
    found = explainer(model).double()
    p = model.patch_embed.num_patches
    with torch.no_grad():
        patches, states, z = slow_states(model, x)
        assert len(states) == found.layers == 6
        for k in (0, 3, 5) if family == "vit" else (5,):
            u = torch.rand(2, k + 1, p, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            expected, kl, size = [], [], []
            mixed = torch.zeros_like(patches)
            for b in range(2):
                for t in range(p):
                    v, c = 1.0, 0.0
                    for i in range(k + 1):
                        logit = slow_gate(found.gates.gates[i], states[0][b, t], states[i][b, t])
                        noise = float(u[b, i, t])
                        s = 1 / (1 + math.exp(-(math.log(noise) - math.log(1 - noise) + logit) / 0.2))
                        v *= min(1.0, max(0.0, s * 1.2 - 0.2))
                        c += math.log(1 / (1 + math.exp(-(logit - 0.2 * math.log(0.2)))))
                    expected.append(c)
                    mixed[b, t] = v * patches[b, t] + (1 - v) * found.gates.placeholder[0, 0]
            hook = model.patch_embed.register_forward_hook(lambda m, args, out, mixed=mixed: mixed)
            told = model(x)
            hook.remove()
            for b in range(2):
                one, other = z[b].softmax(0), told[b].softmax(0)
                kl.append(sum(float(a) * math.log(float(a) / float(o)) for a, o in zip(one, other, strict=True)))
                size.append(sum(expected[b * p : (b + 1) * p]) / p)
            terms = found.terms(x, k, torch.Generator().manual_seed(7))
            assert largest(terms.log_keep.flatten(), torch.tensor(expected, dtype=torch.float64)) < 1e-10
            assert largest(terms.masked, told) < 1e-9
            assert largest(terms.divergence, torch.tensor(kl, dtype=torch.float64)) < 1e-9
            wanted = sum(7.0 * (kl[b] - 0.1) + size[b] for b in range(2)) / 2
            assert float(terms.loss(torch.tensor(7.0), 0.1)) == pytest.approx(wanted, abs=1e-9)


def test_a_normed_embedding_is_read_as_it_enters_the_blocks():
    model = tiny("clip").double()
    x = images_for(model, 2)
    found = explainer(model).double()
    with torch.no_grad():
        _, states, _ = slow_states(model, x)
        wanted = found.gates([states[1], *states[1:]])
        assert largest(found.observe(x).gates, wanted) < 1e-12


def test_sampling_can_be_differentiated():
    logits = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: sample(t, torch.Generator().manual_seed(3)), (logits,), eps=1e-7, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool_no_class"])
def test_the_explained_model_never_changes(family):
    model = tiny(family, drop_path_rate=0.5)
    x = images_for(model)
    before = state_of(model)
    with torch.no_grad():
        logits = model(x)
    found = DiffMaskExplainer(model).train()
    assert_same_state(model, before)
    assert found.training
    assert not any(m.training for m in found.model.modules())
    own = {k: v.clone() for k, v in found.model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in found.parameters() if p.requires_grad], lr=0.1)
    for layer in range(found.layers):
        optimizer.zero_grad()
        found.terms(x, layer).loss(found.alpha[layer], 0.1).backward()
        optimizer.step()
        assert all(p.grad is None for p in found.model.parameters())
        trained = [g for g in found.gates.gates if g.add.grad is not None]
        assert len(trained) == layer + 1  # of the votes that were taken
        assert [a.grad is not None for a in found.alpha] == [i == layer for i in range(found.layers)]
    assert all(v.equal(own[k]) for k, v in found.model.state_dict().items())
    assert found.model(x).equal(logits)
    with torch.no_grad():
        assert model(x).equal(logits)


def test_gates_are_saved_without_the_model_where_it_is_pruned():
    model = tiny()
    with prunex.attach(model, "diffmask", explainer=explainer()) as pruning:
        assert {k.split(".")[0] for k in pruning.pruner.state_dict()} == {"gates"}


# ----------------------------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize("family", SHOWN)
def test_the_answer_is_the_votes_on_the_grid(family):
    model = tiny(family)
    found, x = explainer(model), images_for(model)
    e = prunex.explain("diffmask", model, x, explainer=found)
    with torch.no_grad():
        votes = found(x).exp()
        assert e.logits.equal(model(x)) or largest(e.logits, model(x)) < 1e-6
    assert largest(e.raw, votes) < 1e-7
    assert not e.signed
    grid = tuple(model.patch_embed.grid_size)
    for layer in (-1, 0, 3):
        one = prunex.explain("diffmask", model, x, explainer=found, layer=layer)
        assert one.maps.equal(e.raw[:, layer].unflatten(1, grid))
        assert one.raw.equal(e.raw)
    single = prunex.explain("diffmask", model, x, explainer=found, aggregated=False)
    assert largest(single.raw.cumprod(1), e.raw) < 1e-6
    assert single.maps.equal(single.raw[:, -1].unflatten(1, grid))
    for i in range(3):
        alone = prunex.explain("diffmask", model, x[i : i + 1], explainer=found)
        assert relative(alone.maps[0], e.maps[i]) < 1e-5
    # The map knows no class.
    assert prunex.explain("diffmask", model, x, 2, explainer=found).maps.equal(e.maps)


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_a_pruned_model_gives_class_and_trace_and_the_dense_copy_the_map(pruner):
    model, found = tiny(), explainer()
    dense = prunex.explain("diffmask", model, images(), explainer=found)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        e = prunex.explain("diffmask", model, images(), explainer=found)
        pruning.masked = True
        hidden = prunex.explain("diffmask", model, images(), explainer=found)
    assert e.maps.equal(dense.maps)
    assert hidden.maps.equal(e.maps)
    assert int(e.trace.kept().sum()) < 48


def test_it_leaves_flags_and_modes_alone():
    model, found = tiny().train(), explainer().train()
    flags = [m.training for m in found.modules()]
    holder = nn.Module()
    holder.inner = found
    with torch.inference_mode():
        e = prunex.explain("diffmask", model, images(1), explainer=holder)
    assert not e.raw.requires_grad
    assert [m.training for m in found.modules()] == flags
    assert all(m.training for m in model.modules())


def test_half_precision_models_and_explainers_give_single_precision_values():
    full = prunex.explain("diffmask", tiny(), images(1), explainer=explainer())
    x = images(1, dtype=torch.bfloat16)
    for model, found in ((tiny().bfloat16(), explainer()), (tiny().bfloat16(), explainer().bfloat16())):
        e = prunex.explain("diffmask", model, x, explainer=found)
        assert e.maps.dtype == e.raw.dtype == torch.float32
        assert relative(e.maps, full.maps) < 0.3


def test_divergence_is_that_of_torch_and_of_two_outcomes_for_one_logit():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (torch.distributions.Categorical(logits=t) for t in (a, b))
    assert largest(divergence(a, b), torch.distributions.kl_divergence(p, q)) < 1e-6
    p, q = (torch.distributions.Bernoulli(logits=t[:, 0]) for t in (a, b))
    assert largest(divergence(a[:, :1], b[:, :1]), torch.distributions.kl_divergence(p, q)) < 1e-6


def test_without_a_placeholder_masked_patches_are_zeros():
    found = explainer(no_placeholder=True)
    assert found.gates.placeholder.equal(torch.zeros(1, 1, 48))
    assert "placeholder" not in dict(found.gates.named_parameters())
    with torch.no_grad():
        seen = found.observe(images(2))
        none = found.masked(seen, torch.zeros(2, 16))
        hook = found.model.patch_embed.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
        wanted = found.model(images(2))
        hook.remove()
        assert largest(none, wanted) < 1e-5


def test_gates_start_open():
    found = DiffMaskExplainer(tiny()).eval()
    with torch.no_grad():
        gates = found.observe(images(2)).gates
    assert float(gates.min()) >= 8 - 15
    assert float(gates.max()) <= 8 + 15
    assert float(gates.median()) == pytest.approx(8, abs=4)
    assert all(a.item() == 20 for a in found.alpha)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_giant", "avg_pool", "clip"])
def test_saved_and_loaded_it_says_the_same(family, tmp_path):
    model = tiny(family)
    whole = DiffMaskExplainer(model, mul=3.0, add=2.0, no_placeholder=family == "clip").eval()
    liven(whole, 2)
    folder = whole.save(tmp_path / "new" / "explainer")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    torch.manual_seed(8)
    before = torch.get_rng_state()
    again = load_explainer(folder)
    assert torch.get_rng_state().equal(before)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.gates.settings == whole.gates.settings
    x = images_for(model)
    with torch.no_grad():
        assert again(x).equal(whole(x))
    for path in (folder, str(folder / "model.safetensors")):
        e = prunex.explain("diffmask", model, x, explainer=path)
        assert largest(e.raw, whole(x).exp()) < 1e-7
    whole.save(folder)  # over the old one


def test_folders_that_hold_none(tmp_path):
    folder = explainer().save(tmp_path / "explainer")
    config = json.loads((folder / "config.json").read_text())

    def refused(says, **options):
        with pytest.raises(PrunexError, match=says):
            prunex.explain("diffmask", tiny(), images(1), explainer=folder)
        with pytest.raises(PrunexError, match=says):
            prunex.attach(tiny(), "diffmask", explainer=folder)

    def write(**changes):
        (folder / "config.json").write_text(json.dumps({"prunex": config["prunex"] | changes}))

    with pytest.raises(PrunexError, match=r"has no config\.json.*prunex fit"):
        load_explainer(tmp_path / "nothing")
    write(version=2)
    refused("of format 2, this prunex reads 1")
    write(kind="vit_shapley")
    refused("is not of a diffmask explainer")
    (folder / "config.json").write_text("{")
    refused("is damaged")
    write(gates=3)
    refused("is damaged: gates=3")
    write(gates={"width": 48})
    refused("is damaged: gates=")
    write(gates=config["prunex"]["gates"] | {"mul": "wide"})
    refused("mul='wide'")
    write(gates=config["prunex"]["gates"] | {"width": 40})
    refused(r"does not fit config\.json")
    write()
    (folder / "model.safetensors").write_bytes(b"not at all")
    refused("is damaged")
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunexError, match="cannot write to"):
        explainer().save(tmp_path / "file" / "explainer")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, r"needs a trained explainer: train one with prunex fit --config configs/digits/diffmask\.yaml"),
        (3, r"explainer=3 is not allowed: give the explainer's folder"),
        (nn.Linear(2, 2), "Linear holds 0 diffmask explainers"),
        (nn.ModuleList([explainer(), explainer()]), "holds 2 diffmask explainers"),
        (explainer(tiny(num_classes=7)), r"number of classes is 7, the model's 5"),
        (explainer(tiny(img_size=16)), r"image size is \(16, 16\), the model's \(32, 32\)"),
        (explainer(tiny(patch_size=4)), r"patch size is \(4, 4\), the model's \(8, 8\)"),
    ],
)
def test_bad_explainers(given, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("diffmask", tiny(), images(1), explainer=given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": 6}, r"layer=6 does not exist: hidden states are 0.*1\.\.4.*5"),
        ({"layer": -7}, "layer=-7 does not exist"),
        ({"layer": True}, "layer=True"),
        ({"aggregated": 1}, "aggregated=1"),
        ({"lay": 1}, "did you mean 'layer'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("diffmask", tiny(), images(1), explainer=explainer(), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mul": -1}, "mul=-1"),
        ({"add": math.nan}, "add=nan"),
        ({"no_placeholder": "yes"}, "no_placeholder='yes'"),
        ({"alpha_init": 201}, r"alpha_init=201 is not allowed: give a number in \[0, 200\]"),
    ],
)
def test_bad_constructions(options, says):
    with pytest.raises(PrunexError, match=says):
        DiffMaskExplainer(tiny(), **options)


def test_bad_models():
    with pytest.raises(PrunexError, match="no classifier"):
        DiffMaskExplainer(tiny(num_classes=0))
    model = tiny()
    with prunex.attach(model, "topk"), pytest.raises(PrunexError, match=r"pruned: detach\(\) it first"):
        DiffMaskExplainer(model)
    with pytest.raises(PrunexError, match="number of classes is 5, the model's 0"):
        prunex.explain("diffmask", tiny(num_classes=0), images(1), explainer=explainer())


def test_votes_and_terms_are_plain_sums():
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    assert largest(log_votes(logits)[:, 2], log_keep(logits[:, :3]).sum(1)) < 1e-12
    terms = Terms(torch.tensor([0.3, 0.5]), torch.tensor([[-1.0, -3.0], [0.0, 0.0]]), logits, logits)
    assert float(terms.loss(torch.tensor(10.0), 0.1)) == pytest.approx(10 * 0.3 - 1)
    assert MaskGates(8, 2)([torch.zeros(1, 3, 8)] * 2).shape == (1, 2, 3)  # the first gates alone
