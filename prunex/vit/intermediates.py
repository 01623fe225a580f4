"""Full grids out of the middle of a pruned forward: timm's ``forward_intermediates``, for dense heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.mount import mounted
from prunex.vit.state import TokenState
from prunex.vit.units import prefix_of

FORMATS = ("NCHW", "NLC")


@dataclass(eq=False, repr=False)
class Watch(Brief):
    """Asks one forward for the tokens after some blocks, as full grids."""

    model: Any  # the ViT
    wanted: frozenset[int]  # indices of the blocks asked for
    norm: bool = False  # whether the final norm is applied to them
    # what patches that were removed get, as in :meth:`TokenTrace.scatter`; None: the token as it left
    fill: float | Tensor | None = None
    channels_first: bool = True  # [B, D, gh, gw] instead of [B, P, D]
    stop: int | None = None  # how many blocks to run; None: all
    grids: dict[int, Tensor] = field(default_factory=dict)  # filled by the forward, block by block
    fronts: dict[int, Tensor] = field(default_factory=dict)  # prefix tokens [B, prefix, D], likewise

    def after(self, block: int, state: TokenState) -> None:
        """Take the stream as it leaves a block."""
        if block not in self.wanted:
            return
        tokens = self.model.norm(state.tokens) if self.norm else state.tokens
        prefix, trace = state.anatomy.prefix, state.trace
        self.fronts[block], body = tokens[:, :prefix], tokens[:, prefix:]
        trained = self._all_masked(state)
        if self.fill is None:
            leaving = [self.model.norm(t) if self.norm else t for t in state.leaving or ()]
            full = _mixed(body, state.masks, leaving) if trained else trace.unfold(body, leaving)[0]
        else:
            filling = trace.filling(self.fill, body, self.channels_first)
            if trained:
                full = _mixed(body, state.masks[-1:], [filling])
            else:
                full, present = trace.unfold(body)
                full = torch.where(present.unsqueeze(-1), full, filling)
        self.grids[block] = full.mT.unflatten(2, trace.grid).contiguous() if self.channels_first else full

    @staticmethod
    def _all_masked(state: TokenState) -> bool:
        """Whether every stage so far is a policy that is trained, under which all tokens kept their slots."""
        stages = state.trace.stages
        return 0 < len(stages) == len(state.masks) and all(s.stays and not s.merged for s in stages)


def _mixed(body: Tensor, policies: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
    """Tokens [B, P, D], and in the place of those that left at a stage what they were then, last stage first.

    A policy [B, P] decides as at inference, hard, and has the gradient of one that mixes both: a predictor learns from
    what a decoder makes of the patches that it lets go, not only from what these no longer tell the others.
    """
    # Straight through: the hard choice, and the slope of the soft mixture of both.
    for policy, other in zip(reversed(policies), reversed(left), strict=True):
        slope = (policy - policy.detach()).unsqueeze(-1).to(body.dtype)
        hard = torch.where((policy > 0).unsqueeze(-1), body, other)
        body = hard + slope * (body - other).detach()
    return body


@dataclass(eq=False, repr=False)
class GridCall(Brief):
    """One call of ``forward_intermediates``; the answer to one for grids alone can stand as one row [B, F] an image."""

    wanted: list[int]  # blocks, in rising order
    norm: bool
    fill: float | Tensor | None
    channels_first: bool
    stop: int | None
    prefix: bool  # whether prefix tokens are asked for beside grids
    final: bool  # whether the final features are
    as_dict: bool
    shapes: list[list[int]] = field(default_factory=list)  # of the grids, without the batch

    @classmethod
    def of(
        cls,
        model: Any,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        fill: float | Tensor | None = None,
    ) -> GridCall:
        """The call with timm's arguments and ``fill``; blocks that do not exist and other formats are refused."""
        if output_fmt not in FORMATS:
            raise PrunexError(f"output_fmt={output_fmt!r} is not allowed: give one of {', '.join(FORMATS)}")
        wanted = chosen_blocks(indices, len(model.blocks))
        stop = max(wanted) + 1 if stop_early else None
        final = not intermediates_only
        return cls(wanted, norm, fill, output_fmt == "NCHW", stop, return_prefix_tokens, final, output_dict)

    @property
    def grids_alone(self) -> bool:
        """Whether it gives a list of grids and no more."""
        return not (self.prefix or self.final or self.as_dict)

    def watch(self, model: Any) -> Watch:
        """Who takes these grids of one forward."""
        return Watch(model, frozenset(self.wanted), self.norm, self.fill, self.channels_first, self.stop)

    def row(self, grids: Sequence[Tensor]) -> Tensor:
        """The grids as [B, F]."""
        self.shapes = [list(grid.shape[1:]) for grid in grids]
        return torch.cat([grid.flatten(1) for grid in grids], 1)

    def taken(self, watch: Any) -> Tensor:
        """The same of what a watch took."""
        return self.row([watch.grids[i] for i in self.wanted])

    def grids(self, row: Tensor) -> list[Tensor]:
        """The grids of rows [R, F]."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [part.unflatten(1, shape) for part, shape in zip(row.split(sizes, 1), self.shapes, strict=True)]


def intermediates(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What timm's ``forward_intermediates`` returns, of a pruned model, by the arguments of :meth:`GridCall.of`.

    Every grid is whole: a patch that is left has its token, members of a fused or merged token have that token, and a
    patch that was removed has ``fill`` (see :meth:`TokenTrace.scatter`; None: the last value it had, the token as it
    left), to which ``norm`` is not applied. Without any pruning the results are timm's. The final features, where they
    are returned, are those of ``forward_features``: the tokens that are left.

    Raises:
        PrunexError: For blocks that do not exist, another format, or a ``fill`` that does not fit.
    """
    call = GridCall.of(model, *args, **kwargs)
    watch = call.watch(model)
    final = mounted(model).features(model, x, watch)
    grids: list[Any] = [watch.grids[i] for i in call.wanted]
    fronts = [watch.fronts[i] for i in call.wanted] if call.prefix and prefix_of(model) else None
    if call.as_dict:
        answer: dict[str, Any] = {"image_intermediates": grids}
        if fronts is not None:
            answer["image_intermediates_prefix"] = fronts
        return {**answer, "image_features": final} if call.final else answer
    if fronts is not None:
        grids = list(zip(grids, fronts, strict=True))
    return (final, grids) if call.final else grids


def chosen_blocks(indices: Any, depth: int) -> list[int]:
    """The blocks that timm's ``indices`` mean (None: all, a number: so many last ones), in rising order."""
    wrong = PrunexError(f"indices={indices!r} is not allowed: give how many last blocks, or block indices, of {depth}")
    if indices is None:
        return list(range(depth))
    if isinstance(indices, bool):
        raise wrong
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise wrong
        return list(range(depth - indices, depth))
    try:
        listed = [int(i) for i in indices]
    except (TypeError, ValueError):
        raise wrong from None
    if not listed or any(not -depth <= i < depth for i in listed):
        raise wrong
    return sorted({i % depth for i in listed})
