"""What is printed at a prompt: one line each, and nothing that cannot be compared or be a key."""

import base64
import dataclasses
import importlib
import io
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import prunex
import prunex.callbacks
from prunex.brief import Brief, brief
from prunex.units.xpruner import UnitRelevance
from prunex.vit.trace import Stage
from tests.vits import tiny

LINE = 260


def dataclasses_of(package):
    """Every dataclass in a package's files."""
    folder = Path(package.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        name = ".".join([package.__name__, *path.relative_to(folder).with_suffix("").parts])
        module = importlib.import_module(name.removesuffix(".__init__"))
        yield from (c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__)


def holds_tensors(kind):
    return any("Tensor" in str(f.type) and "Callable" not in str(f.type) for f in dataclasses.fields(kind))


def test_whatever_holds_tensors_is_one_line_and_compares_by_identity():
    kinds = [*dataclasses_of(prunex), *dataclasses_of(prunex.callbacks)]
    tensors = [kind for kind in kinds if holds_tensors(kind)]
    assert len(tensors) > 30
    for kind in tensors:
        assert issubclass(kind, Brief), kind
        assert kind.__repr__ is Brief.__repr__, kind
        assert kind.__eq__ is object.__eq__, kind
        assert kind.__hash__ is object.__hash__, kind


@pytest.fixture(scope="module")
def pruned():
    model = tiny().eval()
    pruning = prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2))
    model(torch.randn(2, 3, 32, 32))
    return model, pruning


def test_an_explanation(pruned):
    model, _ = pruned
    first, second = (prunex.explain("rollout", model, torch.randn(2, 3, 32, 32), target=1) for _ in range(2))
    assert repr(first) == (
        "Explanation(method='rollout', maps=float32 [2, 4, 4], target=[1, 1], signed=False, image_size=[32, 32])"
    )
    assert first != second
    assert len({first, second, first}) == 2


def test_a_trace_its_stages_and_the_handle(pruned):
    _, pruning = pruned
    trace = pruning.trace
    assert (
        repr(trace)
        == "TokenTrace(grid=[4, 4], prefix=1, batch=2, device=device(type='cpu'), stages=2 of Stage, bare=False)"
    )
    assert trace == trace
    assert trace.stages.index(trace.stages[1]) == 1  # what asks for equality on the way
    for held in (trace.stages[0], pruning):
        assert len(repr(held)) < LINE
        assert "\n" not in repr(held)


def test_a_cost_compares_by_value():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=40, num_classes=0)
    cost = prunex.cost(model)
    assert cost == prunex.cost(model)
    assert len({cost, prunex.cost(model)}) == 1
    assert repr(cost) == f"Cost(macs={cost.macs}, params={cost.params}, tokens=40 of int)"


def test_widths_of_many_units():
    spec = prunex.WidthSpec(heads={0: (0, 2)}, channels={b: tuple(range(500)) for b in range(12)})
    assert repr(spec) == "WidthSpec(heads={0: [0, 2]}, channels=12 entries, query_dims={}, value_dims={})"
    assert {spec: 1}[prunex.WidthSpec.read(spec.plain())] == 1


def test_a_detached_handle_can_be_printed():
    pruning = prunex.attach(tiny(), "topk")
    pruning.detach()
    assert repr(pruning) == "Pruning(detached)"


def test_values_in_a_few_words():
    assert brief(torch.zeros(0, dtype=torch.long)) == "[]"
    assert brief(torch.zeros(3, device="meta", dtype=torch.long)) == "int64 [3]"
    assert brief(torch.nn.Linear(2, 2)) == "Linear"
    assert brief({"a": torch.zeros(2)}) == "{'a': float32 [2]}"
    assert brief("x" * 1000) == "str"
    with pytest.raises(prunex.PrunexError, match=r"weight=int64 \[1, 3\] is not allowed"):
        Stage(0, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), 3)


