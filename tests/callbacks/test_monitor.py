"""What both monitors share: which images, when, which files, which loggers, and that they disturb nothing."""

import os

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.batches import parts
from prunex.callbacks import FaithfulnessMonitor, KeptTokenMonitor, RelevancyMonitor, TokenPruning
from prunex.callbacks.monitor import Monitor
from prunex.callbacks.run_folder import run_folder
from tests.callbacks.modules import Plain, csv_logger, data, loader, metrics, trainer
from tests.vits import tiny


class Epochs(Monitor):
    """Notes what it was shown, and when."""

    def __init__(self, images=4, every_n_epochs=1):
        super().__init__(images, every_n_epochs)
        self.epochs, self.shown = [], []

    def watch(self, trainer, pl_module, batch):
        self.epochs.append(trainer.current_epoch)
        self.shown.append(batch)


def maps(folder, epoch):
    with np.load(folder / "maps" / f"epoch={epoch:03d}.npz", allow_pickle=False) as found:
        return {k: found[k] for k in found.files}


def fit(folder, *callbacks, module=None, train=None, validate=None, method="topk", **options):
    module = Plain() if module is None else module
    validate = loader(8, masks=True) if validate is None else validate
    run = trainer(folder, TokenPruning(method, keep_ratio=0.5), *callbacks, **options)
    run.fit(module, loader(8) if train is None else train, validate)
    return module, run


# ------------------------------------------------------------------------------------------------------------- files


def test_files_and_keys(tmp_path):
    both = (KeptTokenMonitor(images=6), RelevancyMonitor(["tokentm", "rollout"], images=6))
    module, run = fit(tmp_path, *both, max_epochs=2, logger=csv_logger(tmp_path), num_sanity_val_steps=2)
    folder = tmp_path / "run" / "version_0"
    names = ["epoch=000.npz", "epoch=001.npz"]
    names += [f"{kind}-epoch=00{e}.png" for kind in ("kept_tokens", "relevancy") for e in (0, 1)]
    assert sorted(p.name for p in (folder / "maps").iterdir()) == sorted(names)
    found = maps(folder, 1)
    shapes = {
        "images": ((6, 32, 32, 3), np.uint8),
        "labels": ((6,), np.int64),
        "predicted": ((6,), np.int64),
        "kept": ((3, 6, 4, 4), np.bool_),
        "share": ((6, 4, 4), np.float32),
        "masks": ((6, 32, 32), np.bool_),
        "relevance/tokentm": ((6, 4, 4), np.float32),
        "relevance/rollout": ((6, 4, 4), np.float32),
        "target/tokentm": ((6,), np.int64),
        "target/rollout": ((6,), np.int64),
    }
    assert {k: (v.shape, v.dtype.type) for k, v in found.items()} == shapes
    # what they hold is what the model does
    x = data(8)[0][:6]
    module.eval()
    with torch.no_grad():
        logits = module(x)
    pruning = prunex.attached(module)
    assert (found["kept"] == np.stack([pruning.trace.kept(s).numpy() for s in range(3)])).all()
    assert np.allclose(found["share"], pruning.trace.share().numpy())
    assert (found["predicted"] == logits.argmax(1).numpy()).all()
    assert (found["labels"] == np.arange(6) % 5).all()
    e = prunex.explain("rollout", module, x)
    assert np.allclose(found["relevance/rollout"], e.maps.numpy(), atol=1e-6)
    assert (found["target/rollout"] == -1).all()  # a map of no class
    assert (maps(folder, 0)["images"] == found["images"]).all()
    assert (maps(folder, 0)["kept"] != found["kept"]).any()
    for name in names[2:]:
        picture = imread(folder / "maps" / name)
        assert picture.ndim == 3
        assert picture.shape[2] in (3, 4)
        assert picture.shape[0] > 6 * 32
        assert picture.shape[1] > 3 * 32
        assert picture[..., :3].std() > 0.05
    assert all(p.stat().st_mode & 0o044 for p in (folder / "maps").iterdir())
    logged = metrics(folder)
    ours = {f"prunex/relevancy_{k}/{m}" for k in ("kept", "on_object") for m in ("tokentm", "rollout")}
    ours.add("prunex/object_kept")
    assert ours <= set(logged)
    assert all(len(logged[n]) == 2 and 0 <= min(logged[n]) <= max(logged[n]) <= 1 for n in ours)


