import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunex
from prunex import PrunexError
from prunex.learned.vit_shapley import ShapleyExplainer, load_explainer, normalise
from prunex.removal.game import Removal, masked
from prunex.vit.embedding import embed
from prunex.vit.forward import resume
from tests.vits import FAMILIES, images, images_for, largest, lively, relative, tiny


def explainer(model=None, seed=3):
    """An explainer with lively random weights on a frozen surrogate."""
    model = tiny() if model is None else model
    found = ShapleyExplainer(model)
    for part in (found.block, found.norm, found.mlp):
        lively(part, seed)
    return found.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_patches_the_surrogate_is_the_model_and_with_none_it_sees_no_image(family):
    model = tiny(family).double()
    a, b = images_for(model, 3), images_for(model, 3, seed=5)
    with torch.no_grad():
        found = []
        for x in (a, b):
            tokens, grid = embed(model, x)
            present = torch.ones(3, grid[0] * grid[1], dtype=torch.bool)
            assert largest(masked(model, tokens, grid, present), model(x)) < 1e-12
            present[1], present[2, 3:] = False, False
            logits = masked(model, tokens, grid, present)
            assert largest(logits[0], model(x)[0]) < 1e-12
            assert largest(logits[2], model(x)[2]) > 1e-3
            found.append(logits[1])
        assert largest(found[0], found[1]) < 1e-12


def test_training_with_hidden_patches_has_the_gradient_of_training_without_them():
    model = tiny().double().requires_grad_(True)
    x = images(2, dtype=torch.float64)
    present = torch.zeros(2, 16, dtype=torch.bool)
    present[:, [1, 4, 5, 11]] = True
    wanted = torch.randn(2, 5, dtype=torch.float64)

    def gradients(logits):
        model.zero_grad()
        (logits * wanted).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    tokens, grid = embed(model, x)
    hidden = gradients(masked(model, tokens, grid, present))
    tokens, _ = embed(model, x)
    rows = torch.cat([torch.zeros(1).long(), 1 + present[0].nonzero().flatten()])
    dropped = gradients(resume(model, tokens[:, rows], (1, 4)))
    assert hidden.keys() == dropped.keys() == {n for n, _ in model.named_parameters()}
    for name, gradient in dropped.items():
        assert relative(hidden[name], gradient) < 1e-9, name


@pytest.mark.parametrize(
    "family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "not_square"]
)
def test_values_of_every_class_sum_to_what_all_patches_add(family):
    model = tiny(family)
    x = images_for(model)
    for found in (explainer(model), ShapleyExplainer(model).eval()):
        game = Removal(model, x)
        nothing, everything = game(torch.tensor([[False], [True]]).expand(3, 2, game.players)).unbind(1)
        with torch.no_grad():
            phi = found(x)
        assert phi.shape == (3, game.players, 5)
        assert largest(phi.sum(1), everything - nothing) < 1e-5
        assert largest(found(x, (everything, nothing)), phi) < 1e-6


def test_the_normalisation_moves_all_patches_alike():
    raw, total = torch.randn(2, 7, 3), torch.randn(2, 3)
    moved = normalise(raw, total) - raw
    assert largest(moved, moved[:, :1].expand(-1, 7, -1)) < 1e-6
    assert largest((raw + moved).sum(1), total) < 1e-5


def test_the_network_is_what_the_paper_draws():
    model = tiny()
    found = explainer(model)
    x = images(2)
    with torch.no_grad():
        tokens = model.forward_features(x)
        block = found.block
        assert isinstance(block.norm1, nn.Identity)
        tokens = tokens + block.attn(tokens)  # no first norm
        tokens = tokens + block.mlp(block.norm2(tokens))
        one, two, three = (m for m in found.mlp if isinstance(m, nn.Linear))
        hidden = nn.functional.gelu(one(found.norm(tokens)))
        raw = three(nn.functional.gelu(two(hidden)))[:, 1:].tanh()
        assert (one.out_features, two.out_features, three.out_features) == (192, 192, 5)
        full, empty = found.ends(x)
        assert largest(found(x), normalise(raw, (full - empty).float())) < 1e-5
    assert raw.abs().max() <= 1
    # Without a final norm of the tokens the first LayerNorm stays.
    assert isinstance(explainer(tiny("avg_pool")).block.norm1, nn.LayerNorm)


