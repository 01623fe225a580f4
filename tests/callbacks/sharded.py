"""Trainings by processes that hold a part of every weight each; run as a script by ``test_sharded.py``.

As a script: ``python -m tests.callbacks.sharded FOLDER CASE,CASE OPTIONS``, as ``tests/callbacks/parallel.py``.
"""

import contextlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import prunex
from prunex import PrunexError
from prunex.callbacks import (
    ExactResume,
    HeadMonitor,
    KeptTokenMonitor,
    MaskPruning,
    RelevancyGuidance,
    RelevancyMonitor,
    SlimExport,
    TokenPruning,
)
from tests.callbacks.modules import Plain, csv_logger, loader, trainer
from tests.callbacks.parallel import TRAINED, Counted, Watcher, head, train, watch
from tests.callbacks.test_exact_resume import Break
from tests.callbacks.test_resume_in_epoch import Stateful, Steps
from tests.vits import tiny

SCRIPT = "tests.callbacks.sharded"
TRAINED["slow"] = lambda: [TokenPruning("dynamicvit", keep_ratio=0.6, backbone_lr_scale=0.1, freeze_backbone=0.4)]
TRAINED["magnitude"] = lambda: [MaskPruning("magnitude", budget=0.6, remove=False)]


def cuts(count, parts=False):
    """A strategy by which so many processes hold a part of every weight each."""
    return ModelParallelStrategy(count, 1, save_distributed_checkpoint=parts)


def cut(module, *roots):
    """Shard each block, then the roots."""
    mesh = module.device_mesh
    if mesh is None or isinstance(roots[-1], FSDPModule):
        return
    for part in (*module.vit.blocks, *roots):
        fully_shard(part, mesh=mesh["data_parallel"])


class Cut(Plain):
    """Made in ``__init__``, sharded where Lightning wants it."""

    def configure_model(self):
        cut(self, self.vit)


class Nested(Plain):
    """The same in two groups, so that the ViT's own is let go of behind its forward."""

    def configure_model(self):
        cut(self, self.vit, self)


class CutCounted(Counted):
    def configure_model(self):
        cut(self, self.vit)


class Made(Plain):
    """Makes and shards its ViT where Lightning wants it."""

    first = None  # what is attached before that

    def __init__(self, **options):
        super().__init__(**options)
        del self.net["backbone"]

    def configure_model(self):
        if "backbone" not in self.net:
            self.net["backbone"] = nn.Sequential(tiny(seed=0))
            if self.first is not None:
                prunex.attach(self.vit, self.first, keep_ratio=0.6)
            cut(self, self.vit)


class First(Made):
    first = "evit"


def said(folder, *callbacks, make=Cut, **options):
    """What is said of a training that is refused."""
    own = options | {"strategy": cuts(options["devices"])}  # a strategy serves one Trainer
    try:
        trainer(folder, *callbacks, **own).fit(make(lr=0.02), loader(4))
    except PrunexError as error:
        return str(error)
    return ""


def refused(folder, **options):
    """What cannot work with sharded weights, in each process's words."""
    cases = {
        "late": ([TokenPruning("evit")], Made),
        "guidance": ([RelevancyGuidance("rollout")], Made),
        "self": ([TokenPruning("evit"), RelevancyGuidance("rollout", judge="self")], Cut),
        "diffrate": ([TokenPruning("diffrate")], Cut),
        "patch_slimming": ([TokenPruning("patch_slimming")], Cut),
        "corrected": ([MaskPruning("magnitude", correct="bias")], Cut),
        "units": ([MaskPruning("xpruner"), RelevancyGuidance("rollout")], Cut),
        "explainer": ([RelevancyMonitor(["attention_flow"], options={"attention_flow": {"max_tokens": 4}})], Cut),
    }
    return {name: said(folder, *given, make=make, **options) for name, (given, make) in cases.items()}


def by_hand(folder, **options):
    """Doors of the core with a sharded module, and what its copy gives."""
    found = {}
    module = Cut(lr=0.02)
    before = prunex.attach(module, "evit", keep_ratio=0.6)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    plain = module.eval()(images)
    trainer(folder, max_steps=0, **options).fit(module, loader(4))
    assert isinstance(module.vit, FSDPModule)
    doors = {
        "attach": lambda: prunex.attach(module, "magnitude"),
        "explain": lambda: prunex.explain("rollout", module, images),
        "slim": lambda: prunex.slim(module),
        "calibrate": lambda: before.calibrate(images),
    }
    for name, door in doors.items():
        try:
            door()
        except PrunexError as error:
            found[name] = str(error)
    module.eval()
    with torch.no_grad():
        found["same"] = torch.equal(module(images), plain)
    copied = prunex.whole(module)
    found["none"] = copied is None
    if copied is not None:
        found["copied"] = torch.equal(copied(images), plain)
        found["maps"] = prunex.explain("rollout", copied, images).maps
        found["kinds"] = sorted({type(p).__name__ for p in copied.state_dict().values()})
        found["left"] = [n for m in copied.modules() for n in vars(m) if "fsdp" in n or "composable" in n]
        assert not isinstance(copied.vit, FSDPModule)
    return found


