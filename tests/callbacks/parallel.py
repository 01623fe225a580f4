"""Trainings by one process or by several, and what each of them saw; run as a script by ``test_parallel.py``.

As a script: ``python -m tests.callbacks.parallel FOLDER CASE,CASE`` in every process, with Lightning's own environment
variables (LOCAL_RANK, NODE_RANK, MASTER_ADDR, MASTER_PORT). All cases run one after another in one process group.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import prunex
from prunex import PrunexError
from prunex.callbacks import (
    ExplainableHead,
    FaithfulnessMonitor,
    HeadMonitor,
    KeptTokenMonitor,
    MaskPruning,
    RelevancyGuidance,
    RelevancyMonitor,
    SlimExport,
    TokenPruning,
    UnitMonitor,
    finite,
)
from prunex.callbacks.layers import put_round
from prunex.handles.units import UnitPruning
from tests.callbacks.modules import Plain, csv_logger, data, trainer

ROOT = Path(__file__).parents[2]
BATCH, IMAGES, WINDOW = 2, 24, 2  # of one process: 3 optimiser steps an epoch
UNITS = {"masks": 0.34, "thresholds": 0.34, "threshold_lr": 0.6, "remove": False}

# Dropout draws by process; what is compared has none.
HEADS = {
    "concept_transformer": {"concepts": 2, "spatial": 3, "dropout": 0.0},
    "vit_net": {"depth": 2},
    "attributes": {"attributes": 3, "warmup": 0.0},
    "mean_patch": {},
}


def head(name):
    """A head whose random start is the same in every process."""
    return ExplainableHead(name, HEADS[name], lr_scale=1)


# What trains differently: how its callbacks are made.
TRAINED = {
    "dynamicvit": lambda: [TokenPruning("dynamicvit", keep_ratio=0.6)],
    "dynamicvit_adaptive": lambda: [TokenPruning("dynamicvit", keep_ratio=0.6, options={"count": "adaptive"})],
    "evit": lambda: [TokenPruning("evit", keep_ratio=0.6)],
    "topk": lambda: [TokenPruning("topk", keep_ratio=0.6)],
    "ia_red2": lambda: [TokenPruning("ia_red2", keep_ratio=0.6)],
    "diffrate": lambda: [TokenPruning("diffrate", keep_ratio=0.7, options={"target": 0.5}, lr_scale=5)],
    "diffmask": lambda: [TokenPruning("diffmask", keep_ratio=0.6, options={"count": "fixed", "layer": 2})],
    "xpruner": lambda: [MaskPruning("xpruner", budget=0.6, **UNITS)],
    "taylor": lambda: [MaskPruning("taylor", budget=0.6, images=BATCH, remove=False)],
    "concept_transformer": lambda: [TokenPruning("evit", keep_ratio=0.6), head("concept_transformer")],
    "vit_net": lambda: [TokenPruning("evit", keep_ratio=0.6), head("vit_net")],
    "attributes": lambda: [TokenPruning("evit", keep_ratio=0.6), head("attributes")],
    "mean_patch": lambda: [TokenPruning("evit", keep_ratio=0.6), head("mean_patch")],
    "guidance": lambda: [TokenPruning("evit", keep_ratio=0.6), RelevancyGuidance("rollout")],
    "unit_guidance": lambda: [MaskPruning("xpruner", budget=0.6, **UNITS), RelevancyGuidance("rollout")],
}
# Losses of these are means over images, so that two batches of two are one of four. That of unit_guidance is one over
# the images whose class has a mask that varies by then, which may be other numbers of them.
LINEAR = (
    "evit", "topk", "diffrate", "diffmask", "xpruner", "guidance", "concept_transformer", "vit_net", "attributes",
    "mean_patch",
)  # fmt: skip


class Losses(L.Callback):
    """Every loss that ``training_step`` returned in the end; add it last."""

    def setup(self, trainer, pl_module, stage):
        self.found = []

        def note(beneath, *args, **kwargs):
            output = beneath(*args, **kwargs)
            self.found.append(output.item())
            return output

        self.undo = put_round(pl_module, "training_step", note)

    def teardown(self, trainer, pl_module, stage):
        self.undo()


@contextlib.contextmanager
def drawn_by_image(module):
    """Every image's own draws, whichever process and batch it is in: by step, call and the image itself."""
    step = {"images": None, "call": 0}

    def begin(beneath, batch, *args, **kwargs):
        step.update(images=batch[0], call=0)
        return beneath(batch, *args, **kwargs)

    def uniform(like):
        step["call"] += 1
        rows = []
        for image in step["images"]:
            seed = int(image.double().abs().sum() * 1e6) + 7919 * step["call"]
            rows.append(torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows).clamp(1e-6, 1 - 1e-6)

    def gumbel_softmax(logits, tau=1.0, hard=False, dim=-1):
        soft = ((logits - (-uniform(logits).log()).log()) / tau).softmax(dim)
        index = soft.argmax(dim, keepdim=True)
        return torch.zeros_like(soft).scatter(dim, index, 1.0) - soft.detach() + soft

    def bernoulli(p):
        return (uniform(p) < p).to(p)

    real = F.gumbel_softmax, torch.Tensor.bernoulli
    F.gumbel_softmax, torch.Tensor.bernoulli = gumbel_softmax, bernoulli
    undo = put_round(module, "training_step", begin)
    try:
        yield
    finally:
        F.gumbel_softmax, torch.Tensor.bernoulli = real
        undo()


