"""Putting unit gates on a model in place: the handle that tells scores and widths, removes units, and detaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import OutOfReach, PrunexError
from prunex.handles.base import Handle, drop_mark
from prunex.later import deferred, refuse
from prunex.units.base import UnitPruner
from prunex.units.batches import as_they_enter
from prunex.units.xpruner import UnitRelevance, XPruner
from prunex.vit.anatomy import head_classes
from prunex.vit.cost import tally, tokens_of
from prunex.vit.cuts import check_cuts
from prunex.vit.mount import UNITS, mounted, mounted_units, unmount
from prunex.vit.optimisers import check_followed
from prunex.vit.sharded import COPY, check_gathered
from prunex.vit.surroundings import answering
from prunex.vit.units import (
    KINDS,
    Branch,
    Kind,
    blocks_of,
    branches,
    check_gates,
    opens_heads,
    put_gates,
    take_gates_off,
)
from prunex.vit.widths import WidthSpec, narrow, widths_of


class Gated(nn.Module):
    """What hangs on a model with gated units as ``model.prunex_units``: the unit pruner, and the labels of the moment.

    Dense parameter names stay as they are; what the pruner holds is called ``prunex_units.<method>.*``. A dense state
    dict loads strictly. One that was saved after units were removed narrows the model before it is loaded.
    """

    def __init__(self, pruner: UnitPruner) -> None:
        super().__init__()
        self.add_module(pruner.name, pruner)
        self.method = pruner.name
        self.labels: Tensor | None = None
        self.more: list[Callable[[Tensor, Tensor], Mapping[str, Tensor]]] = []
        self.ran = False  # set by every forward, for whoever wants to know whether one came
        self.trained = False  # set by every training forward in which closed units took no part any more
        self.register_load_state_dict_pre_hook(drop_mark)

    @property
    def pruner(self) -> UnitPruner:
        """The pruner itself."""
        pruner: UnitPruner = getattr(self, self.method)
        return pruner

    def gate(self, key: str, batch: int) -> Tensor | None:
        """What the layer behind a branch's units shall have its input multiplied by; refuses labels of other images."""
        self.ran = True
        self.trained = self.trained or (self.training and self.pruner.left(key) is not None)
        factors = self.pruner.gate(key, self.labels)
        if factors is not None and factors.ndim == 2 and len(factors) != batch:
            raise PrunexError(f"labelled(...) was given {len(factors)} labels for {batch} images: give one an image")
        return factors

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"labels": None, "more": []}


