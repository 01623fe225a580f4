"""Models and helpers for the tests of unit pruners."""

import copy

import torch
from timm.models.swin_transformer import SwinTransformer

import prunex
from tests.vits import lively, tiny


def swin(**kwargs):
    """A tiny Swin of two stages, windows of 4 x 4 with shifts, in eval mode."""
    args = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return lively(SwinTransformer(num_classes=5, drop_path_rate=0.0, **args | kwargs)).eval()


def batches(count=2, size=4, labels=True, seed=5, dtype=torch.float32):
    """Batches of 32 x 32 images, with labels or without."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(size, 3, 32, 32, generator=generator).to(dtype)
        y = torch.randint(5, (size,), generator=generator)
        found.append((x, y) if labels else x)
    return found


def planted(seed=0, **kwargs):
    """A tiny ViT in which half of each MLP's ``fc2`` columns are zero, and which ones."""
    model = tiny(**kwargs)
    generator = torch.Generator().manual_seed(seed)
    dead = {}
    for i, block in enumerate(model.blocks):
        hidden = block.mlp.fc2.in_features
        dead[i] = torch.randperm(hidden, generator=generator)[: hidden // 2].sort().values
        with torch.no_grad():
            block.mlp.fc2.weight[:, dead[i]] = 0
    return model, dead


def half_of_channels(model):
    """The budget that is met by removing half of all MLP channels."""
    branches = prunex.vit.units.branches(model)
    saved = sum(b.units // 2 * b.macs for b in branches if b.kind == "channels")
    return f"{prunex.cost(model).macs - saved}MACs"


def removed(model):
    """A copy of a model with its closed units taken out for good, nothing attached for them."""
    small = copy.deepcopy(model)
    pruning = prunex.attached(small, units=True)
    pruning.remove()
    return pruning.detach()
