import copy

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.learned.diffmask import divergence, load_explainer
from prunex.recipes import DiffMask, DigitScenes, ImageClassifier
from prunex.recipes.commands import cli
from prunex.recipes.modules.lookahead import LookaheadAdam
from tests.explainers.test_diffmask import force
from tests.recipes.commands.test_cli import QUICK
from tests.recipes.modules.test_classifier import ARCHITECTURE, SMALL, loader, trainer

DIGITS = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}


def small(**arguments):
    return DiffMask(
        ARCHITECTURE, 10, dict(SMALL), **({"lr": 1e-3, "warmup_steps": 0, "from_scratch": True} | arguments)
    )


def scenes(**arguments):
    return DigitScenes(**({"batch_size": 8, "train_size": 16, "val_size": 12} | arguments))


def kept(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, before):
    return all(v.equal(before[k]) for k, v in module.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ Lookahead


@pytest.mark.parametrize("maximize", [False, True])
def test_lookahead_is_adam_pulled_back(maximize):
    start = torch.randn(5, dtype=torch.float64)
    gradients = torch.randn(20, 5, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = LookaheadAdam([p], lr=0.1, slow_steps=4, slow_rate=0.3, maximize=maximize)
    fast, slow = torch.nn.Parameter(start.clone()), start.clone()
    adam = torch.optim.Adam([fast], lr=0.1, maximize=maximize)
    for i, g in enumerate(gradients):
        p.grad, fast.grad = g.clone(), g.clone()
        optimizer.step()
        adam.step()
        if (i + 1) % 4 == 0:
            slow = slow + 0.3 * (fast.detach() - slow)
            fast.data = slow.clone()
        assert (p - fast).abs().max() < 1e-12
    plain = torch.nn.Parameter(start.clone())
    optimizer, fast.data = LookaheadAdam([plain], lr=0.1, slow_steps=0), start.clone()
    adam = torch.optim.Adam([fast], lr=0.1)
    for g in gradients:
        plain.grad, fast.grad = g.clone(), g.clone()
        optimizer.step()
        adam.step()
    assert plain.equal(fast)


def test_lookahead_leaves_a_parameter_without_a_gradient_alone():
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = LookaheadAdam([a, b], lr=1.0, slow_steps=2)
    for i in range(8):
        optimizer.zero_grad()
        (a if i % 4 else b).mul(-1).backward()
        before = [t.item() for t in (a, b)]
        optimizer.step()
        assert (a.item() != before[0]) or not i % 4 or optimizer.state[a]["slow_count"] % 2 == 0
        assert (b.item() == before[1]) == bool(i % 4)
    assert (optimizer.state[a]["slow_count"], optimizer.state[b]["slow_count"]) == (6, 2)


def test_lookahead_goes_on_from_its_state():
    def run(steps, state=None, start=None):
        p = torch.nn.Parameter(torch.ones(3) if start is None else start.clone())
        optimizer = LookaheadAdam([p], lr=0.1, slow_steps=3)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            (p**2).sum().backward()
            optimizer.step()
        return p.detach(), copy.deepcopy(optimizer.state_dict())

    whole, _ = run(8)
    half, state = run(4)
    assert run(4, state, half)[0].equal(whole)


def test_lookahead_asks_a_closure_first():
    p = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = LookaheadAdam([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p**2
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 4
    assert float(p) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"slow_steps": -1}, "slow_steps=-1"), ({"slow_rate": 0}, "slow_rate=0"), ({"slow_rate": 1.5}, "slow_rate=1.5")],
)
def test_bad_lookahead(options, message):
    with pytest.raises(PrunexError, match=message):
        LookaheadAdam([torch.zeros(1)], **options)
    with pytest.raises(PrunexError, match=message):
        small(**options)


# ------------------------------------------------------------------------------------------------------ the multipliers


