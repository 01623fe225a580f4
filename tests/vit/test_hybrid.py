"""ViTs whose patches are made by convolutions: only the embedding differs, and the sequence is any other's."""

import pytest
import timm
import torch
from torch import nn

import prunex
from prunex.errors import PrunexError
from prunex.vit.anatomy import read
from prunex.vit.describe import describe
from prunex.vit.rebuild import build as rebuild
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
    with pytest.raises(PrunexError, match="HybridEmbed"):
        prunex.explain("lrp", model, images_of(model))
    model.pretrained_cfg = None  # as where somebody put stem and blocks together
    with pytest.raises(PrunexError, match="convolutional stem that timm does not build by name"):
        prunex.save(model, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("name", STEMS)
def test_saved_and_loaded_again(name, tmp_path):
    model = build(name)
    images = images_of(model)
    prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,))
    with torch.no_grad():
        wanted = model(images)
        again = prunex.load(prunex.save(prunex.slim(model), tmp_path / "slim"))
        assert torch.equal(again(images), wanted)
        twice = prunex.load(prunex.save(again, tmp_path / "again"))
        assert torch.equal(twice(images), wanted)
    assert prunex.cost(again) == prunex.cost(model)


def test_half_precision_and_narrow_layers_come_back(tmp_path):
    model = build("vit_tiny_r_s16_p8_224")
    units = prunex.attach(model, "magnitude", budget=0.98)
    units.calibrate()
    small = prunex.slim(model).bfloat16()
    again = prunex.load(prunex.save(small, tmp_path / "slim"))
    assert next(again.parameters()).dtype == torch.bfloat16
    assert [b.mlp.fc2.in_features for b in again.blocks] == [b.mlp.fc2.in_features for b in small.blocks]
    images = images_of(model).bfloat16()
    with torch.no_grad():
        assert torch.equal(again(images), small(images))


def test_what_the_name_does_not_say_is_refused(tmp_path):
    model = build("vit_tiny_r_s16_p8_224")
    model.blocks[1].mlp.act = nn.ReLU()
    with pytest.raises(PrunexError, match=r"builds vit_tiny_r_s16_p8_224 with another blocks\.1\.mlp\.act"):
        prunex.save(model, tmp_path / "slim")


def test_a_name_that_is_no_stems_is_not_built():
    spec = describe(build("vit_tiny_r_s16_p8_224"))
    for name in ("resnet18", "vit_tiny_patch16_224", "hf-hub:somebody/model"):
        with pytest.raises(PrunexError, match="no architecture with a convolutional stem"):
            rebuild({**spec, "args": spec["args"] | {"architecture": name}})


def test_another_embedding_is_not_guessed():
    class Shuffled(timm.layers.PatchEmbed):
        def forward(self, x):
            return super().forward(x).flip(1)

    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_layer=Shuffled)
    with pytest.raises(PrunexError, match="Shuffled as patch embedding"):
        read(model)
