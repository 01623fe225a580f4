"""TokenPruning calibrates what looks at images before it decides: once, on training data, the same in every process."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex import PrunexError
from prunex.callbacks import KeptTokenMonitor, SlimExport, TokenPruning, load_from_checkpoint
from prunex.pruners.patch_slimming import PatchSlimming
from tests.callbacks.modules import Plain, Seeded, csv_logger, data, loader, metrics, snapshot, trainer

OPTIONS = {"tolerance": 0.3, "step": 3, "epochs": 1, "learning_rate": 1e-3, "calibration_images": 10}


def slimming(**more):
    return TokenPruning("patch_slimming", options=OPTIONS | more)


class Count:
    """How often a pruner was calibrated, and on what."""

    def __init__(self, monkeypatch):
        self.seen = []
        real = PatchSlimming.calibrate

        def calibrate(pruner, model, images, **options):
            images = list(images)
            self.seen.append(images)
            return real(pruner, model, images, **options)

        monkeypatch.setattr(PatchSlimming, "calibrate", calibrate)


def test_it_calibrates_as_one_would_by_hand_and_then_trains(tmp_path):
    module, by_hand = Plain(), Plain()
    started = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            started.append(snapshot(pl_module))

    trainer(tmp_path, slimming(), Look()).fit(module, loader())
    pruning = prunex.attach(by_hand, "patch_slimming", **OPTIONS)
    pruning.calibrate(data()[0][:12].split(4))
    found = prunex.attached(module)
    assert found.spec == pruning.spec
    assert 0 < found.counts()[-1] < 16
    assert all(torch.equal(started[0][n], p) for n, p in snapshot(by_hand).items())
    assert not torch.equal(snapshot(module)["net.backbone.0.head.weight"], started[0]["net.backbone.0.head.weight"])


def test_the_training_draws_the_numbers_it_would_have_drawn(tmp_path):
    drawn = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drawn.append(torch.rand(1).item())

    for callback in (slimming(), TokenPruning("topk", keep_ratio=0.6)):
        torch.manual_seed(3)
        trainer(tmp_path, callback, Look(), limit_train_batches=2).fit(Plain(), loader())
    assert drawn[:2] == drawn[2:]


def test_once_and_not_again_after_a_checkpoint(tmp_path, monkeypatch):
    whole = Seeded(optimiser="adamw", lr=1e-3)
    trainer(tmp_path, slimming(), max_epochs=3).fit(whole, loader())
    count = Count(monkeypatch)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    first = Seeded(optimiser="adamw", lr=1e-3)
    trainer(tmp_path, slimming(), saver, max_epochs=3, enable_checkpointing=True).fit(first, loader())
    assert len(count.seen) == 1
    path = tmp_path / "epoch=1.ckpt"
    resumed = Seeded(optimiser="adamw", lr=1e-3)
    trainer(tmp_path, slimming(), max_epochs=3).fit(resumed, loader(), ckpt_path=path)
    assert len(count.seen) == 1
    wanted = snapshot(whole)
    assert all(float((p - wanted[n]).abs().max()) < 1e-6 for n, p in snapshot(resumed).items())
    opened = load_from_checkpoint(Plain, path)
    assert prunex.attached(opened).options["keep"] == prunex.attached(whole).options["keep"]
    trainer(tmp_path, slimming()).fit(opened, loader())  # sets are there: nothing to look for
    assert len(count.seen) == 1


def test_sets_that_were_given_are_not_looked_for(tmp_path, monkeypatch):
    count = Count(monkeypatch)
    keep = [list(range(12)), list(range(8)), [1, 2]]
    module = Plain()
    trainer(tmp_path, TokenPruning("patch_slimming", options={"keep": keep})).fit(module, loader())
    assert prunex.attached(module).options["keep"] == keep
    trainer(tmp_path, slimming()).validate(Plain(), loader(), verbose=False)  # nothing trains, nothing is looked for
    assert not count.seen


def test_a_run_logs_and_exports_what_was_found(tmp_path):
    callbacks = [slimming(), KeptTokenMonitor(images=3), SlimExport(formats=[])]
    module = Plain()
    run = trainer(tmp_path, *callbacks, logger=csv_logger(tmp_path), num_sanity_val_steps=1)
    run.fit(module, loader(), loader(8))
    counts = prunex.attached(module).counts()
    logged = metrics(run.log_dir)
    for stage, count in enumerate(counts):
        assert logged[f"prunex/keep_ratio_stage{stage + 1}"] == pytest.approx([count / 16])
        assert logged[f"prunex/val_keep_ratio_stage{stage + 1}"] == pytest.approx([count / 16])
    small = prunex.load(tmp_path / "run" / "version_0" / "slim")
    assert prunex.attached(small).counts() == counts
    assert logged["prunex/gmacs"] == pytest.approx([prunex.cost(small).gmacs])


def test_batches_of_every_shape(tmp_path, monkeypatch):
    count = Count(monkeypatch)

    class Named(Plain):
        def training_step(self, batch, batch_idx):
            batch = batch if isinstance(batch, dict) else {"pair": batch[0]}
            batch = batch.get("pair", batch)
            return super().training_step([batch["x"], batch["y"]] if isinstance(batch, dict) else batch, batch_idx)

    x, y = data()
    dicts = DataLoader([{"y": b, "x": a} for a, b in zip(x, y, strict=True)], 4)
    trainer(tmp_path, slimming()).fit(Named(), dicts)
    trainer(tmp_path, slimming()).fit(Named(), CombinedLoader([loader()]))
    for images in count.seen:
        assert torch.equal(torch.cat(images)[:10], x[:10])

    class Blind(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no images")

    with pytest.raises(PrunexError, match=r"no images in the training batch \(list\): give batches that hold"):
        trainer(tmp_path, slimming()).fit(Blind(), DataLoader(TensorDataset(y.float(), y), 4))


def test_keep_ratio_is_no_option_of_it(tmp_path):
    assert "keep_ratio" not in TokenPruning("patch_slimming").options
    assert TokenPruning("evit").options == {"keep_ratio": 0.7}  # the method's own default
    with pytest.raises(PrunexError, match="keep_ratio"):
        TokenPruning("patch_slimming", keep_ratio=0.5)
