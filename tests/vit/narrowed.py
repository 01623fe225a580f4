"""Models whose units are closed, for the tests of units, widths and slimming."""

import copy

import torch
from timm.models.swin_transformer import SwinTransformer

import prunex
from prunex.vit.units import branches, put_gates
from tests.vits import lively, tiny

SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def tiny_swin(seed=0, **kwargs):
    """A tiny Swin of two stages in eval mode, the second block of each with shifted windows."""
    return lively(SwinTransformer(**(SWIN | {"window_size": 2} | kwargs)), seed).eval()


def masked(model, spec):
    """A copy in which the units that a spec leaves out are multiplied by 0."""
    twin = copy.deepcopy(model)
    factors = {}
    for b in branches(twin):
        kept = (spec.heads if b.kind == "heads" else spec.channels).get(b.block)
        if kept is not None:
            open_ = torch.zeros(b.units)
            open_[list(kept)] = 1
            factors[b.key] = open_.repeat_interleave(b.width)
    put_gates(twin, lambda key, batch: factors.get(key))
    return twin


def hard(model, budget=0.6, seed=0, closed=(), **options):
    """Gate a model by random masks and decide; more units may be closed by their branch and numbers."""
    pruning = prunex.attach(model, "xpruner", budget=budget, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in pruning.pruner.masks():
            mask.copy_(torch.rand(mask.shape, generator=generator))
    pruning.pruner.conclude()
    for key, units in dict(closed).items():
        pruning.pruner.open(key)[list(units)] = False
    pruning.pruner.refresh()
    return pruning


def tiny_of(family, **kwargs):
    """A tiny model of a family by name, Swin among them."""
    return tiny_swin(**kwargs) if family == "swin" else tiny(family, **kwargs)
