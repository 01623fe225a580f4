"""Batches as others collate them: right parts, or none and the reason why."""

import dataclasses
from collections import UserDict, namedtuple

import pytest
import torch

from prunex import PrunexError
from prunex.batches import parts

X = torch.zeros(4, 3, 8, 8)
Y = torch.tensor([3, 1, 0, 2])
INDEX = torch.arange(4)
SOFT = torch.full((4, 5), 0.2)
MASK = torch.zeros(4, 8, 8, dtype=torch.bool)


@dataclasses.dataclass
class Sample:
    idx: torch.Tensor
    image: torch.Tensor
    Label: torch.Tensor


class Slots:
    """Attributes without a __dict__, and a property that raises."""

    __slots__ = ("labels", "pixel_values")

    def __init__(self, x, y):
        self.pixel_values, self.labels = x, y

    @property
    def target(self):
        raise RuntimeError("not collated")


class Derived:
    """Images and labels behind properties alone."""

    def __init__(self, x, y):
        self._store = [x, y]

    image = property(lambda self: self._store[0])
    y = property(lambda self: self._store[1])


Pair = namedtuple("Pair", "view img target")


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [Y, X],
        {"view": INDEX, "image": X, "label": Y},
        {"Pixel_Values": X, "sample": INDEX, "Labels": Y},
        {"image": X, "depth": X[:, :1], "y": Y[:, None], "idx": INDEX},
        {"a": X, "sample_id": INDEX, "kind": Y},
        {"x": X, "class_id": Y, "view": INDEX},
        UserDict(pixel_values=X, labels=Y, image_id=INDEX),  # as transformers' BatchEncoding is one
        Pair(INDEX, X, Y),
        Sample(INDEX, X, Y),
        Slots(X, Y),
        Derived(X, Y),
        [[X, Y]],  # of a combined loader
        {"labelled": {"image": X, "label": Y}},
        {"image": X, "label": Y, "target": Y, "copy": X, "index": Y},  # tensors under several names
        ({"image": X, "name": ["a", "b", "c", "d"]}, {"label": Y, "index": INDEX}),
        (X, Y, [{"labels": INDEX}, {"labels": INDEX}, {"labels": INDEX}, {"labels": INDEX}]),
    ],
)
def test_names_win_and_what_looks_like_it_follows(batch):
    found = parts(batch)
    assert found["images"] is X
    assert torch.equal(found["labels"], Y)
    assert not found.unclear | found.unfit


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ((X, Y, INDEX), ["batch[1]", "batch[2]"]),
        ((X, (Y, INDEX, torch.tensor(0.3))), ["batch[1][0]", "batch[1][1]"]),  # mixed images: two labels and a share
        ({"image": X, "breed": Y, "age": INDEX}, ["batch['breed']", "batch['age']"]),
        ({"image": X, "label": Y, "target": INDEX}, ["batch['label']", "batch['target']"]),
        ((X, SOFT, INDEX), ["batch[2]", "batch[1]"]),  # self-adaptive training: soft labels and a sample's number
    ],
)
def test_labels_that_may_be_two_are_not_guessed(batch, named):
    found = parts(batch)
    assert found["images"] is X
    assert "labels" not in found
    assert found.unclear["labels"].startswith(f"{named[0]} and {named[1]} may both be meant: give a dict")
    for reads in (lambda: found.need("labels", "accuracy"), lambda: found.labels("accuracy")):
        with pytest.raises(PrunexError, match="accuracy found no labels in a .*'label'") as caught:
            reads()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((X, SOFT), r"batch\[1\] is float32 \[4, 5\] and no class index"),
        ((X, torch.zeros(4, 5, dtype=torch.int64)), r"batch\[1\] is int64 \[4, 5\]"),  # several labels an image
        ({"image": X, "target": SOFT, "serial": INDEX}, r"batch\['target'\] is float32 \[4, 5\]"),
        ({"image": X, "label": torch.rand(4)}, r"batch\['label'\] is float32 \[4\]"),  # regression
        ({"image": X, "y": torch.zeros(4, 8, 8, dtype=torch.int64)}, r"batch\['y'\] is int64 \[4, 8, 8\]"),
    ],
)
def test_labels_that_are_no_class_indices_are_none_and_said(batch, told):
    found = parts(batch)
    assert "labels" not in found
    with pytest.warns(UserWarning, match=f"taylor goes by the predicted classes: {told}"):
        assert found.labels("taylor") is None
    with pytest.raises(PrunexError, match=told):
        found.need("labels", "accuracy")


@pytest.mark.parametrize(
    "batch",
    [
        (X + 1, X, Y),
        ((X + 1, X), Y),
        {"image": [X + 1, X], "label": Y},
        {"image": X + 1, "pixel_values": X, "y": Y},
        {"strong": X + 1, "weak": X, "y": Y},
        [{"image": X + 1, "label": Y}, {"image": X}],  # several loaders at once
    ],
)
def test_of_several_views_pictures_take_the_first_and_nothing_else_does(batch):
    found = parts(batch)
    assert torch.equal(found["images"], X + 1)
    assert torch.equal(found["labels"], Y)
    with pytest.raises(PrunexError, match="calibration found no images in the training batch .*may both be meant"):
        found.need("images", "calibration", "the training batch")


