"""What is printed at a prompt: one line each, and nothing that cannot be compared or be a key."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import timm
import torch

import prunex
import prunex.callbacks
from prunex.brief import Brief, brief
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
    model = timm.create_model("vit_giant_patch14_dinov2", img_size=28, num_classes=0)
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