def test_it_starts_from_the_surrogate_and_leaves_it_alone():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = ShapleyExplainer(model).train()
    assert not found.surrogate.training
    assert found.backbone.training
    for name, value in found.backbone.state_dict().items():
        assert value.equal(before[name])
    found(images(2)).pow(2).sum().backward()
    assert all(p.grad is None for p in found.surrogate.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in found.backbone.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_answer_is_the_networks_on_the_grid():
    model, found = tiny(), explainer()
    x = images(3)
    e = prunex.explain("vit_shapley", model, x, torch.tensor([4, 0, 2]), explainer=found)
    with torch.no_grad():
        phi = found(x)
        assert largest(e.raw, phi) < 1e-7
        assert e.logits.equal(model(x))
    assert e.signed
    for i, t in enumerate((4, 0, 2)):
        assert e.maps[i].equal(e.raw[i, :, t].view(4, 4))
        alone = prunex.explain("vit_shapley", model, x[i : i + 1], t, explainer=found)
        assert relative(alone.maps[0], e.maps[i]) < 1e-5
    predicted = prunex.explain("vit_shapley", model, x, explainer=found)
    assert predicted.target.equal(predicted.logits.argmax(1))


def test_a_module_that_holds_one_will_do():
    holder = nn.Module()
    holder.inner = explainer()
    a = prunex.explain("vit_shapley", tiny(), images(1), explainer=holder)
    assert a.maps.equal(prunex.explain("vit_shapley", tiny(), images(1), explainer=holder.inner).maps)


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_a_pruned_model_gives_class_and_trace_and_the_surrogate_the_values(pruner):
    model, found = tiny(), explainer()
    dense = prunex.explain("vit_shapley", model, images(), 1, explainer=found)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        e = prunex.explain("vit_shapley", model, images(), 1, explainer=found)
        pruning.masked = True
        hidden = prunex.explain("vit_shapley", model, images(), 1, explainer=found)
    assert e.maps.equal(dense.maps)
    assert hidden.maps.equal(e.maps)
    assert int(e.trace.kept().sum()) < 48


def test_it_leaves_flags_and_modes_alone():
    model, found = tiny().train(), explainer().train()
    flags = [m.training for m in found.modules()]
    with torch.inference_mode():
        e = prunex.explain("vit_shapley", model, images(1), explainer=found)
    assert not e.raw.requires_grad
    assert [m.training for m in found.modules()] == flags
    assert all(m.training for m in model.modules())


def test_half_precision_models_and_explainers_give_single_precision_values():
    full = prunex.explain("vit_shapley", tiny(), images(1), explainer=explainer())
    x = images(1, dtype=torch.bfloat16)
    for model, found in ((tiny().bfloat16(), explainer()), (tiny().bfloat16(), explainer().bfloat16())):
        e = prunex.explain("vit_shapley", model, x, explainer=found)
        assert e.maps.dtype == e.raw.dtype == torch.float32
        assert relative(e.maps, full.maps) < 0.3


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_giant", "avg_pool", "clip"])
def test_saved_and_loaded_it_says_the_same(family, tmp_path):
    model = tiny(family)
    found = explainer(model)
    assert found.save(tmp_path / "new" / "explainer") == tmp_path / "new" / "explainer"
    files = sorted(p.name for p in (tmp_path / "new" / "explainer").iterdir())
    assert files == ["config.json", "model.safetensors"]
    torch.manual_seed(8)
    before = torch.get_rng_state()
    again = load_explainer(tmp_path / "new" / "explainer")
    assert torch.get_rng_state().equal(before)
    assert not any(p.requires_grad for p in again.parameters())
    x = images_for(model)
    with torch.no_grad():
        assert again(x).equal(found(x))
    for path in (tmp_path / "new" / "explainer", str(tmp_path / "new" / "explainer" / "model.safetensors")):
        e = prunex.explain("vit_shapley", model, x, explainer=path)
        assert largest(e.raw, found(x)) < 1e-7
    found.save(tmp_path / "new" / "explainer")  # over the old one


def test_folders_that_hold_none(tmp_path):
    folder = explainer().save(tmp_path / "explainer")
    config = json.loads((folder / "config.json").read_text())

    def refused(says):
        with pytest.raises(PrunexError, match=says):
            prunex.explain("vit_shapley", tiny(), images(1), explainer=folder)

    def write(**changes):
        (folder / "config.json").write_text(json.dumps({"prunex": config["prunex"] | changes}))

    with pytest.raises(PrunexError, match=r"has no config\.json.*prunex fit"):
        load_explainer(tmp_path / "nothing")
    write(version=2)
    refused("of format 2, this prunex reads 1")
    write(kind="slim")
    refused("is not of a vit_shapley explainer")
    (folder / "config.json").write_text("{")
    refused("is damaged")
    (folder / "config.json").write_text("[]")
    refused("is not of a vit_shapley explainer")
    write(mlp_ratio=2)
    refused(r"does not fit config\.json")
    write(mlp_ratio="wide")
    refused("mlp_ratio='wide'")
    write()
    assert "mlp.0.weight" in load_file(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"not at all")
    refused("is damaged")
    (folder / "model.safetensors").unlink()
    refused(r"has no model\.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunexError, match="cannot write to"):
        explainer().save(tmp_path / "file" / "explainer")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, r"needs a trained explainer: train one with prunex fit --config configs/digits/vit_shapley\.yaml.*shap"),
        (3, r"explainer=3 is not allowed: give the explainer's folder"),
        (nn.Linear(2, 2), "Linear holds 0 vit_shapley explainers"),
        (nn.ModuleList([explainer(), explainer()]), "holds 2 vit_shapley explainers"),
        (explainer(tiny(num_classes=7)), r"number of classes is 7, the model's 5"),
        (explainer(tiny(img_size=16)), r"image size is \(16, 16\), the model's \(32, 32\)"),
        (explainer(tiny(patch_size=4)), r"patch size is \(4, 4\), the model's \(8, 8\)"),
    ],
)
def test_bad_explainers(given, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("vit_shapley", tiny(), images(1), explainer=given)


def test_bad_surrogates():
    with pytest.raises(PrunexError, match="no classifier"):
        ShapleyExplainer(tiny(num_classes=0))
    model = tiny()
    with prunex.attach(model, "topk"), pytest.raises(PrunexError, match=r"pruned: detach\(\) it first"):
        ShapleyExplainer(model)
    with pytest.raises(PrunexError, match="number of classes is 5, the model's 0"):
        prunex.explain("vit_shapley", tiny(num_classes=0), images(1), explainer=explainer(tiny()))
