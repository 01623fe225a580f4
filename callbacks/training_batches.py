"""What enters a ViT in training, looked at before the training itself goes on as if nobody had looked."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from prunex.batches import Parts, parts
from prunex.callbacks.layers import is_layered
from prunex.errors import PrunexError

BY_HAND = "calibrate before fit with prunex.attach(...).calibrate(images)"
# What samplers keep in their attributes and change in place.
_COLLECTIONS = (list, dict, set, np.ndarray)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def training_batches(trainer: Trainer, module: LightningModule, vit: Any) -> Iterator[Iterator[Parts]]:
    """The first training batches, as :class:`~prunex.batches.Parts` on the CPU of what enters the ViT.

    Batches go through the hooks that Lightning calls on them and through the module's own ``training_step`` as far as
    the ViT, so that what either does to the images is done here too. Random states, samplers, workers, buffers and logs
    of the training stay as they are. Loaders that can be walked only once are refused, as are batches without images.
    """
    with isolate_rng(), _untouched(module, vit):
        walk = _walk(trainer, module, vit)
        try:
            yield walk
        finally:
            walk.close()


def _walk(trainer: Trainer, module: LightningModule, vit: Any) -> Generator[Any, None, None]:
    step: Any = module.training_step
    while is_layered(step):  # beneath what callbacks put round it
        step = step.__wrapped__
    fetches = "dataloader_iter" in inspect.signature(step).parameters  # the step takes its batches itself
    follow = not fetches
    # The loaders' own objects are busy: their iterators were made when the fit began, and persistent ones are shared.
    mode: Any = getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "max_size_cycle")
    loaders = CombinedLoader(trainer.train_dataloader, mode)
    loaders.flattened = [_apart(loader) for loader in loaders.flattened]
    for batch, index, _ in loaders:
        if batch is None:
            continue
        if not fetches:
            batch = handed_over(trainer, module, batch)
        entered = _entering(trainer, vit, step, batch, index) if follow else None
        fields = parts(batch, entered)
        if entered is None:
            follow = False  # told once
            try:
                fields.need("images", "calibration", "the training batch")
            except PrunexError as error:
                raise PrunexError(f"{error}, or {BY_HAND}") from None
        yield fields.cpu()


def handed_over(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A loader's batch as Lightning hands it to a step: converted, and through the three hooks round its transfer."""
    with torch.no_grad():
        batch = trainer.precision_plugin.convert_input(batch)
        before: Any = getattr(module, "_on_before_batch_transfer", None)
        if before is None:  # a private name of Lightning's: it chooses between these two
            data = getattr(trainer, "datamodule", None)
            chosen = data if data is not None and is_overridden("on_before_batch_transfer", data) else module
            before = chosen.on_before_batch_transfer
        return trainer.strategy.batch_to_device(before(batch, dataloader_idx=0), dataloader_idx=0)


class _Entered(BaseException):
    """Ends a step where its ViT begins; no Exception, which a step might catch."""


def _entering(trainer: Trainer, vit: Any, step: Any, batch: Any, index: int) -> Tensor | None:
    """What the module's step gives the ViT first; None, with a warning, where it cannot be followed that far."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach())
        raise _Entered

    # Lightning passes the batch's number to steps that take it.
    parameters = inspect.signature(step).parameters.values()
    many = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    handle = vit.patch_embed.register_forward_pre_hook(look)
    why = "it does not run the ViT on this batch"
    try:
        # Eager: a compiled step would run past a hook that came after it.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context():
            step(*((batch, index) if many else (batch,)))
    except _Entered:
        return seen[0]
    except Exception as error:  # whatever a stranger's step raises outside its loop
        why = f"it raised {type(error).__name__} ({' '.join(str(error).split())[:100]})"
    finally:
        handle.remove()
    rank_zero_warn(f"calibration takes images as the batch has them, since training_step could not be followed: {why}")
    return None


@contextmanager
def _untouched(module: LightningModule, vit: nn.Module) -> Iterator[None]:
    """Log nothing, and give what a step may change before its ViT back as it was: a norm's buffers, frozen weights."""
    pruners = {id(b) for b in vit.buffers()}  # a pruner's, which calibration fills
    buffers = [(b, b.detach().clone()) for b in module.buffers() if id(b) not in pruners]
    frozen = [(p, p.requires_grad) for p in module.parameters()]
    silent = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    module.__dict__.update(dict.fromkeys(silent, lambda *_, **__: None))
    try:
        yield
    finally:
        for name, method in silent.items():
            if method is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = method
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, flag in frozen:
            p.requires_grad = flag


def _apart(loader: Any) -> Any:
    """A loader over the same data whose walk leaves this one's sampler, generators and workers alone."""
    if not isinstance(loader, DataLoader):
        if iter(loader) is loader:
            raise PrunexError(
                f"the training data are a {type(loader).__name__} that can be walked only once: give a DataLoader, or "
                f"{BY_HAND}"
            )
        return loader
    memo = {id(loader.dataset): loader.dataset}  # never copied
    again = copy.copy(loader)
    sampler = _copied(loader.sampler, memo)
    memo[id(loader.sampler)] = sampler
    state = {"sampler": sampler, "batch_sampler": _copied(loader.batch_sampler, memo), "_iterator": None}
    again.__dict__.update(state, generator=copy.deepcopy(loader.generator, memo), persistent_workers=False)
    return again


def _copied(sampler: Any, memo: dict[int, Any]) -> Any:
    """A sampler of its own: what it changes in place is copied, what it only refers to is shared."""
    again = copy.copy(sampler)
    for name, value in getattr(again, "__dict__", {}).items():
        if id(value) in memo or isinstance(value, _GENERATORS):
            again.__dict__[name] = copy.deepcopy(value, memo)
        elif isinstance(value, Sampler):
            again.__dict__[name] = _copied(value, memo)
        elif isinstance(value, _COLLECTIONS):
            again.__dict__[name] = copy.copy(value)
    return again
