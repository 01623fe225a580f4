"""One budget for tokens and units together: how much of the saving either takes, tried out on calibration images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.attach import attach
from prunex.brief import Brief
from prunex.checks import check_budget, check_number, check_whole
from prunex.errors import OutOfReach, PrunexError
from prunex.pruners.base import TokenPruner
from prunex.registry import lookup
from prunex.units.base import UnitPruner
from prunex.units.batches import labelled_batches, undisturbed
from prunex.vit.anatomy import ViT, find
from prunex.vit.cost import tally
from prunex.vit.mount import mounted, mounted_units
from prunex.vit.units import branches


@dataclass(frozen=True)
class Share:
    """One way to split a budget, and what it did to the model at once, without training.

    Attributes:
        tokens: Share of the saving that tokens take, in [0, 1]; units take the rest.
        token_pruning: For ``prunex.attach(model, **token_pruning)``; None where tokens take nothing.
        unit_pruning: Likewise, of the unit criterion; None where units take nothing.
        macs: Multiply-adds of one image.
        heads: Heads left in all blocks together.
        channels: MLP channels left in all blocks together.
        loss: Mean over images: cross-entropy with the labels; without labels, KL divergence from the dense model's
            prediction to this one's. In nats.
        agreement: Share of images whose predicted class is the label's (the dense model's, without labels).
        why_not: Why this split was not possible; empty where it was. Numbers are NaN or 0 then.
    """

    tokens: float
    token_pruning: dict[str, Any] | None = None
    unit_pruning: dict[str, Any] | None = None
    macs: int = 0
    heads: int = 0
    channels: int = 0
    loss: float = float("nan")
    agreement: float = float("nan")
    why_not: str = ""


@dataclass(frozen=True, repr=False)
class Split(Brief):
    """What :func:`search_split` found.

    Attributes:
        rows: One for each share, in the order given.
        dense_macs: Multiply-adds of the dense model.
        dense_loss: Its loss: 0 without labels.
        labels: Whether losses are those of labels.
        images: How many images were looked at.
    """

    rows: tuple[Share, ...]
    dense_macs: int
    dense_loss: float
    labels: bool
    images: int

    @property
    def best(self) -> Share:
        """The row of the least loss; of equal ones the first."""
        # A loss that is no number is the worst there is: min() would take it for anything.
        return min((r for r in self.rows if not r.why_not), key=lambda r: float("inf") if isnan(r.loss) else r.loss)

    def table(self) -> list[dict[str, Any]]:
        """The rows in plain values, for a table or a file."""
        return [
            {
                "tokens": row.tokens,
                "macs": row.macs,
                "share_of_dense": round(row.macs / self.dense_macs, 4),
                "heads": row.heads,
                "channels": row.channels,
                "loss": row.loss,
                "agreement": row.agreement,
                "best": row is self.best,
                "why_not": row.why_not,
            }
            for row in self.rows
        ]


def search_split(
    model: nn.Module,
    token_method: str,
    unit_method: str,
    budget: float | str,
    batches: Any,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    token_options: Mapping[str, Any] | None = None,
    unit_options: Mapping[str, Any] | None = None,
    images: int = 512,
    path: str | None = None,
) -> Split:
    """How one budget is best shared between pruning tokens and pruning units, by trying splits without training.

    For each share s in ``shares`` the token pruner is attached with the budget 1 - s (1 - budget), and the unit
    criterion, calibrated on the same images behind it, brings the model to the whole budget. With s = 0 units save all,
    with s = 1 tokens do. What is measured is the loss right after pruning, which fine-tuning will lower for every
    split; that the best split before is the best after is a guess, and no result of a paper.

    Args:
        model: A dense ViT, or a module that holds exactly one.
        token_method: A token pruner that decides without training, such as "evit", "topk", "tome".
        unit_method: A unit criterion that needs no training: "magnitude", "taylor", "relevance", "random".
        budget: What tokens and units together shall leave: a share of the dense multiply-adds, or "2.4GMACs".
        batches: Calibration images, with labels or without: a loader, an iterable of batches, or one batch.
        shares: Shares of the saving that tokens take, in [0, 1].
        token_options: Further options of the token pruner.
        unit_options: Further options of the unit criterion.
        images: Most images that are looked at; all of them are held in memory.
        path: Dotted path to the ViT when ``model`` holds several.

    Returns:
        The table and the best split. The model is left exactly as it was.

    Raises:
        PrunexError: For a model that is pruned already, methods that have to be trained first, shares or options out of
            range, batches that do not fit, or a budget that no share reaches.

    >>> import prunex, timm, torch
    >>> from prunex.split import search_split
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=4, img_size=64)
    >>> found = search_split(model, "evit", "magnitude", 0.6, torch.randn(4, 3, 64, 64), (0, 0.5))
    >>> [row.tokens for row in found.rows], found.best.unit_pruning["method"]
    ([0.0, 0.5], 'magnitude')
    """
    vit: ViT = find(model, path)[1]
    for attached in (mounted(vit), mounted_units(vit)):
        if attached is not None:
            raise PrunexError(f"{type(vit).__name__} is pruned already by {attached.method}: detach() it first")
    _check_methods(token_method, unit_method)
    tokens, units = {"method": token_method, **(token_options or {})}, {"method": unit_method, **(unit_options or {})}
    for options, whose in ((tokens, "token_options"), (units, "unit_options")):
        if "budget" in options:
            raise PrunexError(f"budget in {whose} is not allowed: give one budget for both, and shares")
    shares = _check_shares(shares)
    dense = tally(vit).macs
    allowed = check_budget(budget, dense)
    if allowed > dense:
        raise PrunexError(f"budget={budget!r} is more than the dense model costs ({dense / 1e9:.3g} GMACs)")
    limit = check_whole("images", images, 1)
    with undisturbed(vit), torch.no_grad():
        data = list(_limited(labelled_batches(batches, vit), limit))
        trial = _Trial(vit, data)
        dense_loss = trial.measured()[0]
        rows = []
        for share in shares:
            target = 1 - share * (1 - allowed / dense)
            # What one share cannot reach another may: it is a row of the table like any other.
            try:
                rows.append(trial.of(share, tokens | {"budget": target}, units | {"budget": budget}))
            except OutOfReach as error:
                rows.append(Share(share, why_not=str(error)))
    if all(row.why_not for row in rows):
        raise PrunexError(f"budget={budget!r} is out of reach for every share in {shares}: {rows[0].why_not}")
    return Split(tuple(rows), dense, dense_loss, data[0][1] is not None, sum(len(x) for x, _ in data))


class _Trial:
    """A model, the batches that splits are tried on, and its dense logits of each."""

    def __init__(self, vit: Any, data: list[tuple[Tensor, Tensor | None]]) -> None:
        self.vit, self.data = vit, data
        self.dense_logits = [vit(x) for x, _ in data]

    def of(self, share: float, tokens: dict[str, Any], units: dict[str, Any]) -> Share:
        """One split, attached, measured, and taken off again."""
        token_spec = unit_spec = None
        with ExitStack() as stack:
            # Tokens first, since units are scored by what is left of the images.
            if share > 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # whole tokens come near a budget as they can: the table tells
                    pruning = stack.enter_context(attach(self.vit, **tokens))
                _check_ready(pruning.pruner)
                token_spec = pruning.spec
            if share < 1:
                gated = attach(self.vit, **units)
                stack.callback(gated.detach)
                gated.calibrate(self.data)
                unit_spec = gated.spec
            loss, agreement = self.measured()
            heads, channels = _left(self.vit)
            return Share(share, token_spec, unit_spec, tally(self.vit).macs, heads, channels, loss, agreement)

    def measured(self) -> tuple[float, float]:
        loss = right = count = 0.0
        for (x, labels), dense in zip(self.data, self.dense_logits, strict=True):
            logits, dense = self.vit(x).double(), dense.double()
            if labels is None:
                parts = F.kl_div(logits.log_softmax(1), dense.log_softmax(1), reduction="sum", log_target=True)
                labels = dense.argmax(1)
            else:
                parts = F.cross_entropy(logits, labels, reduction="sum")
            loss += float(parts)
            right += int((logits.argmax(1) == labels).sum())
            count += len(x)
        return loss / count, right / count


def _check_ready(pruner: TokenPruner) -> None:
    """Refuse what cannot be tried at once: predictors without training, sets not found yet, counts that stay open."""
    # Parameters of its own are predictors, which know nothing yet.
    if any(True for _ in pruner.parameters()) or pruner.needs_calibration:
        raise PrunexError(f"{pruner.name} has to be trained or calibrated first: search with evit, topk or tome")
    if pruner.count != "fixed":
        raise PrunexError(f"count={pruner.count!r} of {pruner.name} leaves open what images cost: search with 'fixed'")


def _left(vit: Any) -> tuple[int, int]:
    """Heads and MLP channels that are open, in all blocks together."""
    gated = mounted_units(vit)
    closed = {} if gated is None else gated.pruner.closed()
    counts = {"heads": 0, "channels": 0}
    for b in branches(vit):
        counts[b.kind] += b.units - closed.get(b.key, 0)
    return counts["heads"], counts["channels"]


def _limited(data: Iterator[tuple[Tensor, Tensor | None]], limit: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for x, labels in data:
        yield x[:limit], None if labels is None else labels[:limit]
        limit -= len(x)
        if limit <= 0:
            return


def _check_shares(shares: Any) -> tuple[float, ...]:
    if not isinstance(shares, Sequence) or isinstance(shares, str) or len(shares) == 0:
        raise PrunexError(f"shares={shares!r} is not allowed: give shares of the saving in [0, 1], as in (0, 0.5, 1)")
    return tuple(check_number("shares", s, 0, 1) for s in shares)


def _check_methods(token_method: str, unit_method: str) -> None:
    tokens: Any = lookup("pruner", token_method).make
    units: Any = lookup("pruner", unit_method).make
    if not issubclass(tokens, TokenPruner):
        raise PrunexError(f"token_method={token_method!r} prunes units: give a token pruner, such as 'evit'")
    if not issubclass(units, UnitPruner):
        raise PrunexError(f"unit_method={unit_method!r} prunes tokens: give a unit criterion, such as 'taylor'")
    if units.trains:
        raise PrunexError(
            f"unit_method={unit_method!r} learns in training: search with taylor or relevance, and train with the split"
        )
