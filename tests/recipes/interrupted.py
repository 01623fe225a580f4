"""Runs of ``prunex fit`` in a forked process, stopped at a chosen moment in a chosen way."""

import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback

from prunex.recipes.commands.cli import main

WHEN = "PRUNEX_TEST_INTERRUPT"  # "12 kill": at the twelfth hook; "0 none": count them
HOOKS = (
    "setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward",
    "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end", "on_validation_epoch_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
    "on_train_epoch_end", "on_save_checkpoint", "on_train_end", "on_fit_end", "teardown",
)  # fmt: skip


class Broken(Exception):
    """What an exception in somebody's callback is."""


class Interrupt(Callback):
    """Counts the hooks that come by, and at one of them ends the process, or breaks something."""

    def __init__(self):
        at, self.how = os.environ.get(WHEN, "-1 none").split(" ", 1)
        self.at, self.count = int(at), 0

    def come_by(self, name):
        self.count += 1
        if name == "teardown":
            print(f"hooks: {self.count}", flush=True)
        if self.count != self.at:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if self.how == "exception":
            raise Broken("a callback broke")
        if self.how == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


for name in HOOKS:
    setattr(Interrupt, name, lambda self, *args, name=name, **kwargs: self.come_by(name))


def fit(config, *more, when="-1 none", log=None):
    """``prunex fit`` in a process of its own: its exit code, -9 if it was killed; what it printed goes to ``log``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.environ[WHEN] = when
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            main(["fit", "--config", str(config), *more])
        except SystemExit as stop:
            code = 1 if stop.code is None or isinstance(stop.code, str) else int(stop.code)
        except KeyboardInterrupt:
            code = 130
        except Broken:
            code = 3
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def write_config(folder, callbacks, epochs=3, train=48, **data):
    """A config of a small digit run in a folder; the interrupting callback is among its callbacks."""
    config = {
        "model": {
            "class_path": "prunex.recipes.ImageClassifier",
            "init_args": {
                "architecture": "vit_tiny_patch16_224",
                "num_classes": 10,
                "model_args": {
                    "img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 3, "drop_path_rate": 0.1
                },
                "learning_rate": 1e-3,
                "from_scratch": True,
            },
        },
        "data": {
            "class_path": "prunex.recipes.DigitScenes",
            "init_args": {"batch_size": 16, "train_size": train, "val_size": 16, **data},
        },
        "trainer": {
            "max_epochs": epochs, "accelerator": "cpu", "devices": 1, "enable_model_summary": False,
            "enable_progress_bar": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "run"},
            },
            "callbacks": [{"class_path": "tests.recipes.interrupted.Interrupt"}, *callbacks],
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fit.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def hooks(log):
    """How many hooks came by in a run that nothing happened to."""
    return max(int(line.removeprefix("hooks: ")) for line in log.read_text().splitlines() if line.startswith("hooks: "))


def callback(name, **options):
    return {"class_path": f"prunex.callbacks.{name}", "init_args": options}


def same(found, wanted, where=""):
    """What differs between two values of a checkpoint, as paths."""
    if isinstance(wanted, dict):
        keys = set(wanted) ^ set(found)
        return [f"{where}.{k}: only in one" for k in keys] + [
            d for k in wanted if k in found for d in same(found[k], wanted[k], f"{where}.{k}")
        ]
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        if len(found) != len(wanted):
            return [f"{where}: {len(found)} and {len(wanted)} long"]
        return [d for i, pair in enumerate(zip(found, wanted, strict=True)) for d in same(*pair, f"{where}.{i}")]
    if isinstance(wanted, torch.Tensor):
        return [] if found.dtype == wanted.dtype and torch.equal(found, wanted) else [where]
    return [] if found == wanted or (found != found and wanted != wanted) else [f"{where}: {found} and {wanted}"]


def differences(run, whole):
    """What differs between the folders of two runs; wall-clock times and paths may."""
    run, whole = Path(run), Path(whole)
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (run, whole)]
    found = [f"{name}: only in one" for name in names[0] ^ names[1]]
    for name in sorted(names[0] & names[1]):
        a, b = run / name, whole / name
        if name.endswith(".npz"):
            with np.load(a) as x, np.load(b) as y:
                found += [f"{name}:{k}" for k in set(x) | set(y) if k not in x or not np.array_equal(x[k], y[k])]
        elif name.endswith(".ckpt"):
            found += [f"{name}{d}" for d in same(plain(a), plain(b))]
        elif name not in ("config.yaml", "summary.json", "report.html") and a.read_bytes() != b.read_bytes():
            found.append(name)
    return found


def plain(path):
    """What a checkpoint holds, without what tells of how it came about: counts of restarts, and paths."""
    told = torch.load(path, weights_only=True)
    told.pop("loops")
    return told
