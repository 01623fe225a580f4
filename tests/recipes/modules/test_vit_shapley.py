import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from scipy.stats import chisquare, spearmanr

import prunex
from prunex import PrunexError
from prunex.learned.vit_shapley import load_explainer, normalise
from prunex.recipes import DigitScenes, ImageClassifier, ViTShapley
from prunex.recipes.commands import cli
from prunex.recipes.data.images import preparation, read_image
from prunex.recipes.modules.vit_shapley import regression_loss
from prunex.removal.coalitions import seeded, shapley_coalitions, size_probabilities
from tests.recipes.commands.test_cli import QUICK
from tests.recipes.modules.test_classifier import ARCHITECTURE, SMALL, loader, trainer
from tests.removal import games

CLOSE_UP = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}  # as the config has them
CLOSE_UP_SCENES = {"image_size": 32, "min_digit": 24, "max_digit": 32}


def small(**arguments):
    return ViTShapley(
        ARCHITECTURE, 10, dict(SMALL), **({"surrogate_epochs": 1, "masks": 4, "from_scratch": True} | arguments)
    )


def scenes(**arguments):
    return DigitScenes(**({"batch_size": 8, "train_size": 16, "val_size": 12} | arguments))


def kept(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, before):
    return all(v.equal(before[k]) for k, v in module.state_dict().items())


def fitted(game, players, batch, classes, steps, masks):
    """Values as free parameters, trained with the recipe's loss and normalisation on exact-size coalitions."""
    ends = game(torch.tensor([[False] * players, [True] * players]).expand(batch, -1, -1)).double()
    empty, total = ends[:, 0], ends[:, 1] - ends[:, 0]
    raw = torch.zeros(batch, players, classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draws = seeded(0)
    for _ in range(steps):
        z = shapley_coalitions(masks, players, draws).expand(batch, -1, -1)
        loss = regression_loss(normalise(raw, total), empty, z, game(z).double())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return normalise(raw, total).detach()


def test_free_values_of_a_linear_game_become_its_weights():
    weights = torch.randn(2, 12, 3, dtype=torch.float64)
    found = fitted(games.additive(weights), 12, 2, 3, 400, 64)
    assert (found - weights).abs().max() < 1e-3


def test_free_values_of_any_game_become_its_shapley_values():
    game = games.toy(8)
    found = fitted(game, 8, 2, 3, 1500, 256)
    for values, table in zip(found, game.table, strict=True):
        wanted = games.exact(table, 8)
        assert (values - wanted).abs().max() < 1e-2 * (wanted.max() - wanted.min())


def test_the_loss_is_players_times_the_mean_square():
    phi, empty = torch.randn(2, 5, 3), torch.randn(2, 3)
    z, wanted = torch.rand(2, 4, 5) < 0.5, torch.randn(2, 4, 3)
    total = 0.0
    for i in range(2):
        for m in range(4):
            for c in range(3):
                told = float(empty[i, c]) + sum(float(phi[i, p, c]) for p in range(5) if z[i, m, p])
                total += (told - float(wanted[i, m, c])) ** 2
    assert float(regression_loss(phi, empty, z, wanted)) == pytest.approx(5 * total / 24, rel=1e-5)


def test_coalitions_come_in_pairs_and_exact_sizes():
    module = small(masks=600)
    z = module._coalitions(3, seeded(0))
    assert z.shape == (3, 600, 16)
    assert bool((z[:, ::2] ^ z[:, 1::2]).all())
    assert z.sum(2)[1:].equal(z.sum(2)[:2])  # images share sizes
    assert float((z[0] == z[1]).all(1).float().mean()) < 0.2  # but not the patches
    sizes = z[0, ::2].sum(1)
    assert chisquare((sizes - 1).bincount(minlength=15), size_probabilities(16) * len(sizes)).pvalue > 1e-3


def test_one_batch_of_each_stage(tmp_path):
    for first in (1, 0):
        module = small(surrogate_epochs=first)
        run = trainer(tmp_path, fast_dev_run=True)
        run.fit(module, scenes())
        assert (f"train_{'surrogate' if first else 'explainer'}_loss_step") in run.callback_metrics
        assert ("val_explainer_loss" in run.callback_metrics) == (first == 0)
    assert not list(tmp_path.rglob("explainer"))


def test_both_stages_then_a_folder_that_explains(tmp_path):
    module = small()
    classifier, start = kept(module.classifier), kept(module.explainer.surrogate)
    between = {}

    def begin():
        between.update(kept(module.explainer.surrogate))
        return inner()

    inner, module._begin_explaining = module._begin_explaining, begin
    run = trainer(tmp_path, max_epochs=3, logger=CSVLogger(tmp_path, "runs"))
    run.fit(module, scenes())
    assert same(module.classifier, classifier)
    assert not same(module.explainer.surrogate, start)
    assert same(module.explainer.surrogate, between)  # frozen in the second stage
    assert all(p.grad is None for p in (*module.classifier.parameters(), *module.explainer.surrogate.parameters()))
    assert module.explainer.backbone.blocks[0].attn.qkv.weight.ne(between["blocks.0.attn.qkv.weight"]).any()
    metrics = run.callback_metrics
    assert {f"val_{n}" for n in ("surrogate_loss", "surrogate_kl", "surrogate_agreement", "explainer_loss")} <= set(
        metrics
    )
    assert 0 <= float(metrics["val_surrogate_agreement"]) <= 1
    folder = tmp_path / "runs" / "version_0" / "explainer"
    images = torch.randn(2, 3, 64, 64)
    e = prunex.explain("vit_shapley", module.classifier, images, explainer=folder)
    assert e.raw.shape == (2, 16, 10)
    assert module.best <= float(metrics["val_explainer_loss"]) + 1e-9
    assert load_explainer(folder).surrogate.state_dict()["cls_token"].equal(between["cls_token"])
    values = torch.cat(run.predict(module, scenes()))
    assert values.shape == (12, 16, 10)
    assert "test_explainer_loss" in run.test(module, scenes(), verbose=False)[0]


def test_the_best_explainer_is_kept(tmp_path, monkeypatch):
    module = small(surrogate_epochs=0)
    losses, written = iter((0.5, 0.2, 0.3)), []
    monkeypatch.setattr(module, "_evaluate", lambda stage, images: module.log("val_explainer_loss", next(losses)))
    monkeypatch.setattr(module, "_save", lambda folder: written.append((module.current_epoch, folder.name)))
    trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0).fit(module, scenes(batch_size=12))
    assert written == [(0, "explainer"), (1, "explainer")]
    assert module.best == pytest.approx(0.2)


