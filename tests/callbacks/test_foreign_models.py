"""Models that cannot be written are refused before training; those that can are, by the module's own setup too."""

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import SlimExport, TokenPruning
from tests.callbacks.modules import Plain, loader, trainer


class Steps(Plain):
    """Counts its training steps."""

    steps = 0

    def training_step(self, batch, index):
        self.steps += 1
        return super().training_step(batch, index)


def assigned(vit):
    vit.head = nn.Linear(48, 5)


def sequential(vit):
    vit.head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 5))


def parametrized(vit):
    nn.utils.parametrizations.weight_norm(vit.blocks[0].mlp.fc1)


def adapter(vit):
    vit.blocks[1].attn.proj.lora = nn.Linear(48, 4)


def own_norm(vit):
    class Mine(nn.LayerNorm):
        def __init__(self):
            super().__init__(48)
            self.more = nn.Parameter(torch.zeros(48))

    vit.norm = Mine()


@pytest.mark.parametrize("change", [sequential, adapter, own_norm])
def test_what_cannot_be_written_is_refused_before_the_first_step(tmp_path, change):
    module = Steps()
    change(module.vit)
    with pytest.raises(PrunexError):
        trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(module, loader())
    assert module.steps == 0
    assert not (tmp_path / "slim").exists()


def test_a_head_by_assignment(tmp_path):
    """timm still says 1000 classes; the head has 5."""
    module = Plain(num_classes=1000)
    assigned(module.vit)
    trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(module, loader())
    small, x = prunex.load(tmp_path / "slim"), torch.randn(2, 3, 32, 32)
    module.eval()
    with torch.no_grad():
        assert small(x).shape == (2, 5)
        assert torch.allclose(small(x), module(x), atol=1e-6)


def test_a_reparametrised_layer_is_written_as_a_plain_one(tmp_path):
    module = Plain()
    parametrized(module.vit)
    trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(module, loader())
    small, x = prunex.load(tmp_path / "slim"), torch.randn(2, 3, 32, 32)
    module.eval()
    assert type(small.blocks[0].mlp.fc1) is nn.Linear
    assert not nn.utils.parametrize.is_parametrized(small.blocks[0].mlp.fc1)
    with torch.no_grad():
        assert torch.allclose(small(x), module(x), atol=1e-6)


def test_a_head_that_the_modules_own_setup_makes_right(tmp_path):
    class Later(Plain):
        def setup(self, stage):
            self.vit.reset_classifier(5)

    module = Later()
    sequential(module.vit)
    trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(module, loader())
    assert prunex.load(tmp_path / "slim").num_classes == 5


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_any_number_of_channels(tmp_path, channels):
    x = torch.randn(8, channels, 32, 32)
    batches = torch.utils.data.DataLoader([(image, i % 5) for i, image in enumerate(x)], 4)
    module = Plain(in_chans=channels)
    trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(module, batches)
    small = prunex.load(tmp_path / "slim")
    module.eval()
    with torch.no_grad():
        assert torch.allclose(small(x), module(x), atol=1e-6)


def test_a_format_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("prunex.formats.find_spec", lambda name: None)
    module = Steps()
    with pytest.raises(PrunexError, match="export to onnx needs onnx: pip install 'prunex-vit.onnx.'"):
        trainer(tmp_path, SlimExport(str(tmp_path), formats=["onnx"])).fit(module, loader())
    assert module.steps == 0
