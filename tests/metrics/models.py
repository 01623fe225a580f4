"""ViTs whose answers are known by hand, and what models say without some patches, one forward at a time."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex.vit.anatomy import read
from tests.vits import SIZES, randomise, tiny

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PRUNED = {
    "evit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "tome": {"r": 3},
    "ppt": {"r": 3, "tau": 0.01, "stages": (1, 2)},
    "dynamicvit": {"keep_ratio": 0.6, "stages": (1, 2)},
}


def linear(classes=3, seed=0):
    """Blocks that add nothing and a mean over patches: logits are linear in the pixels. Float64."""
    sizes = SIZES | {"depth": 1, "num_classes": classes, "global_pool": "avg", "class_token": False}
    model = VisionTransformer(**sizes, pos_embed="none", final_norm=False, fc_norm=False).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        for p in (*model.patch_embed.parameters(), *model.head.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def shares(model, images, target):
    """Each patch's exact share of the class's logit over grey, [B, gh, gw], of a :func:`linear` model."""
    with torch.no_grad():
        weight = model.head.weight[target]
        embedded = F.conv2d(images, model.patch_embed.proj.weight, stride=8)
        return torch.einsum("bdhw,d->bhw", embedded, weight) / embedded[0, 0].numel()


def constant(classes=3):
    """A model that says the same of every image. Float64."""
    model = linear(classes)
    with torch.no_grad():
        model.head.weight.zero_()
    return model


def sighted(threshold=1e-3):
    """Class 1 where any colour is left, else class 0: the mean of all pixels against a threshold. Float64."""
    model = linear(2)
    with torch.no_grad():
        model.patch_embed.proj.weight.fill_(1.0)
        model.patch_embed.proj.bias.zero_()
        model.head.weight.copy_(torch.tensor([[0.0], [1.0]]).expand(-1, 48))
        model.head.bias.copy_(torch.tensor([threshold, 0.0]))
    return model


def pruned(name, seed=0, **kwargs):
    """A tiny ViT in float64 with a pruner on it."""
    model = tiny(seed=seed, **kwargs).double()
    if name is not None:
        randomise(prunex.attach(model, name, **PRUNED[name]).pruner)
    return model


def gaussian(image):
    """The blur of the definition, pixel by pixel over repeated borders: [C, H, W]."""
    weight = torch.tensor([torch.exp(torch.tensor(-(i**2) / 50.0, dtype=torch.float64)) for i in range(-5, 6)])
    kernel = torch.outer(weight, weight) / weight.sum() ** 2
    wide = F.pad(image[None].double(), (5, 5, 5, 5), mode="replicate")[0]
    found = torch.zeros_like(image, dtype=torch.float64)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            found[:, y, x] = (wide[:, y : y + 11, x : x + 11] * kernel).sum((1, 2))
    return found


def painted(image, gone, removal):
    """One image [3, H, W] with pixels bool [H, W] painted, as the definitions say it."""
    if removal == "black":
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        plain = image * std + mean
        plain[:, gone] = 0
        return (plain - mean) / std
    out = image.clone()
    soft = gaussian(image) if removal == "blur" else None
    for c in range(3):
        colour = 0.0 if removal == "grey" else sum(image[c].flatten().tolist()) / image[c].numel()
        for y, x in gone.nonzero().tolist():
            out[c, y, x] = colour if soft is None else soft[c, y, x]
    return out


def dropped(model, image, gone):
    """Logits of one image [3, H, W] without the patches bool [P]: blocks one after another on fewer tokens."""
    prefix = read(model).prefix
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(image[None]))
        there = torch.cat([torch.ones(prefix, dtype=torch.bool), ~gone])
        x = model.norm_pre(tokens[:, there])
        for block in model.blocks:
            x = block(x)
        return model.forward_head(model.norm(x))[0]


def without(model, image, gone, removal):
    """Logits of one image without patches bool [P] of a dense model."""
    if removal == "drop":
        return dropped(model, image, gone)
    pixels = gone.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    with torch.no_grad():
        return model(painted(image, pixels, removal)[None])[0]