def batches(images, labels, way, rank, count=2):
    """The training batches of one process.

    ``way``: "own", this process's part, in order (Lightning's own sampler would shuffle); "parts", of one process: the
    parts of all ``count``, one batch after another; "whole", of one: as many images at once as all have together.
    """
    every = TensorDataset(images, labels)
    if way == "own":
        return DataLoader(every, BATCH, sampler=DistributedSampler(every, count, rank, shuffle=False))
    if way == "whole":
        return DataLoader(every, count * BATCH)
    rows = torch.arange(len(images)).view(-1, BATCH, count).transpose(1, 2).flatten()
    return DataLoader(TensorDataset(images[rows], labels[rows]), BATCH)


def train(
    folder, name, way="own", precision="32-true", make=Plain, count=2, epochs=2, start=None, save=None, **options
):
    """One training, from a checkpoint and into one where these are given; its losses, weights and steps."""
    window = {"own": WINDOW, "parts": count * WINDOW, "whole": WINDOW}[way]
    torch.manual_seed(1)
    module, losses = make(lr=0.02), Losses()
    run = trainer(
        folder,
        *TRAINED[name](),
        losses,
        max_epochs=epochs,
        accumulate_grad_batches=window,
        gradient_clip_val=1.0,
        precision=precision,
        **options,
    )
    images, labels = data(IMAGES)
    with drawn_by_image(module):
        run.fit(module, batches(images, labels, way, run.global_rank, count), ckpt_path=start)
    if save:
        run.save_checkpoint(save)
    gathered = prunex.whole(module)
    state = {} if gathered is None else {n: p.detach().clone() for n, p in gathered.state_dict().items()}
    return {"losses": torch.tensor(losses.found, dtype=torch.float64), "state": state, "steps": run.global_step}


# ------------------------------------------------------------------------------------------------- what runs only once

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "broadcast_object_list",
    "barrier", "monitored_barrier", "gather", "gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "scatter_object_list", "send", "recv",
)  # fmt: skip


