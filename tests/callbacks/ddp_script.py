"""One training by two processes on the CPU; run as a script by ``test_ddp.py`` with a folder and a method."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import prunex
from prunex.callbacks import KeptTokenMonitor, MaskPruning, RelevancyMonitor, SlimExport, TokenPruning, UnitMonitor
from tests.callbacks.modules import Plain, csv_logger, loader, trainer

OPTIONS = {"patch_slimming": {"options": {"tolerance": 0.3, "step": 3, "epochs": 1, "learning_rate": 1e-3}}}


UNITS = {"masks": 0.25, "thresholds": 0.25, "threshold_lr": 0.6}


def units(folder, method):
    """MaskPruning in two processes: gates stay hard to the end, and both processes chose the same."""
    options = UNITS if method == "xpruner" else {}
    callbacks = [MaskPruning(method, budget=0.6, **options), UnitMonitor(images=2), SlimExport(formats=[])]
    told = {"strategy": "ddp", "devices": 2, "max_epochs": 4, "logger": csv_logger(folder)}
    run = trainer(folder, *callbacks, **told)
    module = Plain(seed=1)
    run.fit(module, loader(), loader(8))
    handle = prunex.attached(module, units=True)
    state = {n: p.detach() for n, p in module.state_dict().items()}
    told = {"state": state, "removed": handle.removed, "log_dir": str(run.log_dir), "macs": prunex.cost(module).macs}
    torch.save(told, Path(folder) / f"rank{run.global_rank}.pt")


def main(folder, method):
    torch.set_num_threads(1)
    if method in ("xpruner", "taylor"):
        units(folder, method)
        return
    callbacks = [
        TokenPruning(method, **OPTIONS.get(method, {"keep_ratio": 0.6}), backbone_lr_scale=0.5),
        KeptTokenMonitor(images=3),
        RelevancyMonitor(images=3),
        SlimExport(monitor="val_loss", mode="min", formats=[]),
        ModelCheckpoint(monitor="val_loss", save_top_k=1),
    ]
    run = trainer(
        folder,
        *callbacks,
        strategy="ddp",
        devices=2,
        max_epochs=2,
        logger=csv_logger(folder),
        enable_checkpointing=True,
        num_sanity_val_steps=1,
    )
    torch.manual_seed(run.local_rank)  # predictors start differently: DDP must bring them together
    module = Plain()
    run.fit(module, loader(), loader(8))
    state = {n: p.detach() for n, p in module.named_parameters()}
    kept = prunex.attached(module).pruner.state_dict().get("kept", torch.zeros(0))
    torch.save({"state": state, "kept": kept, "log_dir": str(run.log_dir)}, Path(folder) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