def step(tmp_path, module, monkeypatch, layer=2, steps=1):
    """Real steps of Lightning's loop on one layer."""
    monkeypatch.setattr(module, "draw_layer", lambda: layer)
    data = loader((torch.randn(4, 3, 64, 64), torch.zeros(4).long()))
    trainer(tmp_path, max_steps=2 * steps, max_epochs=-1, limit_val_batches=0).fit(module, data)  # two optimisers


def disagreeing():
    """A module whose classifier is sure of itself, so that nothing shown means something else said."""
    module = small(lr=0.0, lr_placeholder=0.0)
    with torch.no_grad():
        module.explainer.model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize(("logit", "rises"), [(50.0, False), (-50.0, True)])
def test_a_multiplier_rises_while_its_constraint_is_violated_and_falls_while_it_holds(
    tmp_path, monkeypatch, logit, rises
):
    module = disagreeing()
    force(module.explainer, logit)
    with torch.no_grad():
        gap = module.explainer.terms(torch.randn(4, 3, 64, 64), 2).divergence.mean() - 0.1
    assert bool(gap > 0) == rises
    step(tmp_path, module, monkeypatch)
    after = [a.item() for a in module.explainer.alpha]
    assert after[2] == pytest.approx(20.3 if rises else 19.7, abs=1e-4)
    assert [a for i, a in enumerate(after) if i != 2] == [20.0] * (len(after) - 1)


@pytest.mark.parametrize(("logit", "start", "end"), [(50.0, 0.2, 0.0), (-50.0, 199.8, 200.0)])
def test_multipliers_stay_within_their_bounds(tmp_path, monkeypatch, logit, start, end):
    module = disagreeing()
    force(module.explainer, logit)
    with torch.no_grad():
        module.explainer.alpha[2].fill_(start)
    step(tmp_path, module, monkeypatch, steps=8)
    assert module.explainer.alpha[2].item() == end


def test_gates_descend(tmp_path, monkeypatch):
    module = small(lr=1e-2, alpha_init=0.0, lr_alpha=0.0)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = module.explainer.terms(images, 2).log_keep.mean()
    step(tmp_path, module, monkeypatch, steps=5)
    with torch.no_grad():
        assert module.explainer.terms(images, 2).log_keep.mean() < before


# -------------------------------------------------------------------------------------------------------------- the run


def test_a_run_ends_in_a_folder_that_explains_and_prunes(tmp_path):
    module = small()
    classifier, gates = kept(module.explainer.model), kept(module.explainer.gates)
    run = trainer(tmp_path, max_epochs=3, logger=CSVLogger(tmp_path, "runs"))
    run.fit(module, scenes())
    assert same(module.explainer.model, classifier)  # bit for bit
    assert all(p.grad is None for p in module.explainer.model.parameters())
    assert not any(m.training for m in module.explainer.model.modules())
    assert not module.explainer.gates.placeholder.equal(gates["placeholder"])
    assert not module.explainer.gates.gates[0].hidden.weight.equal(
        torch._weight_norm(*(gates[f"gates.0.hidden.parametrizations.weight.original{i}"] for i in (1, 0)))
    )
    metrics = run.callback_metrics
    assert {"val_kl", "val_agreement", "val_kept", "val_l0", "train_kl", "train_l0", "train_alpha"} <= set(metrics)
    assert 0 <= float(metrics["val_kept"]) <= 1
    folder = tmp_path / "runs" / "version_0" / "explainer"
    images = torch.randn(2, 3, 64, 64)
    model = load_explainer(folder).model
    e = prunex.explain("diffmask", model, images, explainer=folder)
    assert e.raw.shape == (2, 4, 16)
    with prunex.attach(model, "diffmask", explainer=str(folder)) as pruning:
        model(images)
        assert pruning.trace.kept().equal(e.maps > 0.5)
    told = torch.cat(run.predict(module, scenes()))
    assert told.shape == (12, 16)
    assert "test_kl" in run.test(module, scenes(), verbose=False)[0]


def test_one_batch(tmp_path):
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(small(), scenes())
    assert "train_kl_step" in run.callback_metrics
    assert not list(tmp_path.rglob("explainer"))