def test_without_validation_the_last_explainer_is_written(tmp_path):
    trainer(tmp_path, limit_val_batches=0).fit(small(surrogate_epochs=0), scenes())
    assert (tmp_path / "explainer" / "config.json").is_file()


def test_the_explainer_starts_from_the_trained_surrogate():
    module = small()
    with torch.no_grad():
        for p in module.explainer.surrogate.parameters():
            p.add_(0.1)
    module._begin_explaining()
    own = module.explainer.backbone.state_dict()
    assert all(v.equal(module.explainer.surrogate.state_dict()[k]) for k, v in own.items())


@pytest.mark.slow
def test_it_learns(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64)
    module = small(surrogate_epochs=0, learning_rate=3e-3, masks=16)
    with torch.no_grad():  # a fresh head says nothing; make the game one
        for model in (module.classifier, module.explainer.surrogate):
            model.head.weight.copy_(torch.randn(10, 32, generator=seeded(0)))
            model.blocks[1].attn.qkv.weight.mul_(5)
    batch = (images, torch.zeros(16).long())
    before = trainer(tmp_path).validate(module, loader(batch), verbose=False)[0]["val_explainer_loss"]
    run = trainer(tmp_path, max_epochs=40)
    run.fit(module, loader(batch), loader(batch))
    assert float(run.callback_metrics["val_explainer_loss"]) < 0.7 * before


