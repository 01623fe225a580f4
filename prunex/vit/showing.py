"""Traces and costs as a notebook shows them: which numbers and which pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunex.columns import line, macs_unit
from prunex.errors import PrunexError
from prunex.pictures.arrays import Picture, as_pictures, stretched
from prunex.pictures.cards import card, picture, table
from prunex.pictures.mosaic import kept_mosaic, share_mosaic

if TYPE_CHECKING:
    from prunex.vit.cost import Cost
    from prunex.vit.trace import TokenTrace

FEW = 4  # images of a batch that are shown without being asked for


def pictures_for(images: Any, count: int) -> Picture:
    """Images as they are drawn on, uint8 [count, H, W, 3]: uint8 of that shape, or float [count, C, H, W]."""
    drawn = stretched(images) if isinstance(images, Tensor) and images.is_floating_point() else images
    shape = tuple(getattr(drawn, "shape", ()))
    if not shape or shape[0] != count:
        came = f"of shape {list(shape)}" if shape else f"a {type(drawn).__name__}"
        raise PrunexError(f"images are {came}: give those that were explained, {count} of them")
    return as_pictures(drawn, 4)


def trace_picture(trace: TokenTrace, images: Any = None, most: int = FEW) -> Picture:
    """What :meth:`TokenTrace.show` draws, of the first ``most`` images."""
    drawn = None if images is None else pictures_for(images, trace.batch)[:most]
    stages = range(len(trace.stages))
    everything = torch.ones(1, trace.batch, *trace.grid)[:, :most]
    # Windows overlap, so that no patch is kept as itself: what is drawn is how much of it is left.
    if trace.pooled:
        shares = [trace.share(number)[:most].float().cpu() for number in stages]
        counts = [int(trace.stages[number].n_out) for number in stages]
        return share_mosaic(drawn, torch.stack(shares), counts)
    kept = torch.stack([trace.kept(number)[:most].cpu() for number in stages]) if stages else everything.bool()
    groups = torch.stack([trace.groups(number)[:most].cpu() for number in stages]) if trace.merges() else None
    return kept_mosaic(drawn, kept, groups=groups)


def trace_parts(trace: TokenTrace) -> list[str]:
    """A trace's stages as a table and a picture."""
    if not trace.stages:
        return []
    patches = trace.grid[0] * trace.grid[1]
    rows = []
    for number, (stage, ratio) in enumerate(zip(trace.stages, trace.keep_ratios(), strict=True), start=1):
        mean = float(ratio.mean())
        rows.append([f"stage {number}", str(stage.block), f"{mean * patches:.4g} of {patches}", f"{mean:.0%}"])
    left = "tokens left" if trace.pooled or trace.merges() else "patches kept"
    shown = f"what each stage leaves of {first_of(trace.batch)}"
    return [table(["", "block", left, "share"], rows), picture(trace_picture(trace), shown)]


def trace_card(trace: TokenTrace) -> str:
    """A trace as HTML."""
    facts: dict[str, Any] = {
        "images": trace.batch,
        "patch grid": f"{trace.grid[0]} × {trace.grid[1]}",
        "prefix tokens": trace.prefix,
    }
    if not trace.stages:
        facts["stages"] = "none: every patch is there"
    elif trace.batch > FEW:
        facts["drawn"] = first_of(trace.batch)
    return card("TokenTrace", facts, *trace_parts(trace))


def first_of(count: int) -> str:
    """Which images are shown of so many."""
    if count > FEW:
        return f"the first {FEW} of {count} images"
    return f"{count} images" if count > 1 else f"{count} image"


def cost_rows(cost: Cost) -> tuple[str, list[list[str]]]:
    """A row a block, one for what is outside of them, and one for all; and the unit of multiply-adds."""
    factor, unit = macs_unit([cost.gmacs])
    digits = 1 if unit == "MMACs" else 2

    def macs(count: int) -> list[str]:
        return [f"{factor * count / 1e9:,.{digits}f}", f"{count / cost.macs:.1%}"]

    rows = [
        [str(number), str(block.attention_tokens), str(block.mlp_tokens), *macs(block.macs)]
        for number, block in enumerate(cost.blocks)
    ]
    outside = cost.macs - sum(block.macs for block in cost.blocks)
    return unit, [*rows, ["embedding, head", "", "", *macs(outside)], ["all", "", "", *macs(cost.macs)]]


def cost_table(cost: Cost) -> str:
    """What :meth:`Cost.table` gives."""
    unit, rows = cost_rows(cost)
    lines: list[Sequence[str]] = [["block", "tokens", "in the MLP", unit, "share"], *rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    widths = [-first, *(width + 2 for width in others)]
    return "\n".join(line(cells, widths) for cells in lines)


def cost_card(cost: Cost) -> str:
    """A cost as HTML, with a bar for each block's share."""
    unit, rows = cost_rows(cost)
    factor, _ = macs_unit([cost.gmacs])
    facts = {unit: f"{factor * cost.gmacs:,.2f}", "parameters": f"{cost.params:,}"}
    largest = max(block.macs for block in cost.blocks) or 1
    # Two rows at the end, of what lies outside of the blocks and of all, have no bar.
    bars = [*(block.macs / largest for block in cost.blocks), 0.0, 0.0]
    return card("Cost of one image", facts, table(["block", "tokens", "in the MLP", unit, "share"], rows, bars))