def test_pictures_undo_the_data_modules_normalisation(tmp_path):
    raw = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0.1, 0.2, 0.4])
    x = (raw - mean[:, None, None]) / std[:, None, None]

    class Data(L.LightningDataModule):
        mean, std, class_names = (0.2, 0.5, 0.7), (0.1, 0.2, 0.4), ["a", "b", "c", "d", "e"]

        def train_dataloader(self):
            return DataLoader(list(zip(x, torch.arange(4), strict=True)), 4)

        val_dataloader = train_dataloader

    run = trainer(tmp_path, TokenPruning("topk"), KeptTokenMonitor(images=4))
    run.fit(Plain(), datamodule=Data())
    wanted = (raw * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(maps(tmp_path, 0)["images"].astype(float) - wanted).max() <= 1


def test_an_earlier_run_in_the_same_folder_leaves_nothing_behind(tmp_path):
    fit(tmp_path, RelevancyMonitor(["rollout"], images=2))
    (tmp_path / "maps" / "notes.txt").write_text("mine")
    fit(tmp_path, KeptTokenMonitor(images=3), RelevancyMonitor(["tokentm"], images=3))
    found = maps(tmp_path, 0)
    assert "relevance/rollout" not in found
    assert len({len(v) for k, v in found.items() if k != "kept"}) == 1
    assert (tmp_path / "maps" / "notes.txt").read_text() == "mine"


def test_a_file_that_lies_there_is_replaced_whole_and_never_read(tmp_path):
    path = tmp_path / "maps" / "epoch=000.npz"
    path.parent.mkdir()
    np.savez(path, mine=np.array([{}], dtype=object))
    fit(tmp_path, KeptTokenMonitor(images=3), RelevancyMonitor(["tokentm"], images=3))
    found = maps(tmp_path, 0)
    assert {"kept", "relevance/tokentm"} < set(found)
    assert "mine" not in found
    assert not list(path.parent.glob(".draft-*"))


# ------------------------------------------------------------------------------------------------------------ images


def as_dict(items):
    return {"name": "x", "image": torch.stack([i[0] for i in items]), "label": torch.stack([i[1] for i in items])}


def with_masks(items):
    batch = as_dict(items)
    return {"mask": torch.zeros(len(items), 32, 32, dtype=torch.bool), **batch}


@pytest.mark.parametrize(
    ("collate", "keys"),
    [
        (lambda items: torch.stack([i[0] for i in items]), {"images"}),
        (lambda items: tuple(as_dict(items).values())[1:], {"images", "labels"}),
        (lambda items: list(as_dict(items).values())[1:], {"images", "labels"}),
        (as_dict, {"images", "labels"}),
        (with_masks, {"images", "labels", "masks"}),
    ],
)
def test_batch_forms(tmp_path, collate, keys):
    class Any(Plain):
        def validation_step(self, batch, batch_idx):
            x = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list | tuple) else batch
            self(x)

    images, labels = data(8)
    batches = DataLoader(list(zip(images, labels, strict=True)), 3, collate_fn=collate)
    epochs = Epochs(images=7)
    fit(tmp_path, epochs, KeptTokenMonitor(images=7), module=Any(), validate=batches)
    assert set(epochs.shown[0]) == keys
    assert torch.equal(epochs.shown[0]["images"], images[:7])
    found = maps(tmp_path, 0)
    assert found["images"].shape == (7, 32, 32, 3)
    assert keys - {"images"} == set(found) - {"images", "kept", "share", "predicted"}


