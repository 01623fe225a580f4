"""What one forward hands on to its own pooling and head: with its tokens, never through an attribute of the model.

Models are shared: threads run one model at once, and a training step may run it several times before it pools.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prunex.brief import Brief
from prunex.vit.anatomy import Anatomy
from prunex.vit.trace import TokenTrace

_UNREAD = 2  # forwards in a row: a step of several views may compute all its features before it pools any
_PAST_THE_HEAD = (
    "forward_features keeps dropped patches in their slots (while a method trains masked, or counts are adaptive), and "
    "something else than the model's own head reads them: pool patches with prunex.attached(model).pool(tokens), which "
    "leaves them out; a reader of the class token alone is right"
)


@dataclass(eq=False, repr=False)
class Handed(Brief):
    """What pooling must know of the tokens that a forward gave."""

    anatomy: Anatomy  # of the pruned forward
    policy: Tensor | None = None  # [B, N] or None: 0 for slots of dropped tokens
    sizes: Tensor | None = None  # [B, N] or None: how many patches each token stands for
    trace: TokenTrace | None = None  # what the forward did to the patches; None: nothing
    read: bool = False  # whether somebody who knows of these has read the tokens

    def fits(self, tokens: Tensor) -> bool:
        """Whether policy, sizes, and the grid where nothing was taken from it are of so many tokens."""
        trace = self.trace
        if trace is not None and not trace.stages and not trace.bare:
            gh, gw = trace.grid
            if tokens.shape[1] != trace.prefix + gh * gw:
                return False
        return all(t is None or t.shape == tokens.shape[:2] for t in (self.policy, self.sizes))


class Handover:
    """The tokens that one model's forwards gave and somebody still holds, and what is known of each."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()
        self._here = threading.local()
        self._traced: Handed | None = None  # of a compiled forward: tracing follows neither of them, in one thread
        self._warned = False

    def __reduce__(self) -> Any:
        return Handover, ()  # a copied model starts without forwards

    def give(self, tokens: Tensor, handed: Handed) -> None:
        """Remember what a forward hands on."""
        if torch.compiler.is_compiling():
            self._traced = handed
            return
        self.forget()
        if getattr(self._here, "unread", 0) >= _UNREAD and not self._warned:
            self._warned = True
            warnings.warn(_PAST_THE_HEAD, stacklevel=4)
        self._known[tokens] = self._here.last = handed

    def take(self, tokens: Tensor) -> Handed | None:
        """What is known of tokens that are about to be read; None for those that no forward gave."""
        if torch.compiler.is_compiling():
            return self._traced
        # The tensor itself knows best; changed on its way (cast, dropped out), the thread's last forward is meant.
        candidates = (self._known.get(tokens), getattr(self._here, "last", None), self._traced)
        handed = next((h for h in candidates if h is not None and h.fits(tokens)), None)
        if handed is not None:
            handed.read = True
        return handed

    def forget(self) -> None:
        """Let go of what this thread's last forward left, counting those in a row that nobody who knew has read."""
        last: Handed | None = getattr(self._here, "last", None)
        if last is not None:
            # Only slots of dropped tokens can be read wrongly.
            passed = last.policy is not None and not last.read
            self._here.unread = getattr(self._here, "unread", 0) + 1 if passed else 0
        self._here.last = self._traced = None
