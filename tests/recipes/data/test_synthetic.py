"""Box questions and drawn shapes: what decides the answer, what masks and boxes say, and that nothing is stored."""

import pytest
import torch

from prunex import PrunexError
from prunex.recipes import BoxQuestions, DrawnShapes
from prunex.recipes.data.box_questions import CODES, HALF, VOCABULARY, prototypes
from prunex.recipes.data.drawn_shapes import SHAPES, boxes_of


def questions(split="val", **options):
    return BoxQuestions(val_size=64, train_size=64, **options).dataset(split).__getitems__(list(range(64)))


def shapes(split="val", **options):
    return DrawnShapes(val_size=32, train_size=32, **options).dataset(split).__getitems__(list(range(32)))


def test_one_word_and_one_box_decide_the_answer():
    batch = questions(noise=0.2)
    names, codes = prototypes()
    rows = torch.arange(64)
    asked = batch["input_ids"].gather(1, batch["word"][:, None])[:, 0] - (len(VOCABULARY) - len(names))
    chosen = batch["visual_feats"][rows, batch["box"]]
    assert torch.equal(torch.cdist(chosen[:, :HALF], names).argmin(1), asked)
    assert torch.equal(torch.cdist(chosen[:, HALF:], codes).argmin(1), batch["labels"])
    # No other box has the name, and no other word names a box.
    nearest = torch.cdist(batch["visual_feats"][..., :HALF], names.expand(64, -1, -1)).argmin(2)
    assert ((nearest == asked[:, None]).sum(1) == 1).all()
    first = len(VOCABULARY) - len(names)
    named = [{int(i) - first for i in row if i >= first} for row in batch["input_ids"]]
    assert all(len(words & set(boxes.tolist())) == 1 for words, boxes in zip(named, nearest, strict=True))
    assert all(len(words) == 2 for words in named)  # the one asked for, and a decoy


@pytest.mark.parametrize("make", [questions, shapes])
def test_a_sample_is_its_number_seed_and_split(make):
    def flat(batch):
        return torch.cat([v.float().flatten() for v in batch.values() if isinstance(v, torch.Tensor)])

    assert torch.equal(flat(make()), flat(make()))
    assert not torch.equal(flat(make()), flat(make(seed=1)))
    for other in ("train", "test"):
        assert not torch.equal(flat(make()), flat(make(other)))


def test_fresh_questions_every_epoch():
    data = BoxQuestions(batch_size=8, train_size=8, val_size=8)
    loader = data.train_dataloader()
    first = next(iter(loader))["visual_feats"]
    loader.sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader))["visual_feats"], first)
    assert torch.equal(next(iter(data.val_dataloader()))["box"], next(iter(data.val_dataloader()))["box"])


def test_masks_boxes_and_classes_fit():
    batch = shapes()
    assert batch["pixel_values"].shape == (32, 3, 96, 96)
    seen = set()
    for image, labels in zip(batch["pixel_values"], batch["labels"], strict=True):
        masks = labels["masks"]
        assert 1 <= len(masks) <= 3
        assert masks.flatten(1).any(1).all()
        assert masks.sum(0).max() == 1  # none lies over another
        torch.testing.assert_close(labels["boxes"], boxes_of(masks))
        seen |= set(labels["class_labels"].tolist())
        for kind, mask, box in zip(labels["class_labels"], masks, labels["boxes"], strict=True):
            area = mask.sum() / (box[2] * box[3] * 96 * 96)
            wanted = {"circle": 0.785, "square": 1.0, "triangle": 0.5}[SHAPES[kind]]
            assert abs(area - wanted) < 0.1
            pixels = image[:, mask]
            assert pixels.std(1).max() < 1e-5  # of one colour
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (BoxQuestions, {"boxes": 1}),
        (BoxQuestions, {"boxes": CODES + 1}),
        (BoxQuestions, {"min_words": 1}),
        (BoxQuestions, {"noise": -1}),
        (BoxQuestions, {"decoys": 20}),
        (DrawnShapes, {"image_size": 95}),
        (DrawnShapes, {"min_side": 50, "max_side": 44}),
        (DrawnShapes, {"most": 5}),
        (DrawnShapes, {"batch_size": 0}),
    ],
)
def test_bad_options(make, options):
    with pytest.raises(PrunexError, match="is not allowed"):
        make(**options)