def test_validation_repeats_itself_whatever_the_batch_size(tmp_path):
    module = small(surrogate_epochs=0)
    run = trainer(tmp_path)
    found = [run.validate(module, scenes(batch_size=b), verbose=False)[0] for b in (12, 12, 5)]
    assert found[0] == found[1]
    for name, value in found[0].items():
        assert found[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_checkpoint_goes_on_in_its_stage(tmp_path):
    module = small()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, scenes())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = ViTShapley.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu").eval()
    assert again.explaining
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert again(images).equal(module.eval()(images))
    longer = small()
    trainer(tmp_path, max_epochs=3).fit(longer, scenes(), ckpt_path=tmp_path / "run.ckpt")
    assert same(longer.explainer.surrogate, kept(module.explainer.surrogate))


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    arguments = ["fit", "--config", "configs/digits/vit_shapley.yaml", *QUICK, "--model.init_args.masks", "2"]
    arguments += ["--trainer.max_epochs", "2", "--model.init_args.surrogate_epochs", "1"]
    assert cli.run(arguments) == 0
    torch.set_num_threads(threads)
    [folder] = tmp_path.glob("runs/digits-vit-shapley/*/explainer")
    model = ImageClassifier(ARCHITECTURE, 10, CLOSE_UP, weights="digits").model
    e = prunex.explain("vit_shapley", model, torch.randn(1, 3, 32, 32), explainer=str(folder))
    assert e.maps.shape == (1, 4, 4)
    # The run explains its classifier with what it has trained, and is scored like any other.
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    run = str(folder.parent)
    assert cli.run(["explain", run, "--images", "photo.png", "--methods", "vit_shapley,rollout", "--out", "out"]) == 0
    with np.load(tmp_path / "out" / "maps.npz", allow_pickle=False) as found:
        pixels = preparation(model)(read_image(tmp_path / "photo.png"))[1][None]
        wanted = prunex.explain("vit_shapley", model, pixels, explainer=str(folder)).maps
        assert np.abs(found["vit_shapley"] - wanted.numpy()).max() < 1e-5
    arguments = ["score", run, "--methods", "vit_shapley,rollout", "--metrics", "deletion", "--images", "4"]
    assert cli.run(arguments) == 0
    scores = (folder.parent / "score" / "scores.csv").read_text()
    assert "dense,vit_shapley,deletion" in scores
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_epochs_rank_patches_as_long_sampling_of_the_game_does(tmp_path, monkeypatch):
    """The shipped config goes on twelve times as long, and further (docs/explainers.md)."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    arguments = ["fit", "--config", "configs/digits/vit_shapley.yaml", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.max_epochs", "3", "--model.init_args.surrogate_epochs", "1", "--seed_everything", "1"]
    assert cli.run([*arguments, "--data.val_size", "64"]) == 0
    torch.set_num_threads(threads)
    [folder] = tmp_path.glob("runs/digits-vit-shapley/*/explainer")
    explainer = load_explainer(folder)
    images = DigitScenes(val_size=96, **CLOSE_UP_SCENES).dataset("val").__getitems__(list(range(64, 96)))[0]
    e = prunex.explain("vit_shapley", explainer.surrogate, images, explainer=explainer)
    long = prunex.explain("shap", explainer.surrogate, images, e.target, estimator="permutation", budget=2 + 30 * 40)
    found = torch.tensor(
        [spearmanr(a, b).statistic for a, b in zip(e.maps.flatten(1), long.maps.flatten(1), strict=True)]
    )
    assert found.median() > 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, "num_classes=None"),
        ({"architecture": "resnet18", "model_args": {}}, "no supported ViT"),
        ({"masks": 3}, "masks=3 is not allowed: give an even number"),
        ({"masks": 0}, "masks=0.*at least 2"),
        ({"surrogate_epochs": -1}, "surrogate_epochs=-1"),
        ({"chunk": 0}, "chunk=0"),
        ({"warmup": 2.0}, "warmup=2.0.*in .0, 1."),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001.*at least 0"),
        ({"weights": "digits"}, "digits.*"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message):
    with pytest.raises(PrunexError, match=message):
        ViTShapley(**({"architecture": ARCHITECTURE, "num_classes": 10, "model_args": dict(SMALL)} | arguments))


def test_weights_without_the_head_are_no_classifier(tmp_path):
    with pytest.raises(PrunexError, match=r"lack head\.weight.*trained classifier of 7 classes"):
        ViTShapley(
            ARCHITECTURE, 7, {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}, "digits"
        )


def test_no_epoch_left_for_the_explainer(tmp_path):
    with pytest.raises(PrunexError, match="surrogate_epochs=1 of 1 epochs leave none"):
        trainer(tmp_path).fit(small(), scenes())


def test_the_long_config_takes_a_step_of_each_stage(tmp_path, monkeypatch):
    """As it is, but for the size: half precision, checkpoints and the limit of time too."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    arguments = ["fit", "--config", "configs/digits/vit_shapley_long.yaml", *QUICK, "--data.num_workers", "0"]
    arguments += ["--model.init_args.masks", "2", "--trainer.limit_train_batches", "1"]
    arguments += ["--trainer.max_epochs", "2", "--model.init_args.surrogate_epochs", "1"]
    assert cli.run(arguments) == 0
    torch.set_num_threads(threads)
    [run] = tmp_path.glob("runs/digits-vit-shapley-long/*")
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert load_explainer(run / "explainer").surrogate.patch_embed.grid_size == (8, 8)
