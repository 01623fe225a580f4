import os
from contextlib import suppress

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.multiprocessing import ProcessExitedException

from prunex import PrunexError
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.recipes.data import digits as module
from prunex.recipes.data.digits import DigitDataset
from prunex.recipes.data.draws import uniform


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


def test_scenes_of_several_digits_say_where_each_is():
    data = DigitDataset("val", size=400, task="several")
    images, labels, masks, more = data.__getitems__(list(range(400)))
    assert labels.dtype == torch.float32
    assert (labels.sum(1) == 2).all()
    assert (labels.sum(0) > 40).all()  # all digits, in equal parts
    each = more["label_masks"]
    assert torch.equal(each.any(1), masks)
    assert torch.equal(each.flatten(2).any(2), labels.bool())
    assert (each.sum(1) <= 1).all()  # a pixel shows one digit
    # Each of the two is one of the known strokes' size, within a quarter of its own, give or take its slant.
    for scene, there in zip(each[:50], labels[:50].bool(), strict=True):
        centres = [mask.nonzero().float().mean(0) // 32 for mask in scene[there]]
        assert not torch.equal(*centres)
    together, alone = data.__getitems__([3, 50, 7]), data[50]
    for whole, one in zip(together[:3], alone[:3], strict=True):
        torch.testing.assert_close(whole[1].float(), one.float(), rtol=0, atol=1e-6)
    assert torch.equal(together[3]["label_masks"][1], alone[3]["label_masks"])


def test_the_digit_that_is_drawn_is_the_one_that_the_label_names():
    """Every mask is most like strokes of its own class, by a nearest mean that never saw it."""
    strokes, classes = module._digits(held_out=False)
    means = torch.stack([strokes[classes == d].mean(0) for d in range(10)]).flatten(1)
    means = means - means.mean(1, keepdim=True)
    labels, _, more = DigitDataset("val", size=200, task="several", digit_size=(30, 32)).__getitems__(list(range(200)))[
        1:
    ]
    right = []
    for scene, there in zip(more["label_masks"], labels.bool(), strict=True):
        for digit in there.nonzero()[:, 0]:
            rows, columns = scene[digit].nonzero().unbind(1)
            tile = scene[digit][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float()
            side = torch.zeros(max(tile.shape), max(tile.shape))
            left = (side.shape[1] - tile.shape[1]) // 2
            side[: tile.shape[0], left : left + tile.shape[1]] = tile
            size = (module.STROKE, module.STROKE)
            seen = torch.nn.functional.interpolate(side[None, None], size, mode="bilinear").flatten()
            right.append(int((means @ (seen - seen.mean())).argmax()) == int(digit))
    assert sum(right) / len(right) > 0.6  # slanted and turned as they are; by chance 0.1


def test_counts_are_of_the_digits_in_the_scene():
    data = DigitDataset("train", size=300, task="count", seed=3)
    images, labels, masks = data.__getitems__(list(range(300)))
    assert labels.dtype == torch.float32
    assert labels.shape == (300,)
    assert set(labels.tolist()) == {1.0, 2.0, 3.0}
    assert (labels.unique(return_counts=True)[1] > 70).all()
    area = [masks[labels == n].float().mean() for n in (1, 2, 3)]
    assert area[0] < area[1] < area[2]


def test_scenes_of_one_digit_are_not_changed_by_those_of_several():
    plain, parity = (
        DigitDataset("val", size=8, task=task).__getitems__(list(range(8))) for task in ("digit", "parity")
    )
    assert torch.equal(plain[0], parity[0])
    assert torch.equal(plain[1] % 2, parity[1])
    with pytest.raises(PrunexError, match=r"min_digit=33.*task='several'.*at most half of image_size \(32\)"):
        DigitScenes(task="several", min_digit=33)
    with pytest.raises(PrunexError, match=r"unknown task 'two'.*several"):
        DigitScenes(task="two")


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


@pytest.mark.parametrize("task", ["digit", "parity"])
def test_a_logged_training_of_the_classifier_on_digits(tmp_path, task):
    """Module and data have a ``task`` each, which loggers are not given as one."""
    data = DigitScenes(batch_size=2, train_size=2, val_size=2, image_size=32, min_digit=16, max_digit=24, task=task)
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
    classifier = ImageClassifier("vit_tiny_patch16_224", data.num_classes, args, from_scratch=True)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, data)
    again = DigitScenes.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert again.task == task


def test_scenes_for_segmentation_and_detection_are_those_of_count():
    images, numbers, anywhere = DigitDataset("val", size=60, task="count").__getitems__(list(range(60)))
    mapped, maps, covered = DigitDataset("val", size=60, task="segmentation").__getitems__(list(range(60)))
    boxed, targets, inside = DigitDataset("val", size=60, task="detection").__getitems__(list(range(60)))
    assert images.equal(mapped)
    assert images.equal(boxed)
    assert anywhere.equal(covered)
    assert anywhere.equal(inside)
    assert maps.dtype == torch.int64
    assert (maps > 0).equal(anywhere)
    assert [len(target["labels"]) for target in targets] == numbers.int().tolist()
    for one, target in zip(maps, targets, strict=True):
        assert [d - 1 for d in one.unique().tolist() if d] == target["labels"].tolist()
        for (left, top, right, bottom), digit in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
            shows = one == digit + 1
            # All of the digit lies in its box, and reaches each of its edges.
            assert shows.sum() == shows[top:bottom, left:right].sum()
            box = shows[top:bottom, left:right]
            assert box[0].any()
            assert box[-1].any()
            assert box[:, 0].any()
            assert box[:, -1].any()
    single = DigitDataset("val", size=60, task="detection")[7]
    assert single[1]["boxes"].equal(targets[7]["boxes"])