def test_the_best_explainer_is_kept(tmp_path, monkeypatch):
    """The fewest patches within 2 eps; before anything is within, the smallest divergence."""
    module = small()
    told = iter([(0.9, 0.1), (0.5, 0.9), (0.15, 0.8), (0.7, 0.05), (0.19, 0.3), (0.01, 0.4)])
    written = []

    def evaluate(stage, images):
        kl, share = next(told)
        module.log_dict({"val_kl": kl, "val_kept": share})

    monkeypatch.setattr(module, "_evaluate", evaluate)
    monkeypatch.setattr(module, "_save", lambda folder: written.append((module.current_epoch, folder.name)))
    trainer(tmp_path, max_epochs=6, num_sanity_val_steps=0).fit(module, scenes(batch_size=12))
    assert written == [(i, "explainer") for i in (0, 1, 2, 4)]
    assert module.best == pytest.approx((0.0, 0.3))


def test_without_validation_the_last_explainer_is_written(tmp_path):
    trainer(tmp_path, limit_val_batches=0).fit(small(), scenes())
    assert (tmp_path / "explainer" / "config.json").is_file()


def test_layers_are_drawn_evenly_or_by_need():
    torch.manual_seed(0)
    module = small(weighted_layer_distribution=True)
    even = torch.tensor([module.draw_layer() for _ in range(2000)]).bincount(minlength=4)
    assert ((even - 500).abs() < 100).all()
    module.running_agreement[1], module.running_l0[1], module.draws[1] = 0.8, 0.05, 101
    module.running_agreement[2], module.running_l0[2], module.draws[2] = 0.8, 0.05, 100
    drawn = torch.tensor([module.draw_layer() for _ in range(2000)]).bincount(minlength=4)
    assert float(drawn[1]) / 2000 == pytest.approx(0.1 / 3.1, abs=0.02)
    assert float(drawn[2]) / 2000 == pytest.approx(1 / 3.1, abs=0.05)
    module.hparams["weighted_layer_distribution"] = False
    drawn = torch.tensor([module.draw_layer() for _ in range(2000)]).bincount(minlength=4)
    assert int(drawn[1]) > 400


def test_running_figures_of_the_layer_drawn(tmp_path, monkeypatch):
    module = small(lr=0.0, lr_placeholder=0.0)
    force(module.explainer, -50.0)
    step(tmp_path, module, monkeypatch, layer=1, steps=2)
    assert module.draws.tolist() == [0, 2, 0, 0]
    assert module.running_l0.tolist() == pytest.approx([1, 0.81, 1, 1])
    assert module.running_agreement[[0, 2, 3]].tolist() == [1, 1, 1]


def test_rates_are_warmed_up(tmp_path, monkeypatch):
    module = small(warmup_steps=4, lr=1.0, lr_placeholder=2.0)
    [down, up], [warm] = module.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append([g["lr"] for g in down.param_groups] + [up.param_groups[0]["lr"]])
        warm.step()
    assert rates[0] == pytest.approx([0.25, 0.5, 0.3])
    assert rates[3] == rates[5] == pytest.approx([1.0, 2.0, 0.3])
    assert len(small(no_placeholder=True).configure_optimizers()[0][0].param_groups) == 1


