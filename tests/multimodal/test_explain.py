"""The door: targets, inputs and options as they may come, and a sample's map whatever lies beside it."""

import numpy as np
import pytest
import torch

import prunex.multimodal
from prunex.errors import PrunexError
from tests.multimodal.models import MAKERS, clip, detector, lxmert, owlvit, vilt, visual_bert
from tests.multimodal.test_recorder import ALL, DETECTORS, explain

ONE_ANSWER = ["lxmert", "visual_bert", "vilt", "clip"]
METHODS = ["generic_attention", "raw_attention", "rollout", "grad_cam"]


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def part(inputs, which, kind):
    """Some samples of a batch; of a model that compares texts go on or stay."""
    if kind == "clip":
        return {**inputs, "pixel_values": inputs["pixel_values"][which]}
    if kind == "owlvit":
        texts = (
            inputs["input_ids"].view(len(inputs["pixel_values"]), -1, inputs["input_ids"].shape[1])[which].flatten(0, 1)
        )
        return {
            "input_ids": texts,
            "attention_mask": torch.ones_like(texts),
            "pixel_values": inputs["pixel_values"][which],
        }
    return {name: value[which] for name, value in inputs.items()}


def made(kind, count):
    return MAKERS[kind](images=count) if kind in ("clip", "owlvit") else MAKERS[kind](batch=count)


@pytest.mark.parametrize("method", METHODS)
@ALL
def test_alone_in_a_batch_and_in_another_order(kind, method):
    model, inputs = made(kind, 3)
    together = explain(kind, model, inputs, method=method)
    turned = explain(kind, model, part(inputs, [2, 0, 1], kind), method=method)
    for here, there in enumerate([1, 2, 0]):
        alone = explain(kind, model, part(inputs, [here], kind), method=method)
        close(together.image[here], alone.image[0])
        close(turned.image[there], alone.image[0])
        if together.text is not None:
            close(together.text[here], alone.text[0])
        assert torch.equal(together.target[here], alone.target[0])


@pytest.mark.parametrize("kind", ["lxmert", "visual_bert", "vilt"])
def test_padded_texts_and_boxes_are_as_good_as_absent(kind):
    model, inputs = MAKERS[kind]()
    short = {name: value[:1] for name, value in inputs.items()}
    short = {name: value[:, :4] if name in ("input_ids", "attention_mask") else value for name, value in short.items()}
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    image = slice(None)
    if kind != "vilt":
        image = [0, 1, 2]
        inputs["visual_attention_mask"] = torch.tensor([[1.0, 1, 1, 0, 0], [1] * 5])
        boxes = [name for name in short if name.startswith("visual")]
        short |= {name: short[name][:, image] for name in boxes}
    # Grad-CAM's means over a map and rollout's products take padding in.
    for method in ("generic_attention", "raw_attention"):
        e, want = (explain(kind, model, each, method=method) for each in (inputs, short))
        close(e.image[0, image], want.image[0])
        close(e.text[0, :4], want.text[0])
        if method == "generic_attention":
            assert e.text[0, 4:].abs().sum() == 0
            assert e.image[0][~e.image_valid[0]].abs().sum() == 0
            assert e.text_valid[0].tolist() == [True] * 4 + [False] * 2


def test_images_of_several_sizes_in_a_batch_of_vilt():
    model, _ = vilt()
    _, inputs = vilt(batch=3)
    sizes = [(32, 24), (16, 24), (24, 8)]
    inputs["pixel_mask"] = torch.zeros(3, 32, 24, dtype=torch.long)
    for mask, (height, width) in zip(inputs["pixel_mask"], sizes, strict=True):
        mask[:height, :width] = 1
    inputs["pixel_values"] = inputs["pixel_values"] * inputs["pixel_mask"][:, None]
    e = explain("vilt", model, inputs)
    for sample, (height, width) in enumerate(sizes):
        alone = {name: value[sample : sample + 1] for name, value in inputs.items()}
        alone |= {n: alone[n][..., :height, :width] for n in ("pixel_values", "pixel_mask")}
        want = explain("vilt", model, alone)
        map_ = e.image[sample].view(4, 3)
        close(map_[: height // 8, : width // 8], want.image[0].view(height // 8, width // 8))
        assert map_.sum() == pytest.approx(want.image.sum().item(), abs=1e-6)
        assert e.image_valid[sample].sum() == height * width // 64


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "table_transformer"])
def test_images_of_several_sizes_in_a_batch_of_a_detector(kind):
    """Cells of padding have no relevance, and an image's own map is as large as the image."""
    model, inputs = MAKERS[kind]()
    inputs["pixel_mask"][0, 64:, :] = 0
    inputs["pixel_mask"][0, :, 96:] = 0
    e = explain(kind, model, inputs)
    valid = e.image_valid[0]
    assert valid.view(3, 4).sum(0).tolist() == [2, 2, 2, 0]
    assert e.image[0][:, ~valid].abs().sum() == 0
    assert e.image[0][:, valid].sum() > 0
    assert e.queries[0, 2].map.shape == (2, 3)
    assert e.queries[1, 2].map.shape == (3, 4)
    assert e.queries[0, 2].mask.shape == (64, 96)


