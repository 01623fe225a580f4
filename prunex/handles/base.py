"""What the handles on pruned models share: method and options in plain values, and leaving a ``with`` block."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Self, TypeVar

from torch import nn

from prunex.errors import PrunexError
from prunex.vit.mount import mounted

# A key that checkpoints have beside the weights of a pruned model: a dense one refuses it, and so names the way in.
MARK = "open_with.prunex.callbacks.load_from_checkpoint"


def drop_mark(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded into what hangs on a model: a pruned model is what the mark asks for."""
    state.pop(prefix + MARK, None)


def accept_dense(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a dense model's state dict is loaded, strictly: what hangs on the model keeps its values."""
    # torch calls this before it looks for missing keys, so that a strict load has none.
    if not any(k.startswith(prefix) for k in state):
        state.update({prefix + k: v for k, v in module.state_dict().items()})


def warn_of_frozen(learner: nn.Module, method: str, reached: str) -> None:
    """Tell of parameters that rest while others train: what adds adapters to a model freezes all that it has."""
    named = list(learner.named_parameters())
    frozen = [name for name, p in named if not p.requires_grad]
    if frozen:
        warnings.warn(
            f"{len(frozen)} of {len(named)} parameters of {method} ({frozen[0]}, ...) are frozen while others train: "
            f"where that is not meant, call {reached}.requires_grad_(True) after what froze them (peft.get_peft_model "
            "does) and before the optimiser is made",
            stacklevel=4,
        )


class Handle:
    """Base of :class:`prunex.Pruning` and :class:`prunex.handles.units.UnitPruning`.

    Attributes:
        model: The backbone it is on.
    """

    reached = "prunex.attached(self).pruner"  # how a module finds what learns
    does = "prunes"  # what its method does with the model's forward, in messages
    kind = ""  # under which of the names in prunex.vit.mount it hangs on the model

    def __init__(self, model: Any) -> None:
        self.model = model

    def _holder(self) -> Any:
        """What hangs on the model; refused after :meth:`detach`."""
        holder = mounted(self.model, self.kind)
        if holder is None:
            raise PrunexError("this pruning was detached: attach again with prunex.attach(model, ...)")
        return holder

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self._holder().method)

    @property
    def learner(self) -> Any:
        """The module that decides, or reads, and may have parameters that learn."""
        return self._holder().pruner

    @property
    def options(self) -> dict[str, Any]:
        """The options in force, in plain values."""
        return dict(self.learner.options)

    @property
    def spec(self) -> dict[str, Any]:
        """Method and options, in plain values: ``prunex.attach(model, **spec)`` makes the same pruning."""
        return {"method": self.method, **self.options}

    @abstractmethod
    def detach(self) -> nn.Module:
        """Give the model back without what was attached."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        if mounted(self.model, self.kind) is None:
            return f"{type(self).__name__}(detached)"
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{type(self).__name__}({self.method!r}, {options})"


H = TypeVar("H", bound=Handle)


def handle_on(kind: type[H], model: Any) -> H | None:
    """The handle of one kind on a backbone, or None where nothing of that kind hangs there."""
    return kind(model) if mounted(model, kind.kind) is not None else None