def test_parts_are_told_by_dtype_and_shape():
    x, y = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int32)
    assert set(parts([y, x])) == {"images", "labels"}
    assert set(parts((x, torch.zeros(4)))) == {"images", "values"}  # numbers to predict are no classes
    assert set(parts((x, torch.zeros(3, dtype=torch.long)))) == {"images"}
    assert set(parts((x, y, torch.zeros(4, 4, 4, dtype=torch.bool)))) == {"images", "labels"}
    assert "images" not in parts((x.to(torch.uint8), y))
    assert parts("text") == {}
    mask = torch.rand(4, 1, *x.shape[2:]) > 0.5
    assert parts((x, y, mask))["masks"].equal(mask[:, 0])
    first = {"a": x, "b": x + 1}
    assert parts(first)["images"] is x


def test_images_stay_the_same_over_epochs_also_when_the_loader_shuffles(tmp_path):
    images, labels = data(12)
    shuffled = DataLoader(list(zip(images, labels, strict=True)), 2, shuffle=True)
    epochs = Epochs(images=5)
    fit(tmp_path, epochs, validate=shuffled, max_epochs=3, num_sanity_val_steps=2)
    assert epochs.epochs == [0, 1, 2]
    assert all(torch.equal(b["images"], epochs.shown[0]["images"]) for b in epochs.shown)
    flat = epochs.shown[0]["images"].flatten(1)
    assert len(flat.unique(dim=0)) == 5  # none twice


@pytest.mark.parametrize("sanity", [0, 2])
def test_fewer_validation_images_than_asked_for(tmp_path, sanity):
    epochs = Epochs(images=50)
    fit(tmp_path, epochs, validate=loader(6, 2), max_epochs=3, num_sanity_val_steps=sanity)
    assert [len(b["images"]) for b in epochs.shown] == [6, 6, 6]
    assert torch.equal(epochs.shown[-1]["images"], data(6)[0])


def test_only_the_first_validation_loader(tmp_path):
    class Many(Plain):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    epochs = Epochs(images=6)
    fit(tmp_path, epochs, module=Many(), validate=[loader(4), loader(8, seed=9)])
    assert torch.equal(epochs.shown[0]["images"], data(4)[0])


def test_batches_without_images_are_told(tmp_path):
    class Bytes(Plain):
        def validation_step(self, batch, batch_idx):
            self(batch[0].float())

    class Elsewhere(Plain):
        def validation_step(self, batch, batch_idx):
            return None

    x = DataLoader(list(zip((data(4)[0] * 9).to(torch.uint8), data(4)[1], strict=True)), 2)
    with pytest.raises(PrunexError, match=r"KeptTokenMonitor found no images in the validation batch \(list\)"):
        fit(tmp_path, KeptTokenMonitor(), module=Elsewhere(), validate=x)
    fit(tmp_path, KeptTokenMonitor(), module=Bytes(), validate=x)  # what its step makes of them entered the ViT
    assert maps(tmp_path, 0)["images"].shape == (4, 32, 32, 3)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels(tmp_path, channels):
    x = torch.randn(4, channels, 32, 32)
    batches = DataLoader(list(zip(x, torch.arange(4), strict=True)), 4)
    fit(tmp_path, KeptTokenMonitor(images=2), module=Plain(in_chans=channels), train=batches, validate=batches)
    assert maps(tmp_path, 0)["images"].shape == (2, 32, 32, 3)


# --------------------------------------------------------------------------------------------------------------- when


def test_no_validation_writes_nothing(tmp_path):
    run = trainer(tmp_path, TokenPruning("topk"), KeptTokenMonitor(), RelevancyMonitor())
    run.fit(Plain(), loader(8))
    assert not (tmp_path / "maps").exists()


