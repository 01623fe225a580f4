"""ExactResume and SafeCheckpointIO: somebody's own module goes on bit for bit, files are whole and run no code."""

import os
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

import prunex
from prunex import PrunexError
from prunex.callbacks import ExactResume, MaskPruning, SafeCheckpointIO, TokenPruning
from tests.callbacks.modules import Plain, csv_logger, data, loader, snapshot, trainer


class Augmented(Dataset):
    """Images with noise from torch in the main process or a worker, and from NumPy."""

    def __init__(self, images=12):
        self.images, self.labels = data(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = torch.randn(3, 32, 32) + float(np.random.rand())  # noqa: NPY002
        return self.images[index] + 0.1 * noise, self.labels[index]


class Dropping(Plain):
    """Adds noise of the process's own generator."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + 0.1 * torch.rand(()))


class Break(L.Callback):
    """Raises in the middle of an epoch."""

    def __init__(self, epoch, batch):
        self.moment = (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.moment:
            raise KeyError("broken")


def fit(folder, *callbacks, workers=0, checkpoint=None, seed=0, module=None, max_epochs=4, **kwargs):
    L.seed_everything(seed, verbose=False)
    module = Dropping(optimiser="adamw", lr=1e-3) if module is None else module
    loaders = DataLoader(
        Augmented(), 4, shuffle=True, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    run = trainer(
        folder,
        ExactResume(),
        *callbacks,
        max_epochs=max_epochs,
        logger=csv_logger(folder),
        enable_checkpointing=True,
        plugins=[SafeCheckpointIO()],
        **kwargs,
    )
    run.fit(module, loaders, loader(8), ckpt_path=checkpoint)
    return module, run


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("moment", [(1, 0), (3, 1)])
def test_the_order_and_noise_of_an_epoch_are_its_own(tmp_path, workers, moment):
    whole, first = fit(tmp_path / "whole", workers=workers)
    with pytest.raises(KeyError, match="broken"):
        fit(tmp_path / "parts", Break(*moment), workers=workers)
    last = tmp_path / "parts" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    # another seed: what the run began with is in the checkpoint
    again, second = fit(tmp_path / "again", workers=workers, checkpoint=last, seed=7)
    wanted = snapshot(whole)
    assert all(torch.equal(p, wanted[n]) for n, p in again.named_parameters())
    texts = [(tmp_path / name / "run" / "version_0" / "metrics.csv").read_text() for name in ("whole", "again")]
    assert texts[0] == texts[1]
    assert first.callback_metrics.keys() == second.callback_metrics.keys()


def test_a_finished_run_can_be_made_longer(tmp_path):
    _, run = fit(tmp_path / "a")
    last = tmp_path / "a" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    module = Dropping(optimiser="adamw", lr=1e-3)
    longer = trainer(
        tmp_path / "b", ExactResume(), max_epochs=6, enable_checkpointing=True, plugins=[SafeCheckpointIO()]
    )
    longer.fit(module, DataLoader(Augmented(), 4, shuffle=True), loader(8), ckpt_path=last)
    assert (run.current_epoch, longer.current_epoch) == (4, 6)
    assert longer.global_step == 18


def test_one_file_between_epochs_and_no_other(tmp_path):
    _, run = fit(tmp_path)
    assert [p.name for p in (tmp_path / "run" / "version_0" / "checkpoints").iterdir()] == ["last.ckpt"]
    found = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert found["global_step"] == 12
    fit(tmp_path / "with", ModelCheckpoint(monitor="val_loss", filename="best"))
    names = {p.name for p in (tmp_path / "with" / "run" / "version_0" / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt"}


def test_every_n_epochs(tmp_path):
    seen = []

    class Watch(ExactResume):
        def _save(self, trainer):
            seen.append(trainer.current_epoch)
            super()._save(trainer)

    run = trainer(tmp_path, Watch(every_n_epochs=2), max_epochs=5, enable_checkpointing=True)
    run.fit(Plain(), loader(), loader(8))
    assert seen == [2, 4, 5]
    with pytest.raises(PrunexError, match="every_n_epochs=0"):
        ExactResume(every_n_epochs=0)


def test_a_checkpoint_of_other_options_is_refused_and_they_are_named(tmp_path):
    _, _ = fit(tmp_path / "a", TokenPruning("evit", keep_ratio=0.7, stages=[1]))
    last = tmp_path / "a" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    wanted = r"written with other options: keep_ratio=0.7 \(now 0.5\), stages=\[1\] \(now \[1, 2\]\); ask for"
    with pytest.raises(PrunexError, match=wanted):
        fit(tmp_path / "b", TokenPruning("evit", keep_ratio=0.5, stages=[1, 2]), checkpoint=last)
    with pytest.raises(PrunexError, match=r"method='evit' \(now 'topk'\)"):
        fit(tmp_path / "c", TokenPruning("topk", keep_ratio=0.7, stages=[1]), checkpoint=last)
    other = Dropping(optimiser="adamw", lr=1e-3)
    other.net["backbone"][0].blocks = other.net["backbone"][0].blocks[:1]
    with pytest.raises(PrunexError, match="weights do not fit this model: .*blocks.1"):
        fit(tmp_path / "d", checkpoint=last, module=other)
    _, run = fit(tmp_path / "e", MaskPruning("magnitude", budget=0.7))
    last = tmp_path / "e" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    with pytest.raises(PrunexError, match=r"budget=0.7 \(now 0.5\)"):
        fit(tmp_path / "f", MaskPruning("magnitude", budget=0.5), checkpoint=last)


def test_a_later_format_is_refused(tmp_path):
    fit(tmp_path / "a", TokenPruning("evit", keep_ratio=0.7, stages=[1]))
    last = tmp_path / "a" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    told = torch.load(last, weights_only=True)
    for version in (2, "1", None, True):
        torch.save(told | {"prunex": told["prunex"] | {"version": version}}, last)
        with pytest.raises(PrunexError, match=f"has prunex format {version!r}: this prunex reads up to 1"):
            fit(tmp_path / "b", TokenPruning("evit", keep_ratio=0.7, stages=[1]), checkpoint=last)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PRUNEX_TEST_CANARY"],))


def test_reading_runs_no_code_and_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEX_TEST_CANARY", str(tmp_path / "canary"))
    path = tmp_path / "x.ckpt"
    for content in (pickle.dumps(Bomb()), b"", b"text", pickle.dumps({"state_dict": {}, "a": Bomb()})):
        path.write_bytes(content)
        with pytest.raises(PrunexError, match="x.ckpt is no checkpoint that loads safely"):
            fit(tmp_path / "run", checkpoint=path)
    torch.save({"state_dict": {}, "code": Bomb()}, path)
    with pytest.raises(PrunexError, match="x.ckpt is no checkpoint that loads safely"):
        fit(tmp_path / "run", checkpoint=path)
    with pytest.raises(PrunexError, match="there is no checkpoint at"):
        fit(tmp_path / "run", checkpoint=tmp_path / "nothing.ckpt")
    torch.save([1], path)
    with pytest.raises(PrunexError, match="is no checkpoint: it holds a list"):
        SafeCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = SafeCheckpointIO()
    checkpoints.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")

    def full(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(PrunexError, match="cannot write .*x.ckpt: .*PytorchStreamWriter.*; the checkpoint before it"):
        checkpoints.save_checkpoint({"a": 2}, tmp_path / "x.ckpt")
    assert checkpoints.load_checkpoint(tmp_path / "x.ckpt") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_the_modules_own_methods_come_back(tmp_path):
    module, _ = fit(tmp_path, TokenPruning("evit", keep_ratio=0.7, stages=[1]))
    assert not {"on_load_checkpoint", "load_state_dict", "training_step"} & set(vars(module))
    with pytest.raises(KeyError):
        fit(tmp_path, Break(0, 1), module=module)
    assert not {"on_load_checkpoint", "load_state_dict", "training_step"} & set(vars(module))
    assert isinstance(module, nn.Module)


@pytest.mark.parametrize(
    "pruning",
    [
        ("patch_slimming", {"options": {"calibration_images": 4}}),  # finds ``keep``
        ("evit", {"keep_ratio": 0.7, "stages": [1], "options": {"count": "adaptive"}}),  # finds ``expected``
    ],
)
def test_what_a_method_found_out_is_no_option_that_differs(tmp_path, pruning):
    method, options = pruning
    fit(tmp_path / "a", TokenPruning(method, **options), max_epochs=2)
    last = tmp_path / "a" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    module, _ = fit(tmp_path / "b", TokenPruning(method, **options), checkpoint=last, max_epochs=2)
    told = torch.load(last, weights_only=True)["prunex"]["pruning"]
    assert told.get("keep") is not None or told.get("expected") is not None
    fresh = Dropping(optimiser="adamw", lr=1e-3)
    validated = trainer(tmp_path, TokenPruning(method, **options))
    validated.validate(fresh, loader(8), ckpt_path=last, verbose=False)
    assert prunex.attached(fresh).counts() == prunex.attached(module).counts()
