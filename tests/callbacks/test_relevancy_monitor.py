"""RelevancyMonitor: shares of relevancy, dense and headless models, and the explainers it is given."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex import PrunexError
from prunex.callbacks import FaithfulnessMonitor, KeptTokenMonitor, RelevancyMonitor, TokenPruning
from prunex.callbacks.relevancy_monitor import share_inside
from prunex.targets import Contrast
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


class Features(Headless):
    """The same, whose head is reached from its steps alone."""

    def forward(self, x):
        return self.net[0](x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net[1](self(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net[1](self(batch[0]))


def test_a_head_behind_a_vit_without_one_gives_the_classes(tmp_path):
    module = Headless()
    run = trainer(tmp_path, TokenPruning("topk"), RelevancyMonitor(["rollout", "tokentm"], images=4))
    run.fit(module, loader(8), loader(8))
    module.eval()
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert found["target/tokentm"].tolist() == module(data(8)[0][:4]).argmax(1).tolist()
        assert found["predicted"].tolist() == found["target/tokentm"].tolist()


def test_a_model_without_classifier(tmp_path):
    """Methods that need no class draw; one that does says so before training, not after the first epoch."""
    run = trainer(tmp_path, TokenPruning("topk"), RelevancyMonitor(["rollout"], images=4))
    run.fit(Features(), loader(8), loader(8))
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        assert "predicted" not in found.files
        assert (found["target/rollout"] == -1).all()
    module = Features()
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


def test_options_by_method(tmp_path):
    names, options = ["rollout", "dino"], {"rollout": {"discard_ratio": 0.6, "head_fusion": "max"}}
    module = Plain()
    run = trainer(tmp_path, RelevancyMonitor(names, images=4, options=options))
    run.fit(module, loader(8), loader(8))
    with np.load(tmp_path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        for name in names:
            wanted = prunex.explain(name, module, data(8)[0][:4], **options.get(name, {})).maps
            assert np.abs(found[f"relevance/{name}"] - wanted.numpy()).max() < 1e-6
        assert np.abs(found["relevance/rollout"] - prunex.explain("rollout", module, data(8)[0][:4]).maps.numpy()).max()


@pytest.mark.parametrize("monitor", [RelevancyMonitor, FaithfulnessMonitor])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollout": {"discard": 0.9}}, "did you mean 'discard_ratio'"),
        ({"rollout": 0.9}, "give a dict of options"),
        ([("rollout", {})], "give options by method"),
        ({"dino": {}}, "'dino', which is not among the methods"),
    ],
)
def test_wrong_options_are_told_at_once(monitor, options, said):
    with pytest.raises(PrunexError, match=said):
        monitor(["rollout"], options=options)


@pytest.mark.parametrize("monitor", [RelevancyMonitor, FaithfulnessMonitor])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "vit_shapley needs a trained explainer"),
        ({"vit_shapley": {"explainer": "nowhere"}}, "nowhere"),
    ],
)
def test_a_trained_explainer_that_is_missing_is_told_before_training(tmp_path, monitor, options, said):
    run = trainer(tmp_path, monitor(["vit_shapley"], options=options))
    with pytest.raises(PrunexError, match=said):
        run.fit(Plain(), loader(8), loader(8))
    assert run.global_step == 0


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True, "dynamic_img_pad": True}])
def test_pictures_end_where_the_patches_do(tmp_path, options):
    """Images of 36 pixels under patches of 8: 4 pixels are never seen, or padded to a fifth patch."""
    images, masks = torch.randn(4, 3, 36, 36), torch.ones(4, 36, 36, dtype=torch.bool)
    masks[:, :32, :32] = False
    batches = DataLoader(TensorDataset(images, torch.arange(4), masks), 4)
    module = Plain(img_size=36, **options)
    side = 40 if options else 32
    watch = (KeptTokenMonitor(images=4), RelevancyMonitor(["rollout"], images=4))
    run = trainer(tmp_path, TokenPruning("topk", keep_ratio=0.6), *watch, logger=csv_logger(tmp_path))
    run.fit(module, batches, batches)
    folder = tmp_path / "run" / "version_0"
    with np.load(folder / "maps" / "epoch=000.npz", allow_pickle=False) as found:
        shown, objects = found["images"], found["masks"]
        assert found["kept"].shape[2:] == (side // 8, side // 8)
    assert shown.shape == (4, side, side, 3)
    assert objects.shape == (4, side, side)
    assert ((shown[:, 36:] == 0).all(), (shown[:, :, 36:] == 0).all()) == (True, True)
    assert shown[:, :32, :32].std() > 10
    assert objects.any() == bool(options)  # the object lies where only the padded patches are
    assert ("prunex/object_kept" in metrics(folder)) == bool(options)


def found_in(path):
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


@pytest.mark.parametrize("target", ["contrast:3,1", Contrast(3, 1)])
def test_other_numbers_than_a_class_are_watched(tmp_path, target):
    module = Plain()
    watch = RelevancyMonitor(["rollout", "tokentm"], images=4, target=target)
    run = trainer(tmp_path, TokenPruning("topk"), watch, logger=csv_logger(tmp_path))
    run.fit(module, loader(8), loader(8))
    found = found_in(tmp_path / "run" / "version_0" / "maps" / "epoch=000.npz")
    assert set(found) >= {"relevance/rollout", "relevance/tokentm:contrast:3,1"}
    assert not {"predicted", "target/rollout", "target/tokentm:contrast:3,1"} & set(found)  # nobody's class
    want = prunex.explain("tokentm", module, data(8)[0][:4], Contrast(3, 1)).maps
    assert np.allclose(found["relevance/tokentm:contrast:3,1"], want.numpy(), atol=1e-5)
    assert "prunex/relevancy_kept/tokentm:contrast:3,1" in metrics(run.log_dir)


def test_several_labels_have_a_map_each_and_monitors_of_two_targets_stand_side_by_side(tmp_path):
    module = Plain()
    watch = [
        RelevancyMonitor(["rollout", "tokentm"], images=4, target="labels:0,2"),
        RelevancyMonitor(["tokentm"], images=4, target=3),
        RelevancyMonitor(["tokentm"], images=4),
    ]
    run = trainer(tmp_path, TokenPruning("topk"), *watch)
    run.fit(module, loader(8), loader(8))
    found = found_in(tmp_path / "maps" / "epoch=000.npz")
    names = {name for name in found if name.startswith("relevance/")}
    assert names == {"relevance/rollout", *(f"relevance/tokentm{label}" for label in (":0", ":2", ":3", ""))}
    for label in (0, 2, 3):
        want = prunex.explain("tokentm", module, data(8)[0][:4], label).maps
        assert np.allclose(found[f"relevance/tokentm:{label}"], want.numpy(), atol=1e-5)
        assert found[f"target/tokentm:{label}"].tolist() == [label] * 4
    assert found["predicted"].tolist() == module.eval()(data(8)[0][:4]).argmax(1).tolist()


@pytest.mark.parametrize("kind", [RelevancyMonitor, FaithfulnessMonitor])
def test_a_target_that_the_model_has_not_is_refused_before_training(tmp_path, kind):
    with pytest.raises(PrunexError, match="unknown target 'contrats'"):
        kind(["tokentm"], target="contrats:1,2")
    for target in ("contrast:1,99", "labels:1,99", 99):
        run = trainer(tmp_path, kind(["tokentm"], target=target))
        with pytest.raises(PrunexError, match="99"):
            run.fit(Plain(), loader(8), loader(8))
        assert run.global_step == 0


def test_batches_of_several_labels_are_watched_without_a_class_of_each(tmp_path):
    hot = torch.eye(5)[data(8)[1]] + torch.eye(5)[(data(8)[1] + 1) % 5]
    batches = DataLoader(TensorDataset(data(8)[0], hot), batch_size=4)
    run = trainer(tmp_path, TokenPruning("topk"), RelevancyMonitor(["tokentm"], images=4), KeptTokenMonitor(images=4))
    run.validate(Plain(), batches)
    found = found_in(next((tmp_path / "maps").glob("*.npz")))
    assert "labels" not in found
    assert {"predicted", "kept", "relevance/tokentm"} <= set(found)
    watch = FaithfulnessMonitor(["tokentm"], ["perturbation_positive"], images=4)
    with pytest.warns(
        UserWarning, match="several labels an image, so perturbation counts the predicted class as right"
    ):
        trainer(tmp_path, watch).validate(Plain(), batches)
