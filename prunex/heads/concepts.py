"""Named concepts, and attention to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.vit.weights import effective, is_plain

STREAMS = ("global", "spatial", "unsupervised")
NONE = "none"
MOST = 10_000  # concepts of a kind


class ConceptAttention(nn.Module):
    """Attention from queries to concepts whose output is class scores; without residual, norm or MLP.

    Q = x W_Q, (K, V) = E W_KV, A_h = softmax(Q_h K_h^T / sqrt(D_h)) over concepts, y = concat_h(A_h V_h) W_O + b.
    """

    def __init__(self, count: int, width: int, classes: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.concepts = nn.Parameter(torch.empty(count, width))
        nn.init.trunc_normal_(self.concepts, std=width**-0.5)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, classes)
        self.proj_drop = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> Tensor:
        """[..., m, D] by head: [..., H, m, D / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def attend(self, queries: Tensor) -> Tensor:
        """Attention of queries [B, m, D] to the concepts: [B, H, m, C]."""
        keys, _ = self.kv(self.concepts).chunk(2, -1)
        scores = (self._split(self.q(queries)) * self.scale) @ self._split(keys).transpose(-2, -1)
        return scores.softmax(-1)

    def scores(self, attention: Tensor) -> Tensor:
        """What attention [B, H, m, C] is worth: class scores [B, m, classes]."""
        _, values = self.kv(self.concepts).chunk(2, -1)
        gathered = (attention @ self._split(values)).transpose(1, 2).flatten(2)
        out: Tensor = self.proj_drop(self.proj(gathered))
        return out

    def table(self) -> Tensor:
        """G [H, C, classes]: what a unit of a head's attention to a concept adds to each score."""
        _, values = self.kv(self.concepts).chunk(2, -1)
        # An adapter put round it has a part in the scores too; exported graphs have none, and no numbers to see it by.
        plain = torch.compiler.is_compiling() or is_plain(self.proj)
        weight = self.proj.weight if plain else effective(self.proj)[0]
        weights = weight.T.unflatten(0, (self.heads, -1))
        return self._split(values) @ weights

    def macs(self, queries: int) -> int:
        """Multiply-adds for so many queries, keys and values of the concepts included."""
        count, width = self.concepts.shape
        return queries * (width * width + 2 * count * width + width * self.proj.out_features) + 2 * count * width**2


def names_of(concepts: Any, spatial: Any, unsupervised: Any, none: bool) -> dict[str, tuple[str, ...]]:
    """The names of all concepts by stream; ``none`` adds one for patches that have nothing.

    Raises:
        PrunexError: For no concept at all, names that are none or used twice, or ``none`` without spatial concepts.
    """
    names = {
        "global": named("concepts", concepts, "concept"),
        "spatial": named("spatial", spatial, "spatial concept"),
        "unsupervised": named("unsupervised", check_whole("unsupervised", unsupervised, 0, MOST), "unsupervised"),
    }
    if none:
        if not names["spatial"]:
            raise PrunexError(
                "none=True is for spatial concepts, and there are none: give spatial=[...], or leave it out"
            )
        names["spatial"] = (*names["spatial"], NONE)
    every = [name for stream in STREAMS for name in names[stream]]
    if not every:
        raise PrunexError("concept_transformer has no concepts: give concepts=[...], spatial=[...] or unsupervised=8")
    if len(set(every)) < len(every):
        twice = sorted({name for name in every if every.count(name) > 1})
        raise PrunexError(f"concepts {twice} are named twice: give every concept a name of its own")
    return names


def named(option: str, given: Any, what: str) -> tuple[str, ...]:
    """The names of concepts given by name or as a number."""
    if isinstance(given, int) and not isinstance(given, bool):
        return tuple(f"{what} {i}" for i in range(1, check_whole(option, given, 0, MOST) + 1))
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if not several or not all(isinstance(name, str) and name.strip() for name in given):
        raise PrunexError(
            f"{option}={given!r} is not allowed: give a list of names, such as ['loop', 'bar'], or a number"
        )
    return tuple(given)


def plain_names(given: Sequence[str] | int) -> list[str] | int:
    """As options are kept: a list, or a number."""
    return given if isinstance(given, int) else list(given)
