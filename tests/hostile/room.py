"""Where hostile cases are tried: good things to spoil, canaries, and the judge of how each case ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import prunex
from prunex import PrunexError
from prunex.learned.diffmask import DiffMaskExplainer
from prunex.learned.vit_shapley import ShapleyExplainer
from prunex.recipes import ImageClassifier
from prunex.recipes.commands import cli
from tests.vits import tiny

LABELS = ["ant", "<script>alert(1)</script>", "../../up", "{{ 7*7 }}", "${oc.env:HOME}"]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


class Broken(Exception):
    """A case that ended otherwise than in success or one line."""


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Room:
    """A folder with good things in ``good/``; a case spoils copies in ``work/`` and may write nowhere else.

    Attributes:
        canary: What no case may make.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.good, self.work, self.canary = root, root / "good", root / "work", root / "canary"
        self.good.mkdir(parents=True)
        torch.set_num_threads(1)
        model = tiny()
        prunex.attach(model, "topk", keep_ratio=0.6)
        prunex.save(prunex.slim(model), self.good / "slim", labels=LABELS, mean=[0.4] * 3, std=[0.3] * 3)
        ShapleyExplainer(tiny()).save(self.good / "vit_shapley")
        DiffMaskExplainer(tiny()).save(self.good / "diffmask")
        self.model, self.images = prunex.load(self.good / "slim"), torch.randn(2, 3, 32, 32)
        self._weights()
        self._pictures()
        self._run()
        self.before = self._outside()
        self.fresh()

    def _weights(self) -> None:
        module = ImageClassifier("vit_tiny_patch16_224", 5, SMALL)
        state = {k: v.contiguous() for k, v in module.model.state_dict().items()}
        told = {"architecture": "vit_tiny_patch16_224", "model_args": '{"img_size": 32, "patch_size": 8, '
                '"embed_dim": 48, "depth": 4, "num_heads": 3}'}  # fmt: skip
        save_file(state, self.good / "weights.safetensors", metadata=told)
        hyper = dict(module.hparams)
        plain = {"state_dict": module.state_dict(), "hyper_parameters": hyper, "pytorch-lightning_version": "2.6.0"}
        torch.save(plain, self.good / "dense.ckpt")
        prunex.attach(module.model, "topk", keep_ratio=0.6)
        told = {"version": 1, "path": "model", "pruning": prunex.attached(module.model).spec, "progress": 1.0}
        torch.save(plain | {"state_dict": module.state_dict(), "prunex": told}, self.good / "pruned.ckpt")

    def _pictures(self) -> None:
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                for top, mode in ((split, "RGB"), (f"masks/{split}", "L")):
                    folder = self.good / "photos" / top / name
                    folder.mkdir(parents=True)
                    shape = (40, 48, 3) if mode == "RGB" else (40, 48)
                    Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / "a.png")

    def _run(self) -> None:
        run = self.good / "run" / "version_0"
        (run / "maps").mkdir(parents=True)
        shutil.copytree(self.good / "slim", run / "slim")
        rng = np.random.default_rng(0)
        for epoch in range(2):
            np.savez(
                run / "maps" / f"epoch={epoch:03d}.npz",
                images=rng.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8), labels=np.array([0, 1]),
                masks=rng.random((2, 32, 32)) > 0.5, predicted=np.array([0, 1]), kept=rng.random((3, 2, 4, 4)) > 0.3,
                share=rng.random((2, 4, 4)).astype(np.float32),
                **{"relevance/tokentm": rng.random((2, 4, 4)), "target/tokentm": np.array([0, 1])},
            )  # fmt: skip
        (run / "metrics.csv").write_text("step,epoch,train_loss,val_accuracy\n0,0,1.5,\n1,0,,0.5\n2,1,1.0,0.7\n")
        (run / "units.csv").write_text("epoch,block,head,class,relevance,kept,updates\n0,0,0,0,0.5,True,4\n")
        rows = [{"model": "dense", "accuracy": 0.9, "gmacs": 1}]
        speed = [{"runtime": "torch", "batch": 1, "models": [{"model": "dense", "images_per_s": 5}]}]
        (run / "summary.json").write_text(json.dumps({"machine": "x", "rows": rows}))
        (run / "bench.json").write_text(json.dumps({"machine": "x", "rows": rows, "speed": speed}))
        (run / "score").mkdir()
        (run / "score" / "scores.csv").write_text(
            "model,method,metric,group,higher_is_better,mean,low,high,images,seconds_per_image,forwards_per_image\n"
            "dense,rollout,deletion,faithfulness,False,0.2,0.1,0.3,9,0.1,1\n"
        )
        (run / "config.yaml").write_text(
            "model:\n  class_path: prunex.recipes.ImageClassifier\n  init_args:\n"
            "    {architecture: vit_tiny_patch16_224, num_classes: 5, model_args: {img_size: 32, patch_size: 8, "
            "embed_dim: 48, depth: 4, num_heads: 3}}\ndata:\n  class_path: prunex.recipes.DigitScenes\n"
            "  init_args: {val_size: 4, train_size: 4, image_size: 32, min_digit: 22, max_digit: 30}\n"
        )

    def _outside(self) -> dict[str, int]:
        found = (p for p in self.root.rglob("*") if not p.is_relative_to(self.work))
        return {str(p): p.lstat().st_mtime_ns for p in found if p.is_file()}

    def fresh(self) -> Path:
        """An empty ``work/``, which the process is in."""
        os.chdir(self.root)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        os.chdir(self.work)
        return self.work

    def copy(self, name: str) -> Path:
        """A copy of one of the good things in ``work/``."""
        source = self.good / name
        target = self.work / source.name
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target))

    def judge(self, case: Callable[[], object]) -> bool:
        """Whether a case succeeded; False where it ended in one ``PrunexError`` of one line.

        Raises:
            Broken: For anything else, a canary, or something written outside ``work/``.
        """
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                case()
            fine = True
        except PrunexError as error:
            fine = False
            if "\n" in str(error) or not str(error) or len(str(error)) > 6000:
                raise Broken(f"{len(str(error))} letters or several lines: {str(error)[:300]!r}") from error
        except Broken:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Broken("".join(traceback.format_exception(error)[-6:])) from error
        self.check()
        return fine

    def check(self) -> None:
        """No canary sang, nothing outside was touched, and no draft was left."""
        if self.canary.exists() or "tests.hostile.evil" in sys.modules:
            raise Broken("code from data was run")
        if self._outside() != self.before:
            raise Broken("something was written outside the chosen folder")
        drafts = [str(p) for p in self.work.rglob(".*") if p.is_file() or p.name.startswith(".slim")]
        if drafts:
            raise Broken(f"drafts were left: {drafts[:3]}")

    def command(self, arguments: list[str]) -> None:
        """A command line in this process, as a user sees it.

        Raises:
            PrunexError: Where it ended in one line and exit code 2.
            Broken: Where it ended otherwise than so, or in 0.
        """
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        said = err.getvalue()
        if code == 0:
            return
        last = (said.strip().splitlines() or [""])[-1]
        if code != 2 or not last.startswith("prunex: error: ") or "Traceback" in said:
            raise Broken(f"exit code {code}: {said[-1500:]}")
        if said.count("prunex: error: ") != 1:
            raise Broken(f"several errors: {said[-1500:]}")
        raise PrunexError(last)


def chosen(rng: random.Random, *values):
    """One of the values."""
    return rng.choice(values)
