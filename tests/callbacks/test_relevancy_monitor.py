"""RelevancyMonitor: shares of relevancy, dense and headless models, and the explainers it is given."""

import numpy as np
import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.callbacks import RelevancyMonitor, TokenPruning
from prunex.callbacks.relevancy_monitor import share_inside
from tests.callbacks.modules import Plain, csv_logger, data, loader, metrics, trainer
from tests.vits import tiny


def test_share_inside_by_hand():
    mass = torch.tensor([[[1.0, 3.0], [0.0, 4.0]], [[2.0, 2.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    region = torch.tensor([[[1, 0], [1, 1]], [[0, 1], [0, 0]], [[1, 1], [1, 1]]], dtype=torch.bool)
    # 5 of 8, 2 of 8; the third map has no mass
    assert share_inside(mass, region) == pytest.approx((5 / 8 + 2 / 8) / 2)
    assert np.isnan(share_inside(mass[2:], region[2:]))
    assert share_inside(mass * 1e-30, region) == pytest.approx((5 / 8 + 2 / 8) / 2)
    assert share_inside(mass, torch.ones_like(region)) == 1.0


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_logged_shares(tmp_path, method):
    module, names = Plain(), ["tokentm", "raw_attention"]
    run = trainer(
        tmp_path, TokenPruning(method, keep_ratio=0.6), RelevancyMonitor(names, images=8), logger=csv_logger(tmp_path)
    )
    run.fit(module, loader(8), loader(8, masks=True))
    logged = metrics(run.log_dir)
    for name in names:
        e = prunex.explain(name, module, data(8)[0])
        mass = e.maps.clamp(min=0)
        inside = (mass * e.trace.kept()).sum((1, 2)) / mass.sum((1, 2))
        assert logged[f"prunex/relevancy_kept/{name}"] == pytest.approx([float(inside.mean())], abs=1e-5)
        pixels = e.upsample().clamp(min=0)
        shares = pixels[:, :16, :16].sum((1, 2)) / pixels.sum((1, 2))
        assert logged[f"prunex/relevancy_on_object/{name}"] == pytest.approx([float(shares.mean())], abs=1e-5)


def test_a_dense_model_is_drawn_and_has_no_kept_mass(tmp_path):
    run = trainer(tmp_path, RelevancyMonitor(images=4), logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8), loader(8, masks=True))
    folder = tmp_path / "run" / "version_0"
    assert sorted(p.name for p in (folder / "maps").iterdir()) == ["epoch=000.npz", "relevancy-epoch=000.png"]
    with np.load(folder / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert set(found.files) == {"images", "labels", "masks", "predicted", "relevance/tokentm", "target/tokentm"}
    ours = {n for n in metrics(folder) if n.startswith("prunex/")}
    assert ours == {"prunex/relevancy_on_object/tokentm"}


class Headless(Plain):
    """A ViT without classifier under the user's own head."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(tiny(num_classes=0).train(), torch.nn.Linear(48, 5))

    def forward(self, x):
        return self.net(x)


def test_a_model_without_classifier(tmp_path):
    """Methods that need no class draw; one that does says so before training, not after the first epoch."""
    run = trainer(tmp_path, TokenPruning("topk"), RelevancyMonitor(["rollout"], images=4))
    run.fit(Headless(), loader(8), loader(8))
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert "predicted" not in found.files
        assert (found["target/rollout"] == -1).all()
    module = Headless()
    run = trainer(tmp_path, TokenPruning("topk"), RelevancyMonitor(["rollout", "tokentm"], images=4))
    with pytest.raises(PrunexError, match="classifier"):
        run.fit(module, loader(8), loader(8))
    assert run.global_step == 0
    assert "training_step" not in vars(module)


def test_half_precision(tmp_path):
    run = trainer(tmp_path, TokenPruning("evit"), RelevancyMonitor(images=4), precision="bf16-true")
    run.fit(Plain(), loader(8), loader(8, masks=True))
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert found["relevance/tokentm"].dtype == np.float32


@pytest.mark.parametrize("bad", ["tokentm", []])
def test_methods_must_be_a_list(bad):
    with pytest.raises(PrunexError, match="give a list of explainers"):
        RelevancyMonitor(bad)


def test_unknown_methods_are_told_at_once():
    with pytest.raises(PrunexError, match="tokentm"):
        RelevancyMonitor(["rollout", "tokentmm"])