def test_the_sanity_check_writes_nothing(tmp_path):
    class Stop(L.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            raise EOFError

    monitors = KeptTokenMonitor(images=2), RelevancyMonitor(images=2)
    with pytest.raises(EOFError):
        fit(tmp_path, *monitors, Stop(), num_sanity_val_steps=2)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    ("every", "options", "wanted"),
    [
        (1, {"max_epochs": 3}, [0, 1, 2]),
        (2, {"max_epochs": 4}, [0, 2, 3]),
        (3, {"max_epochs": 4}, [0, 3]),
        (9, {"max_epochs": 3}, [0, 2]),
        (2, {"max_epochs": 7, "check_val_every_n_epoch": 2}, [1, 3, 5]),
        (2, {"max_epochs": 2, "val_check_interval": 0.5}, [0, 0, 1, 1]),
        (5, {"max_epochs": -1, "max_steps": 6}, [0, 2]),
    ],
)
def test_epochs(tmp_path, every, options, wanted):
    epochs = Epochs(every_n_epochs=every)
    fit(tmp_path, epochs, validate=loader(4), **options)
    assert epochs.epochs == wanted


def test_validation_alone_is_watched(tmp_path):
    module, run = fit(tmp_path / "a", KeptTokenMonitor(images=2, every_n_epochs=5), max_epochs=2)
    other = trainer(tmp_path / "b", TokenPruning("topk", keep_ratio=0.5), KeptTokenMonitor(images=2, every_n_epochs=5))
    other.validate(module, loader(8), verbose=False)
    assert sorted(os.listdir(tmp_path / "b" / "maps")) == ["kept_tokens-validate.png", "validate.npz"]


def test_validation_in_the_folder_of_a_training_leaves_its_files(tmp_path):
    module, _ = fit(tmp_path, KeptTokenMonitor(images=2), RelevancyMonitor(images=2), max_epochs=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "maps").iterdir()}
    watch = KeptTokenMonitor(images=2), RelevancyMonitor(images=2)
    trainer(tmp_path, TokenPruning("topk", keep_ratio=0.5), *watch).validate(module, loader(8), verbose=False)
    after = {p.name: p.read_bytes() for p in (tmp_path / "maps").iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"kept_tokens-validate.png", "relevancy-validate.png", "validate.npz"}


@pytest.mark.parametrize("monitor", [KeptTokenMonitor, RelevancyMonitor])
def test_a_monitor_that_saw_nothing_says_so(tmp_path, monitor):
    with pytest.warns(UserWarning, match=rf"{monitor.__name__} has seen no validation batch.*give trainer\.fit"):
        trainer(tmp_path, TokenPruning("topk", keep_ratio=0.5), monitor(images=2)).fit(Plain(), loader(8))


def test_kept_tokens_of_a_model_that_nobody_prunes(tmp_path):
    with pytest.warns(UserWarning, match="KeptTokenMonitor: nothing prunes this model") as told:
        trainer(tmp_path, KeptTokenMonitor(images=2), max_epochs=3).fit(Plain(), loader(8), loader(8))
    assert sum("nothing prunes" in str(w.message) for w in told) == 1


# ------------------------------------------------------------------------------------------------------------ loggers


def test_tensorboard_receives_the_pictures(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="tb")
    _, run = fit(tmp_path, KeptTokenMonitor(images=2), RelevancyMonitor(images=2), logger=logger, max_epochs=2)
    assert run_folder(run) == tmp_path / "tb" / "version_0"
    assert (tmp_path / "tb" / "version_0" / "maps" / "epoch=001.npz").is_file()
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"prunex/kept_tokens", "prunex/relevancy"}
    shown = events.Images("prunex/kept_tokens")
    assert [s.step for s in shown] == [1, 3]
    height, width = imread(run_folder(run) / "maps" / "kept_tokens-epoch=001.png").shape[:2]
    assert (shown[1].height, shown[1].width) == (height, width)


class FakeLogger(L.pytorch.loggers.logger.Logger):
    """Holds calls; Lightning's own loggers of these names need packages that are not installed."""

    name, version = "project", "abc123"

    def __init__(self, folder=None, error=None):
        self.calls, self.error, self.run_id, self.folder = [], error, "run7", folder
        self.experiment = self

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_image(self, *args, **kwargs):
        if self.error:
            raise self.error
        self.calls.append((args, kwargs))


