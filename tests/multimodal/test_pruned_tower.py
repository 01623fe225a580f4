"""Models that compare, with a timm ViT as image tower, pruned: the same relevance, dropped cells marked as dropped."""

import torch

import prunex
import prunex.multimodal
from tests.multimodal.models import clip


def likeness(model, inputs, text):
    """The model's own score of one text, of image embeddings."""
    with torch.no_grad():
        embedding = model(**inputs).text_embeds[text]
    scale = model.logit_scale.exp().detach()
    return lambda out: scale * torch.cosine_similarity(out, embedding[None])


def test_the_twin_of_an_image_tower_has_the_models_own_relevance():
    model, inputs = clip(images=2, texts=3)
    twin = prunex.from_transformers(model)
    for text in range(3):
        want = prunex.multimodal.explain(model, inputs, text)
        e = prunex.explain("generic_attention", twin, inputs["pixel_values"], likeness(model, inputs, text))
        torch.testing.assert_close(e.logits[:, 0], want.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(e.maps.flatten(1), want.image, rtol=1e-3, atol=1e-6)


def test_dropped_cells_are_marked_as_dropped():
    model, inputs = clip(images=2, texts=3)
    twin = prunex.from_transformers(model)
    prunex.attach(twin, "topk", keep_ratio=0.5, stages=(0,))
    e = prunex.explain("raw_attention", twin, inputs["pixel_values"], likeness(model, inputs, 1))
    kept = e.trace.kept()
    assert kept.sum((1, 2)).tolist() == [8, 8]
    assert (e.maps[~kept] == 0).all()
    assert (e.maps[kept] > 0).all()
