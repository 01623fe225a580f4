"""Modules that compile their ViT, or are compiled whole: the same training, weight for weight."""

import pytest
import torch

import prunex
from prunex.callbacks import MaskPruning, TokenPruning, load_from_checkpoint
from tests.callbacks.modules import Plain, loader, trainer
from tests.vits import images, quick, relative


class Eager(Plain):
    def __init__(self):
        super().__init__(optimiser="adamw", lr=1e-2, depth=2)
        self.build()

    def build(self):
        pass


class Inside(Eager):
    """Holds a compiled ViT."""

    def build(self):
        self.net["backbone"][0] = torch.compile(self.net["backbone"][0], backend="eager")


class Later(Eager):
    """Compiles it in place, when the pruner is there."""

    def on_train_start(self):
        self.net["backbone"][0].compile(backend="eager")


def trained(tmp_path, kind, callback, whole=False):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = kind()
    torch.manual_seed(1)
    run = trainer(tmp_path, callback(), max_epochs=2)
    run.fit(torch.compile(module, backend="eager") if whole else module, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    return module.eval()


CALLBACKS = {
    "dynamicvit": lambda: TokenPruning("dynamicvit", keep_ratio=0.6, stages=(0,)),
    "removal on the way": lambda: MaskPruning("taylor", budget=0.7, images=8, start=0.5),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(("kind", "whole"), quick([(Inside, False), (Later, False), (Eager, True)], [(Eager, True)]))
def test_the_same_training(tmp_path, name, kind, whole):
    wanted = trained(tmp_path, Eager, CALLBACKS[name])
    module = trained(tmp_path, kind, CALLBACKS[name], whole)
    weights = {n.replace("_orig_mod.", ""): p for n, p in module.named_parameters()}
    assert weights.keys() == dict(wanted.named_parameters()).keys()
    assert all(relative(weights[n], p) < 1e-5 for n, p in wanted.named_parameters())
    with torch.no_grad():
        logits = module(images())
        assert relative(logits, wanted(images())) < 1e-5
        assert relative(prunex.slim(module)(images()), logits) < 1e-5
        again = load_from_checkpoint(kind, tmp_path / "end.ckpt").eval()
        assert relative(again(images()), logits) < 1e-6
    torch._dynamo.reset()
