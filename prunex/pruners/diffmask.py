"""Vision DiffMask: the patches that keep the model's output, by gates trained beside it; as a pruner, and the gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.learned.diffmask import (
    KIND,
    MaskGates,
    blocks_before,
    build_gates,
    check_layer,
    gate_tensors,
    hidden_states,
    log_keep,
)
from prunex.learned.folder import held, how, load_into, read_folder
from prunex.pruners.adaptive import Adaptive, CountOptions, above
from prunex.pruners.base import ceil_share, top
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.aside import as_found
from prunex.vit.decisions import Drop, Keep
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn


@register(
    "pruner",
    "diffmask",
    "Nalmpantis et al., CVPRW 2023, arXiv 2304.06391",
    "a trained explainer; runs the blocks up to a layer on all patches first",
)
class DiffMask(Adaptive):
    """The patches that Vision DiffMask keeps (arXiv 2304.06391), and nothing of the others from the first block on.

    The paper explains; that its masks prune is our use of them. A first pass over all patches, without any decision,
    gives the hidden states h_0 .. h_layer; gates i = 0..layer vote on every patch, and the pass that counts starts anew
    with the patches whose probability of getting every vote, exp(c) = prod_i P(v_i != 0), is above ``threshold``. Where
    none is, a class token goes on alone, and a model without one keeps the likeliest patch.

    The first pass costs ``layer`` - 1 blocks, which ``prunex.cost`` counts: with a late layer nothing is saved, only
    shown. The gates stay as they are: train them with ``prunex fit --config configs/digits/diffmask.yaml``.

    The gates learn with the dense model's hidden states and with masked patches replaced by a placeholder: dropping
    them is another removal, and fine-tuning the model moves it away from what they know. Prefix tokens are never gated
    (the authors gate the class token and throw the result away).

    Args:
        explainer: The folder that the recipe wrote (``explainer/`` of its run), or a module that holds such an
            explainer; its gates are copied. None: fresh ones, which keep everything, for weights that are loaded later.
        layer: The last hidden state that is looked at: 0 (patch embeddings, no first pass) to L + 1, or negative from
            the end.
        keep_ratio: Share kept where the count is fixed, in (0, 1]; at 1.0 nothing is dropped either way.
        mul: Half the range of the gates' logits; an explainer brings its own.
        add: Where they start; likewise.
        no_placeholder: Whether zeros stand for the learned vector; likewise.
        **shared: See :class:`~prunex.pruners.adaptive.CountOptions`: ``threshold`` is of exp(c), and ``count="fixed"``
            keeps the share ``keep_ratio`` with the largest.

    Raises:
        PrunexError: For an option out of range, a folder that holds no such explainer, or gates of a model of another
            width or depth.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    >>> with prunex.attach(model, "diffmask", count="fixed", keep_ratio=0.5, layer=1) as pruning, torch.no_grad():
    ...     logits = model(torch.randn(1, 3, 224, 224))  # the gates of this one have learnt nothing
    ...     int(pruning.trace.kept().sum())
    98
    """

    name = KIND
    shards = False
    read_once = frozenset({"explainer"})  # options that only attaching reads; they are no part of ``options``
    handed_on = {"count": "adaptive", "threshold": 0.5, "expected": None}

    def __init__(
        self,
        anatomy: Anatomy,
        explainer: nn.Module | str | Path | None = None,
        layer: int = -1,
        keep_ratio: float | Sequence[float] = 0.7,
        mul: float = 15.0,
        add: float = 8.0,
        no_placeholder: bool = False,
        **shared: Unpack[CountOptions],
    ) -> None:
        super().__init__(anatomy, keep_ratio, (0,), **shared)
        self.layer = check_layer(layer, anatomy.depth)
        if explainer is None:
            self.gates = MaskGates(anatomy.width, anatomy.depth, mul, add, no_placeholder)
        else:
            self.gates = _trained_gates(explainer, anatomy)
        # They have learnt what they know: nothing of them waits for a gradient.
        self.gates.requires_grad_(False)
        del self.options["stages"]  # there is one place
        self.options |= {
            "layer": layer,
            "mul": self.gates.mul,
            "add": self.gates.add,
            "no_placeholder": self.gates.no_placeholder,
        }

    @property
    def keeps_all(self) -> bool:
        """Whether the options keep every patch of every image, so that nobody need be asked."""
        return self.rates[0] >= 1 or (self.adaptive and self.threshold <= 0)

    def plan(self) -> list[Turn]:
        """Before the first block, after a pass through those that the gates look into."""
        return [] if self.keeps_all else [Turn(0, ahead=blocks_before(self.layer))]

    def decide(self, turn: Turn, state: TokenState) -> Keep | Drop | None:
        """Keep what the gates keep."""
        score = self.score(state)
        # There is no logarithm of a threshold of 0, for which nobody is asked (see ``keeps_all``).
        if self.adaptive:
            return Drop(above(score, math.log(self.threshold), state.present, self.least), score)
        k = ceil_share(self.rates[0], state.trace.grid[0] * state.trace.grid[1])
        return None if k >= state.left else Keep(top(score, k, state.present), score)

    @torch.no_grad()
    def score(self, state: TokenState) -> Tensor:
        """c_layer, [B, n]: the log-probability that a patch gets every vote."""
        model = state.model
        with as_found(model, train=False) if state.training else nullcontext():
            states, _ = hidden_states(model, state, self.layer, _origins(state))
        return log_keep(self.gates(states)).sum(1)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after the decision; expected ones where images differ."""
        if self.keeps_all:
            return [patches]
        return self.likely(patches) or [ceil_share(self.rates[0], patches)]

    def macs(self, entering: int, inner: int = 0) -> int:
        """The gates 0..layer over the entering patches: n (2 D (D / 4) + D / 4) each."""
        gate: Any = self.gates.gates[0]
        one = gate.hidden.weight.numel() + gate.vote.weight.numel()
        return entering * (self.layer + 1) * one


def _origins(state: TokenState) -> Tensor | None:
    """Which patches of the grid the present slots hold, int64 [B, n]; None where nothing left them yet."""
    patches, n = state.trace.grid[0] * state.trace.grid[1], state.tokens.shape[1] - state.anatomy.prefix
    if n == patches:
        return None
    where = state.trace.tokens()
    order = torch.arange(patches, device=where.device).expand_as(where)
    # From "the slot of each patch" to "the patch of each slot".
    slots = where.new_zeros(where.shape[0], n + 1)  # the last one takes those that are gone
    return slots.scatter(1, where.masked_fill(where < 0, n), order)[:, :n]


def _trained_gates(explainer: Any, anatomy: Anatomy) -> MaskGates:
    """A copy of a trained explainer's gates; gates of another width or depth are refused."""
    trained = held(explainer, MaskGates, KIND)
    if trained is None:
        spec, tensors, folder = read_folder(explainer, KIND, "gates")
        weights = gate_tensors(tensors)
        gates = load_into(build_gates(spec["gates"], folder, weights), weights, folder)
    else:
        gates = copy.deepcopy(trained)
    size, wanted = (gates.width, gates.depth), (anatomy.width, anatomy.depth)
    if size != wanted:
        raise PrunexError(
            "this explainer's gates are for a model of width {} and depth {}, this one has {} and {}: ".format(
                *size, *wanted
            )
            + how(KIND).replace("one", "one for it")
        )
    return gates
