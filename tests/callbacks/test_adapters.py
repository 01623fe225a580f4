"""LoRA in a LightningModule: what rests and what learns, whatever the optimiser was told, and what comes out."""

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, SlimExport, TokenPruning, load_from_checkpoint
from tests.callbacks.modules import Plain, loader, snapshot, trainer
from tests.vit.test_adapters import LoRALinear
from tests.vits import images, relative


class ByHand(Plain):
    """LoRA as tutorials write it: everything else frozen, trainable parameters in the optimiser."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        for block in self.net["backbone"][0].blocks:
            block.attn.qkv, block.mlp.fc1 = LoRALinear(block.attn.qkv), LoRALinear(block.mlp.fc1)
        self.vit.head.requires_grad_(True)

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.trained(), 1e-2)


class Peft(ByHand):
    def __init__(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        Plain.__init__(self)
        names = ["qkv", "proj", "fc1", "fc2"]
        config = peft.LoraConfig(r=2, target_modules=names, modules_to_save=["head"], init_lora_weights=False)
        self.net["backbone"] = peft.get_peft_model(self.net["backbone"], config)

    @property
    def vit(self):
        return prunex.vit.anatomy.find(self)[1]


class OneByOne(Peft):
    """Names what it trains."""

    def trained(self):
        return [p for name, p in self.named_parameters() if "lora_" in name]


class NamesOurs(OneByOne):
    def trained(self):
        return [*super().trained(), *prunex.attached(self).pruner.parameters()]


class Afterwards(Peft):
    """Puts its adapters on when the callbacks are through."""

    def __init__(self):
        Plain.__init__(self)

    def on_fit_start(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(r=2, target_modules=["qkv"])
        self.net["backbone"] = peft.get_peft_model(self.net["backbone"], config)


@pytest.mark.parametrize("module", [ByHand, Peft, NamesOurs])
def test_adapters_and_predictors_learn_and_nothing_else(tmp_path, module):
    module = module()
    start, frozen = snapshot(module), [n for n, p in module.named_parameters() if not p.requires_grad]
    callbacks = [TokenPruning("dynamicvit", keep_ratio=0.6), SlimExport(tmp_path / "out", formats=())]
    run = trainer(tmp_path, *callbacks)
    run.fit(module, loader())
    now = dict(module.named_parameters())
    assert frozen
    assert all(torch.equal(now[n], start[n]) and not now[n].requires_grad for n in frozen)
    assert any(not torch.equal(now[n], start[n]) for n in start if "lora_B" in n or n.endswith(".b"))
    predictors = prunex.attached(module).pruner
    assert all(p.requires_grad for p in predictors.parameters())
    run.save_checkpoint(tmp_path / "end.ckpt")
    module.eval()
    again = load_from_checkpoint(type(module), tmp_path / "end.ckpt").eval()
    with torch.no_grad():
        wanted = module(images())
        assert torch.equal(again(images()), wanted)
        small = prunex.load(tmp_path / "out" / "slim")
        assert relative(small(images()), wanted) < 1e-4
    assert all(type(m) is not LoRALinear for m in small.modules())


@pytest.mark.parametrize("method", ["dynamicvit", "ia_red2"])
def test_an_optimiser_of_adapters_alone_is_told_how_to_take_predictors(tmp_path, method):
    with pytest.raises(PrunexError, match=rf"no optimiser steps .* of {method} .*pruner\.parameters\(\)"):
        trainer(tmp_path, TokenPruning(method)).fit(OneByOne(), loader())
    trainer(tmp_path, TokenPruning("evit")).fit(OneByOne(), loader())  # which brings nothing that learns


def test_adapters_that_come_after_the_pruner_freeze_it_and_that_is_said(tmp_path):
    with pytest.raises(PrunexError, match=r"of dynamicvit .* were frozen after they were attached.*__init__"):
        trainer(tmp_path, TokenPruning("dynamicvit")).fit(Afterwards(), loader())
    with pytest.raises(PrunexError, match="was replaced or wrapped after its units were gated"):
        trainer(tmp_path, MaskPruning("xpruner", budget=0.6)).fit(
            type("Proj", (Afterwards,), {"on_fit_start": _wraps_proj})(), loader()
        )


def _wraps_proj(self):
    for block in self.vit.blocks:
        block.attn.proj = LoRALinear(block.attn.proj)


@pytest.mark.parametrize("method", ["taylor", "xpruner"])
@pytest.mark.parametrize("module", [ByHand, Peft])
def test_units_stay_masked_under_adapters_and_are_gone_when_slimmed(tmp_path, module, method):
    before = snapshot(module())
    options = {"images": 8} if method == "taylor" else {}
    with pytest.raises(PrunexError, match=r"qkv .*merge the adapter .*remove=False"):
        trainer(tmp_path, MaskPruning(method, budget=0.6, **options)).fit(module(), loader())
    pruned = module()
    masks = MaskPruning(method, budget=0.6, remove=False, **options)
    trainer(tmp_path, masks, max_epochs=2).fit(pruned, loader())
    pruned.eval()
    small = prunex.slim(pruned)
    with torch.no_grad():
        assert relative(small(images()), pruned(images())) < 1e-4
    assert prunex.cost(small).macs < 0.7 * prunex.cost(Plain().vit).macs
    assert before.keys() <= dict(pruned.named_parameters()).keys()
    assert all(isinstance(m, nn.Linear) for n, m in small.named_modules() if n.endswith(("qkv", "fc1", "fc2")))