class Watcher:
    """Which collectives were called, and which of them while something ran that rank zero runs alone."""

    def __init__(self):
        self.called, self.inside, self.ran, self.depth = [], [], [], 0
        self.undo = []

    def collective(self, name):
        real = getattr(dist, name)

        def call(*args, **kwargs):
            self.called.append(name)
            if self.depth:
                self.inside.append((self.ran[-1], name))
            return real(*args, **kwargs)

        self.put(dist, name, call)

    def alone(self, owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            self.ran.append(f"{getattr(owner, '__name__', owner)}.{name}")
            self.depth += 1
            try:
                return real(*args, **kwargs)
            finally:
                self.depth -= 1

        self.put(owner, name, call)

    def put(self, owner, name, value):
        self.undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __enter__(self):
        for name in COLLECTIVES:
            self.collective(name)
        for kind in (KeptTokenMonitor, RelevancyMonitor, UnitMonitor, FaithfulnessMonitor, HeadMonitor):
            self.alone(kind, "watch")
        for owner, name in ((prunex, "save"), (prunex, "export"), (prunex, "load"), (UnitPruning, "calibrate")):
            self.alone(owner, name)
        return self

    def __exit__(self, *_):
        for owner, name, value in reversed(self.undo):
            setattr(owner, name, value)


class Counted(Plain):
    """Notes what every validation batch of this process kept, to be averaged by the test."""

    def __init__(self, **options):
        super().__init__(**options)
        self.kept = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            pruning = prunex.attached(self)
            shares = torch.stack(pruning.trace.keep_ratios(), 1)
            self.kept.append([self.trainer.current_epoch, shares.tolist()])


def watch(folder, validation=9, sleep=0.0, make=Counted, **options):
    """A training with everything that writes or watches; 9 validation images: the last batches are uneven."""
    images, labels = data(IMAGES)
    masks = torch.zeros(validation, 32, 32, dtype=torch.bool)
    masks[:, :16, :16] = True
    x, y = data(validation, seed=8)
    pruning = TokenPruning("topk", options={"count": "adaptive", "threshold": 0.6})
    units = MaskPruning("xpruner", budget=0.5, masks=0.5, thresholds=0.25, threshold_lr=0.6)
    callbacks = [
        pruning,
        units,
        KeptTokenMonitor(images=3),
        RelevancyMonitor(["rollout"], images=3),
        UnitMonitor(images=3),
        FaithfulnessMonitor(["rollout"], ["deletion", "energy_inside", "corrected_overlap"], images=3),
        SlimExport(formats=["pt2"]),
        SlimExport(str(Path(folder) / "best"), monitor="val_loss", mode="min", formats=[]),
    ]
    module = make()

    class Slow(L.Callback):
        """The others wait for nobody who watches."""

        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.global_rank:
                time.sleep(sleep)

    with Watcher() as watcher:
        run = trainer(
            folder, *callbacks, Slow(), max_epochs=4, logger=csv_logger(folder), num_sanity_val_steps=1, **options
        )
        run.fit(
            module,
            DataLoader(TensorDataset(images, labels), BATCH),
            DataLoader(TensorDataset(x, y, masks), 4),
        )
    return {
        "called": watcher.called,
        "inside": watcher.inside,
        "ran": watcher.ran,
        "kept": module.kept,
        "folder": str(run.log_dir),
        "expected": list(pruning.pruning.options["expected"]),
        "updates": units.pruning.pruner.updates.tolist(),
    }


def uneven(folder, **options):
    """Two processes with other numbers of validation images each, which no sampler evens out."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    x, y = data(7 if rank else 3, seed=8 + rank)
    pruning = TokenPruning("topk", options={"count": "adaptive", "threshold": 0.6})
    module = Counted()
    images, labels = data(8)
    run = trainer(folder, pruning, use_distributed_sampler=False, logger=csv_logger(folder), **options)
    run.fit(module, DataLoader(TensorDataset(images, labels), BATCH), DataLoader(TensorDataset(x, y), 4))
    told = run.callback_metrics
    logged = {k: float(v) for k, v in told.items() if k.startswith("prunex/val_keep")}
    return {"kept": module.kept, "expected": list(pruning.pruning.options["expected"]), "logged": logged}


def tree(folder, **options):
    """A tree that is watched, in two processes with other numbers of validation images each."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    x, y = data(7 if rank else 3, seed=8 + rank)
    module, images = Plain(lr=0.02), data(8)
    callbacks = [head("vit_net"), HeadMonitor(images=3)]
    with Watcher() as watcher:
        run = trainer(
            folder, *callbacks, use_distributed_sampler=False, logger=csv_logger(folder), max_epochs=2,
            num_sanity_val_steps=1, **options,
        )  # fmt: skip
        run.fit(module, DataLoader(TensorDataset(*images), BATCH), DataLoader(TensorDataset(x, y), 4))
    handle = prunex.attached(module, head=True)
    controls = [(len(part), handle.controls(part, names)) for part, names in zip(x.split(4), y.split(4), strict=True)]
    return {
        "leaf": handle.read(x).leaf.tolist(),
        "controls": controls,
        "folder": str(run.log_dir),
        "called": watcher.called,
        "inside": watcher.inside,
        "ran": watcher.ran,
    }


def nan(folder, accumulate=2, **options):
    """Only one process has an image that is no image."""
    images, labels = data(16)
    images[9, 0, 0, 0] = float("nan")  # the second process's, in its third batch
    module = Plain(lr=0.02)
    run = trainer(folder, TokenPruning("dynamicvit"), accumulate_grad_batches=accumulate, **options)
    begun = time.monotonic()
    said = ""
    try:
        run.fit(module, DataLoader(TensorDataset(images, labels), BATCH))
    except PrunexError as error:
        said = str(error)
    whole = all(bool(p.isfinite().all()) for p in module.parameters())
    return {"said": said, "seconds": time.monotonic() - begun, "finite": whole, "steps": run.global_step}


def nan_late(folder, **options):
    """The same where flags are read one step later, as on an accelerator."""
    real, finite.later = finite.later, lambda tensor: True
    try:
        return nan(folder, accumulate=1, **options)
    finally:
        finite.later = real


class Around(Plain):
    """Goes through the blocks itself, where nothing prunes."""

    def forward(self, x):
        tokens = self.vit.norm(self.vit.blocks(self.vit._pos_embed(self.vit.patch_embed(x))))
        return self.vit.head(tokens[:, 0])


def around(folder, **options):
    """Every process trains the weights by another forward than the pruned one."""
    module = Around(lr=0.02)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    images, labels = data(16)
    run = trainer(folder, TokenPruning("evit", keep_ratio=0.6), **options)
    said = ""
    try:
        run.fit(module, DataLoader(TensorDataset(images, labels), BATCH))
    except PrunexError as error:
        said = str(error)
    still = all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    return {"said": said, "still": still, "steps": run.global_step}


CASES = {"watch": watch, "uneven": uneven, "tree": tree, "nan": nan, "nan_late": nan_late, "around": around}


def case(folder, name, **options):
    """A case by its name: one of those above, or "<pruner>" or "<pruner>@bf16-mixed"."""
    if name in CASES:
        return CASES[name](folder, **options)
    method, _, precision = name.partition("@")
    return train(folder, method, precision=precision or "32-true", **options)


def main(folder, names, options):
    torch.set_num_threads(1)
    for name in names.split(","):
        own = Path(folder) / name
        result = case(str(own), name, **json.loads(options))
        rank = dist.get_rank()
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")


def processes(folder, names, nodes=1, strategy="ddp", timeout=600, count=2, script="tests.callbacks.parallel", **more):
    """Run cases by two processes on one node, or on two nodes of one; {case: [what each process told]}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = {"strategy": strategy, "devices": count // nodes, "num_nodes": nodes, **more}
    command = [sys.executable, "-m", script, str(folder), ",".join(names), json.dumps(options)]
    running = []
    for rank in range(count):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "NODE_RANK": str(rank if nodes > 1 else 0),
            "LOCAL_RANK": str(0 if nodes > 1 else rank),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        out = open(Path(folder) / f"process{rank}.txt", "w")  # noqa: SIM115  (as long as the process)
        running.append((subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=out), out))
    end = time.monotonic() + timeout
    try:
        codes = [process.wait(max(1.0, end - time.monotonic())) for process, _ in running]
    finally:
        for process, out in running:
            process.kill()
            process.wait()
            out.close()
    said = [(Path(folder) / f"process{rank}.txt").read_text()[-3000:] for rank in range(count)]
    assert codes == [0] * count, "\n".join(said)
    return {n: [torch.load(Path(folder) / f"{n}-{r}.pt", weights_only=True) for r in range(count)] for n in names}


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # What was asked for is on disk; gloo's threads may abort a process that ends as usual.
    os._exit(0)
