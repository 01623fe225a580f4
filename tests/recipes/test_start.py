"""Where a model starts from, and images of its size: said before training, not after it."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from prunex import PrunexError
from prunex.recipes import DiffMask, ImageClassifier, ViTShapley
from prunex.recipes.commands import cli
from tests.recipes.modules.test_classifier import ARCHITECTURE, SMALL, scenes, trainer
from tests.recipes.test_imagefolder_configs import root  # noqa: F401
from tests.recipes.test_reading import QUICK, config_of

ONE = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", *QUICK]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("made", [ImageClassifier, DiffMask, ViTShapley])
def test_random_weights_must_be_asked_for(tmp_path, made):
    with pytest.raises(PrunexError, match=r"would start from random weights: give weights=FILE .*from_scratch=True"):
        trainer(tmp_path).fit(made(ARCHITECTURE, 10, dict(SMALL)), scenes())


def test_a_loaded_state_is_a_start_and_so_is_a_checkpoint(tmp_path):
    module = ImageClassifier(ARCHITECTURE, 10, dict(SMALL))
    module.load_state_dict(ImageClassifier(ARCHITECTURE, 10, dict(SMALL)).state_dict())
    run = trainer(tmp_path)
    run.fit(module, scenes())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    trainer(tmp_path).fit(again, scenes())
    trainer(tmp_path, max_epochs=2).fit(
        ImageClassifier(ARCHITECTURE, 10, dict(SMALL)), scenes(), ckpt_path=str(tmp_path / "a.ckpt")
    )
    trainer(tmp_path).validate(ImageClassifier(ARCHITECTURE, 10, dict(SMALL)), scenes(), verbose=False)


def test_a_folder_of_ones_own_needs_weights(root, here, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", "imagefolder/evit", "--data.root", str(root), *ONE])
    assert stop.value.code == 2
    assert "--model.from_scratch true" in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in here.iterdir()] == ["photos"]


class Sized(LightningDataModule):
    image_size = 32

    def train_dataloader(self):
        return DataLoader([(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))], batch_size=None)


@pytest.mark.parametrize(("data", "size"), [(Sized, 64), (lambda: scenes(image_size=48), 64), (scenes, 96)])
def test_images_of_another_size_are_refused_before_training(tmp_path, data, size):
    module = ImageClassifier(ARCHITECTURE, 10, SMALL | {"img_size": size}, from_scratch=True)
    with pytest.raises(PrunexError, match=r"images are (\d+) x \1 pixels .* takes \d+ x \d+ .*give both the same"):
        trainer(tmp_path).fit(module, data())
    free = ImageClassifier(ARCHITECTURE, 10, SMALL | {"dynamic_img_size": True}, from_scratch=True)
    trainer(tmp_path, fast_dev_run=True).fit(free, Sized())


@pytest.mark.parametrize(
    "typed",
    [
        ["--data.image_size", "48"],
        ["--data.init_args.image_size=48"],
        ["--model.model_args.img_size=48"],
        ["--model.init_args.model_args.img_size", "48"],
    ],
)
def test_where_one_size_is_typed_the_other_follows(here, typed):
    config_of(here, callbacks=[])
    assert cli.run(["fit", "--config", "own.yaml", *ONE, *typed, "--trainer.fast_dev_run", "true"]) == 0


def test_two_sizes_that_differ_are_one_line(here, capsys):
    config_of(here, callbacks=[])
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "own.yaml", *ONE, "--data.image_size=48", "--model.model_args.img_size=64"])
    assert "images are 48 x 48 pixels" in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "runs").exists()
