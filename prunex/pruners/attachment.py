"""What hangs on a pruned model: the pruner, the trace of the last forward, and the training forwards of this step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.handle import drop_mark
from prunex.pruners.base import Forward, TokenPruner
from prunex.vit.anatomy import Anatomy, ViT, head_classes, read
from prunex.vit.forward import run
from prunex.vit.handover import Handed, Handover
from prunex.vit.intermediates import Watch
from prunex.vit.readout import for_heads, masked_pool
from prunex.vit.trace import TokenTrace

# Forwards whose losses nobody asks for must not pile up. A compiled one is traced anew for each number that waits.
MOST, MOST_COMPILED = 16, 4


class Attached(nn.Module):
    """What hangs on a pruned model as ``model.prunex``: the pruner's parameters, and what forwards left.

    Dense parameter names stay as they are; a pruner's own are called ``prunex.<method>.*``. A dense state dict loads
    strictly into a pruned model: the pruner's parameters keep their values.

    Attributes:
        trace: What the last forward, of any thread, did to the patches.
        forwards: Training forwards with a graph whose losses were not asked for, and no backward pass went through.
        counted: Those before them, until the next training forward.
        crowded: Whether forwards were let go of because too many waited.
    """

    def __init__(self, pruner: TokenPruner, anatomy: Anatomy) -> None:
        super().__init__()
        self.add_module(pruner.name, pruner)
        self.method = pruner.name
        self.dense = anatomy
        self.anatomy = pruner.alter(anatomy)
        self.masked: bool | None = None
        self.trace: TokenTrace | None = None
        self.forwards: list[Forward] = []
        self.counted: list[Forward] = []
        self.crowded = False
        self.handover = Handover()
        self.more: list[Callable[[Forward], Mapping[str, Tensor]]] = []
        self.ran = False  # set by every forward, for whoever wants to know whether one came
        self.register_load_state_dict_pre_hook(drop_mark)
        self.register_load_state_dict_pre_hook(_accept_dense)

    @property
    def pruner(self) -> TokenPruner:
        """The pruner itself."""
        return getattr(self, self.method)

    def __getstate__(self) -> dict[str, Any]:
        # Copies start without forwards: their tensors belong to a graph and cannot be copied.
        return self.__dict__ | {"trace": None, "forwards": [], "counted": [], "more": []}

    def current(self, model: ViT) -> Anatomy:
        """The pruned forward's anatomy, read again after ``reset_classifier`` or ``set_input_size`` changed it."""
        embed, known = model.patch_embed, self.dense
        now = (head_classes(model), model.global_pool, tuple(embed.img_size), tuple(embed.patch_size))
        if now != (known.classes, known.pool, known.image, known.patch):
            self.refit(model)
        return self.anatomy

    def refit(self, model: ViT) -> None:
        """Read the anatomy again, after heads or MLP channels were taken out of the model."""
        self.dense = read(model)
        self.anatomy = self.pruner.alter(self.dense)

    def features(self, model: ViT, images: Tensor, watch: Watch | None = None) -> Tensor:
        """The pruned ``forward_features``: [B, prefix + n, D]; a watch takes full grids on the way."""
        pruner = self.pruner
        masked = self.masked if self.masked is not None else model.training and pruner.trains_masked
        anatomy = self.current(model)
        tokens, state = run(model, images, anatomy, (pruner,), masked=masked, watch=watch)
        self.ran = True
        self.handover.give(tokens, Handed(anatomy, state.policy, state.sizes, read=watch is not None))
        self.trace = state.trace.detach()
        if model.training and torch.is_grad_enabled() and not _in_backward():
            self._remember(Forward(images, tokens, state.policy, anatomy, state.masks, trace=state.trace, model=model))
        return tokens

    def _remember(self, forward: Forward) -> None:
        compiled = torch.compiler.is_compiling()
        most = MOST_COMPILED if compiled else MOST
        if len(self.forwards) >= most:
            self.crowded = True
        self.forwards, self.counted = [*self.forwards[1 - most :], forward], []
        if compiled or not forward.tokens.requires_grad:
            return
        # A hook that held either would be a cycle through the graph, which Python's collector cannot see.
        ours, theirs = weakref.ref(self), weakref.ref(forward)

        def spent(_: Tensor) -> None:
            holder, passed = ours(), theirs()
            if holder is not None and passed is not None and not torch.is_grad_enabled():  # else the graph is kept
                holder._count(passed)

        forward.tokens.register_hook(spent)

    def _count(self, passed: Forward) -> None:
        """A backward pass went through this forward: it is no part of a later step."""
        left = [f for f in self.forwards if f is not passed]
        if len(left) < len(self.forwards):
            self.forwards, self.counted = left, [*self.counted, passed]

    def take(self) -> list[Forward]:
        """The training forwards of this step: the next one begins another, and until then these are given again."""
        if self.forwards:
            self.forwards, self.counted = [], self.forwards
        return self.counted

    def forget(self) -> None:
        """Let go of all training forwards."""
        self.forwards, self.counted = [], []
        self.handover.forget()

    def pool(self, model: ViT, x: Tensor, pool_type: str | None) -> Tensor:
        """The head's pooling, over tokens that are there, by size where some were merged."""
        handed = self.handover.take(x) or Handed(self.anatomy)
        return masked_pool(model, x, pool_type, handed.policy, handed.anatomy, handed.sizes)

    def for_heads(self, model: ViT, x: Tensor) -> Tensor:
        """Final tokens as timm's ``forward_head`` wants them."""
        handed = self.handover.take(x) or Handed(self.anatomy)
        return for_heads(model, x, handed.policy, handed.anatomy)

    def saw_logits(self, tokens: Tensor, logits: Any) -> None:
        """Remember the logits of a training forward, for losses that need them; a model without a head has none."""
        if not self.training or not torch.is_grad_enabled():
            return
        forward = self._forward_of(tokens)
        if forward is None or forward.anatomy.classes == 0:
            return
        if isinstance(logits, tuple):  # a distilled DeiT in distilled training: two heads
            logits = sum(logits) / len(logits)
        forward.logits = logits

    def _forward_of(self, tokens: Tensor) -> Forward | None:
        """The training forward that gave some tokens, or the last one without logits, had they been changed since."""
        if torch.compiler.is_compiling():
            return self.forwards[-1] if self.forwards else None
        fitting = [f for f in self.forwards if f.tokens.shape == tokens.shape]
        changed = [f for f in fitting if f.logits is None]
        return next((f for f in fitting if f.tokens is tokens), changed[-1] if changed else None)


def give_labels(forwards: Sequence[Forward], labels: Any, pruner: TokenPruner) -> None:
    """Labels [B] to every forward of B images.

    Raises:
        PrunexError: For labels that fit none, or not all of them where the pruner learns from labels.
    """
    counts = [len(f.images) for f in forwards]
    whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    fitting = [f for f, count in zip(forwards, counts, strict=True) if whole and len(labels) == count]
    if not fitting or (pruner.reads_labels and len(fitting) < len(forwards)):
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        sizes = " and ".join(str(c) for c in dict.fromkeys(counts))
        raise PrunexError(f"labels are {what}: give one class index for each of the {sizes} images")
    for forward in fitting:
        forward.labels = labels


def _in_backward() -> bool:
    """Whether a checkpointed forward is only run again: its first run counts."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _accept_dense(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not any(k.startswith(prefix) for k in state):
        state.update({prefix + k: v for k, v in module.state_dict().items()})
