"""KeptTokenMonitor: the share of the object that is kept, and models it has nothing to say about."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex.callbacks import KeptTokenMonitor, RelevancyMonitor, TokenPruning
from prunex.callbacks.kept_token_monitor import object_kept
from tests.callbacks.modules import Plain, csv_logger, data, loader, metrics, trainer
from tests.vits import tiny


def test_object_kept_by_hand():
    """A grid of 2 x 2 patches of 4 x 4 pixels."""
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :8] = True  # both upper patches
    masks[1, 3:5, 3:5] = True  # one pixel of each patch: 1/16 of its area
    kept = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, 0]], [[0, 0], [0, 0]]], dtype=torch.bool)
    # 1 of 2, 3 of 4; the third image shows no object
    assert object_kept(kept, masks) == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert object_kept(kept, masks, least=0.1) == pytest.approx(1 / 2)  # the second object counts nowhere
    assert np.isnan(object_kept(kept[2:], masks[2:]))
    assert object_kept(torch.ones_like(kept), masks) == 1.0
    assert object_kept(torch.zeros_like(kept), masks) == 0.0


def test_the_logged_share_is_that_of_the_last_stage(tmp_path):
    module = Plain()
    run = trainer(
        tmp_path, TokenPruning("topk", keep_ratio=0.6), KeptTokenMonitor(images=8), logger=csv_logger(tmp_path)
    )
    run.fit(module, loader(8), loader(8, masks=True))
    with torch.no_grad():
        module.eval()(data(8)[0])
    kept = prunex.attached(module).trace.kept()
    wanted = kept[:, :2, :2].float().mean()  # the object is the four patches top left
    assert metrics(run.log_dir)["prunex/object_kept"] == pytest.approx([float(wanted)])


def test_without_any_object_nothing_is_logged(tmp_path):
    nothing = torch.zeros(4, 32, 32, dtype=torch.bool)
    batches = DataLoader(TensorDataset(*data(4), nothing), 4)
    run = trainer(tmp_path, TokenPruning("topk"), KeptTokenMonitor(images=4), logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8), batches)
    assert "prunex/object_kept" not in metrics(run.log_dir)


def test_a_dense_model_is_passed_over(tmp_path):
    run = trainer(tmp_path, KeptTokenMonitor(images=4), logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8), loader(8))
    assert not (tmp_path / "run" / "version_0" / "maps").exists()


@pytest.mark.parametrize("method", ["evit", "dynamicvit", "topk"])
def test_stages_keep_their_place_and_only_ever_lose_patches(tmp_path, method):
    callback = TokenPruning(method, keep_ratio=[0.7, 1.0, 0.5], stages=[1, 2, 3])
    run = trainer(tmp_path, callback, KeptTokenMonitor(images=4))
    run.fit(Plain(), loader(8), loader(8))
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        kept, share = found["kept"], found["share"]
    assert kept.shape == (3, 4, 4, 4)
    assert (kept[1] == kept[0]).all() if method != "evit" else (kept[1] <= kept[0]).all()
    assert (kept[2] <= kept[1]).all()
    assert kept[2].sum() < kept[1].sum() < kept[0].size
    assert (share[kept[2]] == 1).all()
    assert ((share[~kept[2]] == 0).all()) == (method != "evit")  # a fused token stands for the others


def test_a_schedule_that_keeps_everything_at_first(tmp_path):
    callback = TokenPruning("evit", options={"shrink_start": 1.0})
    run = trainer(tmp_path, callback, KeptTokenMonitor(images=4), max_epochs=2)
    run.fit(Plain(), loader(8), loader(8))
    sums = []
    for epoch in (0, 1):
        with np.load(tmp_path / "maps" / f"epoch={epoch:03d}.npz", allow_pickle=False) as found:
            assert found["kept"].shape == (3, 4, 4, 4)
            sums.append(found["kept"][-1].mean())
    assert sums[0] == 1.0
    assert sums[1] < 1.0


def test_features_are_no_predictions(tmp_path):
    class Headless(Plain):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(tiny(num_classes=0).train(), torch.nn.Linear(48, 5))

        def forward(self, x):
            return self.net[0](x)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net[1](self(batch[0])), batch[1])

        def validation_step(self, batch, batch_idx):
            self.net[1](self(batch[0]))

    run = trainer(tmp_path, TokenPruning("topk"), KeptTokenMonitor(images=4))
    run.fit(Headless(), loader(8), loader(8))
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert "predicted" not in found.files
        assert "labels" in found.files


def test_a_path_in_a_module_of_two(tmp_path):
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.other = tiny(seed=4)

    run = trainer(tmp_path, TokenPruning("topk", model="net"), KeptTokenMonitor(images=4, model="net.backbone"))
    run.fit(Two(), loader(8), loader(8))
    assert (tmp_path / "maps" / "epoch=000.npz").is_file()


def test_merged_tokens_are_written_as_groups(tmp_path):
    run = trainer(tmp_path, TokenPruning("tome", options={"r": [0, 3, 4]}), KeptTokenMonitor(images=4))
    module = Plain()
    run.fit(module, loader(8), loader(8))
    (path,) = tmp_path.rglob("epoch=000.npz")
    with np.load(path, allow_pickle=False) as arrays:
        groups, kept = arrays["groups"], arrays["kept"]
    assert groups.shape == kept.shape == (4, 4, 4, 4)
    for image in range(4):
        assert [len(np.unique(stage[image])) for stage in groups] == [16, 13, 9, 9]
        for stage, alone in zip(groups[:, image], kept[:, image], strict=True):
            tokens, counts = np.unique(stage, return_counts=True)
            assert np.array_equal(alone, np.isin(stage, tokens[counts == 1]))
    assert list(path.parent.glob("kept_tokens-*.png"))


def test_a_method_that_pools_keeps_no_patch(tmp_path):
    callbacks = TokenPruning("hvt", stages=[0, 3]), KeptTokenMonitor(images=4), RelevancyMonitor(["rollout"], images=4)
    run = trainer(tmp_path, *callbacks, logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8), loader(8, masks=True))
    folder, logged = tmp_path / "run" / "version_0", metrics(run.log_dir)
    with np.load(folder / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert "kept" not in found.files
        assert found["share"].shape == (4, 4, 4)
        assert 0 < found["share"].max() < 1
    assert (folder / "maps" / "kept_tokens-epoch=000.png").is_file()
    assert logged["prunex/val_keep_ratio_stage1"] == pytest.approx([7 / 16])
    assert logged["prunex/val_keep_ratio_stage2"] == pytest.approx([3 / 16])
    assert "prunex/relevancy_on_object/rollout" in logged
    assert not {"prunex/object_kept", "prunex/relevancy_kept/rollout"} & set(logged)
