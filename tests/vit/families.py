"""Every family of timm that works, by a published architecture made small; the README's table is printed from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import timm
import torch

from tests.vits import OLD_TIMM, lively

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        title: What people call it.
        names: Published architectures of timm; the first one is built and tested.
        note: What is special about it, for whoever prunes it.
        args: Beside ``SMALL``, what makes it small and lively.
        rules: Whether relevance rules (lrp, partial_lrp, transformer_attribution) reach all of its layers: "yes", or
            the layer that they do not know, as the error names it.
        shares: Whether what a head looks at is above 0 and sums to 1.
    """

    title: str
    names: tuple[str, ...]
    note: str
    args: dict = field(default_factory=dict)
    rules: str = "yes"
    shares: bool = True


FAMILIES = {
    "vit": Family(
        "ViT, DeiT, MAE, DINO, FlexiViT",
        ("vit_tiny_patch16_224", "deit_small_patch16_224", "flexivit_small"),
        "class token",
    ),
    "distilled": Family(
        "distilled DeiT", ("deit_tiny_distilled_patch16_224",), "the distillation token is never pruned"
    ),
    "deit3": Family("DeiT-III", ("deit3_small_patch16_224",), "LayerScale", {"init_values": 0.5}),
    "dinov2": Family(
        "DINOv2",
        ("vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"),
        "registers are never pruned; SwiGLU in the giant",
        {"init_values": 0.5},
    ),
    "gap": Family(
        "average-pooled ViTs",
        ("vit_medium_patch16_gap_256", "vit_betwixt_patch16_reg4_gap_256"),
        "no class token: all pooled tokens rank the patches",
    ),
    "clip": Family(
        "CLIP",
        ("vit_base_patch16_clip_quickgelu_224", "vit_base_patch32_clip_224"),
        "norm in front of the blocks",
    ),
    "aimv2": Family("AIMv2", ("aimv2_large_patch14_224",), "RMS norms, SwiGLU, norm of the patches"),
    "siglip": Family(
        "SigLIP, SigLIP 2",
        ("vit_base_patch16_siglip_224", "vit_so400m_patch14_siglip_224"),
        "attention pooling over the patches that are left; its own attention is the read-out",
    ),
    "res_post": Family(
        "post-norm ViT",
        ("vit_base_patch16_rpn_224",),
        "norms behind attention and MLP; average-pooled",
        {"init_values": None},
    ),
    "parallel_scaling": Family(
        "parallel ViT (ViT-22B)",
        ("vit_base_patch16_xp_224", "vit_pwee_patch16_reg1_gap_256"),
        "tokens that leave inside a block leave before its MLP, which reads the block's input",
        {"qkv_bias": True} if OLD_TIMM else {},
    ),
    "parallel_things": Family(
        "parallel ViT (three things)",
        ("vit_small_patch16_18x2_224",),
        "two attentions at once: their heads together rank the patches",
        {"init_values": 0.5},
    ),
    "differential": Family(
        "differential ViT",
        ("vit_dlittle_patch16_reg1_gap_256",),
        "each head is the difference of two softmaxes; patches are ranked by its positive part",
        {"init_values": 0.5},
        shares=False,
    ),
    "differential_parallel": Family(
        "parallel differential ViT",
        ("vit_dpwee_patch16_reg1_gap_256",),
        "the same heads beside an MLP that reads the block's input",
        {"init_values": 0.5},
        shares=False,
    ),
    "eva": Family(
        "EVA", ("eva_giant_patch14_224", "eva_giant_patch14_clip_224"), "BEiT's descendant, absolute positions"
    ),
    "eva02": Family(
        "EVA-02",
        ("eva02_tiny_patch14_224", "eva02_base_patch14_448"),
        "rotary positions follow their tokens; SwiGLU, three projections",
        {"mlp_ratio": 8 / 3},
    ),
    "eva02_clip": Family(
        "EVA-02-CLIP", ("eva02_base_patch16_clip_224",), "norm inside attention and MLP", {"mlp_ratio": 8 / 3}
    ),
    "eva02_enormous": Family(
        "EVA-02-CLIP-E", ("eva02_enormous_patch14_clip_224",), "post-norm blocks", {"mlp_ratio": 2.0}
    ),
    "rope_gap": Family(
        "timm's ROPE ViTs", ("vit_medium_patch16_rope_reg1_gap_256",), "registers, no class token", {"init_values": 0.5}
    ),
    "rope_mixed": Family(
        "ROPE-ViT",
        ("vit_small_patch16_rope_mixed_224", "vit_small_patch16_rope_224", "vit_small_patch16_rope_ape_224"),
        "a rotary table for each block and head",
        {"init_values": 0.5},
    ),
    "pe": Family(
        "Perception Encoder",
        ("vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512"),
        "attention pooling over patches and class token",
        {"attn_pool_num_heads": 3},
    ),
    "dinov3": Family(
        "DINOv3",
        ("vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3", "vit_small_patch16_lingbot"),
        "rotary positions of any image size, registers",
        {"init_values": 0.5},
    ),
    "sapiens2": Family(
        "Sapiens2",
        ("vit_base_patch16_sapiens2",),
        "grouped queries, qk-norm",
        {"num_kv_heads": (3, 1, 1), "init_values": 0.5},
    ),
    "beit": Family(
        "BEiT, BEiTv2",
        ("beit_base_patch16_224", "beitv2_base_patch16_224"),
        "relative biases follow their tokens",
        {"init_values": 0.5},
    ),
    "cait": Family(
        "CaiT",
        ("cait_xxs24_224", "cait_s24_384"),
        "talking heads; patches rank patches: the class token enters behind the blocks; what it sees is the read-out",
        {"init_values": 0.5},
        shares=False,
    ),
    "relpos": Family(
        "relative-position ViT",
        ("vit_relpos_small_patch16_224", "vit_relpos_medium_patch16_cls_224", "vit_relpos_base_patch16_clsgap_224"),
        "a small network makes the relative biases, which follow their tokens",
        {"init_values": 0.5},
    ),
    "srelpos": Family(
        "relative-position ViT, shared",
        ("vit_srelpos_small_patch16_224", "vit_srelpos_medium_patch16_224"),
        "all blocks share one bias",
        {"init_values": 0.5},
    ),
    "relpos_post": Family(
        "relative-position ViT, post-norm",
        ("vit_relpos_base_patch32_plus_rpn_256", "vit_relpos_small_patch16_rpn_224"),
        "norms behind attention and MLP",
        {"init_values": None},
    ),
}


def build(name: str, **more) -> torch.nn.Module:
    """The first architecture of a family made small, in eval mode, with lively weights."""
    family = FAMILIES[name]
    if not timm.is_model(family.names[0]):
        pytest.skip(f"this timm has no {family.names[0]}")
    try:
        model = timm.create_model(family.names[0], **(SMALL | family.args | more))
    except TypeError as error:
        if not OLD_TIMM:
            raise
        pytest.skip(f"this timm cannot build {family.names[0]}: {error}")
    return lively(model).eval()


def double(name: str) -> torch.nn.Module:
    """The same in float64."""
    if name == "rope_mixed" and OLD_TIMM:
        pytest.skip("this timm computes mixed rotary tables in float32 alone")
    return build(name).double()


def table() -> str:
    """The families as a table in Markdown."""
    rows = ["| family | timm names, for example | what to know | relevance rules |", "|---|---|---|---|"]
    for f in FAMILIES.values():
        names = ", ".join(f"`{n}`" for n in f.names)
        rows.append(f"| {f.title} | {names} | {f.note} | {f.rules} |")
    return "\n".join(rows)
