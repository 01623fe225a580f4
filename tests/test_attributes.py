"""Normalisation and class names as others write them down: read right, or not at all and the reason why."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from prunex import PrunexError
from prunex.attributes import class_names, given_normalisation, models_normalisation, read_normalisation


class Owner:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def told(channels=3, **attributes):
    said = []
    return read_normalisation([None, Owner(**attributes)], channels, said.append), said


RGB = [0.25, 0.5, 0.75], [0.125, 0.25, 0.5]


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        RGB,
        (tuple(RGB[0]), tuple(RGB[1])),
        (np.array(RGB[0], dtype=np.float16), np.array(RGB[1])),
        (torch.tensor(RGB[0]), torch.tensor(RGB[1], dtype=torch.bfloat16)),
        (torch.tensor(RGB[0])[:, None, None], torch.tensor(RGB[1])[None, :, None, None]),
        ([torch.tensor(v) for v in RGB[0]], [np.float32(v) for v in RGB[1]]),
        (lambda: RGB[0], lambda: torch.tensor(RGB[1], requires_grad=True)),  # methods
        (torch.tensor(RGB[0]) * 255, [v * 255 for v in RGB[1]]),  # of pixels in 0..255
    ],
)
def test_numbers_a_channel_in_every_form(mean, std):
    assert told(mean=mean, std=std) == (RGB, [])


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
@pytest.mark.parametrize(
    ("mean", "std", "wanted"),
    [
        (0.5, 0.25, (0.5, 0.25)),
        (torch.tensor(0.0), torch.tensor(255.0), (0.0, 1.0)),
        (np.float64(0.5), [0.25], (0.5, 0.25)),
        (torch.tensor([[[0.5]]]), np.array(1), (0.5, 1.0)),
        (127.5, 63.75, (0.5, 0.25)),
    ],
)
def test_scalars_count_for_all_channels(channels, mean, std, wanted):
    assert told(channels, mean=mean, std=std) == (([wanted[0]] * channels, [wanted[1]] * channels), [])


@pytest.mark.parametrize(
    ("mean", "std", "why"),
    [
        (RGB[0][:2], RGB[1], "mean has 2 numbers for 3 channels"),
        (0.5, [1, 0, 1], "std is [1.0, 0.0, 1.0], which must be above 0"),
        (float("nan"), 1, "mean is [nan]"),
        (0.5, [], "std is []"),
        ({"red": 0.5}, 1, "mean is a dict and no numbers"),
        ("imagenet", 1, "mean is a str and no numbers"),
        (torch.zeros(3, 2), 1, "mean has shape [3, 2]"),
        (0.5, None, "one of the two is missing"),
        (lambda band: band, 1, "mean raises TypeError"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(mean, std, why):
    pair, said = told(mean=mean, std=std)
    assert pair is None
    assert len(said) == 1
    assert said[0].startswith(f"mean and std of Owner cannot be used, and the model's are: {why}")
    assert "\n" not in said[0]


def test_properties_that_raise_and_layers_of_that_name():
    class Late:
        std = 1.0

        @property
        def mean(self):
            raise RuntimeError("call setup first")

    said = []
    assert read_normalisation([Late(), Owner(mean=0.5, std=0.5)], 1, said.append) == ([0.5], [0.5])
    assert "mean raises RuntimeError (call setup first)" in said[0]
    module = nn.Module()
    module.mean = nn.Identity()  # a metric, say
    assert read_normalisation([module], 3, said.append) is None
    module.register_buffer("std", torch.ones(1, 3, 1, 1))
    del module.mean
    module.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
    assert read_normalisation([module], 3, said.append) == ([0.5] * 3, [1.0] * 3)
    assert len(said) == 1


def test_what_a_user_gives_is_taken_or_refused():
    assert given_normalisation(None, None) is None
    assert given_normalisation(0, 255, 2) == ([0, 0], [1, 1])
    for mean, std, channels, why in (
        (0.5, None, None, "belong together"),
        ([0.5, 0.5], [1, 1], 3, "2 numbers for 3 channels"),
        (0.5, 0, None, "must be above 0"),
        ("x", 1, None, "no numbers"),
    ):
        with pytest.raises(PrunexError, match=why):
            given_normalisation(mean, std, channels)


def test_a_models_own():
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=4, depth=1)
    mean = list(vit.pretrained_cfg["mean"])
    assert models_normalisation(vit, 4)[0] == [*mean, mean[0]]
    vit.pretrained_cfg = {"mean": 0.25, "std": torch.tensor([0.5])}
    assert models_normalisation(vit, 2) == ([0.25, 0.25], [0.5, 0.5])
    vit.pretrained_cfg = None
    assert models_normalisation(vit, 1) == ([0.5], [0.5])


NAMES = ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"class_names": NAMES},
        {"classes": tuple(NAMES)},
        {"label_names": np.array(NAMES)},
        {"classes": 3, "label_names": NAMES},  # a count
        {"class_names": {0: "cat", 2: "owl", 1: "dog"}},
        {"class_names": {"0": "cat", "1": "dog", "2": "owl"}},  # as JSON keeps it
        {"classes": {"dog": 1, "owl": 2, "cat": 0}},  # class_to_idx
        {"classes": [("cat", "house cat"), ("dog",), ("owl", "night bird")]},  # torchvision's ImageNet
        {"class_names": lambda: NAMES},
        {"class_names": None, "classes": NAMES},
        {"class_names": ["cat"], "classes": NAMES},
    ],
)
def test_names_in_every_form(attributes):
    said = []
    assert class_names([None, Owner(), Owner(**attributes)], 3, said.append) == NAMES
    assert said == []


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (NAMES[:2], "has 2 names for 3 classes"),
        ("cat", "is a str, and no list of names"),
        ({"cat", "dog", "owl"}, "is a set, and no list of names"),
        ({1: "cat", 2: "dog", 3: "owl"}, "does not number 3 classes from 0 on"),
        ([0.5, 1.5, 2.5], "holds other things than names"),
        (lambda split: NAMES, "class_names raises TypeError"),
    ],
)
def test_names_that_do_not_fit_are_told(value, why):
    said = []
    assert class_names([Owner(class_names=value), Owner(classes=5)], 3, said.append) is None
    assert len(said) == 1
    assert said[0].startswith(f"classes are shown as numbers: Owner.class_names {why}")


def test_nobody_tells_names():
    said = []
    assert class_names([None, Owner()], 3, said.append) is None
    assert said == []
