"""What is explained: any number an image that can be made of a model's output, a class's score among them.

Every target is a function from the model's own output, whatever that is, to one number an image; whoever writes
``lambda output: output["depth"].mean((1, 2))`` has one as well. Rows answer for themselves: a target that mixes images
is noticed and refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_index
from prunex.errors import PrunexError
from prunex.spelling import SHOWN, read_target

Function = Callable[[Any], Tensor]
Target = int | Tensor | Function | None  # a class, one of each image, any number an image, or the predicted class


def part(output: Any, path: str = "") -> Tensor:
    """The tensor [B, C] at a dotted path of a model's output; of what holds several, its logits or its only one.

    Raises:
        PrunexError: For a path that leads nowhere, and several tensors to choose from, or none.

    >>> part({"aux": torch.zeros(2, 3), "main": (torch.ones(2, 5),)}, "main.0").shape
    torch.Size([2, 5])
    """
    value = output
    for step in filter(None, path.split(".")):
        parts = fields(value)
        name = step if step in parts else f"[{step}]"
        if name not in parts:
            held = ", ".join(filter(None, parts)) or "no parts"
            raise PrunexError(f"path={path!r} ends at {step!r}: a {type(value).__name__} has {held}")
        value = parts[name]
    parts = fields(value)
    fitting = {n: v for n, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 2}
    if "logits" not in fitting and len(fitting) != 1:
        held = ", ".join(filter(None, parts)) or "nothing that is [B, C]"
        raise PrunexError(
            f"the output is a {type(value).__name__} with {held}: "
            'say which tensor is meant, as in Class(3, path="logits")'
        )
    return fitting["logits"] if "logits" in fitting else next(iter(fitting.values()))


def fields(output: Any) -> dict[str, Any]:
    """The parts of a model's output by name; a tensor is its own only one, named ""."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, tuple | list):
        return {f"[{i}]": value for i, value in enumerate(output)}
    if dataclasses.is_dataclass(output):
        return dict(vars(output))
    # A regressor's [B] is one column.
    return {"": output[:, None] if isinstance(output, Tensor) and output.ndim == 1 else output}


@dataclass(frozen=True, eq=False, repr=False)
class _Target(Brief):
    """One number an image of rows [B, C].

    Attributes:
        path: Dotted path to the tensor in the model's output; "" for the output itself, or its only one.
    """

    path: str = dataclasses.field(default="", kw_only=True)

    def __call__(self, output: Any) -> Tensor:
        return self.of(part(output, self.path))

    def of(self, rows: Tensor) -> Tensor:
        """From rows [B, C] to [B]."""
        raise NotImplementedError


def _column(rows: Tensor, index: Any, name: str) -> Tensor:
    count = rows.shape[1]
    return rows[:, check_index(name, index, count, f"this model has outputs 0..{count - 1}")]


@dataclass(frozen=True)
class Class(_Target):
    """The score of a class, as its number alone means it.

    >>> Class(1)(torch.tensor([[0.5, 2.0]]))
    tensor([2.])
    """

    index: int

    def of(self, rows: Tensor) -> Tensor:
        """The column."""
        return _column(rows, self.index, "index")


@dataclass(frozen=True)
class Contrast(_Target):
    """Why one class and not another: the difference of their scores.

    >>> Contrast(1, 0)(torch.tensor([[0.5, 2.0]]))
    tensor([1.5000])
    """

    a: int
    b: int

    def of(self, rows: Tensor) -> Tensor:
        """Column a less column b."""
        return _column(rows, self.a, "a") - _column(rows, self.b, "b")


@dataclass(frozen=True)
class Regression(_Target):
    """A number that a model predicts, by its column.

    >>> Regression()(torch.tensor([3.5, 7.0]))
    tensor([3.5000, 7.0000])
    """

    output: int = 0

    def of(self, rows: Tensor) -> Tensor:
        """The column."""
        return _column(rows, self.output, "output")


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(_Target):
    """Cosine of an embedding model's output [B, D] and a reference: of an image, or of a text from the same space.

    >>> Similarity(torch.tensor([0.0, 2.0]))(torch.tensor([[3.0, 4.0]]))
    tensor([0.8000])
    """

    embedding: Tensor  # [D]

    def __post_init__(self) -> None:
        e = self.embedding
        vector = isinstance(e, Tensor) and e.is_floating_point() and e.ndim == 1
        if not vector or not e.isfinite().all() or not e.any():
            came = f"{e.dtype} {list(e.shape)}" if isinstance(e, Tensor) else type(e).__name__
            raise PrunexError(f"embedding is {came}: give one finite vector [D] that is not 0")

    def of(self, rows: Tensor) -> Tensor:
        """The cosine with each row."""
        if rows.shape[1] != len(self.embedding):
            raise PrunexError(f"embedding has {len(self.embedding)} numbers and the model's output {rows.shape[1]}")
        return nn.functional.cosine_similarity(rows, self.embedding.to(rows)[None], dim=1)


