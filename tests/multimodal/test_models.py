"""Models that nobody here has heard of: taught, or refused by name; and a detector that looks where it was told to."""

import pytest
import torch
from torch import nn

import prunex.multimodal
from prunex.errors import PrunexError
from prunex.multimodal.adapter import ADAPTERS, Adapter, known
from prunex.multimodal.rules import Attended, Rules, propagate
from tests.multimodal.models import BERT, TOWER, detector, randomised, transformers

WORDS, PATCHES = 4, 6


class Attention(nn.Module):
    """Plain attention that returns its map, always or when it is asked."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, output_attentions=False):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        out = self.out((weights @ v).transpose(1, 2).flatten(2))
        return (out, weights) if output_attentions else (out,)


class Answer:
    def __init__(self, scores):
        self.scores = scores


class Fusion(nn.Module):
    """Words, then patches, in one stream; the first patch answers."""

    calls = 1

    def __init__(self, depth=2, width=16):
        super().__init__()
        self.words, self.patches = nn.Embedding(30, width), nn.Linear(5, width)
        self.layers = nn.ModuleList(Attention(width) for _ in range(depth))
        self.classes = nn.Linear(width, 3)

    def forward(self, input_ids, cells):
        x = torch.cat([self.words(input_ids), self.patches(cells)], 1)
        for layer in self.layers:
            for _ in range(self.calls):
                x = x + layer(x)[0]
        return Answer(self.classes(x[:, WORDS]))


class Twice(Fusion):
    calls = 2


class Blind(Fusion):
    """Its attention keeps its map to itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (10,))) for _ in range(2))

    def forward(self, input_ids, cells):
        x = torch.cat([self.words(input_ids), self.patches(cells)], 1)
        for layer in self.layers:
            x = x + layer[0](x)
        return Answer(self.classes(x[:, WORDS]))


@pytest.fixture
def forgets():
    prunex.multimodal.models()  # those that are known come with it
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


def fusion(kind=Fusion):
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(30, (2, WORDS)), "cells": torch.randn(2, PATCHES, 5)}
    return randomised(kind()), inputs


def teach(kind=Fusion, attention=r"layers\.\d+", **options):
    told = {"row": WORDS, "image": lambda inputs: (0, (2, 3)), "logits": "scores"}
    prunex.multimodal.register(kind, attention, **{**told, **options})


@pytest.mark.usefixtures("forgets")
def test_a_model_of_ones_own_is_taught():
    model, inputs = fusion()
    with pytest.raises(PrunexError, match=r"Fusion is not known.*register"):
        prunex.multimodal.explain(model, inputs)
    teach()
    e = prunex.multimodal.explain(model, inputs)
    assert (e.text.shape, e.image.shape, e.grid) == ((2, WORDS), (2, PATCHES), (2, 3))
    assert e.image[:, 0].abs().max() == 0  # the token that answers says nothing of itself
    assert e.text.min() >= 0
    assert e.text.max() > 0
    # The single-stream rule, by hand.
    maps = []
    x = torch.cat([model.words(inputs["input_ids"]), model.patches(inputs["cells"])], 1)
    for layer in model.layers:
        out, weights = layer(x, output_attentions=True)
        maps.append(weights)
        x = x + out
    score = model.classes(x[:, WORDS]).max(1).values.sum()
    matrix = torch.eye(WORDS + PATCHES).expand(2, -1, -1)
    for weights, gradient in zip(maps, torch.autograd.grad(score, maps), strict=True):
        matrix = matrix + (weights * gradient).clamp(min=0).mean(1) @ matrix
    torch.testing.assert_close(e.relevance["R_ss"], matrix.detach(), rtol=1e-4, atol=1e-7)
    for method in ("raw_attention", "rollout", "grad_cam"):
        assert prunex.multimodal.explain(model, inputs, method=method).image.isfinite().all()


@pytest.mark.usefixtures("forgets")
@pytest.mark.parametrize(
    ("kind", "options"),
    [(Fusion, {"attention": r"nothing\.\d+"}), (Twice, {}), (Fusion, {"row": 0}), (Fusion, {"row": 99}), (Blind, {})],
)
def test_what_was_taught_wrongly_is_noticed(kind, options):
    teach(kind, **options)
    model, inputs = fusion(kind)
    with pytest.raises(PrunexError) as caught:
        prunex.multimodal.explain(model, inputs)
    assert "\n" not in str(caught.value)


def test_a_bad_pattern_is_refused_when_it_is_given():
    with pytest.raises(PrunexError, match="no regular expression"):
        prunex.multimodal.register("Anything", "layers.(")


