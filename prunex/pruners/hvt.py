"""HVT: the token sequence is max-pooled between blocks, and the mean of what remains is classified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.checks import check_choice, check_whole
from prunex.errors import PrunexError
from prunex.pruners.base import TokenPruner, check_stages
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.decisions import Pool
from prunex.vit.positions import positions_of
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn
from prunex.vit.units import prefix_of


class Position(nn.Module):
    """The position embedding [1, n, D] of one pooled sequence; under timm's name, so that recipes do not decay it."""

    def __init__(self, tokens: int, width: int, init: str) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        if init == "trunc_normal":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)


@register("pruner", "hvt", "Pan et al., ICCV 2021, arXiv 2103.10619", "training: it has position embeddings to learn")
class HVT(TokenPruner):
    """Hierarchical pooling of the token sequence ("Scalable Vision Transformers with Hierarchical Pooling", Sec. 3).

    After the blocks i with i mod w = 0, so always after block 0, each channel of the patch sequence is max-pooled along
    the sequence (kernel 3, stride 2, no padding: n tokens become (n - 3) // 2 + 1), and a learned position embedding of
    the new length is added. The class is read from the mean of the remaining tokens after the final norm. Training and
    inference are the same, for all images alike: nothing is ranked and no loss is added. 196 patches become 97 for
    w = 12; 97, 48, 23 and 11 for w = 3.

    The pooling is one-dimensional over raster order: windows straddle row ends, and of an even number of tokens the
    last is in none. ``pool="2d"`` is a variant of ours and **not HVT**: 3 x 3 windows two apart on the patch grid, with
    a border of one, so that every patch is in a window and h x w becomes ceil(h / 2) x ceil(w / 2).

    No patch is chosen or kept: ``trace.kept()`` is false everywhere after a pooling, and ``trace.share()`` is the
    largest share of channels in which a patch has the maximum of some token.

    On a timm ViT without class token, ``global_pool="avg"`` and the norm before pooling (``fc_norm=False``) this is the
    authors' model; they train it from scratch for 300 epochs (``init="trunc_normal"``, weight decay 0.025, none on
    position embeddings). Their accuracy (ImageNet-1k: HVT-S-1 78.00 at 2.40 GMACs, 2.4 points below their own unpooled
    80.39) was not reproduced here.

    **Converting a model with a class token** is ours: by default all prefix tokens and their positions stay out of the
    forward (their parameters remain, so that ``detach`` gives the dense model), and the head reads the mean of the
    patch tokens (both heads of a distilled DeiT do; models that pool, keep their own way to pool). The new positions
    begin at 0. Expect a large drop until it is fine-tuned. ``class_token="keep"`` carries the prefix tokens along,
    never pooled, and the head reads what it read before.

    Positions along a sequence that wraps round rows cannot be interpolated: another image size than the model had when
    attached is refused; attach again for it.

    Args:
        stages: Blocks after which tokens are pooled; None: those of ``pool_width``.
        pool_width: w, at least 1: pool after blocks 0, w, 2 w, ...; None: the depth, one pooling after block 0.
            Together with ``stages`` it must mean the same.
        pool: "1d", or "2d" for the variant on the grid.
        class_token: "drop" or "keep": what becomes of prefix tokens. Models without any are not concerned.
        init: Of the new positions: "zero" to convert a trained model, "trunc_normal" (std 0.02) to train from scratch.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    >>> with prunex.attach(model, "hvt", pool_width=3) as pruning, torch.no_grad():
    ...     model(torch.zeros(1, 3, 224, 224)).shape, pruning.options["stages"], pruning.counts()
    (torch.Size([1, 4]), [0, 3, 6, 9], [97, 48, 23, 11])
    """

    name = "hvt"
    chooses = "slots"
    lr = 3e-4  # from 0 to as wide as a ViT's positions (0.02) in some 130 steps; not searched

    def __init__(
        self,
        anatomy: Anatomy,
        stages: Sequence[int] | None = None,
        pool_width: int | None = None,
        pool: Literal["1d", "2d"] = "1d",
        class_token: Literal["drop", "keep"] = "drop",
        init: Literal["zero", "trunc_normal"] = "zero",
    ) -> None:
        check_choice("pool", pool, ("1d", "2d"))
        check_choice("class_token", class_token, ("drop", "keep"))
        check_choice("init", init, ("zero", "trunc_normal"))
        super().__init__(anatomy, 1.0, _blocks(stages, pool_width, anatomy.depth))
        self.pool, self.class_token = pool, class_token
        self.grid = anatomy.grid
        # The grid or length that enters each pooling.
        self.sizes = self._sizes(anatomy.grid if pool == "2d" else (1, anatomy.grid[0] * anatomy.grid[1]))
        self.positions = nn.ModuleList(Position(h * w, anatomy.width, init) for h, w in self.sizes[1:])
        # Not the base's: its rate is no option here, where nothing is kept or left out.
        self.options: dict[str, Any] = {
            "stages": list(self.stages),
            "pool_width": pool_width,
            "pool": pool,
            "class_token": class_token,
            "init": init,
        }

    @classmethod
    def settings(cls, anatomy: Anatomy) -> list[dict[str, Any]]:
        """The authors' HVT-S-1 to HVT-S-4 at depth 12, one to four poolings, as far as the sequence is long enough."""
        settings, left = [], anatomy.grid[0] * anatomy.grid[1]
        for poolings in (1, 2, 3, 4):
            left = (left - 3) // 2 + 1
            # A width that does not divide the depth pools more often than is meant.
            if left >= 1 and anatomy.depth % poolings == 0:
                settings.append({"pool_width": anatomy.depth // poolings})
        return settings

    def _sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """The patch tokens before the first pooling and after each one, as (h, w); a sequence is (1, n)."""
        sizes = [size]
        for block in self.stages:
            h, w = sizes[-1]
            if h * w < (3 if self.pool == "1d" else 2):
                raise PrunexError(
                    f"{h * w} patch tokens are left after block {block}: too few to pool once more; "
                    "give fewer stages, a larger pool_width, or larger images"
                )
            sizes.append((1, (w - 3) // 2 + 1) if self.pool == "1d" else ((h + 1) // 2, (w + 1) // 2))
        return sizes

    def prepare(self, model: ViT) -> None:
        """Refuse a model whose attention has a bias for the class token that shall not enter."""
        known = positions_of(model, prefix_of(model), self.grid)
        if self.class_token == "drop" and known is not None and known.relative:
            raise PrunexError(
                f"hvt cannot drop the class token of a {type(model).__name__} with relative position bias: "
                "give class_token='keep'"
            )

    def alter(self, anatomy: Anatomy) -> Anatomy:
        """Without prefix tokens, and with the mean of the patches as what the head reads, unless they are kept."""
        if self.class_token == "keep" or anatomy.prefix == 0:
            return anatomy
        # A head that read prefix tokens has nothing left to read but the patches' mean.
        pool = "avg" if anatomy.pool == "token" or len(anatomy.rankers) > 1 else anatomy.pool
        return replace(anatomy, prefix=0, readers=(), rankers=(), pool=pool, pool_prefix=False)

    def plan(self) -> list[Turn]:
        """After the blocks of its stages; before the first one the images are looked at."""
        return [Turn(0), *(Turn(block, "after") for block in self.stages)]

    def decide(self, turn: Turn, state: TokenState) -> Pool | None:
        """Pool, and add the new positions; another image size than was attached for is refused."""
        if turn.when == "before":
            self._check_size(state.trace.grid, state.patches.shape[1])
            return None
        s = self.stages.index(turn.block)
        position = self.positions[s].get_parameter("pos_embed")
        return Pool(self.sizes[s] if self.pool == "2d" else None, position)

    def _check_size(self, grid: tuple[int, int], tokens: int) -> None:
        if grid != self.grid or tokens != self.grid[0] * self.grid[1]:
            raise PrunexError(
                f"hvt has position embeddings for a patch grid of {self.grid[0]} x {self.grid[1]}, and was given "
                f"{grid[0]} x {grid[1]} ({tokens} tokens): resize the images, or detach() and attach again for this "
                "size"
            )

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each pooling; too few patches are refused, and on the grid another number of them."""
        whole = self.grid[0] * self.grid[1]
        if self.pool == "2d" and patches != whole:
            raise PrunexError(f"{patches} patches are not allowed: pool='2d' was attached for {whole}; attach again")
        sizes = self.sizes if patches == whole else self._sizes((1, patches))
        return [h * w for h, w in sizes[1:]]

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions from the authors' names: ``blocks.{i}.pos_embed``, i the block that pools."""
        renamed = {}
        for key, value in state.items():
            parts = key.split(".")
            if len(parts) == 3 and (parts[0], parts[2]) == ("blocks", "pos_embed") and parts[1].isdigit():
                block = int(parts[1])
                # One of another width's keeps its name, and is refused as foreign.
                renamed[f"positions.{self.stages.index(block)}.pos_embed" if block in self.stages else key] = value
        return renamed


def _blocks(stages: Any, pool_width: Any, depth: int) -> Sequence[int]:
    """The blocks after which tokens are pooled; a bad width, or two options that differ, are refused."""
    width = depth if pool_width is None else check_whole("pool_width", pool_width, 1)
    regular = tuple(range(0, depth, width))
    if stages is None:
        return regular
    given = check_stages(stages, depth)
    if pool_width is not None and given != regular:
        raise PrunexError(f"stages={given} and pool_width={pool_width}, which means {regular}: give one of the two")
    return given
