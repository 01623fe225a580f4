"""Slow computations that share no line with prunex: what a pruned model, its losses and its cost have to be."""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

STAGES = (1, 2, 3)


def tokens_after_topk(vit, images, keep_ratio, scale=None):
    """Top-K as a mask over the dense model, block by block in float64: final tokens, and which patches are left.

    Args:
        vit: A plain timm ViT with one class token; nothing of prunex on it is called.
        images: float [B, C, H, W].
        keep_ratio: Share of the entering patches that go on at each of STAGES.
        scale: What each block's output is multiplied by, {block: factor}; None for nothing.
    """
    x = torch.cat([vit.cls_token.expand(len(images), -1, -1), vit.patch_embed(images)], 1) + vit.pos_embed
    x = x.double()
    left = torch.ones(x.shape[:2], dtype=torch.bool)
    for number, block in enumerate(vit.blocks):
        y = layer(block.norm1, x)
        heads = block.attn.num_heads
        q, k, v = layer(block.attn.qkv, y).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        attention = scores.masked_fill(~left[:, None, None], float("-inf")).softmax(-1)
        x = x + layer(block.attn.proj, (attention @ v).transpose(1, 2).flatten(2))
        if number in STAGES:
            paid = attention[:, :, 0].mean(1)
            for image in range(len(x)):
                patches = [p for p in range(1, x.shape[1]) if left[image, p]]
                patches.sort(key=lambda p: -paid[image, p].item())
                for p in patches[math.ceil(keep_ratio * len(patches) - 1e-9) :]:
                    left[image, p] = False
        y = F.gelu(layer(block.mlp.fc1, layer(block.norm2, x)))
        x = x + layer(block.mlp.fc2, y)
        if scale and number in scale:
            x = x * scale[number]
    return layer(vit.norm, x), left[:, 1:]


def topk_logits(vit, images, keep_ratio, scale=None):
    """The same as class scores [B, classes]."""
    return layer(vit.head, tokens_after_topk(vit, images, keep_ratio, scale)[0][:, 0]).float()


def layer(module, x):
    """A linear layer or a layer norm on float64, by its formula."""
    weight, bias = module.weight.double(), module.bias.double()
    if isinstance(module, torch.nn.Linear):
        return x @ weight.T + bias
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * weight + bias


def patches_left(patches, keep_ratio, method):
    """Patch tokens after the last stage by each paper's own rule; EViT's fused token counts as a token."""
    kept = patches
    for s in range(len(STAGES)):
        if method == "dynamicvit":
            kept = math.floor(patches * keep_ratio ** (s + 1) + 1e-9)
        else:
            kept = math.ceil(keep_ratio * kept - 1e-9) + (method == "evit")
    return kept


class Draws:
    """Stands in for ``gumbel_softmax`` and writes down what was drawn, to compute DynamicViT's ratio loss by hand."""

    def __init__(self, monkeypatch):
        self.drawn, original = [], F.gumbel_softmax

        def gumbel_softmax(*args, **kwargs):
            out = original(*args, **kwargs)
            self.drawn.append(out)
            return out

        monkeypatch.setattr(F, "gumbel_softmax", gumbel_softmax)

    def ratio_losses(self, keep_ratio):
        """Weight 2, mean over stages and images of (kept share - target)^2: one value a forward that has a graph."""
        losses = []
        for first in range(0, len(self.drawn), len(STAGES)):
            drawn = self.drawn[first : first + len(STAGES)]
            if not drawn[0].requires_grad:
                continue
            kept, total = torch.ones_like(drawn[0][..., 0]), 0.0
            for s, one in enumerate(drawn):
                kept = kept * one[..., 0].detach()
                total += float(((kept.mean(1) - keep_ratio ** (s + 1)) ** 2).mean())
            losses.append(2 * total / len(STAGES))
        return losses


def multiply_adds(vit, image):
    """Of one image, as torch counts them: half of its floating-point operations."""
    # The fused kernel of CPUs is not among those that torch counts.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        vit(image)
    return counter.get_total_flops() / 2