def tree(folder, **options):
    """A tree that is watched, and measured in each validation."""
    run = trainer(
        folder, head("vit_net"), HeadMonitor(images=3), max_epochs=2, logger=csv_logger(folder),
        num_sanity_val_steps=1, **options,
    )  # fmt: skip
    with Watcher() as watcher:
        run.fit(Cut(lr=0.02), loader(8), loader(8, 4, seed=8))
    return {"called": watcher.called, "inside": watcher.inside, "ran": watcher.ran, "folder": str(run.log_dir)}


def slim(folder, **options):
    """A slim model at the end and at the best epoch."""
    evit = TokenPruning("evit", keep_ratio=0.6)
    best = SlimExport(str(Path(folder) / "best"), monitor="val_loss", mode="min", formats=[])
    run = trainer(folder, evit, SlimExport(str(folder), formats=[]), best, max_epochs=2, **options)
    make = Cut if options else Plain
    run.fit(make(lr=0.02), loader(8, 4 if options else 8), loader(8, 8, seed=8))
    return {"best": best.best}


def broken(folder, **options):
    """Process 0 fails alone while it watches: the others end too, and soon."""

    class Fails(KeptTokenMonitor):
        def watch(self, *_):
            raise RuntimeError("no picture today")

    begun, told = time.monotonic(), ""
    try:
        trainer(folder, Fails(images=2), **options).fit(Cut(lr=0.02), loader(4), loader(4))
    except Exception as error:  # the others raise prunex's own
        told = f"{type(error).__name__}: {error}"
    return {"said": told, "seconds": time.monotonic() - begun}


def checkpoint(folder, epochs=1, start=None, make=Cut, **options):
    """An epoch with an optimiser that remembers, written whole or in parts, or gone on with."""
    way = "own" if options.get("strategy") else "parts"
    save = Path(folder) / "end.ckpt"
    make = partial(make, optimiser="momentum")
    return train(folder, "dynamicvit", way, make=make, epochs=epochs, start=start, save=save, **options)


def inside(folder, **options):
    """A training that broke inside an epoch and went on there, beside one that nothing happened to."""
    parts = options.pop("strategy")._save_distributed_checkpoint

    def fit(name, *callbacks, seed=0, checkpoint=None):
        L.seed_everything(seed, verbose=False)
        module, steps = Cut(optimiser="adamw", lr=1e-3), Steps()
        run = trainer(
            Path(folder) / name, ExactResume(every_n_steps=2), steps, TokenPruning("dynamicvit", keep_ratio=0.6),
            *callbacks, max_epochs=2, logger=csv_logger(Path(folder) / name), enable_checkpointing=True,
            strategy=cuts(options["devices"], parts), **options,
        )  # fmt: skip
        with contextlib.suppress(KeyError):
            run.fit(module, Stateful(), loader(8), ckpt_path=checkpoint)
        return {n: p.to_local().clone() for n, p in module.named_parameters() if isinstance(p, DTensor)}, steps.seen

    whole, seen = fit("whole")
    _, broken = fit("broken", Break(1, 5))
    last = Path(folder) / "broken" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    again, rest = fit("again", seed=7, checkpoint=str(last))
    same = all(torch.equal(value, again[name]) for name, value in whole.items())
    return {"same": same, "cut": len(whole), "seen": seen, "broken": broken, "rest": rest, "folder": last.is_dir()}


CASES = {
    "inside": inside,
    "refused": refused,
    "by_hand": by_hand,
    "watch": partial(watch, make=CutCounted),
    "tree": tree,
    "slim": slim,
    "broken": broken,
    "save": checkpoint,
    "go_on": lambda folder, **o: checkpoint(folder, 2, Path(folder).parent / "start.ckpt", **o),
    "first": partial(train, name="evit", make=First),
}


def case(folder, name, parts=False, strategy=None, **options):
    """A case by its name: one of those above, or "<pruner>", or "<pruner>#nested"."""
    count = options["devices"]
    options |= {"strategy": cuts(count, parts)}
    if name in ("save", "go_on", "first"):
        options |= {"count": count}
    if name in CASES:
        return CASES[name](folder, **options)
    method, _, nested = name.partition("#")
    return train(folder, method, make=Nested if nested else Cut, count=count, **options)


def main(folder, names, options):
    torch.set_num_threads(1)
    for name in names.split(","):
        result = case(str(Path(folder) / name), name, **json.loads(options))
        torch.save(result, Path(folder) / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort a process that ends as usual
