"""Positions that attention itself knows, rotary tables and relative biases, for the tokens that are there.

Absolute positions are part of a token and leave with it. A rotary table (EVA) or a relative bias (BEiT,
relative-position ViTs) is looked up inside attention by a token's place in the image, so the places follow every stage
of the trace. A token made of several patches is given the mean of theirs, weighted by its members' shares: its score
with another token is then the mean of what the members, had they its query and key, would have scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.vit.stage import Stage, parts_of
from prunex.vit.sums import grouped


@dataclass(eq=False, repr=False)
class Places(Brief):
    """Which patches of which grid a shortened sequence holds."""

    index: Tensor  # int64 [B, n], the patch each token after the prefix is
    grid: tuple[int, int]  # patch grid (gh, gw) that they are counted in


@dataclass(eq=False, repr=False)
class Positions(Brief):
    """What the blocks look up, and where the present tokens come from."""

    prefix: int  # number of prefix tokens, which have no place in the image
    # rotary table (sine and cosine side by side) [P, 2d], the same for all blocks, or [depth, H, P, 2d]; None
    rope: Tensor | None = None
    shared: Tensor | None = None  # relative bias [H, prefix + P, prefix + P] that every block adds, or None
    relative: bool = False  # whether any block has a relative bias, its own or the shared one
    # int64 [B, n], the patch that each patch token is; -1 for a token of several. None: all, in order.
    index: Tensor | None = None
    # For tokens of several patches: patch, token and share, [B, E] each. None: there are none.
    links: tuple[Tensor, Tensor, Tensor] | None = None
    _looked_up: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def whole(self) -> bool:
        """Whether timm's own block can be called: it adds the bias of all patches, and of nothing else."""
        return not self.relative or self.index is None

    def after(self, stage: Stage) -> Positions:
        """The same tables for the tokens that a stage leaves; emptied slots keep their place for who hides them."""
        b, n = stage.group.shape[:2]
        device = stage.group.device
        index = torch.arange(n, device=device).expand(b, -1) if self.index is None else self.index
        group, weight = parts_of(stage)
        parts = group.shape[2]
        flat = group.flatten(1)
        present, out = flat >= 0, stage.n_out
        aim = torch.where(present, flat, out)  # those that left go to a slot that is cut off
        kept = index if n == out else nn.functional.pad(index[:, :out], (0, max(0, out - n)), value=0)
        kept = nn.functional.pad(kept, (0, 1))
        came = index.unsqueeze(2).expand(-1, -1, parts).flatten(1)
        places = kept.scatter(1, aim, came)[:, :out]
        links = self.links
        if links is not None or joins(stage):
            links = _follow(links, index, group, weight)
            count = grouped(torch.ones(flat.shape, device=device), flat, out)
            places = torch.where(count > 1, -1, places)
        return replace(self, index=places, links=links, _looked_up={})

    def rope_of(self, number: int) -> Tensor | None:
        """A block's rotary table: [P, 2d] or [H, P, 2d] for all patches, [B, 1, n, 2d] or [B, H, n, 2d] for tokens."""
        if self.rope is None:
            return None
        table = self.rope if self.rope.ndim == 2 else self.rope[number]
        if self.index is None:
            return table
        if table.ndim == 3:
            return self._of_tokens(table)
        if "rope" not in self._looked_up:
            self._looked_up["rope"] = self._of_tokens(table[None])
        return self._looked_up["rope"]

    def relative_of(self, relative: Tensor | None) -> Tensor | None:
        """What a block adds to its scores: [1 or B, H, N, N], from its own bias [H, prefix + P, prefix + P]."""
        if not self.relative:
            return None
        parts = [t for t in (relative, self.shared) if t is not None]
        if not parts:
            return None
        whole = sum(parts[1:], parts[0])
        if self.index is None:
            return whole[None]
        side = whole.shape[1]
        pairs = self._pairs(side)
        # One gather in the flattened table is cheaper than rows, then columns.
        bias = whole.flatten(1)[:, pairs].transpose(0, 1)
        if self.links is None:
            return bias
        # Rows first, then columns: a token of several patches has the mean over its members on either side.
        joined = self._joined()
        patch, token, share = self._with_prefix(*self.links)
        n, share = self._numbers().shape[1], share.to(whole.dtype)
        # Links first, [B, E, H, ...], which are what is summed.
        rows = grouped(whole[:, patch].permute(1, 2, 0, 3) * share[:, :, None, None], token, n)
        columns = rows.gather(3, patch[:, None, None, :].expand(-1, n, whole.shape[0], -1)).permute(0, 3, 2, 1)
        mean = grouped(columns * share[:, :, None, None], token, n).permute(0, 2, 3, 1)
        either = (joined.unsqueeze(2) | joined.unsqueeze(1)).unsqueeze(1)
        return torch.where(either, mean, bias)

    def _of_tokens(self, table: Tensor) -> Tensor:
        """Rows of a table [K, P, c] for the tokens there: [B, K, n, c]."""
        index = torch.as_tensor(self.index)
        rows_alone = table[:, index.clamp(min=0)].transpose(0, 1)
        if self.links is None:
            return rows_alone
        patch, token, share = self.links
        mine = share * (index < 0).gather(1, token)  # links of tokens that are one patch would count it twice
        rows = table[:, patch].permute(1, 2, 0, 3) * mine[:, :, None, None].to(table.dtype)
        several = grouped(rows, token, index.shape[1]).transpose(1, 2)
        return rows_alone.masked_fill((index < 0)[:, None, :, None], 0) + several

    def _numbers(self) -> Tensor:
        """Each token's row in a bias over prefix and patches, [B, prefix + n]; 0 for tokens of several patches."""
        index = torch.as_tensor(self.index)
        front = torch.arange(self.prefix, device=index.device).expand(index.shape[0], -1)
        return torch.cat([front, index.clamp(min=0) + self.prefix], 1)

    def _pairs(self, side: int) -> Tensor:
        """Where each pair of tokens is in a flattened bias, [B, N, N]; found once a stage."""
        if "pairs" not in self._looked_up:
            numbers = self._numbers()
            self._looked_up["pairs"] = numbers.unsqueeze(2) * side + numbers.unsqueeze(1)
        return self._looked_up["pairs"]

    def _joined(self) -> Tensor:
        """Which tokens are several patches, bool [B, prefix + n]."""
        return nn.functional.pad(torch.as_tensor(self.index) < 0, (self.prefix, 0))

    def _with_prefix(self, patch: Tensor, token: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The links with those of the prefix tokens, each to itself, counted as a bias counts them."""
        front = torch.arange(self.prefix, device=patch.device).expand(patch.shape[0], -1)
        ones = share.new_ones(patch.shape[0], self.prefix)
        return (
            torch.cat([front, patch + self.prefix], 1),
            torch.cat([front, token + self.prefix], 1),
            torch.cat([ones, share], 1),
        )


def joins(stage: Stage) -> bool:
    """Whether some token after a stage may be made of several."""
    return stage.fused or stage.merged or stage.pooled


def _follow(
    links: tuple[Tensor, Tensor, Tensor] | None, index: Tensor, group: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Links from patches to the tokens after a stage; those of tokens that left have share 0."""
    b, n, parts = group.shape
    if links is None:
        patch, token = index, torch.arange(n, device=index.device).expand(b, -1)
        share = weight.new_ones(b, n)
    else:
        patch, token, share = links
    into = group.gather(1, token.unsqueeze(2).expand(-1, -1, parts)).flatten(1)
    part = weight.gather(1, token.unsqueeze(2).expand(-1, -1, parts)).flatten(1)
    patch, share = (t.unsqueeze(2).expand(-1, -1, parts).flatten(1) for t in (patch, share))
    return patch, into.clamp(min=0), (share * part).masked_fill(into < 0, 0)


def positions_of(
    model: nn.Module, prefix: int, grid: tuple[int, int], places: Places | None = None, rope: Tensor | None = None
) -> Positions | None:
    """The tables of a model for one patch grid; None for models whose attention knows no positions.

    ``places``: which patches there are, where not all (their grid then counts); ``rope``: as for ``begin``.
    """
    inner: Any = model
    index = None if places is None else places.index
    grid = grid if places is None else places.grid
    if isinstance(model, Eva):
        table = rotary_table(model, grid) if rope is None else rope
        return None if table is None else Positions(prefix, rope=table, index=index)
    # BEiT adds one bias for all blocks or one a block; both are looked up by pairs of patches.
    if isinstance(model, Beit):
        shared = None if inner.rel_pos_bias is None else inner.rel_pos_bias()
        relative = any(b.attn.relative_position_bias_table is not None for b in inner.blocks)
        if shared is not None or relative:
            return Positions(prefix, shared=shared, relative=True, index=index)
    if isinstance(model, VisionTransformerRelPos):
        shared = None if inner.shared_rel_pos is None else inner.shared_rel_pos.get_bias()[0]
        return Positions(prefix, shared=shared, relative=True, index=index)
    return None


def rotary_table(model: Eva, grid: tuple[int, int]) -> Tensor | None:
    """What timm's ``_pos_embed`` gives its blocks to rotate by, or None."""
    rope: Any = model.rope
    if rope is None:
        return None
    # A table of a fixed size was made with the model; others are made for the grid.
    if model.dynamic_img_size or not hasattr(rope, "feat_shape"):
        return rope.get_embed(shape=grid)
    return rope.get_embed()
