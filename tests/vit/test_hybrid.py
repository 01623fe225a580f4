"""ViTs whose patches are made by convolutions: only the embedding differs, and the sequence is any other's."""

import pytest
import timm
import torch
from torch import nn

import prunex
from prunex.errors import PrunexError
from prunex.vit.anatomy import read
from tests.vits import lively

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
STEMS = {
    "vit_tiny_r_s16_p8_224": (SMALL | {"img_size": 96}, (32, 32)),
    "vit_small_r26_s32_224": (SMALL | {"img_size": 96}, (32, 32)),
    "vitamin_small_224": ({"img_size": 64, "num_classes": 5, "depth": 3}, (16, 16)),
}


def build(name):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    args, _ = STEMS[name]
    model = lively(timm.create_model(name, **args)).eval()
    for module in model.modules():  # statistics that a model trained with it would have
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(2.0)
    return model


def images_of(model, batch=2):
    side = model.patch_embed.img_size
    return torch.randn(batch, 3, *side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", STEMS)
def test_pruned_explained_slimmed_and_given_back(name):
    model = build(name)
    images, patch = images_of(model), STEMS[name][1]
    anatomy = read(model)
    assert (anatomy.patch, anatomy.channels) == (patch, 3)
    assert anatomy.grid == tuple(side // p for side, p in zip(images.shape[2:], patch, strict=True))
    with torch.no_grad():
        dense = model(images)
    pruning = prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,))
    with torch.no_grad():
        removed = model(images)
        pruning.masked = True
        torch.testing.assert_close(model(images), removed, rtol=1e-4, atol=1e-4)
        pruning.masked = None
        torch.testing.assert_close(prunex.slim(model)(images), removed)
    for method in ("tokentm", "rollout", "grad_cam"):
        e = prunex.explain(method, model, images)
        assert e.maps.shape == (2, *anatomy.grid)
        assert e.upsample().shape == (2, *images.shape[2:])
        torch.testing.assert_close(e.logits, removed, rtol=1e-4, atol=1e-4)
    pruning.detach()
    with torch.no_grad():
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("name", STEMS)
def test_convolutions_are_counted(name):
    model = build(name)
    macs = 0

    def count(layer, _, out):
        nonlocal macs
        macs += out[0].numel() // layer.weight.shape[0] * layer.weight.numel()

    layers = [m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.patch_embed(images_of(model, 1))
    for handle in handles:
        handle.remove()
    cost = prunex.cost(model)
    head = model.head.weight.numel()
    assert cost.macs == macs + sum(block.macs for block in cost.blocks) + head


def test_a_training_step_reaches_the_stem():
    model = build("vit_tiny_r_s16_p8_224").train()
    prunex.attach(model, "dynamicvit", keep_ratio=0.7, stages=(1,))
    nn.functional.cross_entropy(model(images_of(model)), torch.tensor([0, 1])).backward()
    first = next(m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().max() > 0


def test_what_a_stem_cannot_do_is_refused_by_name(tmp_path):
    model = build("vit_tiny_r_s16_p8_224")
    with pytest.raises(PrunexError, match="convolutional stem"):
        prunex.save(model, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()
    with pytest.raises(PrunexError, match="HybridEmbed"):
        prunex.explain("lrp", model, images_of(model))


def test_another_embedding_is_not_guessed():
    class Shuffled(timm.layers.PatchEmbed):
        def forward(self, x):
            return super().forward(x).flip(1)

    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_layer=Shuffled)
    with pytest.raises(PrunexError, match="Shuffled as patch embedding"):
        read(model)