class UnitPruning(Handle):
    """The handle on a model whose heads and MLP channels are gated; also a context manager that detaches.

    Attributes:
        model: The backbone it is on.
    """

    kind = UNITS

    @property
    def _gated(self) -> Gated:
        gated: Gated = self._holder()
        return gated

    @property
    def pruner(self) -> UnitPruner:
        """The module that decides."""
        return self._gated.pruner

    @property
    def decided(self) -> bool:
        """Whether it is known which units stay."""
        return self.pruner.has_decided

    @property
    def removed(self) -> bool:
        """Whether the others were taken out for good."""
        return self.pruner.has_removed

    @property
    def widths(self) -> WidthSpec:
        """The units that are kept, in the dense model's numbers.

        Raises:
            PrunexError: Before that is known.
        """
        if not self.decided:
            raise PrunexError(f"{self.method} has not chosen units yet: train with it, or call calibrate(...)")
        return self.pruner.widths()

    @contextmanager
    def labelled(self, labels: Tensor) -> Iterator[None]:
        """Tell the images' classes to the training forwards inside, for masks that have a row a class.

        Args:
            labels: int64 [B], in 0..classes - 1.

        Raises:
            PrunexError: For anything else.
        """
        count, gated = self.pruner.classes, self._gated
        whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        if not whole or labels.dtype == torch.bool or len(labels) == 0:
            what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise PrunexError(f"labels are {what}: give one class index an image, int64 [B]")
        if not torch.compiler.is_compiling():
            refuse(
                ((labels < 0) | (labels >= count)).any(),
                lambda: f"labels run from {int(labels.min())} to {int(labels.max())}, the model has {count} classes",
            )
        # What is refused later must not end in a device's own assertion.
        gated.labels = labels.clamp(0, count - 1) if deferred(labels) else labels
        try:
            yield
        finally:
            gated.labels = None

    def losses(self, images: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted auxiliary losses of the stage, each a scalar; empty where nothing is learned.

        Losses that :meth:`also` added need the training forward's images [B, C, H, W] and their classes int64 [B].
        """
        losses = dict(self.pruner.losses())
        if images is not None and labels is not None:
            for more in self._gated.more:
                losses |= more(images, labels)
        return losses

    def also(self, loss: Callable[[Tensor, Tensor], Mapping[str, Tensor]]) -> None:
        """Add a loss to those that :meth:`losses` gives: from images and labels to named scalars, weighted.

        Copies of the model, such as slim ones, do not have it.
        """
        self._gated.more.append(loss)

    def calibrate(self, batches: Any = None, module: nn.Module | None = None, *, entered: bool = False) -> WidthSpec:
        """Score the units and choose those that the budget allows.

        Args:
            batches: Batches of images, or of images and labels, as the criterion needs them; ``magnitude`` and
                ``random`` need none.
            module: The module round the model, where batches are what that takes and labels are classes that it gives:
                it normalises or resizes, or has a head of its own.
            entered: Whether batches are what enters the model already, and only the classes are the module's.

        Raises:
            PrunexError: For a method that learns its scores in training, batches that do not hold what it needs, or
                units that were removed already.
        """
        if self.removed:
            raise PrunexError("units were removed for good already: detach() and attach again to take out more")
        if self.pruner.trains:
            raise PrunexError(f"{self.method} learns its scores in training: use MaskPruning, or its stages by hand")
        check_gathered(self.model, COPY)
        self.budget()
        model: nn.Module = self.model
        # Criteria that look at no images have nothing to do with what is round the model.
        if module is not None and batches is not None and self.pruner.needs in ("images", "labels"):
            if entered:
                model = answering(module, model)
            else:
                model, batches = as_they_enter(batches, module, model)
        self.pruner.calibrate(model, batches)
        return self.widths

    def budget(self) -> float:
        """Tell the pruner what units cost and may cost, with as many tokens as are left at the schedule's end.

        Called before units are chosen, since tokens may have been pruned after the units were gated. Gives the
        multiply-adds that all units together may cost; a budget out of reach is refused.
        """
        pruner = self.pruner
        with schedule_done(self.model):
            if not self.removed:
                check_gates(self.model)
                pruner.price(unit_branches(self.model))
            allowed = _aim(pruner, self.model)
        pruner.may_spend(allowed)
        return allowed

    def conclude(self) -> WidthSpec:
        """End ``xpruner``'s search: choose the units that the budget allows, by its scores and thresholds.

        Raises:
            PrunexError: For another method, or a budget out of reach.
        """
        pruner = self._searching("does not search: call calibrate(...)")
        self.budget()
        pruner.conclude()
        return self.widths

    def relevance_table(self) -> UnitRelevance:
        """Which unit serves which class; of methods whose scores have a class axis.

        Raises:
            PrunexError: For the others.
        """
        return self._searching("scores units without a class axis: attach xpruner for a relevance table").relevance()

    def _searching(self, why: str) -> XPruner:
        if not isinstance(self.pruner, XPruner):
            raise PrunexError(f"{self.method} {why}")
        return self.pruner

    def remove(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> nn.Module:
        """Take the closed units out of the model for good; training can go on with these optimisers.

        The model computes what it did with hard gates. This cannot be undone: ``detach`` then leaves the narrow model.

        Returns:
            The model.

        Raises:
            PrunexError: Where :meth:`check_removable` does; model, gates and optimisers are then as they were.
        """
        if not self.removed:
            self._take_out(self.widths, optimizers)
        return self.model

    def check_removable(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Refuse what :meth:`remove` would refuse with these optimisers, before anything is spent on it.

        Raises:
            PrunexError: By name, for a layer that is adapted, reparametrised, quantised or shares its weights, or an
                optimiser that cannot follow.
        """
        check_gathered(self.model, "slim the copy that prunex.whole(model) gives process 0 when training has ended")
        # With none kept, each layer is looked at that any choice would cut.
        every: dict[Kind, dict[int, tuple[int, ...]]] = {kind: {} for kind in KINDS}
        for b in self.pruner.branches:
            every[b.kind][b.block] = ()
        check_cuts(self.model, WidthSpec(heads=every["heads"], channels=every["channels"]))
        check_followed(optimizers)

    def _take_out(self, spec: WidthSpec, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Narrow the model, without asking whether that was decided."""
        narrow(self.model, spec, optimizers)
        take_gates_off(self.model)
        self.pruner.remove()
        # The token pruner goes by numbers of heads, which have changed.
        tokens = mounted(self.model)
        if tokens is not None:
            tokens.refit(self.model)

    def detach(self) -> nn.Module:
        """Take the gates off: the dense model bit for bit (or the narrow one, after :meth:`remove`); harmless twice.

        Returns:
            The model.
        """
        take_gates_off(self.model)
        if unmount(self.model, UNITS):
            for hook_id, hook in list(self.model._load_state_dict_pre_hooks.items()):
                if getattr(hook, "hook", hook) is _narrow_first:
                    del self.model._load_state_dict_pre_hooks[hook_id]
        return self.model


def put_units(model: nn.Module, make: Any, options: dict[str, Any]) -> UnitPruning:
    """Gate the units of a backbone by a unit pruner made for it.

    Whether the budget can be reached is asked when units are chosen: fewer tokens, pruned later, may bring it within
    reach.
    """
    if mounted_units(model) is not None:
        raise PrunexError(
            f"units of this {type(model).__name__} are pruned already by {mounted_units(model).method}: detach() first"
        )
    pruner: UnitPruner = make(unit_branches(model), head_classes(model), **options)
    pruner.known = widths_of(model)
    pruner.prepare(model)
    if mounted(model) is not None:
        check_readable(model, mounted(model).pruner, pruner)
    # Out of reach now, a budget may come within reach once tokens are pruned.
    with suppress(PrunexError):
        pruner.may_spend(_aim(pruner, model))
    gated = Gated(pruner)
    gated.to(next(model.parameters()).device)
    gated.train(model.training)
    model.add_module(UNITS, gated)
    put_gates(model, gated.gate, pruner.left)
    model.register_load_state_dict_pre_hook(_narrow_first)
    pruning = UnitPruning(model)
    with suppress(OutOfReach):  # told when units are chosen
        pruning.budget()
    return pruning


@contextmanager
def schedule_done(model: nn.Module) -> Iterator[None]:
    """The token pruner's rates as they are when its schedule has ended."""
    attached: Any = mounted(model)
    if attached is None:
        yield
        return
    # Units are chosen for the model as it will be, also where its rates still fall.
    before, attached.pruner.progress = attached.pruner.progress, 1.0
    try:
        yield
    finally:
        attached.pruner.progress = before


def check_readable(model: nn.Module, tokens: Any, units: Any = None) -> None:
    """Refuse a token pruner that ranks by the attention of blocks that have no heads, or may lose all of them."""
    read = sorted({turn.block for turn in tokens.plan() if turn.shown})
    blocks: list[Any] = [block for _, block in blocks_of(model)]
    bare = [b for b in read if opens_heads(blocks[b]) and blocks[b].attn.num_heads == 0]
    if bare:
        raise PrunexError(
            f"{tokens.name} ranks tokens by the attention of block {bare[0]}, which has no heads: choose other stages"
        )
    units = units.pruner if isinstance(units, Gated) else units
    if read and units is not None and units.least["heads"] == 0:
        raise PrunexError(
            f"min_heads=0 could leave no heads in blocks {read}, by whose attention {tokens.name} ranks tokens: give "
            "min_heads=1"
        )


def unit_branches(model: nn.Module) -> list[Branch]:
    """The branches of a model with what a unit costs at the tokens that are there."""
    return branches(model, tokens_of(tally(model, gates=False)) if mounted(model) is not None else None)


def _aim(pruner: UnitPruner, model: nn.Module) -> float:
    """What the units may cost of a model, with the tokens that are there."""
    return pruner.aim(tally(model, gates=False).macs, tally(model, gates=False, tokens=False).macs)


def _narrow_first(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict from after the removal: take the same units out before its weights are loaded."""
    gated = mounted_units(model)
    if gated is None:
        return
    # Before any weight is loaded, since a narrow model's fit no wide one.
    keys = f"{prefix}{UNITS}.{gated.method}."
    state_of_units = {k.removeprefix(keys): v for k, v in state.items() if k.startswith(keys)}
    if not state_of_units:  # a dense state dict
        state.update({f"{prefix}{UNITS}.{k}": v for k, v in gated.state_dict().items()})
        return
    if bool(state_of_units.get("removed", False)) and not bool(gated.pruner.removed):
        for name, value in state_of_units.items():
            # Which units are open, of this very width: what is of another shape is load_state_dict's to refuse.
            known = gated.pruner._buffers.get(name)
            if name.startswith("open_") and known is not None and known.shape == value.shape:
                known.copy_(value)
        UnitPruning(model)._take_out(gated.pruner.widths())
