"""Lightning's engines for our own commands: on one device or many, started by Lightning, torchrun or a cluster."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed import all_gather_object

from prunex.errors import PrunexError

T = TypeVar("T")
STARTED = "TORCHELASTIC_RUN_ID"  # what torchrun sets
PATIENCE = timedelta(days=7)  # processes wait for the slowest, which torch would give up after half an hour


def trainer_of(args: Any, *callbacks: Callback) -> Trainer:
    """A Trainer that predicts where a command was told to run."""
    return _made(
        args,
        lambda placed, several: Trainer(
            **placed,
            strategy=DDPStrategy(timeout=PATIENCE) if several else "auto",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # The data module cuts the batches among processes itself.
            use_distributed_sampler=False,
            # Explainers need gradients, and tensors made in inference mode have none.
            inference_mode=False,
        ),
    )


def fabric_of(args: Any) -> Fabric:
    """A Fabric, for a command that is no prediction, where it was told to run."""
    return _made(
        args, lambda placed, several: Fabric(**placed, strategy=FabricDDP(timeout=PATIENCE) if several else "auto")
    )


def _made(args: Any, make: Callable[[dict[str, Any], bool], T]) -> T:
    """An engine as ``--device``, or ``--accelerator``, ``--devices`` and ``--num_nodes`` say."""
    nodes, devices = args.num_nodes, args.devices
    if STARTED in os.environ:
        # torchrun has said it already; --devices that differ are refused by Lightning.
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, nodes = devices or here, nodes or int(os.environ["WORLD_SIZE"]) // here
    name = args.device or args.accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    placed = {
        "accelerator": kind,
        "devices": [int(number)] if number and kind != "cpu" else devices or 1,
        "num_nodes": nodes or 1,
    }
    try:
        return make(placed, (devices or 1) * (nodes or 1) > 1)
    except (ValueError, RuntimeError, AssertionError) as error:  # among them Lightning's own
        said = " ".join(str(error).split())[:300]
        raise PrunexError(f"--device, --accelerator, --devices or --num_nodes cannot be used: {said}") from error


def predict(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
    """Run a Trainer's prediction; Ctrl-C is a KeyboardInterrupt, which Lightning makes an exit of."""
    before = signal.getsignal(signal.SIGINT)
    interrupted = _Interrupted()
    trainer.callbacks.append(interrupted)  # type: ignore[attr-defined]
    try:
        trainer.predict(module, datamodule=data, return_predictions=False)
    except SystemExit:
        if not interrupted.yes:
            raise
        raise KeyboardInterrupt from None
    finally:
        # Lightning leaves Ctrl-C without effect after the first.
        signal.signal(signal.SIGINT, before)


class _Interrupted(Callback):
    yes = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.yes = isinstance(exception, KeyboardInterrupt)


def first_says(trainer: Trainer | Fabric, make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; where it is refused there, the others leave without a word."""
    result: Any = None
    if trainer.is_global_zero:
        try:
            result = make()
        except PrunexError as error:
            result = error
    result = trainer.strategy.broadcast(result)
    if not isinstance(result, PrunexError):
        return result
    if trainer.is_global_zero:
        raise result
    raise SystemExit(2)


def in_turn(fabric: Fabric, parts: Sequence[T], make: Callable[[T], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all parts in order, each made by one of the processes; of tensors that all parts have."""
    mine = [make(part) for part in parts[fabric.global_rank :: fabric.world_size]]
    every: list[Any] = [mine] * fabric.world_size
    if fabric.world_size > 1:
        all_gather_object(every, mine)
    ordered: list[dict[str, Tensor]] = []
    for turn in zip_longest(*every):
        ordered += [rows for rows in turn if rows is not None]
    return joined(ordered)


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several parts one after another, by the names that all of these have."""
    whole = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts if name in part]
        if len(tensors) == len(parts):
            whole[name] = torch.cat(tensors)
    return whole


def check_terminated(trainer: Trainer) -> None:
    """Leave where the process was told to: Lightning notes it, and looks at it in training alone."""
    if trainer._signal_connector.received_sigterm:
        raise SIGTERMException


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says of devices that are there, tips, and numbers of images."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Images have numbers of our own, which go with them.
            warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")  # Lightning's own business
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
