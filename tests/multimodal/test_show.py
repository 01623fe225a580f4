"""Pictures of explanations: every kind of model, what is drawn where, and what cannot be."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import prunex.multimodal
from prunex import PrunexError
from prunex.multimodal import showing
from prunex.multimodal.showing import corners, map_of, pictures_of, sample_sheet
from prunex.multimodal.words import pieces, sentence
from tests.multimodal.models import MAKERS, clip, detector, lxmert, owlvit, vilt, visual_bert


class Tokenizer:
    """Words of a made-up vocabulary, some of them in two parts."""

    def convert_ids_to_tokens(self, ids):
        return ["<|endoftext|>" if i == 59 else f"w{i}{'</w>' * (i % 3 > 0)}" for i in ids]


def explained(name, **options):
    model, inputs = MAKERS[name]()
    more = {"queries": [5, 0, 3]} if type(model).__name__.endswith("ForObjectDetection") else {}
    return prunex.multimodal.explain(model, inputs, **(more | options))


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("method", ["generic_attention", "rollout"])
def test_every_kind_is_drawn(name, method):
    e = explained(name, method=method)
    shown = e.show()
    assert isinstance(shown, Image.Image)
    assert shown.mode == "RGB"
    assert shown._repr_png_().startswith(b"\x89PNG")
    assert np.asarray(shown).std() > 5


def test_samples_are_drawn_alone_as_in_a_batch():
    model, inputs = vilt()
    both = prunex.multimodal.explain(model, inputs)
    one = {name: value[1:] for name, value in inputs.items()}
    alone = np.asarray(prunex.multimodal.explain(model, one).show()).astype(int)
    lower = np.asarray(both.show()).astype(int)[-len(alone) :]
    assert np.abs(lower - alone).max() <= 2


def test_padding_is_neither_drawn_nor_part_of_a_scale():
    model, inputs = vilt()
    inputs["attention_mask"][0, 4:] = 0
    inputs["pixel_mask"][0, :, 16:] = 0
    e = prunex.multimodal.explain(model, inputs)
    assert map_of(e, (0,)).shape == (4, 2)
    assert map_of(e, (1,)).shape == (4, 3)
    first, second = pictures_of(e, None)
    assert first.shape == (32, 16, 3)
    assert second.shape == (32, 24, 3)
    before = np.asarray(e.show())
    e.text[0, 4:], e.image.view(2, 4, 3)[0, :, 2] = 1e6, 1e6
    assert np.array_equal(before, np.asarray(e.show()))


def test_pictures_are_stretched_each_by_itself():
    model, inputs = clip()
    e = prunex.multimodal.explain(model, inputs)
    e.pictures[1] *= 100
    first, second = pictures_of(e, None)
    assert (first.min(), first.max(), second.min(), second.max()) == (0, 255, 0, 255)


def test_images_may_be_arrays_tensors_or_pil():
    e = explained("clip")
    arrays = np.random.default_rng(0).integers(0, 255, (2, 40, 40, 3), dtype=np.uint8)
    floats = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    shown = [np.asarray(e.show(images)) for images in (arrays, floats, [Image.fromarray(each) for each in arrays])]
    assert np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0], shown[2])
    model, inputs = clip(images=1)
    one = prunex.multimodal.explain(model, inputs)
    assert np.array_equal(np.asarray(one.show(arrays[0])), np.asarray(one.show(arrays[:1])))


def test_images_of_another_shape_are_told_of_once():
    e = explained("clip")
    wide = [np.zeros((20, 60, 3), dtype=np.uint8)] * 2
    with pytest.warns(UserWarning, match="20 x 60 pixels, and the model saw 32 x 32") as said:
        e.show(wide)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e.show([np.zeros((64, 60, 3), dtype=np.uint8)] * 2)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([np.zeros((8, 8, 3), dtype=np.uint8)], "images are 1: give those that were explained, 2 of them"),
        (torch.zeros(2, 2, 8, 8), "1 or 3 channels"),
        ([np.zeros((8, 8), dtype=np.uint8)] * 2, "cannot be drawn"),
    ],
)
def test_what_are_no_images(images, says):
    with pytest.raises(PrunexError, match=says):
        explained("clip").show(images)


def test_a_list_of_boxes_has_no_map_and_no_object_queries():
    model, inputs = detector("Detr")
    query = next(iter(prunex.multimodal.explain(model, inputs, queries=[0]).queries))
    boxes = prunex.multimodal.explain(*lxmert())
    with pytest.raises(PrunexError, match="list of boxes has no map"):
        map_of(boxes, (0,))
    with pytest.raises(PrunexError, match="this explanation has no object queries"):
        boxes.same(query)


def test_boxes_lie_on_a_picture_or_become_bars():
    model, inputs = lxmert()
    e = prunex.multimodal.explain(model, inputs)
    bars, boxes = (np.asarray(e.show(images)) for images in (None, torch.rand(2, 3, 60, 60)))
    assert not np.array_equal(bars.shape, boxes.shape)
    # VisualBERT knows no places: a picture changes nothing.
    model, inputs = visual_bert()
    e = prunex.multimodal.explain(model, inputs)
    assert np.array_equal(np.asarray(e.show()), np.asarray(e.show(torch.rand(2, 3, 60, 60))))


def test_words_come_from_the_processor_or_are_given():
    model, inputs = vilt()
    read = prunex.multimodal.explain(model, inputs, processor=Tokenizer())
    plain = prunex.multimodal.explain(model, inputs)
    assert np.array_equal(np.asarray(read.show()), np.asarray(plain.show(words=read.words)))
    assert not np.array_equal(np.asarray(read.show()), np.asarray(plain.show()))
    with pytest.raises(PrunexError, match="words hold 1 texts: give the tokens of each of the 2 texts"):
        plain.show(words=[["a"] * 6])
    with pytest.raises(PrunexError, match="words hold 5 words in text 0"):
        plain.show(words=[["a"] * 5, ["a"] * 6])


def test_each_image_has_the_words_of_the_text_it_is_explained_for():
    model, inputs = clip(images=2, texts=2)
    target = torch.tensor([1, 0])
    e = prunex.multimodal.explain(model, inputs, target, processor=Tokenizer())
    assert e.texts.tolist() == [1, 0]
    assert e.labels == [sentence(e.words[1]), sentence(e.words[0])]
    # Texts exchanged, targets too: the same pictures.
    flipped = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    other = prunex.multimodal.explain(model, flipped, 1 - target, processor=Tokenizer())
    first, second = (np.asarray(each.show()).astype(int) for each in (e, other))
    assert np.abs(first - second).max() <= 2


def test_of_owl_vit_each_image_has_texts_of_its_own():
    model, inputs = owlvit(images=2, texts=2)
    target = torch.ones(2, 16, dtype=torch.long)
    e = prunex.multimodal.explain(model, inputs, target, queries=[3, 1], processor=Tokenizer())
    assert e.texts.tolist() == [[1, 1], [3, 3]]
    assert [q.text_number for q in e.queries] == [1, 1, 3, 3]
    assert e.queries[1, 3].label == sentence(e.words[3])
    assert [len(each) for each in e.labels] == [2, 2]


def test_several_targets_are_drawn_below_each_other():
    model, inputs = vilt()
    two = prunex.multimodal.explain(model, inputs, torch.tensor([[0, 1], [2, 3]]))
    singles = [prunex.multimodal.explain(model, inputs, torch.tensor(t)) for t in ([0, 2], [1, 3])]
    assert two.show().height == sum(each.show().height for each in singles)
    assert two.labels == [["LABEL_0", "LABEL_1"], ["LABEL_2", "LABEL_3"]]
    assert singles[0].labels == ["LABEL_0", "LABEL_2"]


def test_probabilities_are_those_of_the_explained_class():
    model, inputs = detector("Detr")
    e = prunex.multimodal.explain(model, inputs, 2, queries=[4, 1])
    shares = e.logits.softmax(-1)
    assert [q.probability for q in e.queries] == pytest.approx([float(shares[b, k, 2]) for b in (0, 1) for k in (4, 1)])
    e = explained("conditional_detr")
    for q in e.queries:
        assert q.probability == pytest.approx(float(e.logits[q.image, q.query].sigmoid().max()))


def test_an_image_without_detections_says_so_and_many_are_cut(monkeypatch):
    model, inputs = detector("Detr")
    shares = model(**inputs).logits.detach().softmax(-1)[..., :-1].amax(-1).amax(1)
    threshold = float(shares.mean())
    e = prunex.multimodal.explain(model, inputs, threshold=threshold)
    counts = [sum(q.image == b for q in e.queries) for b in (0, 1)]
    assert min(counts) == 0 < max(counts)
    assert e.show().height > 0
    everything = prunex.multimodal.explain(model, inputs, queries="all")
    full = everything.show().height
    monkeypatch.setattr(showing, "MOST", 2)
    assert everything.show().height < full


def test_nothing_above_the_threshold_is_an_error_of_its_own():
    from prunex.errors import NothingDetected

    model, inputs = detector("Detr")
    with pytest.raises(NothingDetected, match="no object query of DetrForObjectDetection is above threshold=1"):
        prunex.multimodal.explain(model, inputs, threshold=1.0)


def test_several_methods_are_drawn_beside_each_other():
    model, inputs = detector("Detr")
    both = {m: prunex.multimodal.explain(model, inputs, queries=[0, 1], method=m) for m in ("grad_cam", "rollout")}
    picture = pictures_of(both["rollout"], None)[0]
    wide = sample_sheet(both, 0, picture, heading=["cat.jpg"])
    assert wide.shape[0] > sample_sheet({"rollout": both["rollout"]}, 0, picture).shape[0]


def test_corners():
    assert corners(torch.tensor([0.5, 0.4, 0.2, 0.6])).tolist() == pytest.approx([0.4, 0.1, 0.6, 0.7])


def test_pieces_of_words():
    read = pieces(["[CLS]", "##a", "b", "##c", "[MASK]", "##d"])
    assert [each.joined for each in read] == [False, False, False, True, False, False]
    assert [each.text for each in read] == ["[CLS]", "a", "b", "c", "[MASK]", "d"]
    assert [each.mark for each in read] == [True, False, False, False, True, False]
    assert [each.text for each in pieces(["Ġa", "b", "Ġ", "<", "<=>"])] == ["a", "b", "Ġ", "<", "<=>"]
    assert [each.joined for each in pieces(["▁a", "b", "▁c"])] == [False, True, False]
    assert [each.joined for each in pieces(["<|startoftext|>", "a", "b</w>", "c</w>"])] == [False, False, True, False]
    assert sentence(["[CLS]", "pag", "##oda", "?", "[SEP]"]) == "pagoda ?"
