"""What data modules and datasets say of colours and classes, in pictures and slim models."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import prunex
from prunex import PrunexError
from prunex.callbacks import KeptTokenMonitor, RelevancyMonitor, SlimExport, TokenPruning
from prunex.callbacks.described import _SAID, names_of, warn_once
from tests.callbacks.modules import Plain, trainer

RAW = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 5
PIXELS = (RAW * 255).round().permute(0, 2, 3, 1).numpy()
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
NORMALISED = (RAW - MEAN[:, None, None]) / STD[:, None, None]


class Data(L.LightningDataModule):
    def __init__(self, images=RAW, dataset=None):
        super().__init__()
        self.dataset = TensorDataset(images, Y) if dataset is None else dataset

    def train_dataloader(self):
        return DataLoader(self.dataset, 4)

    val_dataloader = train_dataloader


class Divided(Data):
    """As a data module of satellite images may: bytes are divided by 255."""

    mean, std = torch.tensor(0.0), torch.tensor(255.0)


class Buffers(Plain):
    def __init__(self, **vit):
        super().__init__(**vit)
        self.register_buffer("mean", MEAN[None, :, None, None])
        self.register_buffer("std", STD[None, :, None, None])


def fit(folder, data, *callbacks, module=None, **options):
    """Warnings that a run gives, all of them."""
    run = trainer(folder, TokenPruning("topk"), *callbacks, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module or Plain(), datamodule=data)
    return run, [str(w.message) for w in caught]


def pictures(folder):
    with np.load(folder / "maps" / "epoch=000.npz") as arrays:
        return arrays["images"].astype(float)


def colours(said):
    return [text for text in said if "do not fit the images" in text]


@pytest.mark.parametrize(
    ("data", "options", "module"),
    [
        (Divided, {}, Plain),
        (lambda: Data(NORMALISED), {"mean": MEAN.tolist(), "std": STD.tolist()}, Plain),
        (lambda: Data(RAW * 2 - 1), {"mean": 0.5, "std": 0.5}, Plain),
        (lambda: Data(NORMALISED), {}, Buffers),
    ],
)
def test_pictures_and_slim_models_know_how_images_are_normalised(tmp_path, data, options, module):
    callbacks = [KeptTokenMonitor(8, **options), SlimExport(str(tmp_path), formats=[], **options)]
    _, said = fit(tmp_path, data(), *callbacks, module=module())
    assert np.abs(pictures(tmp_path) - PIXELS).max() <= 1
    assert not colours(said)
    known = prunex.load(tmp_path / "slim").pretrained_cfg
    x = (RAW - torch.tensor(known["mean"])[:, None, None]) / torch.tensor(known["std"])[:, None, None]
    entered = next(iter(data().train_dataloader()))[0]
    assert torch.allclose(x[:4], entered, atol=1e-4)


def test_colours_that_cannot_be_right_are_noticed_at_the_first_batch_and_once(tmp_path):
    monitors = KeptTokenMonitor(4), RelevancyMonitor(["rollout"], 4)
    heard = []

    class First(L.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            heard.extend(colours(_SAID[trainer]))  # before anything is trained

    _, said = fit(tmp_path, Data(NORMALISED), *monitors, First(), num_sanity_val_steps=1)
    assert heard == colours(said)
    assert len(heard) == 1
    assert "std [0.5, 0.5, 0.5] do not fit the images, whose pixels then run from -0.5" in colours(said)[0]
    _, said = fit(tmp_path, Data(NORMALISED), KeptTokenMonitor(4), SlimExport(str(tmp_path), formats=[]), max_epochs=2)
    assert len(colours(said)) == 1
    _, said = fit(tmp_path, Data(NORMALISED), SlimExport(str(tmp_path), formats=[]))  # no monitor
    assert len(colours(said)) == 1
    assert not colours(fit(tmp_path, Data(RAW * 1.005), KeptTokenMonitor(4))[1])


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
@pytest.mark.parametrize("scalar", [True, False])
def test_other_numbers_of_channels(tmp_path, channels, scalar):
    raw = torch.rand(8, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    data = Data((raw - 0.25) / 0.5)
    data.mean, data.std = (0.25, torch.tensor(0.5)) if scalar else ([0.25] * channels, np.full(channels, 0.5))
    callbacks = [KeptTokenMonitor(8), SlimExport(str(tmp_path), formats=[])]
    _, said = fit(tmp_path, data, *callbacks, module=Plain(in_chans=channels))
    assert not colours(said)
    shown = raw[:, :3] if channels > 2 else raw[:, :1].expand(-1, 3, -1, -1)
    assert np.abs(pictures(tmp_path) - (shown * 255).permute(0, 2, 3, 1).numpy()).max() <= 1
    assert prunex.load(tmp_path / "slim").pretrained_cfg["mean"] == [0.25] * channels


@pytest.mark.parametrize("callback", [KeptTokenMonitor, RelevancyMonitor, SlimExport])
def test_numbers_that_do_not_fit_the_channels_are_refused_before_training(tmp_path, callback):
    with pytest.raises(PrunexError, match="mean has 2 numbers for 3 channels"):
        fit(tmp_path, Data(), callback(mean=[0.5, 0.5], std=[0.5, 0.5]))
    with pytest.raises(PrunexError, match="belong together"):
        callback(mean=0.5)


def test_an_attribute_that_cannot_be_read_is_told_once_and_the_models_is_taken(tmp_path):
    data = Data(RAW * 2 - 1)
    data.mean, data.std = torch.zeros(2), torch.ones(2)
    _, said = fit(tmp_path, data, KeptTokenMonitor(8), SlimExport(str(tmp_path), formats=[]), max_epochs=2)
    told = [text for text in said if "mean and std of Data" in text]
    assert len(told) == 1
    assert "mean has 2 numbers for 3 channels" in told[0]
    assert np.abs(pictures(tmp_path) - PIXELS).max() <= 1


class Named(TensorDataset):
    classes = ("ant", "bee", "cat", "dog", "elk")


NAMED = Named(RAW, Y)


@pytest.mark.parametrize(
    "dataset", [NAMED, Subset(NAMED, range(8)), ConcatDataset([NAMED, NAMED]), Subset(ConcatDataset([NAMED]), range(8))]
)
def test_names_of_classes_from_the_loaders_datasets(tmp_path, dataset):
    module = Plain()
    run, said = fit(tmp_path, Data(dataset=dataset), SlimExport(str(tmp_path), formats=[]), module=module)
    assert names_of(run, module, 5) == list(Named.classes)
    assert prunex.load(tmp_path / "slim").label_names == list(Named.classes)
    assert not [text for text in said if "classes are shown" in text]


def test_a_data_modules_names_come_first_and_a_wrong_number_of_them_is_told_once(tmp_path):
    data = Data(dataset=NAMED)
    data.class_names = {i: f"n{i}" for i in range(5)}
    fit(tmp_path, data, SlimExport(str(tmp_path), formats=[]))
    assert prunex.load(tmp_path / "slim").label_names == ["n0", "n1", "n2", "n3", "n4"]
    data = Data()
    data.classes = ["ant", "bee"]
    callbacks = [KeptTokenMonitor(4), RelevancyMonitor(["rollout"], 4), SlimExport(str(tmp_path), formats=[])]
    _, said = fit(tmp_path, data, *callbacks, max_epochs=2)
    told = [text for text in said if "classes are shown as numbers" in text]
    assert len(told) == 1
    assert "Data.classes has 2 names for 5 classes; give the data module class_names, a list of 5 names" in told[0]
    assert not prunex.load(tmp_path / "slim").label_names


def test_every_trainer_is_told_anew(tmp_path):
    for run in (trainer(tmp_path), trainer(tmp_path)):
        with pytest.warns(UserWarning, match="once"):
            warn_once(run, "once")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_once(run, "once")
