"""HeadMonitor: an epoch's picture and arrays, what they were made from, and what it refuses."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prunex
from prunex import PrunexError
from prunex.callbacks import ExplainableHead, HeadMonitor, RelevancyMonitor, TokenPruning
from tests.callbacks.modules import Plain, csv_logger, data, loader, trainer
from tests.callbacks.test_monitor import maps
from tests.heads.heads import HEADS, OPTIONS


def fit(folder, name, *more, module=None, epochs=2, monitor=None, options=None, **kwargs):
    module = Plain(lr=0.02) if module is None else module
    monitor = HeadMonitor(images=4) if monitor is None else monitor
    callbacks = [ExplainableHead(name, OPTIONS[name] if options is None else options), *more, monitor]
    run = trainer(folder, *callbacks, max_epochs=epochs, **kwargs)
    run.fit(module, loader(), loader(8))
    return module, run


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("pruned", [False, True])
def test_picture_and_arrays_of_every_epoch(tmp_path, name, pruned):
    more = [TokenPruning("evit", keep_ratio=0.6)] if pruned else []
    module, _ = fit(tmp_path, name, *more, logger=csv_logger(tmp_path), num_sanity_val_steps=2)
    folder = tmp_path / "run" / "version_0"
    names = {p.name for p in (folder / "maps").iterdir()}
    assert names == {f"{kind}epoch=00{e}.{ending}" for kind, ending in (("head-", "png"), ("", "npz")) for e in (0, 1)}
    for name_ in names:
        if name_.endswith("png"):
            assert np.asarray(Image.open(folder / "maps" / name_)).std() > 5
    x = data(8, seed=3)[0][:4]
    evidence = prunex.attached(module, head=True).evidence(x)
    arrays = maps(folder, 1)
    assert arrays["images"].shape == (4, 32, 32, 3)
    assert (arrays[f"target/{name}"] == evidence.target.numpy()).all()
    assert (arrays["predicted"] == module.eval()(x).argmax(1).numpy()).all()
    assert np.allclose(arrays[f"relevance/{name}"], evidence.maps.numpy(), atol=1e-5)
    assert arrays[f"relevance/{name}"].shape == (4, 4, 4)  # the original grid
    if name == "vit_net":
        assert (arrays["head/path"] == evidence.path.numpy()).all()
        assert (arrays["head/leaf"] == evidence.leaf.numpy()).all()
    else:
        assert np.allclose(arrays["head/contributions"], evidence.contributions.numpy(), atol=1e-5)
        assert np.allclose(arrays["head/attention"], evidence.attention.numpy(), atol=1e-5, equal_nan=True)
    assert ("head/concepts" in arrays) == (name in ("concept_transformer", "mean_patch"))
    if "head/concepts" in arrays:
        assert arrays["head/concepts"].tolist() == list(evidence.names)
    assert ("head/effects" in arrays) == (name == "concept_transformer")
    if "head/effects" in arrays:  # attention is linear, and here mean attention in place of all of it
        module = prunex.attached(module, head=True).head
        with torch.no_grad():
            parts = torch.cat([s.table() for s in module.streams.values()], 1).sum(0)
        assert np.allclose(arrays["head/effects"], parts.numpy(), atol=1e-6)


def test_concepts_without_a_place_have_no_map(tmp_path):
    fit(tmp_path, "concept_transformer", options={"concepts": ["round", "long"], "explanation_weight": 0.0}, epochs=1)
    arrays = maps(tmp_path, 0)
    assert "relevance/concept_transformer" not in arrays
    assert arrays["head/contributions"].shape == (4, 2, 5)
    assert arrays["head/concept_maps"].shape == (4, 0, 4, 4)


@pytest.mark.parametrize("inference", ["soft", "hard"])
def test_a_trees_ways_are_counted_over_the_whole_validation(tmp_path, inference):
    options = {"depth": 2, "inference": inference}
    module, _ = fit(tmp_path, "vit_net", options=options, num_sanity_val_steps=2)
    head, arrays = prunex.attached(module, head=True), maps(tmp_path, 1)
    reading = head.read(data(8, seed=3)[0])
    ends = np.bincount(reading.leaf.numpy(), minlength=4)
    left, right = ends[:2].sum(), ends[2:].sum()
    assert arrays["head/passed"].tolist() == [8, left, *ends[:2], right, *ends[2:]]
    for leaf in range(4):
        here = reading.leaves[reading.leaf == leaf, leaf].detach()
        wanted = here.mean(0).numpy() if len(here) else np.full(5, np.nan)
        assert np.allclose(arrays["head/leaves"][leaf], wanted, atol=1e-5, equal_nan=True)
    assert arrays["head/patches"].shape == (3, 3, 8, 8, 3)
    assert arrays["head/patches"].std() > 5
    values = [[patch.value for patch in node.nearest] for node in head.tree() if node.children]
    assert np.allclose(arrays["head/nearest"], values, atol=1e-6)


class Elsewhere(Plain):
    """Its validation step asks a copy of the ViT."""

    def validation_step(self, batch, batch_idx):
        return None


def test_a_validation_that_does_not_run_the_head_leaves_the_watched_images(tmp_path):
    fit(tmp_path, "vit_net", module=Elsewhere(lr=0.02), epochs=1)
    assert maps(tmp_path, 0)["head/passed"][0] == 4


def test_patches_look_as_images_do(tmp_path):
    raw = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = torch.utils.data.DataLoader(list(zip((raw - 0.2) / 0.1, torch.arange(8) % 5, strict=True)), 4)
    callbacks = [ExplainableHead("vit_net", depth=1), HeadMonitor(images=2, mean=0.2, std=0.1)]
    module = Plain(lr=0.02)
    trainer(tmp_path, *callbacks).fit(module, batches, batches)
    nearest = prunex.attached(module, head=True).tree()[0].nearest[0]
    row, column = nearest.cell
    wanted = raw[int(nearest.id), :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0) * 255
    assert np.abs(maps(tmp_path, 0)["head/patches"][0, 0] - wanted.numpy()).max() <= 1


def test_loggers_get_the_picture(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="run")
    fit(tmp_path, "attributes", logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Images("prunex/head")) == 2


def test_beside_another_monitor_one_file_holds_both(tmp_path):
    fit(tmp_path, "attributes", RelevancyMonitor(["tokentm", "attributes"], images=4), epochs=1)
    arrays = maps(tmp_path, 0)
    assert {"relevance/tokentm", "relevance/attributes", "head/contributions", "predicted"} <= set(arrays)


def test_nothing_is_written_in_a_trial(tmp_path):
    fit(tmp_path, "attributes", fast_dev_run=True, epochs=None)
    assert not (tmp_path / "maps").exists()


def test_training_is_the_same_with_it_and_without(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = Plain(lr=0.02)
        trainer(tmp_path, ExplainableHead("attributes", attributes=4), *callbacks, max_epochs=2).fit(
            module, loader(), loader(8)
        )
        return module.state_dict()

    a, b = weights(HeadMonitor(images=4)), weights()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_refusals(tmp_path):
    with pytest.raises(PrunexError, match="images=0"):
        HeadMonitor(images=0)
    with pytest.raises(PrunexError, match="timm's own: add ExplainableHead to the callbacks"):
        trainer(tmp_path, HeadMonitor()).fit(Plain(), loader(), loader(8))
    with pytest.raises(PrunexError, match="add ExplainableHead"):
        trainer(tmp_path, HeadMonitor()).validate(Plain(), loader(8))
    assert not (tmp_path / "maps").exists()


def test_a_trained_head_is_watched_in_validation_alone(tmp_path):
    module = Plain()
    prunex.attach(module, "attributes", attributes=4)
    trainer(tmp_path, HeadMonitor(images=2)).validate(module, loader(8), verbose=False)
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"head-validate.png", "validate.npz"}