@dataclass(frozen=True)
class Margin(_Target):
    """How far a class is ahead of all others: its score less the best of theirs; None: of the class that is ahead.

    >>> Margin()(torch.tensor([[0.5, 2.0, 1.0]])), Margin(0)(torch.tensor([[0.5, 2.0, 1.0]]))
    (tensor([1.]), tensor([-1.5000]))
    """

    index: int | None = None

    def of(self, rows: Tensor) -> Tensor:
        """The lead."""
        if rows.shape[1] < 2:
            raise PrunexError("the model has one output, which is ahead of none: use Regression")
        if self.index is None:
            best = rows.topk(2, 1).values
            return best[:, 0] - best[:, 1]
        ours = _column(rows, self.index, "index")
        itself = torch.arange(rows.shape[1], device=rows.device) == self.index % rows.shape[1]
        return ours - rows.masked_fill(itself, -torch.inf).amax(1)


@dataclass(frozen=True)
class Entropy(_Target):
    """How unsure a classifier is: the entropy of its softmax, in nats.

    >>> Entropy()(torch.zeros(1, 4)).exp()
    tensor([4.])
    """

    def of(self, rows: Tensor) -> Tensor:
        """Sum of - p log p."""
        if rows.shape[1] < 2:
            raise PrunexError("the model has one output, whose softmax is always 1: use Regression")
        logp = rows.log_softmax(1)
        return -(logp.exp() * logp).sum(1)


@dataclass(frozen=True)
class MultiLabel:
    """Several labels of each image, one explanation each, from one forward where the method allows it.

    ``prunex.explain`` gives a list of explanations in the order of ``which``; each is that of its number alone.
    """

    which: Sequence[int]

    def __post_init__(self) -> None:
        # By type, since True would be label 1.
        whole = isinstance(self.which, Sequence) and all(type(label) is int for label in self.which)
        if not whole or not self.which or len({*self.which}) < len(self.which):
            raise PrunexError(f"which={self.which!r} is not allowed: give labels as whole numbers, each once")


def parse(text: str | int) -> int | Function | MultiLabel:
    """A target as the command line and configs spell it: a class's number, or a name with numbers after a colon.

    Names: ``contrast:3,5``, ``margin``, ``margin:2``, ``entropy``, ``regression``, ``regression:0``, ``labels:1,4``.

    >>> parse("contrast:3,5")(torch.tensor([[0.0, 0.0, 0.0, 4.0, 0.0, 1.0]])), parse("7")
    (tensor([3.]), 7)
    """
    name, numbers = read_target(text)
    if name == "labels":
        return MultiLabel(numbers)
    if name == "class":
        return numbers[0]
    made: dict[str, Any] = {"contrast": Contrast, "margin": Margin, "entropy": Entropy, "regression": Regression}
    return made[name](*numbers)


def spelt(target: Any) -> str:
    """A target in :func:`parse`'s spelling where it has one, else as it shows itself.

    >>> spelt(parse("margin:2")), spelt(parse("labels:1,4")), spelt(5), spelt(Contrast(1, 0, path="main"))
    ('margin:2', 'labels:1,4', '5', "Contrast(path='main', a=1, b=0)")
    """
    names: dict[type, str] = {Contrast: "contrast", Margin: "margin", Entropy: "entropy", Regression: "regression"}
    if isinstance(target, MultiLabel):
        return f"labels:{','.join(map(str, target.which))}"
    name = names.get(type(target))
    if name is None or target.path:
        return getattr(target, "__name__", None) or repr(target)
    numbers = [str(v) for k, v in vars(target).items() if k != "path" and v is not None]
    return f"{name}:{','.join(numbers)}" if numbers else name


def as_target(value: Any) -> int | Function | MultiLabel | None:
    """What a callback was given for a target: None, a class, a spelling, or an object of this file or a function."""
    # A class such as Margin, given where Margin() was meant, is callable too.
    if value is None or isinstance(value, MultiLabel) or (callable(value) and not isinstance(value, type)):
        return value
    if type(value) is int or isinstance(value, str):
        return parse(value)
    raise PrunexError(f"target={value!r} is not allowed: give None, a function of the output, or {SHOWN}")


class Aimed(nn.Module):
    """A model whose only output, [B, 1], is a target's number."""

    def __init__(self, model: nn.Module, target: Function | None) -> None:
        super().__init__()
        self.model, self.target = model, target

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The target of what the model answers."""
        return column(self.target, self.model(*inputs, **named))


def column(target: Any, output: Any) -> Tensor:
    """A target's numbers of an output, [B, 1]."""
    number: Any = target(output)
    if not isinstance(number, Tensor) or not number.is_floating_point() or number.ndim != 1:
        came = f"{number.dtype} {list(number.shape)}" if isinstance(number, Tensor) else type(number).__name__
        raise PrunexError(f"the target gave {came}: it must give one floating-point number an image, [B]")
    return number[:, None]
