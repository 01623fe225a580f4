"""Modules that read grids of their ViT, explained as a whole: a target of what they make of them."""

import pytest
import timm
import torch
from torch import nn

import prunex
from prunex import PrunexError
from tests.vits import images, randomise

WORKS = {
    "integrated_gradients": {"steps": 4},
    "grad_cam": {},
    "r_cut": {},
    "atman": {},
    "vit_cx": {},
}
STARTS_AT_THE_HEAD = ["generic_attention", "tokentm", "rollout", "legrad", "lrp", "partial_lrp", "grad_sam"]
PRUNERS = {
    "dense": {},
    "evit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "topk": {"keep_ratio": 0.6, "stages": (1, 2)},
    "dynamicvit": {"keep_ratio": 0.6, "stages": (1, 2), "teacher": False},
    "tome": {"r": 2},
}


class Decoder(nn.Module):
    """Two grids, a layer that is not linear, bilinear upsampling."""

    def __init__(self, blocks=(0, 2), **options):
        super().__init__()
        sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
        self.blocks, self.options = list(blocks), {"norm": True, "intermediates_only": True} | options
        self.read = nn.Sequential(nn.Conv2d(24 * len(self.blocks), 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 5, 1))

    def forward(self, x):
        grids = self.vit.forward_intermediates(x, self.blocks, **self.options)
        return nn.functional.interpolate(self.read(torch.cat(grids, 1)), x.shape[2:], mode="bilinear")


def decoder(pruner="dense", fill=None, **options):
    torch.manual_seed(0)
    model = Decoder(**options).eval()
    if pruner != "dense":
        randomise(prunex.attach(model, pruner, **PRUNERS[pruner]).pruner)
        if fill is not None:
            model.options["fill"] = fill
    return model


def corner(logits):
    """How much of class 3 the upper left quarter shows."""
    return logits[:, 3, :32, :32].mean((1, 2))


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("method", WORKS)
def test_a_target_of_every_pixel_is_explained(method, pruner):
    model, x = decoder(pruner), images(size=(64, 64))
    e = prunex.explain(method, model, x, corner, **WORKS[method])
    assert e.maps.shape == (len(x), 4, 4)
    assert e.maps.isfinite().all()
    assert e.maps.any()
    with torch.no_grad():
        torch.testing.assert_close(e.logits[:, 0], corner(model(x)), rtol=1e-4, atol=1e-5)
    alone = prunex.explain(method, model, x[1:2], corner, **WORKS[method])
    torch.testing.assert_close(alone.maps[0], e.maps[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fill", [None, 0.5])
@pytest.mark.parametrize("pruner", ["dense", "topk", "evit"])
def test_gradients_are_those_of_the_module_itself(pruner, fill):
    model, x = decoder(pruner, None if pruner == "dense" else fill), images(size=(64, 64))
    e = prunex.explain("grad_cam", model, x, corner, kind="elementwise", layer=0)
    seen = []
    model.vit.blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    score = corner(model(x)).sum()
    (gradient,) = torch.autograd.grad(score, seen[0])
    expected = (gradient * seen[0])[:, 1:].clamp(min=0).sum(2).unflatten(1, (4, 4))
    torch.testing.assert_close(e.maps, expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pruner", ["dense", "evit"])
@pytest.mark.parametrize("method", STARTS_AT_THE_HEAD)
def test_methods_that_start_at_a_head_say_so(method, pruner):
    with pytest.raises(PrunexError, match="Decoder reads grids of its ViT.*integrated_gradients") as caught:
        prunex.explain(method, decoder(pruner), images(size=(64, 64)), corner)
    assert "\n" not in str(caught.value)


def test_the_attention_of_a_class_token_is_no_grad_cam_of_a_grid():
    with pytest.raises(PrunexError, match="Decoder reads grids"):
        prunex.explain("grad_cam", decoder(), images(size=(64, 64)), corner, kind="attention")


@pytest.mark.parametrize("pruner", ["dense", "evit"])
def test_tokens_cannot_be_left_out_of_a_grid(pruner):
    with pytest.raises(PrunexError, match="removal='drop' leaves tokens out.*grids, which are whole"):
        prunex.explain("shap", decoder(pruner), images(size=(64, 64)), corner, budget=60)


def test_who_asks_for_more_than_grids_is_refused():
    class WithPrefix(Decoder):
        def forward(self, x):
            pairs = self.vit.forward_intermediates(x, self.blocks, return_prefix_tokens=True, **self.options)
            return self.read(torch.cat([grid for grid, _ in pairs], 1))

    with pytest.raises(PrunexError, match="asks its VisionTransformer for more than grids.*intermediates_only=True"):
        prunex.explain("grad_cam", WithPrefix(), images(size=(64, 64)), lambda out: out[:, 0].mean((1, 2)))


def test_without_a_target_there_are_no_classes_to_choose_from():
    with pytest.raises(PrunexError, match=r"no tensor \[B, classes\]"):
        prunex.explain("grad_cam", decoder(), images(size=(64, 64)))


def test_a_module_that_pools_its_grid_is_followed_to_its_classes():
    class Pooled(Decoder):
        def forward(self, x):
            return super().forward(x).mean((2, 3))

    torch.manual_seed(0)
    model, x = Pooled().eval(), images(size=(64, 64))
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    e = prunex.explain("integrated_gradients", model, x, 2, steps=4)
    with torch.no_grad():
        torch.testing.assert_close(e.logits, model(x), rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was():
    model, x = decoder("topk", fill=0.0), images(size=(64, 64))
    with torch.no_grad():
        before = model(x)
        prunex.explain("integrated_gradients", model, x, corner, steps=2)
        assert torch.equal(model(x), before)
    assert "prunex_tail" not in vars(model.vit)