class WandbLogger(FakeLogger):
    pass


class MLFlowLogger(FakeLogger):
    pass


class CometLogger(FakeLogger):
    pass


class TeamLogger(WandbLogger):
    """A user's subclass."""


class LikeWandb(FakeLogger):
    """One that prunex does not know, with the method that Lightning's WandbLogger has."""


@pytest.mark.parametrize("kind", [WandbLogger, TeamLogger, MLFlowLogger, CometLogger, LikeWandb])
def test_services_are_told_apart_by_name(tmp_path, kind):
    logger = kind(str(tmp_path / "logs"))
    _, run = fit(tmp_path, KeptTokenMonitor(images=2), logger=[logger], max_epochs=1)
    # beside Lightning's checkpoints: save_dir itself is shared by all runs
    folder = tmp_path / "logs" / "project" / "abc123" / "maps"
    assert sorted(p.name for p in folder.iterdir()) == ["epoch=000.npz", "kept_tokens-epoch=000.png"]
    height, width = imread(folder / "kept_tokens-epoch=000.png").shape[:2]
    ((args, kwargs),) = logger.calls
    assert kwargs.pop("step") == 1
    if isinstance(logger, WandbLogger | LikeWandb):
        assert args == ("prunex/kept_tokens",)
        (picture,) = kwargs["images"]
    elif kind is MLFlowLogger:
        assert args[0] == "run7"
        assert kwargs == {"key": "prunex.kept_tokens"}
        picture = args[1]
    else:
        assert kwargs == {"name": "prunex/kept_tokens"}
        (picture,) = args
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8


class ServiceError(Exception):
    """As services raise their own."""


@pytest.mark.parametrize("error", [ServiceError("quota"), OSError("offline"), TypeError("no such argument")])
def test_a_logger_that_raises_ends_nothing(tmp_path, error):
    good = WandbLogger(str(tmp_path))
    with pytest.warns(UserWarning, match="WandbLogger did not take the picture prunex/kept_tokens"):
        fit(tmp_path, KeptTokenMonitor(images=2), logger=[WandbLogger(str(tmp_path), error), good])
    assert len(good.calls) == 1


def test_no_logger(tmp_path):
    fit(tmp_path, KeptTokenMonitor(images=2), RelevancyMonitor(images=2), logger=False)
    assert len(list((tmp_path / "maps").iterdir())) == 3


# --------------------------------------------------------------------------------------------------------- disturbance


