"""What one forward carries from block to block: all that a pruner is shown, and that its decisions change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunex.brief import Brief
from prunex.vit.anatomy import Anatomy
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.attention import KeyWeights
from prunex.vit.packing import Packing
from prunex.vit.positions import Positions
from prunex.vit.trace import TokenTrace

if TYPE_CHECKING:
    from prunex.vit.decisions import Decided


@dataclass(eq=False, repr=False)
class TokenState(Brief):
    """The token stream of one forward, as it goes."""

    tokens: Tensor  # [B, prefix + n, D], the residual stream
    anatomy: Anatomy  # of the model
    trace: TokenTrace  # what was removed so far
    masked: bool  # whether dropped tokens keep their slots under a policy (training, or on request) instead of leaving
    training: bool  # whether the model is in training mode
    # [B, prefix + n] or None: 1 for tokens that are there, 0 for dropped ones in their slots
    policy: Tensor | None = None
    # [B, prefix + n] or None: attention paid to each token by the class token (by the pooled tokens where there is
    # none), mean over heads, each head's in shares that sum to 1 (of differential attention those above 0); present
    # between the halves of a block that a pruner asked it for
    row: Tensor | None = None
    left: int = 0  # patch tokens that are there (an upper bound where images differ)
    ragged: bool = False  # whether a ``Drop`` left images of different lengths, so that some slots hold nobody
    # the differentiable policies [B, n] set so far, one a masking decision
    masks: list[Tensor] = field(default_factory=list)
    keys: KeyWeights | None = None  # weights of tokens as attention keys, or None; they follow their tokens
    ops: Arithmetic = PLAIN  # how elementary operations are carried out
    decisions: list[Decided] = field(default_factory=list)  # what was decided so far, in order
    model: Any = None  # the ViT itself, for pruners that look ahead (:func:`prunex.vit.forward.look_ahead`)
    # the patch tokens [B, n, D] each stage was given, where somebody watches; else None
    leaving: list[Tensor] | None = None
    # float [B, prefix + n] or None: how many patches each token stands for; None: one each. Prefix tokens and slots
    # that nobody is left in have 1.
    sizes: Tensor | None = None
    proportional: bool = False  # whether attention counts a key as often as its size says
    # [B, prefix + n, d] or None: the keys of the block's attention, mean over heads, off the graph; present between the
    # halves of a block that a pruner asked them for
    key_mean: Tensor | None = None
    # [B, prefix + n] or None: lengths of the values of the block's attention, all heads side by side, off the graph;
    # there as keys are
    value_norm: Tensor | None = None
    # [B, prefix + n] or None: how far the block's MLP moved each token, the length of what it added (without stochastic
    # depth); present after a block that a pruner asked it for
    shift: Tensor | None = None
    # rotary tables and relative biases of the tokens, for models that have them; they follow every stage
    positions: Positions | None = None
    # [B, prefix + n, D] or None: between the halves of a parallel block, the stream as it entered
    beside: Tensor | None = None
    # where the tokens of images of different lengths are, while nothing is computed for empty slots
    packing: Packing | None = None
    packs: bool | None = None  # whether all blocks can work so; None: not looked at yet

    @property
    def attending(self) -> KeyWeights | None:
        """What the next attention weighs its keys by: the given weights, and sizes where attention counts them."""
        if self.sizes is None or not self.proportional:
            return self.keys
        return KeyWeights(sizes=self.sizes) if self.keys is None else replace(self.keys, sizes=self.sizes)

    @property
    def patches(self) -> Tensor:
        """The patch tokens [B, n, D] of the stream, dropped slots included."""
        return self.tokens[:, self.anatomy.prefix :]

    @property
    def present(self) -> Tensor | None:
        """The policy of the patch tokens [B, n], or None when all of them are there."""
        return None if self.policy is None else self.policy[:, self.anatomy.prefix :]

    @property
    def plain(self) -> bool:
        """Whether all tokens are there, count once, and lie where timm's own blocks expect them."""
        in_place = self.positions is None or self.positions.whole
        return in_place and self.policy is None and self.attending is None