def test_validation_repeats_itself_whatever_the_batch_size(tmp_path):
    module = small(add=6.0)
    run = trainer(tmp_path)
    found = [run.validate(module, scenes(batch_size=b), verbose=False)[0] for b in (12, 12, 5)]
    assert found[0] == found[1]
    assert 0 < found[0]["val_l0"] < 1
    for name, value in found[0].items():
        assert found[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_checkpoint_goes_on(tmp_path):
    module = small()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, scenes())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = DiffMask.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert again(images).equal(module.eval()(images))
    assert again.best == module.best
    longer = small()
    trainer(tmp_path, max_epochs=3).fit(longer, scenes(), ckpt_path=tmp_path / "run.ckpt")
    assert int(longer.draws.sum()) == 6


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert cli.run(["fit", "--config", "configs/digits/diffmask.yaml", *QUICK]) == 0
    torch.set_num_threads(threads)
    [folder] = tmp_path.glob("runs/digits-diffmask/*/explainer")
    model = ImageClassifier(ARCHITECTURE, 10, dict(DIGITS), weights="digits").model
    e = prunex.explain("diffmask", model, torch.randn(1, 3, 64, 64), explainer=str(folder))
    assert e.maps.shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, "num_classes=None"),
        ({"architecture": "resnet18", "model_args": {}}, "no supported ViT"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"alpha_init": 300.0}, r"alpha_init=300.0.*\[0, 200\]"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"lr_placeholder": "fast"}, "lr_placeholder='fast'"),
        ({"lr_alpha": float("nan")}, "lr_alpha=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"weighted_layer_distribution": 1}, "weighted_layer_distribution=1"),
        ({"mul": -1.0}, "mul=-1.0"),
        ({"no_placeholder": "no"}, "no_placeholder='no'"),
        ({"weights": "digits"}, "digits.*"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message):
    with pytest.raises(PrunexError, match=message):
        DiffMask(**({"architecture": ARCHITECTURE, "num_classes": 10, "model_args": dict(SMALL)} | arguments))


# ------------------------------------------------------------------------------------------------------------ it learns


def patches_of_colour(count, seed):
    """Grey, part of it noisy, [count, 3, 32, 32], with one 8 x 8 patch in one of four colours; its class and place.

    The fifth class has no coloured patch: else one class could be told by showing nothing.
    """
    draws = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=draws)
    plain = torch.rand(count, 1, 4, 4, generator=draws) < torch.rand(count, 1, 1, 1, generator=draws)
    images[plain.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)] = 0
    labels, places = torch.randint(5, (count,), generator=draws), torch.randint(16, (count,), generator=draws)
    colours = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [2, 2, -1], [0, 0, 0]])
    for i in range(count):
        y, x = divmod(int(places[i]), 4)
        images[i, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += colours[labels[i], :, None, None]
    return images, labels, places


@pytest.mark.slow
def test_it_keeps_the_one_patch_that_tells(tmp_path):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    images, labels, _ = patches_of_colour(512, seed=1)
    # The placeholder starts as plain grey and stays: a learned one may come to look like a class, which then need not
    # be shown. The classifier is held from being sure of itself, since a KL of many nats drowns the size of the mask.
    options = {"alpha_init": 10.0, "mul": 10.0, "add": 5.0, "lr": 3e-3, "lr_placeholder": 0.0, "warmup_steps": 20}
    options["from_scratch"] = True  # trained below, by hand
    module = DiffMask(ARCHITECTURE, 5, size, **options)
    model = module.explainer.model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        for x, y in zip(images.split(32), labels.split(32), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.2).backward()
            optimizer.step()
    model.requires_grad_(False).zero_grad()
    with torch.no_grad():
        module.explainer.gates.placeholder.copy_(model.patch_embed(torch.zeros(1, 3, 32, 32))[:, :1])
    batches = DataLoader(list(zip(images.split(32), labels.split(32), strict=True)), batch_size=None, shuffle=True)
    trainer(tmp_path, max_epochs=40, limit_val_batches=0).fit(module, batches)
    images, labels, places = patches_of_colour(256, seed=2)
    found = module.eval().explainer
    with torch.no_grad():
        seen = found.observe(images)
        assert (seen.logits.argmax(1) == labels).float().mean() > 0.98
        kept = module(images) > 0.5
        own = torch.nn.functional.one_hot(places, 16).bool() & (labels < 4)[:, None]
        assert kept[own].float().mean() > 0.9
        assert (~kept[~own]).float().mean() > 0.8
        assert divergence(seen.logits, found.masked(seen, kept)).mean() <= 2 * 0.1