@pytest.mark.parametrize("name", ["image", "anything"])
def test_bytes_are_no_images_yet(name):
    found = parts({name: X.to(torch.uint8), "label": Y})
    assert set(found) == {"labels"}
    with pytest.raises(
        PrunexError, match=rf"batch\['{name}'\] is uint8 \[4, 3, 8, 8\]: give float images.*x.float\(\) / 255"
    ):
        found.need("images", "calibration")


def test_bytes_of_name_are_not_passed_over_for_another_tensor():
    found = parts({"image": X.to(torch.uint8), "heat": X})
    assert "images" not in found
    assert "batch['image'] is uint8" in found.why("images")


@pytest.mark.parametrize("batch", ["text", None, 3, {}, [], (Y,), {"image": X[0]}, [{"image": X[0]}, {"image": X[1]}]])
def test_nothing_is_made_of_nothing(batch):
    assert parts(batch) == {}
    with pytest.raises(
        PrunexError, match=r"found no images in a \w+: give batches that hold a float tensor \[B, C, H, W\]"
    ):
        parts(batch).need("images", "calibration")


def test_labels_of_another_length_are_told():
    found = parts((X, INDEX[:3]))
    assert set(found) == {"images"}
    assert found.unclear["labels"] == "batch[1] holds labels [3] for 4 images: give one class an image"


def test_masks():
    assert parts((X, Y, MASK))["masks"] is MASK
    assert torch.equal(parts((X, MASK[:, None], Y))["masks"], MASK)
    assert parts({"image": X, "valid": ~MASK, "mask": MASK})["masks"] is MASK
    assert "masks" not in parts((X, MASK[:, :4]))
    several = parts({"image": X, "valid": ~MASK, "object": MASK})
    assert "masks" not in several
    assert "batch['valid'] and batch['object'] may both be meant" in several.unclear["masks"]


def test_a_batch_that_holds_itself_comes_to_an_end():
    batch = {"image": X, "label": Y}
    batch["batch"] = batch
    assert set(parts(batch)) == {"images", "labels"}


class Annotated:
    """Concept labels behind a property."""

    def __init__(self):
        self.image, self.label = X, Y

    @property
    def concepts(self):
        return INDEX % 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_concepts_go_by_name_whatever_their_dtype(dtype):
    marks, places = (torch.ones(4, 2) > 0).to(dtype), (torch.ones(4, 8, 8) > 0).to(dtype)
    fields = parts((X, Y, {"Concepts": marks, "spatial_concepts": places}))
    assert fields["concepts"] is marks
    assert fields["spatial_concepts"] is places
    assert set(fields) == {"images", "labels", "concepts", "spatial_concepts"}
    assert not fields.unclear
    # One concept of each image looks like a label, and is none.
    fields = parts((X, Y, {"concepts": marks[:, 0]}))
    assert torch.equal(fields["concepts"], marks[:, 0])
    assert torch.equal(fields["labels"], Y)
    assert torch.equal(parts(Annotated())["concepts"], INDEX % 2)


def test_a_list_of_concepts_is_no_table():
    fields = parts({"image": X, "label": Y, "concepts": [Y, INDEX]})
    assert "concepts" not in fields
    with pytest.raises(PrunexError, match=r"batch\['concepts'\]\[0\], .* give one tensor as 'concepts', a column for"):
        fields.need("concepts", "x")
    with pytest.raises(PrunexError, match=r"x found no spatial_concepts in a dict: give batches that hold"):
        fields.need("spatial_concepts", "x")


HOT = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_several_labels_an_image_are_known_as_such(dtype):
    hot = HOT.to(dtype)
    masks = torch.zeros(4, 3, 8, 8, dtype=torch.bool)
    for batch in ((X, hot), {"image": X, "labels": hot}, (X, hot, {"label_masks": masks})):
        found = parts(batch)
        assert found["multi_hot"] is hot
        assert found.truth("taylor") is hot
        with pytest.raises(PrunexError, match=r"several labels an image, and no one class of each"):
            found.need("labels", "accuracy")


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_number_an_image_is_known_as_such(shape):
    numbers = torch.rand(shape)
    for batch in ((X, numbers), {"image": X, "target": numbers}):
        found = parts(batch)
        assert torch.equal(found["values"], numbers.flatten())
        with pytest.raises(PrunexError, match="a number of each image, and no class"):
            found.need("labels", "accuracy")


def test_what_may_be_several_things_is_neither():
    for batch in ((X, HOT, HOT.clone()), (X, torch.rand(4), torch.rand(4)), (X, Y, HOT), (X, SOFT)):
        found = parts(batch)
        assert not {"multi_hot", "values"} & set(found)
    # Class indices by name are classes, whatever weights lie beside them.
    found = parts({"image": X, "label": Y, "weight": torch.rand(4)})
    assert set(found) == {"images", "labels"}
    assert found.truth("taylor") is found["labels"]
