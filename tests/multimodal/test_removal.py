"""What is masked is as good as removed, what is removed moves up, and an image without boxes says nothing."""

import pytest
import torch

import prunex.multimodal
from prunex.errors import PrunexError
from prunex.multimodal.families import adapter_of
from prunex.multimodal.removal import ModelRemover, questions
from prunex.multimodal.vqa import vqa_perturbation
from tests.multimodal.models import BOXES, TEXT, clip, lxmert, vilt, visual_bert

ALL = {"lxmert": lxmert, "visual_bert": visual_bert, "vilt": vilt}
BOXED = {"lxmert": ("visual_feats", "visual_pos"), "visual_bert": ("visual_embeds", "visual_token_type_ids")}


def logits(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.question_answering_score if hasattr(outputs, "question_answering_score") else outputs.logits


def rows(image, text):
    return torch.tensor(image, dtype=torch.bool), torch.tensor(text, dtype=torch.bool)


@pytest.mark.parametrize("name", ALL)
def test_nothing_removed_is_the_models_own_answer(name):
    model, inputs = ALL[name](batch=1)
    cells = 12 if name == "vilt" else BOXES
    image, text = rows([[True] * cells] * 2, [[True] * TEXT] * 2)
    torch.testing.assert_close(
        ModelRemover(model)(inputs, image, text), logits(model, inputs).expand(2, -1), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", BOXED)
def test_masked_boxes_are_removed_boxes(name):
    model, inputs = ALL[name](batch=1)
    left = torch.tensor([True, False, True, True, False])
    image, text = rows([left.tolist()], [[True] * TEXT])
    removed = {k: v[:, left] if k.startswith("visual") else v for k, v in inputs.items()}
    torch.testing.assert_close(ModelRemover(model)(inputs, image, text), logits(model, removed), atol=1e-6, rtol=1e-5)


def test_a_removed_patch_is_one_that_nobody_can_attend_to():
    model, inputs = vilt(batch=1)
    image = torch.ones(1, 12, dtype=torch.bool)
    image[0, [2, 7]] = False
    ours = ModelRemover(model)(inputs, image, torch.ones(1, TEXT, dtype=torch.bool))
    changed = dict(inputs, pixel_values=inputs["pixel_values"].clone())
    # Patches 2 and 7 of the 4 x 3 grid: whatever they show, the answer is the same.
    changed["pixel_values"][:, :, 0:8, 16:24] = 9.0
    changed["pixel_values"][:, :, 16:24, 8:16] = -9.0
    assert (logits(model, changed) - logits(model, inputs)).abs().max() > 1e-4
    torch.testing.assert_close(ModelRemover(model)(changed, image, torch.ones(1, TEXT, dtype=torch.bool)), ours)


@pytest.mark.parametrize("name", ALL)
def test_removed_tokens_let_the_others_move_up(name):
    model, inputs = ALL[name](batch=1)
    kept = torch.tensor([True, False, True, False, True, True])
    shorter = {k: v[:, kept] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    cells = 12 if name == "vilt" else BOXES
    ours = ModelRemover(model)(inputs, torch.ones(1, cells, dtype=torch.bool), kept[None])
    torch.testing.assert_close(ours, logits(model, shorter), atol=1e-6, rtol=1e-5)
    masked = dict(inputs, attention_mask=kept[None].long())
    if name != "visual_bert":  # its place to read would move with the mask's sum
        assert (logits(model, masked) - ours).abs().max() > 1e-4


def test_an_image_without_boxes_is_independent_of_what_was_in_it():
    model, inputs = lxmert(batch=1)
    image, text = rows([[False] * BOXES, [True] * BOXES], [[True] * TEXT] * 2)
    ours = ModelRemover(model)(inputs, image, text)
    other = dict(inputs, visual_feats=inputs["visual_feats"] * -3, visual_pos=inputs["visual_pos"].flip(1))
    assert torch.equal(ModelRemover(model)(other, image, text)[0], ours[0])
    torch.testing.assert_close(ours[1:], logits(model, inputs), atol=1e-6, rtol=1e-5)
    # Masking all boxes reads them evenly instead.
    masked = logits(model, dict(inputs, visual_attention_mask=torch.zeros(1, BOXES)))
    assert (masked - ours[:1]).abs().max() > 1e-3
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_come_back_in_their_order_whatever_the_batch():
    model, inputs = lxmert(batch=1)
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(20, BOXES, generator=generator) > 0.5
    text = torch.rand(20, TEXT, generator=generator) > 0.4
    text[:, 0] = True
    one = torch.cat([ModelRemover(model)(inputs, image[i : i + 1], text[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(ModelRemover(model, batch=3)(inputs, image, text), one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_questions_have_no_padding_and_keep_what_is_read(name):
    model, inputs = ALL[name](batch=2)
    inputs["attention_mask"][1, -2:] = 0
    if name == "vilt":
        inputs["pixel_mask"][1, 24:] = 0
        inputs["pixel_values"][1, :, 24:] = 0
    else:
        inputs["visual_attention_mask"] = torch.ones(2, BOXES)
        inputs["visual_attention_mask"][1, 3:] = 0
    e = prunex.multimodal.explain(model, inputs)
    first, second = questions(model, inputs, e, torch.tensor([1, 2]))
    assert len(first.text) == TEXT
    assert len(second.text) == TEXT - 2
    assert len(second.image) == (9 if name == "vilt" else 3)
    assert second.answers == 2
    whole = ModelRemover(model)(second.inputs, torch.ones(1, len(second.image)).bool(), torch.ones(1, TEXT - 2).bool())
    torch.testing.assert_close(whole[0], logits(model, inputs)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_protocol_starts_at_the_unperturbed_score_and_orders_mirror(name):
    model, inputs = ALL[name](batch=3)
    answers = torch.rand(3, 7)
    e = prunex.multimodal.explain(model, inputs)
    measured = vqa_perturbation(ModelRemover(model), questions(model, inputs, e, answers), draws=2)
    whole = answers.double().gather(1, logits(model, inputs).argmax(1, keepdim=True))[:, 0]
    for curves in (measured.image, measured.text):
        for curve in (curves.positive, curves.negative, curves.random):
            torch.testing.assert_close(curve.scores[:, 0], whole)
    e.image, e.text = -e.image, -e.text
    mirrored = vqa_perturbation(ModelRemover(model), questions(model, inputs, e, answers))
    assert torch.equal(mirrored.image.positive.scores, measured.image.negative.scores)
    assert torch.equal(mirrored.text.negative.scores, measured.text.positive.scores)


def test_bad_input():
    model, inputs = clip(images=1, texts=1)
    with pytest.raises(PrunexError, match="nobody knows how to remove"):
        ModelRemover(model)(inputs, torch.ones(1, 16).bool(), torch.ones(1, TEXT).bool())
    model, inputs = lxmert(batch=2)
    e = prunex.multimodal.explain(model, inputs)
    with pytest.raises(PrunexError, match="answers for 3"):
        list(questions(model, inputs, e, torch.tensor([1, 2, 0])))
    with pytest.raises(PrunexError, match="without any token"):
        ModelRemover(model)(inputs, torch.ones(1, BOXES).bool(), torch.zeros(1, TEXT).bool())
    assert adapter_of(model, inputs).protected(6) == [0, 5]
