"""Monitors watch what enters the ViT in the real validation step, and answer as the module does."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex.callbacks import FaithfulnessMonitor, KeptTokenMonitor, RelevancyMonitor, TokenPruning
from prunex.callbacks.step_watch import StepWatch
from tests.callbacks.modules import Plain, csv_logger, data, loader, metrics, trainer


def maps(folder):
    with np.load(folder / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        return dict(found)


class InForward(Plain):
    """Normalises in its forward, and has three classes of its own."""

    def __init__(self):
        super().__init__()
        self.behind = nn.Linear(5, 3)

    def forward(self, x):
        return self.behind(super().forward(self.prepared(x)))

    @staticmethod
    def prepared(x):
        return (x - 0.5) / 0.25

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1] % 3)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1] % 3))


class InStep(InForward):
    """Resizes and normalises before its forward, which is called by name."""

    def forward(self, x):
        return self.behind(self.net["backbone"](x))

    @staticmethod
    def prepared(x):
        return F.interpolate((x - 0.5) / 0.25, (32, 32), mode="bilinear")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.forward(self.prepared(batch[0])), batch[1] % 3)

    def validation_step(self, batch, batch_idx):
        self.forward(self.prepared(batch[0]))


class AfterTransfer(Plain):
    """Prepares batches in a hook."""

    prepared = staticmethod(InForward.prepared)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.prepared(batch[0]), batch[1]


def large(size):
    return DataLoader(TensorDataset(*data(8, size)), 4)


@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize(("kind", "size"), [(InForward, 32), (InStep, 48), (AfterTransfer, 32)])
def test_what_entered_the_vit_is_watched(tmp_path, kind, size, pruner):
    module = kind()
    callbacks = [RelevancyMonitor(["generic_attention"], images=4)]
    callbacks += [] if pruner is None else [TokenPruning(pruner)]
    trainer(tmp_path, *callbacks).fit(module, large(size), large(size))
    module.eval()
    entered = kind.prepared(data(8, size)[0])[:4]
    given = data(8, size)[0][:4] if kind is InForward else entered
    e = prunex.explain("generic_attention", module, given)
    found = maps(tmp_path)
    assert np.allclose(found["relevance/generic_attention"], e.maps, atol=1e-6)
    assert found["predicted"].tolist() == module(given).argmax(1).tolist()
    assert found["target/generic_attention"].tolist() == found["predicted"].tolist()
    assert found["images"].shape == (4, 32, 32, 3)
    assert "forward" not in vars(module)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_kept_tokens_and_scores_of_the_whole_module(tmp_path):
    module = InForward()
    callbacks = [KeptTokenMonitor(4), FaithfulnessMonitor(["tokentm"], ["deletion"], images=4), TokenPruning("topk")]
    run = trainer(tmp_path, *callbacks, logger=csv_logger(tmp_path))
    run.fit(module, loader(8), loader(8))
    module.eval()
    x = data(8)[0][:4]
    folder = tmp_path / "run" / "version_0"
    assert maps(folder)["predicted"].tolist() == module(x).argmax(1).tolist()
    wanted = prunex.explain("tokentm", module, x)
    assert np.array_equal(maps(folder)["kept"][-1], wanted.trace.kept())
    assert "prunex/deletion/tokentm" in metrics(folder)


class Views(Plain):
    def validation_step(self, batch, batch_idx):
        for view in (batch[0], batch[0].flip(3)):
            self(view)


class AnotherModel(Plain):
    def validation_step(self, batch, batch_idx):
        copy.deepcopy(self)(batch[0])


class TwoOutputs(Plain):
    def forward(self, x):
        out = super().forward(x)
        return out, 2 * out

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Walks(Plain):
    def forward(self, x):
        v = self.vit
        return v.head(v.norm(v.blocks(v._pos_embed(v.patch_embed(x))))[:, 0])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Views, "a validation step runs the VisionTransformer 2 times"),
        (AnotherModel, "the validation step does not run the VisionTransformer"),
        (TwoOutputs, "RelevancyMonitor goes by the VisionTransformer alone: TwoOutputs gives several tensors"),
        (Walks, "Walks has no forward that calls its VisionTransformer"),
    ],
)
def test_steps_that_cannot_be_followed_are_told(tmp_path, kind, says):
    module = kind()
    with pytest.warns(UserWarning, match=says):
        trainer(tmp_path, RelevancyMonitor(["rollout"], images=4)).fit(module, loader(8), loader(8))
    wanted = prunex.explain("rollout", module.vit, data(8)[0][:4])
    assert np.allclose(maps(tmp_path)["relevance/rollout"], wanted.maps, atol=1e-6)


class Flat(Plain):
    """Two views of each image in one batch of twice the size."""

    def validation_step(self, batch, batch_idx):
        self(torch.cat([batch[0], batch[0].flip(3)]))


def test_labels_of_fewer_images_are_left_out(tmp_path):
    with pytest.warns(UserWarning, match=r"leaves labels \[4\] out: \[8, 3, 32, 32\] entered the VisionTransformer"):
        trainer(tmp_path, RelevancyMonitor(["rollout"], images=4)).fit(Flat(), loader(8), loader(8))
    assert "labels" not in maps(tmp_path)


class Grows(Plain):
    def on_train_epoch_start(self):
        self.vit.set_input_size(img_size=32 + 16 * self.current_epoch)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(self.sized(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self(self.sized(batch[0]))

    def sized(self, x):
        return F.interpolate(x, 32 + 16 * self.current_epoch)


def test_a_vit_that_takes_larger_images_is_watched_anew(tmp_path):
    trainer(tmp_path, RelevancyMonitor(["rollout"], images=4), max_epochs=2).fit(Grows(), loader(8), loader(8))
    for epoch, size in enumerate((4, 6)):
        with np.load(tmp_path / "maps" / f"epoch=00{epoch}.npz", allow_pickle=False) as found:
            assert found["relevance/rollout"].shape == (4, size, size)


def test_a_copy_made_while_looking_is_not_looked_at():
    module = Plain().eval()
    watch = StepWatch(module)
    copied = copy.deepcopy(module.vit)
    copied(data(2)[0])
    module(data(4)[0])
    watch.close()
    module(data(3)[0])
    assert [len(x) for x in watch.entered] == [4]
    assert watch.outermost()[0] == ""
    assert "forward" not in vars(module)


def test_what_is_called_from_outside_inwards():
    module = Plain().eval()
    watch = StepWatch(module)
    module.net["backbone"](data(2)[0])
    watch.close()
    name, given = watch.outermost()
    assert (name, len(given)) == ("net.backbone", 2)