class Page(HTMLParser):
    """The texts and pictures of a piece of HTML; tags that are not closed in their order are an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.pictures = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "img"}, tag
        if tag != "img":
            self.open.append(tag)
            return
        source = dict(attrs)["src"]
        assert source.startswith("data:image/")
        self.pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def shown(thing):
    return Page(thing._repr_html_())


def test_a_notebook_shows_what_was_kept(pruned):
    _, pruning = pruned
    for page in (shown(pruning), shown(pruning.trace)):
        assert "8 of 16" in page.texts
        (picture,) = page.pictures
        assert picture.ndim == 3
    assert "evit" in shown(pruning).texts
    # Plain cells in two columns; with images a third one.
    plain, drawn = (np.asarray(pruning.trace.show(images)) for images in (None, torch.rand(2, 3, 32, 32)))
    assert plain.shape[0] == drawn.shape[0]
    assert plain.shape[1] < drawn.shape[1]
    with pytest.raises(prunex.PrunexError, match="give those that were explained, 2 of them"):
        pruning.trace.show(torch.rand(3, 3, 32, 32))


@pytest.mark.parametrize("method", ["tome", "hvt"])
def test_a_notebook_shows_merged_and_pooled_tokens(method):
    model = tiny().eval()
    pruning = prunex.attach(model, method)
    assert "dense" not in " ".join(shown(pruning).texts[:1])  # before the first forward: facts alone
    assert not shown(pruning).pictures
    model(torch.randn(2, 3, 32, 32))
    page = shown(pruning)
    assert "tokens left" in page.texts
    assert len(page.pictures) == 1
    pruning.detach()
    assert "the model is dense" in shown(pruning).texts


def test_a_trace_without_stages_says_so():
    trace = prunex.explain("rollout", tiny().eval(), torch.randn(1, 3, 32, 32)).trace
    assert "none: every patch is there" in shown(trace).texts
    assert trace.show(torch.rand(1, 3, 32, 32)).size > (0, 0)


def test_a_notebook_shows_an_explanation(pruned):
    model, _ = pruned
    images = torch.rand(5, 3, 32, 32)
    e = prunex.explain("generic_attention", model, images, target=1)
    page = shown(e)
    assert "for class 1" in page.texts
    assert len(page.pictures) == 1
    with pytest.raises(prunex.PrunexError, match="most=0"):
        e.show(most=0)
    one, two = (e.show(images, class_names=["a", "$b$"], most=most).height for most in (1, 2))
    assert one < two
    axes = e.plot(4)
    assert axes.images[0].get_array().tolist() == e.maps[4].tolist()
    assert axes is e.plot(0, axes)
    with pytest.raises(prunex.PrunexError, match=r"index=5 .* 0..4"):
        e.plot(5)


def test_a_grid_that_reaches_beyond_the_image_is_drawn_whole():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        embed_dim=24,
        num_heads=2,
        patch_size=8,
        img_size=32,
        dynamic_img_size=True,
        dynamic_img_pad=True,
    ).eval()
    heights = []
    for size in ((32, 32), (35, 32)):
        images = torch.rand(1, 3, *size)
        heights.append(prunex.explain("rollout", model, images).show(images).height)
    assert heights[1] - heights[0] == 224 // 4  # a fifth row of patches, though of three pixels


def test_a_notebook_shows_a_cost():
    cost = prunex.cost(timm.create_model("vit_tiny_patch16_224", depth=2))
    assert {"197", "43.8%", "100.0%"} <= set(shown(cost).texts)
    assert len(cost.table().splitlines()) == 5


def test_a_notebook_shows_which_heads_serve_which_class():
    kept = {f"{b}.{kind}": torch.arange(4) != 2 for b in range(2) for kind in ("heads", "channels")}
    tables = {b: torch.rand(3, 4) for b in range(2)}
    relevance = UnitRelevance(tables, tables, kept, torch.tensor([5, 6, 7]))
    page = shown(relevance)
    assert page.texts.count("6 of 8") == 2
    assert "5 to 7" in page.texts
    assert relevance.show(["<b>", "&", "x" * 100]).mode == "RGB"


def test_what_strangers_named_is_shown_as_text(pruned):
    model, _ = pruned
    e = prunex.explain("rollout", model, torch.rand(1, 3, 32, 32))
    e.method, e.options = "<script>", {"<img src=x>": "</div><b>"}
    assert {"<script>", "</div><b>"} <= set(shown(e).texts)


@pytest.mark.slow  # a Python of its own
def test_nothing_is_drawn_with_before_it_is_shown():
    script = (
        "import sys, timm, torch, prunex; m = timm.create_model('vit_tiny_patch16_224', depth=2, img_size=32)\n"
        "repr(prunex.explain('rollout', m, torch.rand(1, 3, 32, 32))), prunex.cost(m).table\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
