"""LeGrad block by block against the authors' code (CLIP, attention pooling) and torchcam's (plain logits)."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex.targets import Similarity
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


def of_layers(model, images, target, **options):
    return prunex.explain("legrad", model, images, target, start_layer=0, **options).raw


@pytest.mark.parametrize("which", ["pred", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_logits(seed, which, dtype):
    model, images, stored = model_and_images(seed, dtype)
    want, target = arrays("legrad", seed), stored[f"targets_{which}"]
    for pool, name in (("mean", "mean"), ("read", "cls")):
        raw = of_layers(model, images, target, pool=pool)
        tolerance = 1e-6 if dtype == torch.float64 else 2e-5
        assert relative(raw, want[f"torchcam_legrad_{name}_layers__{which}__dbl"]) < tolerance, pool


def test_similarity_to_an_embedding(seed):
    model, images, _ = model_and_images(seed, torch.float64)
    model.head = torch.nn.Identity()
    want = arrays("legrad", seed)
    for i, text in enumerate(want["text"]):
        raw = of_layers(model, images, Similarity(text))
        assert relative(raw, want["legrad_clip_sim_layers__dbl"][:, :, i]) < 1e-6
    e = prunex.explain("legrad", model, images, Similarity(want["text"][0]), start_layer=3)
    fine = F.interpolate(e.raw.unflatten(2, (4, 4)), scale_factor=8, mode="bilinear").sum(1)
    low, high = fine.amin((1, 2), keepdim=True), fine.amax((1, 2), keepdim=True)
    assert relative((fine - low) / (high - low), want["legrad_clip_sim_start3_final"][:, 0]) < 1e-5


@pytest.mark.parametrize("which", ["pred", "fixed"])
def test_normalised_logits(seed, which):
    model, images, stored = model_and_images(seed, torch.float64)
    model.head.bias.data.zero_()
    want = arrays("legrad", seed)[f"legrad_clip_cls_layers__{which}__dbl"]
    for i, label in enumerate(stored[f"targets_{which}"].tolist()):
        raw = of_layers(model, images[i : i + 1], lambda out, k=label: F.normalize(out, dim=1)[:, k])
        assert relative(raw[0], want[i]) < 1e-6


def test_attention_pooling(seed):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 0}
    model = VisionTransformer(**sizes, class_token=False, global_pool="map", fc_norm=False)
    golden, images, _ = model_and_images(seed)
    want, state = arrays("legrad", seed), golden.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(("head.", "cls_token"))}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    state |= {k.replace("pool_sd/", "attn_pool."): v for k, v in want.items() if k.startswith("pool_sd/")}
    model.load_state_dict(state)
    model, images = model.eval().double(), images.double()
    with torch.no_grad():
        assert relative(model(images), want["siglip_features"]) < 1e-5
    raw = of_layers(model, images, Similarity(want["text"][0]))
    from_layer = raw.flip(1).cumsum(1).flip(1)
    assert relative(from_layer, want["legrad_siglip_sum_from_layer__dbl"]) < 1e-6
    assert relative(raw.sum(1), want["legrad_siglip_start0_sum__dbl"]) < 1e-6