@pytest.mark.parametrize("target", [None, 1, [1, 1], [0, 2]], ids=str)
def test_images_that_share_a_text(target):
    model, inputs = clip(images=2, texts=3)
    target = torch.tensor(target) if isinstance(target, list) else target
    e = explain("clip", model, inputs, target)
    for image in range(2):
        text = int(e.target[image])
        one = {n: v[image : image + 1] if n == "pixel_values" else v[text : text + 1] for n, v in inputs.items()}
        want = explain("clip", model, one, 0)
        close(e.image[image], want.image[0])
        close(e.text[image], want.text[0])
        assert int(e.texts[image]) == text


def test_texts_of_different_lengths_and_one_image():
    model, inputs = clip(images=1, texts=2)
    inputs["input_ids"][0, 3:] = torch.tensor([59, 59, 59])
    inputs["attention_mask"][0, 4:] = 0
    e = explain("clip", model, inputs, torch.tensor([[0, 1]]))
    short = {n: v if n == "pixel_values" else v[:1, :4] for n, v in inputs.items()}
    want = explain("clip", model, short, 0)
    close(e.text[0, 0, :4], want.text[0])
    close(e.image[0, 0], want.image[0])
    assert e.text[0, 0, 3:].sum() == 0


@pytest.mark.parametrize("kind", ONE_ANSWER)
def test_many_targets_are_each_target_alone(kind):
    model, inputs = MAKERS[kind]()
    target = torch.tensor([[0, 2, 1], [1, 1, 0]])
    for method in METHODS:
        e = explain(kind, model, inputs, target, method)
        assert e.image.shape[:2] == e.text.shape[:2] == e.scores.shape == (2, 3)
        for k in range(3):
            one = explain(kind, model, inputs, target[:, k], method)
            close(e.image[:, k], one.image)
            close(e.text[:, k], one.text)
            close(e.scores[:, k], one.scores)
            assert all(one.relevance[name].equal(matrix[:, k]) for name, matrix in e.relevance.items())


@pytest.mark.parametrize("kind", ["detr", "dab_detr", "owlvit"])
def test_many_queries_are_each_query_alone(kind):
    model, inputs = MAKERS[kind]()
    e = prunex.multimodal.explain(model, inputs, queries=[3, 0, 5])
    for k, query in enumerate([3, 0, 5]):
        one = prunex.multimodal.explain(model, inputs, queries=query)
        close(e.image[:, k], one.image[:, 0])
        close(e.queries[1, query].map, one.queries[1, query].map)


@pytest.mark.parametrize("kind", ONE_ANSWER)
def test_targets_of_every_kind(kind):
    model, inputs = MAKERS[kind]()
    predicted = explain(kind, model, inputs)
    chosen = predicted.logits.argmax(1)
    assert torch.equal(predicted.target, chosen)
    for target in (chosen, chosen.to(torch.int32), chosen.to(torch.uint8)):
        close(explain(kind, model, inputs, target).image, predicted.image)
    column = explain(kind, model, inputs, chosen[:, None])
    assert column.image.shape == (2, 1, predicted.image.shape[1])
    close(column.image[:, 0], predicted.image)
    classes = predicted.logits.shape[1]
    allowed = f"classes are 0..{classes - 1}"
    bad = [-1, classes, 2**70, torch.tensor([0, classes]), torch.tensor([-1, 0]), torch.tensor([[0], [-2]])]
    bad += [True, 1.0, "1", [0, 1], (0, 1), np.int64(1), np.array([0, 1]), torch.tensor(1), torch.tensor([1])]
    bad += [torch.tensor([1.0, 0]), torch.tensor([True, False]), torch.tensor([1j, 0]), torch.zeros(2, 0).long()]
    bad += [torch.zeros(2, 1, 1).long(), torch.zeros(3).long(), torch.zeros(2, dtype=torch.long, device="meta")]
    for number, target in enumerate(bad):
        with pytest.raises(PrunexError) as caught:
            explain(kind, model, inputs, target)
        assert allowed in str(caught.value) if number < 6 else "whole numbers [2]" in str(caught.value), target