def test_monitors_leave_everything_as_it_was(tmp_path):
    """Flags, gradients, random numbers, and the losses of a training forward that were not used yet."""
    module = Plain()
    monitors = (KeptTokenMonitor(images=4), RelevancyMonitor(["tokentm", "rollout", "raw_attention"], images=4))
    module, run = fit(tmp_path, *monitors, module=module, method="dynamicvit")
    module.train()
    module.net["backbone"].eval()  # an odd mixture of modes
    module.vit.blocks[1].train()
    module.vit.train(True)
    x, y = data(4)
    loss = torch.nn.functional.cross_entropy(module(x), y)
    loss.backward(retain_graph=True)
    pruning = prunex.attached(module)
    flags = [m.training for m in module.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    wants = [p.requires_grad for p in module.parameters()]
    losses, trace, last = pruning.losses(), pruning.trace, pruning._attached.steps.take()[-1]
    numbers = torch.get_rng_state()
    module.log = lambda *a, **k: None
    for monitor in monitors:
        batch = {"images": x, "labels": y, "masks": torch.ones(4, 32, 32, dtype=torch.bool)}
        monitor.watch(run, module, batch)
        with torch.inference_mode():
            monitor.watch(run, module, batch)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [m.training for m in module.modules()] == flags
    assert [p.requires_grad for p in module.parameters()] == wants
    for p, g in zip(module.parameters(), grads, strict=True):
        assert p.grad is None if g is None else torch.equal(p.grad, g)
    assert pruning._attached.steps.take()[-1] is last
    assert pruning.trace is trace
    again = pruning.losses()
    assert {k: v.item() for k, v in again.items()} == {k: v.item() for k, v in losses.items()}
    sum(again.values()).backward()
    assert all(not m._forward_hooks for m in module.modules())


def test_training_is_the_same_with_and_without_monitors(tmp_path):
    ends = []
    for monitors in ((), (KeptTokenMonitor(images=4), RelevancyMonitor(images=4))):
        torch.manual_seed(0)
        module = Plain()
        torch.manual_seed(0)
        fit(tmp_path, *monitors, module=module, method="dynamicvit", max_epochs=2)
        ends.append(module.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8", None])
def test_arguments(bad):
    for kind in (KeptTokenMonitor, RelevancyMonitor):
        with pytest.raises(PrunexError, match=r"images=.* is not allowed: give a whole number of at least 1"):
            kind(images=bad)
        with pytest.raises(PrunexError, match=r"every_n_epochs=.* is not allowed"):
            kind(every_n_epochs=bad)


def test_a_loader_sorted_by_class_is_watched_in_all_of_its_classes(tmp_path):
    images, labels = torch.randn(20, 3, 32, 32), torch.tensor([0] * 9 + [1] * 9 + [2, 2])
    epochs = Epochs(images=5)
    fit(tmp_path, epochs, validate=DataLoader(list(zip(images, labels, strict=True)), 4), max_epochs=2)
    for batch in epochs.shown:
        assert batch["labels"].tolist() == [0, 0, 1, 1, 2]
        assert torch.equal(batch["images"], images[[0, 1, 9, 10, 18]])


def test_monitors_of_two_models_do_not_share_files(tmp_path):
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.other = tiny(seed=4)

        def forward(self, x):
            return super().forward(x) + self.other(x)

    module, logger = Two(), csv_logger(tmp_path)
    prunex.attach(module.other, "topk", keep_ratio=0.5, stages=(1,))
    watch = [
        monitor(model=path, images=4)
        for path in ("net", "other")
        for monitor in (KeptTokenMonitor, RelevancyMonitor, FaithfulnessMonitor)
    ]
    trainer(tmp_path, TokenPruning("topk", keep_ratio=0.6, model="net"), *watch, logger=logger).fit(
        module, loader(8), loader(8, masks=True)
    )
    folder = tmp_path / "run" / "version_0"
    stages = []
    for path in ("net", "other"):
        with np.load(folder / path / "maps" / "epoch=000.npz", allow_pickle=False) as found:
            stages.append(len(found["kept"]))
        assert (folder / path / "faithfulness.csv").is_file()
    assert stages == [3, 1]
    assert not (folder / "maps").exists()
    told = metrics(folder)
    assert {"prunex/object_kept/net", "prunex/object_kept/other", "prunex/relevancy_kept/tokentm/net"} <= set(told)


class Bare(Plain):
    """Validates on images alone."""

    def validation_step(self, batch, batch_idx):
        self(batch)


@pytest.mark.parametrize("labels", [True, False])
def test_of_images_of_several_sizes_the_first_size_is_watched(tmp_path, labels):
    parts = [torch.randn(2, 3, side, side) for side in (32, 40, 32)]
    batches = [(x, torch.tensor([0, 1])) for x in parts]
    module = Plain(dynamic_img_size=True) if labels else Bare(dynamic_img_size=True)
    watch = KeptTokenMonitor(images=4)
    with pytest.warns(UserWarning, match="watches images of the size that came first"):
        trainer(tmp_path, TokenPruning("topk", keep_ratio=0.6), watch).fit(
            module, loader(8), DataLoader(batches if labels else parts, batch_size=None)
        )
    assert maps(tmp_path, 0)["images"].shape == (4, 32, 32, 3)