@pytest.mark.usefixtures("forgets")
def test_two_streams_of_ones_own_are_an_adapter():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.cells, self.head = nn.Embedding(30, 16), nn.Linear(5, 16), nn.Linear(16, 3)
            self.text, self.image = Attention(), Attention()

        def forward(self, input_ids, cells):
            text, image = self.words(input_ids), self.cells(cells)
            text, image = text + self.text(text)[0], image + self.image(image)[0]
            return Answer(self.head(text[:, 0] * image[:, 0]))

    @known
    class PairAdapter(Adapter):
        models = ("Pair",)
        roles = {"text": ("tt",), "image": ("ii",)}
        reads = ("tt", "ii")
        needs = ("input_ids", "cells")

        def logits(self, outputs):
            return outputs.scores

        def rows(self, matrices, targets, column):
            return matrices["R_tt"][:, 0], matrices["R_ii"][:, 0]

        def image_valid(self, count, grid):
            return torch.ones(2, count, dtype=torch.bool)

    torch.manual_seed(0)
    model = randomised(Pair())
    e = prunex.multimodal.explain(model, {"input_ids": torch.randint(30, (2, WORDS)), "cells": torch.randn(2, 6, 5)})
    assert (e.text.shape, e.image.shape) == ((2, WORDS), (2, 6))
    assert e.relevance["R_ii"].diagonal(dim1=1, dim2=2).min() >= 1


def strangers():
    """Models of transformers that share names or ideas, and not what is known of those that work."""
    small = {"text_config": {**TOWER, "vocab_size": 60}, "vision_config": {**TOWER, "image_size": 32, "patch_size": 8}}
    yield "SiglipModel", lambda: transformers.SiglipModel(transformers.SiglipConfig(**small))
    yield "Owlv2Model", lambda: transformers.Owlv2Model(transformers.Owlv2Config(**small, projection_dim=16))
    yield (
        "LxmertForPreTraining",
        lambda: transformers.LxmertForPreTraining(
            transformers.LxmertConfig(**BERT, visual_feat_dim=16, l_layers=1, r_layers=1, x_layers=1)
        ),
    )
    yield (
        "YolosForObjectDetection",
        lambda: transformers.YolosForObjectDetection(
            transformers.YolosConfig(**TOWER, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
        ),
    )
    yield (
        "ViTForImageClassification",
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER, image_size=32, patch_size=8)),
    )


@pytest.mark.parametrize("name", [name for name, _ in strangers()])
def test_others_are_refused_by_name(name):
    model = dict(strangers())[name]()
    with pytest.raises(PrunexError, match=f"{name} is not known"):
        prunex.multimodal.explain(model, {"pixel_values": torch.randn(1, 3, 32, 32)})


def test_one_forward_and_k_backward_passes_are_k_runs():
    model, inputs = detector("Detr")
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    together = prunex.multimodal.explain(model, inputs, queries="all")
    handle.remove()
    assert len(calls) == 1
    for query in range(7):
        alone = prunex.multimodal.explain(model, inputs, queries=[query])
        torch.testing.assert_close(alone.image[:, 0], together.image[:, query], rtol=1e-5, atol=1e-7)


def test_a_planted_detector_is_explained_by_the_rectangle_that_it_reads():
    cells, inside = (7, 7), torch.zeros(7, 7, dtype=torch.bool)
    inside[2:5, 1:4] = True
    # One decoder layer whose query reads the rectangle alone, and a score that grows with each of its cells.
    attention = torch.where(inside.flatten(), 1.0, 0.0)[None, None, None] / inside.sum()
    attention = attention + 1e-3 * (1 - inside.flatten().float()) / (~inside).sum()
    gradient = inside.flatten().float()[None, None, None]
    start = [Attended("ii", torch.eye(49)[None, None], torch.zeros(1, 1, 49, 49))]
    first = [Attended("qq", torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), Attended("qi", attention, gradient)]
    groups = [[map_] for map_ in (*start, *first)]
    safe = propagate(groups, ("qi",), Rules()).matrices()["R_qi"][0, 0].view(cells)
    assert safe[~inside].abs().max() == 0
    literal = propagate(groups, ("qi",), Rules(literal=True))
    assert literal.dropped[0].all()  # with one layer nothing has mixed, and sums of 0 are divided by
    assert literal.matrices()["R_qi"].abs().max() == 0
    masks = prunex.multimodal.cell_masks(safe[None]).masks
    assert torch.equal(masks[0], inside)
    large = prunex.multimodal.image_masks(masks, (224, 224), mask_rule="half")[0]
    planted = inside.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert (large & planted).sum() / (large | planted).sum() > 0.95  # corners are rounded