def test_queries_above_the_threshold_are_those_of_each_image():
    model, inputs = detector("Detr")
    best = prunex.multimodal.explain(model, inputs, queries="all").logits.softmax(-1)[..., :-1].amax(-1)
    threshold = float(best.flatten().sort().values[-4:-2].mean())
    e = prunex.multimodal.explain(model, inputs, threshold=threshold)
    assert {(q.image, q.query) for q in e.queries} == {tuple(p) for p in (best > threshold).nonzero().tolist()}
    assert len(e.queries) == 3


def test_a_query_without_a_text_is_no_target():
    model, inputs = owlvit(images=2, texts=2)
    inputs["input_ids"][3] = 0  # the second image has one text, and padding
    e = prunex.multimodal.explain(model, inputs, queries=[1])
    assert e.target[1].tolist() == [0]
    one = {"input_ids": inputs["input_ids"][2:3], "attention_mask": inputs["attention_mask"][2:3]}
    want = prunex.multimodal.explain(model, {**one, "pixel_values": inputs["pixel_values"][1:]}, queries=[1])
    close(e.image[1], want.image[0])
    with pytest.raises(PrunexError, match="text 1 of image 1 is padding"):
        prunex.multimodal.explain(model, inputs, 1, queries=[1])
    inputs["input_ids"] = inputs["input_ids"][:3]
    with pytest.raises(PrunexError, match="as many samples|as many for each"):
        prunex.multimodal.explain(model, inputs, queries=[1])


@ALL
def test_methods_and_options(kind):
    model, inputs = MAKERS[kind]()
    for method in ("lrp", "", None, 3):
        with pytest.raises(PrunexError, match="unknown method"):
            explain(kind, model, inputs, method=method)
    for method in ("transformer_attribution", "partial_lrp"):
        with pytest.raises(PrunexError, match="needs relevance rules"):
            explain(kind, model, inputs, method=method)
    for options, match in (
        ({"literl": True}, "did you mean 'literal'"),
        ({"literal": "no"}, "give True or False"),
        ({"normalise": 1}, "give True or False"),
    ):
        with pytest.raises(PrunexError, match=match):
            explain(kind, model, inputs, **options)
    with pytest.raises(PrunexError, match="unknown option of rollout"):
        explain(kind, model, inputs, method="rollout", literal=True)
    if kind not in DETECTORS:
        with pytest.raises(PrunexError, match="unknown option"):
            prunex.multimodal.explain(model, inputs, queries=[0])
    if "input_ids" in inputs:
        with pytest.raises(PrunexError, match="processor is a int"):
            explain(kind, model, inputs, processor=3)


def test_outputs_without_scores_are_told():
    model, inputs = lxmert()
    with pytest.raises(PrunexError, match="without question_answering_score"):
        prunex.multimodal.explain(model, {**inputs, "return_dict": False})
    model, inputs = visual_bert()
    model.config.return_dict = False
    with pytest.raises(PrunexError, match="without logits"):
        prunex.multimodal.explain(model, inputs)


def test_boxes_in_another_order_are_the_same_map_in_that_order():
    model, inputs = lxmert()
    order = [3, 0, 4, 1, 2]
    turned = {**inputs, **{name: inputs[name][:, order] for name in ("visual_feats", "visual_pos")}}
    e, t = (prunex.multimodal.explain(model, each, 2) for each in (inputs, turned))
    close(t.image, e.image[:, order])
    close(t.text, e.text)
    close(t.scores, e.scores)
