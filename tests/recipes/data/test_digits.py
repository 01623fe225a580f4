import os
from contextlib import suppress

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.multiprocessing import ProcessExitedException

from prunex import PrunexError
from prunex.recipes import DigitScenes
from prunex.recipes.data import digits as module
from prunex.recipes.data.digits import DigitDataset, uniform


def test_batch_has_the_promised_types_and_shapes():
    images, labels, masks = DigitDataset("train", size=64).__getitems__(list(range(16)))
    assert images.shape == (16, 3, 64, 64)
    assert images.dtype == torch.float32
    assert labels.shape == (16,)
    assert labels.dtype == torch.int64
    assert masks.shape == (16, 64, 64)
    assert masks.dtype == torch.bool
    assert images.min() >= -1
    assert images.max() <= 1


def test_a_scene_does_not_depend_on_its_batch():
    data = DigitDataset("val", size=64)
    together = data.__getitems__([3, 50, 7])
    alone = data[50]
    for whole, one in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[1], one, rtol=0, atol=1e-6)


def test_validation_repeats_and_training_does_not():
    scenes = DigitScenes(batch_size=8, train_size=16, val_size=8)
    first, second = (next(iter(scenes.val_dataloader())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loader = scenes.train_dataloader()
    loader.sampler.set_epoch(0)
    before = next(iter(loader))
    loader.sampler.set_epoch(1)
    after = next(iter(loader))
    assert not torch.equal(before[0], after[0])
    loader.sampler.set_epoch(0)
    assert torch.equal(before[0], next(iter(loader))[0])


def test_seed_split_and_epoch_each_change_the_scenes():
    def first(split="train", seed=0, number=0):
        return DigitDataset(split, size=16, seed=seed).__getitems__([number])[0]

    reference = first()
    for other in (first(seed=1), first("val"), first("test"), first(number=16)):
        assert not torch.allclose(reference, other)


def test_digits_and_photos_of_validation_are_never_trained_on():
    train, val = (module._digits(held_out=held)[0].flatten(1) for held in (False, True))
    assert len(train) + len(val) == 1797
    assert torch.cdist(val, train).min() > 0
    labels = module._digits(held_out=True)[1]
    assert labels.bincount(minlength=10).min() >= 30
    from sklearn.datasets import load_sample_images

    whole = load_sample_images().images[0]
    edge = round(whole.shape[1] * module.HELD_OUT_WIDTH)
    for held, part in ((True, whole[:, :edge]), (False, whole[:, edge:])):
        atlas, places = module._photos(held, 64)
        assert np.array_equal(atlas[:, : part.shape[0], : part.shape[1]].permute(1, 2, 0).numpy(), part)
        assert places[0].tolist() == [0, part.shape[0] - 63, part.shape[1] - 63]


@pytest.mark.parametrize("contrast", [0.2, 0.4])
def test_masks_lie_on_the_ink_and_the_ink_stands_out(contrast):
    data = DigitDataset("val", size=300, contrast=contrast)
    pixels, _, masks = data.paint(np.arange(300))
    grey = (pixels * torch.tensor(module.LUMINANCE).view(1, 3, 1, 1)).sum(1)
    inside = (grey * masks).sum((1, 2)) / masks.sum((1, 2))
    ring = torch.nn.functional.max_pool2d(masks.float()[:, None], 9, 1, 4)[:, 0].bool() & ~masks
    outside = (grey * ring).sum((1, 2)) / ring.sum((1, 2))
    assert (inside - outside > 0.5 * contrast).float().mean() > 0.95
    assert (masks.sum((1, 2)) > 20).all()


def test_digits_stay_in_the_frame_and_keep_their_size():
    masks = DigitDataset("val", size=500, digit_size=(20, 32)).paint(np.arange(500))[2]
    heights = masks.any(2).sum(1)
    assert 12 <= heights.float().mean() <= 32
    assert heights.max() <= 40
    centre = (masks.any(2).float() @ torch.arange(64.0)) / heights
    assert centre.std() > 8  # they are all over the frame


def test_curriculum_starts_easy_and_ends_at_the_arguments():
    easy = DigitDataset("train", size=100, curriculum=2)
    plain = DigitDataset("train", size=100)
    assert easy.paint(np.arange(50))[2].sum() > 1.5 * plain.paint(np.arange(50))[2].sum()
    late = np.arange(200, 250)
    assert torch.equal(easy.paint(late)[0], plain.paint(late)[0])
    held = DigitDataset("val", size=100, curriculum=2).paint(np.arange(50))[0]
    assert torch.equal(held, DigitDataset("val", size=100).paint(np.arange(50))[0])


def test_uniform_is_flat_and_independent():
    draws = uniform((0, 1), np.arange(20_000), 6)
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((6,), 0.5), atol=0.01, rtol=0)
    off_diagonal = torch.corrcoef(draws.T) - torch.eye(6)
    assert off_diagonal.abs().max() < 0.03


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"train_size": -1},
        {"val_size": 0},
        {"seed": -1},
        {"image_size": 16},
        {"image_size": 512},
        {"min_digit": 4},
        {"min_digit": 35},
        {"max_digit": 65},
        {"contrast": 0.9},
        {"curriculum": -1},
        {"batch_size": 2.5},
    ],
)
def test_bad_arguments_are_refused_with_what_came_and_what_is_allowed(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(PrunexError, match=rf"{name}={value!r}.*give"):
        DigitScenes(**arguments)


def test_an_unknown_split_offers_the_known_ones():
    with pytest.raises(PrunexError, match="train, val"):
        DigitDataset("valid")


def test_other_image_sizes():
    images, _, masks = DigitDataset("val", size=4, image_size=96).__getitems__([0, 1])
    assert images.shape == (2, 3, 96, 96)
    assert masks.shape == (2, 96, 96)


class Recorder(LightningModule):
    """Keeps what it was shown."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.layer, self.seen = folder, torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].mean((1, 2, 3)))
        return self.layer(batch[0].mean().view(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_end(self):
        np.save(os.path.join(self.folder, f"{self.global_rank}.npy"), torch.cat(self.seen).numpy())


def trainer(folder, **arguments):
    return Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **arguments,
    )  # fmt: skip


def test_trainer_gives_every_epoch_fresh_scenes(tmp_path):
    recorder = Recorder(tmp_path)
    trainer(tmp_path, devices=1).fit(recorder, DigitScenes(batch_size=4, train_size=8, val_size=4))
    seen = np.load(tmp_path / "0.npy", allow_pickle=False)
    assert len(seen) == 16
    assert len(np.unique(seen)) == 16


def test_two_processes_share_the_epoch(tmp_path):
    with suppress(ProcessExitedException):  # gloo's threads may abort a process as it ends, when all is on disk
        trainer(tmp_path, devices=2, strategy="ddp_spawn").fit(
            Recorder(tmp_path), DigitScenes(batch_size=4, train_size=8, val_size=4)
        )
    ranks = [np.load(tmp_path / f"{rank}.npy", allow_pickle=False) for rank in range(2)]
    everything = DigitDataset("train", size=8).__getitems__(list(range(16)))[0].mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(np.sort(np.concatenate(ranks)), np.sort(everything), atol=1e-5)
