"""Folders in COCO's format: every way to write a mask, the model's class numbers, and files that cannot be used."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from prunex.errors import PrunexError
from prunex.multimodal.coco import CocoFolder, decode
from prunex.multimodal.mask_scores import Detections, score_masks

coco = pytest.importorskip("pycocotools.mask", reason="needs the extra prunex-vit[multimodal]")
SQUARE = [[4, 2, 12, 2, 12, 10, 4, 10]]


def written(folder, change=None, **parts):
    """A data set of two images of 24 x 16, of which the second has no objects; ``change`` works on its JSON."""
    (folder / "images").mkdir(exist_ok=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (24, 16), colour).save(folder / "images" / name)
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 16, "width": 24},
            {"id": 9, "file_name": "b.png", "height": 16, "width": 24},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "segmentation": SQUARE, "area": 60.5, "iscrowd": 0},
            {
                "id": 2,
                "image_id": 7,
                "category_id": 3,
                "segmentation": {"size": [16, 24], "counts": [0, 32, 352]},
                "area": 32,
                "iscrowd": 1,
            },
        ],
    } | parts
    if change:
        change(content)
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json", folder / "images"


def test_images_and_objects(tmp_path):
    data = CocoFolder(*written(tmp_path))
    assert len(data) == 2
    assert data.names == {3: "cat", 18: "dog"}
    (first, objects), (second, none) = data
    assert first.getpixel((0, 0)) == (255, 0, 0)
    assert second.getpixel((0, 0)) == (0, 0, 255)
    assert objects.labels.tolist() == [18, 3]
    assert objects.crowd.tolist() == [False, True]
    assert objects.areas.tolist() == [60.5, 32]
    assert objects.masks[0, 2:10, 4:12].all()
    assert objects.masks[0].sum() == 64
    assert objects.masks[1, :, :2].all()
    assert objects.masks[1].sum() == 32
    assert none.masks.shape == (0, 16, 24)


def test_numbers_of_the_model(tmp_path):
    data = CocoFolder(*written(tmp_path), labels={"dog": 0, "cat": 1, "bird": 2})
    assert data[0][1].labels.tolist() == [0, 1]
    assert data.names == {0: "dog", 1: "cat"}
    with pytest.raises(PrunexError, match="no number for the category 'dog'"):
        CocoFolder(*written(tmp_path), labels={"cat": 1})


def test_without_areas_and_crowds(tmp_path):
    def change(content):
        del content["annotations"][0]["area"], content["annotations"][1]["iscrowd"]

    objects = CocoFolder(*written(tmp_path, change))[0][1]
    assert objects.areas.tolist() == [64, 32]
    assert objects.crowd.tolist() == [False, False]


def test_it_is_scored(tmp_path):
    data = CocoFolder(*written(tmp_path))
    sizes = []

    def explain(image):
        sizes.append(image.size)
        masks = data[0][1].masks[:1] if len(sizes) == 1 else torch.zeros(0, 16, 24, dtype=torch.bool)
        return Detections(masks, torch.full((len(masks),), 0.9), torch.full((len(masks),), 18))

    scores = score_masks(explain, data)
    assert sizes == [(24, 16)] * 2
    assert (scores.images, scores.objects.all, scores.objects.small) == (2, 1, 1)
    assert scores.ap.all == pytest.approx(1)


@settings(deadline=None, max_examples=80)
@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)))
def test_run_lengths_are_cocos(mask):
    height, width = mask.shape
    packed = coco.encode(np.asfortranarray(mask))
    text = packed["counts"].decode()
    assert np.array_equal(decode({"size": [height, width], "counts": text}, height, width), mask == 1)
    columns = np.concatenate([[0], mask.T.flatten(), [2]])
    edges = np.flatnonzero(np.diff(columns.astype(int)) != 0)
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    assert sum(runs) == mask.size
    assert np.array_equal(decode({"size": [height, width], "counts": runs}, height, width), mask == 1)


def test_long_runs_and_polygons_are_cocos():
    mask = np.zeros((700, 900), dtype=np.uint8)
    mask[13:650, 100:120] = mask[5:20, 400:899] = mask[300, ::7] = 1
    text = coco.encode(np.asfortranarray(mask))["counts"].decode()
    assert np.array_equal(decode({"size": [700, 900], "counts": text}, 700, 900), mask == 1)
    polygons = [[10.5, 4, 300, 20.25, 150, 500], [600, 600, 905, 600, 905, 710.5, 600, 710.5]]
    merged = coco.decode(coco.merge(coco.frPyObjects(polygons, 700, 900)))
    assert np.array_equal(decode(polygons, 700, 900), merged == 1)
    assert merged[650, 700] == 1


@pytest.mark.parametrize(
    ("segmentation", "why"),
    [
        (None, "neither"),
        ([], "neither"),
        ([[1, 1, 5, 5]], "three points"),
        ([[1, 1, 5, 5, 3, 8, 2]], "three points"),
        ([[1, 1, 5, 5, 3, "8"]], "three points"),
        ([[1, 1, 5, 5, 3, True]], "three points"),
        ([1, 1, 5, 5, 3, 8], "three points"),
        ([[1, 1, 5, 5, 3, 1e9]], "far out"),
        ({"size": [16, 24]}, "neither a list nor text"),
        ({"size": [24, 16], "counts": [384]}, "its size is"),
        ({"size": [16, 24], "counts": [383]}, "cover 383 pixels of 384"),
        ({"size": [16, 24], "counts": [2**40]}, "pixels of 384"),
        ({"size": [16, 24], "counts": []}, "cover 0"),
        ({"size": [16, 24], "counts": [-1, 385]}, "no whole numbers"),
        ({"size": [16, 24], "counts": [384.0]}, "no whole numbers"),
        ({"size": [16, 24], "counts": ""}, "cover 0"),
        ({"size": [16, 24], "counts": "zzz"}, "no run lengths"),
        ({"size": [16, 24], "counts": "`" * 100}, "no run lengths"),
        ({"size": [16, 24], "counts": "0000O"}, "negative run|no run"),
        ({"size": [16, 24], "counts": "P"}, "within a number"),
        ({"size": [16, 24], "counts": "\u00fc"}, "no run lengths"),
    ],
)
def test_bad_masks(tmp_path, segmentation, why):
    def change(content):
        content["annotations"][0]["segmentation"] = segmentation

    data = CocoFolder(*written(tmp_path, change))
    with pytest.raises(PrunexError, match=f"annotation 1 has no mask: .*({why})"):
        data[0]
    assert len(data[1][1].labels) == 0


def test_bad_files(tmp_path):
    file, folder = written(tmp_path)
    with pytest.raises(PrunexError, match="is no folder"):
        CocoFolder(file, tmp_path / "nowhere")
    with pytest.raises(PrunexError, match="is no file"):
        CocoFolder(tmp_path / "nothing.json", folder)
    file.write_text("{")
    with pytest.raises(PrunexError, match="is damaged"):
        CocoFolder(file, folder)
    file.write_text("[]")
    with pytest.raises(PrunexError, match="no list of images"):
        CocoFolder(file, folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(annotations={}), "no list of annotations"),
        (lambda c: c.update(categories=[3]), "no list of categories"),
        (lambda c: c.update(images=[]), "lists 0 images"),
        (lambda c: c["images"][1].update(id=7), "2 images of 1 numbers"),
        (lambda c: c["images"][0].update(id="7"), "id='7'"),
        (lambda c: c["images"][0].update(height=0), "height and width"),
        (lambda c: c["images"][0].update(width=10**9), "height and width"),
        (lambda c: c["images"][0].update(width=None), "width=None"),
        (lambda c: c["images"][0].update(file_name=None), "no file_name"),
        (lambda c: c["images"][0].update(file_name="../truth.json"), "leads out"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "leads out"),
        (lambda c: c["annotations"][1].update(image_id=8), "annotation 2 is of an image or category"),
        (lambda c: c["annotations"][1].update(category_id=4), "annotation 2 is of an image or category"),
        (lambda c: c["annotations"][1].update(category_id=None), "category_id=None"),
    ],
)
def test_bad_annotations(tmp_path, change, why):
    with pytest.raises(PrunexError, match=why):
        CocoFolder(*written(tmp_path, change))


def test_bad_images(tmp_path):
    file, folder = written(tmp_path)
    data = CocoFolder(file, folder)
    Image.new("RGB", (16, 24)).save(folder / "a.png")
    with pytest.raises(PrunexError, match="has 16 x 24 pixels"):
        data[0]
    Image.fromarray(np.zeros((16, 24), dtype=np.uint16)).save(folder / "a.png")
    with pytest.raises(PrunexError, match="eight bits a channel"):
        data[0]
    (folder / "a.png").write_text("no image")
    with pytest.raises(PrunexError, match="cannot read image"):
        data[0]
    (folder / "a.png").unlink()
    with pytest.raises(PrunexError, match="it is no file"):
        data[0]


def test_too_many_masks(tmp_path, monkeypatch):
    data = CocoFolder(*written(tmp_path))
    monkeypatch.setattr("prunex.multimodal.coco._ROOM", 500)
    with pytest.raises(PrunexError, match="2 masks of 24 x 16 pixels are too many"):
        data[0]


def test_without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setattr("prunex.multimodal.coco.find_spec", lambda name: None)
    with pytest.raises(PrunexError, match=r"pip install 'prunex-vit\[multimodal\]'"):
        CocoFolder(*written(tmp_path))
