"""Memory of training on paper: parameters, gradients, optimiser states and activations, counted from a model's shapes.

``python docs/measure_memory.py`` prints the table of docs/scale.md; with ``--check`` it trains a small ViT for a step,
counts the bytes that autograd and the optimiser really hold, and prints both.
"""

import argparse
import warnings

import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import prunex

GIB = 2**30
# Name in the table, timm's name or its arguments, pixels.
MODELS = {
    "ViT-S/16": ("vit_small_patch16_224", {}),
    "ViT-B/16": ("vit_base_patch16_224", {}),
    "ViT-L/16": ("vit_large_patch16_224", {}),
    "ViT-H/14": ("vit_huge_patch14_224", {}),
    "ViT-g/14": ("vit_giant_patch14_224", {}),
    "ViT-7B/16": ("vit_7b_patch16_dinov3", {"img_size": 224}),
}
METHODS = {"dense": None, "evit": {"keep_ratio": 0.7}, "dynamicvit": {"keep_ratio": 0.7}}


def attach(model: nn.Module, method: str) -> nn.Module:
    """A model with one of :data:`METHODS` on it."""
    if METHODS[method] is not None:
        prunex.attach(model, method, **METHODS[method])
    return model.train()


def activations(model: nn.Module, method: str) -> float:
    """Bytes that one image's forward and losses leave for the backward pass: float32, no gradient checkpointing.

    Of each linear layer, norm and activation function its input, of fused attention queries, keys, values, output and a
    number a row.
    """
    grid, prefix = model.patch_embed.num_patches, model.num_prefix_tokens
    embed = model.patch_embed.proj
    total = 3.0 * grid * embed.kernel_size[0] * embed.kernel_size[1]  # the image
    attached = prunex.attached(model)
    stages = () if attached is None else attached.pruner.stages
    left = [(grid + prefix, grid + prefix)] * len(model.blocks)
    if method == "evit":
        left = [(b.attention_tokens, b.mlp_tokens) for b in prunex.cost(model).blocks]
    for number, (block, (n, fed)) in enumerate(zip(model.blocks, left, strict=True)):
        attn, mlp = block.attn, block.mlp
        width, heads, inner, hidden = (
            model.embed_dim,
            attn.num_heads,
            attn.num_heads * attn.head_dim,
            mlp.fc2.in_features,
        )
        total += n * (2 * width + 4 * inner + heads + 2)
        # SwiGLU holds gate, its activation, value and product; the others what goes into the activation and out of it.
        total += fed * (2 * width + (4 if hasattr(mlp, "fc1_g") else 2) * hidden + 2)
        if method == "evit" and number in stages:  # keys for the class token's row, and what is fused
            total += n * (inner + width + heads)
        if method == "dynamicvit" and number >= stages[0]:  # attention under a policy, see prunex/vit/policy.py
            total += n * inner + 4 * n * heads * (attn.head_dim + 8) + 3 * n * heads + 2 * heads * (attn.head_dim + 8)
    if method == "dynamicvit":  # predictors, and the distance to the teacher's tokens
        total += grid * model.embed_dim * (5 * len(stages) - 0.5 + 1)
    return 4 * (total + (grid + prefix) * model.embed_dim)


def parameters(model: nn.Module) -> int:
    """Parameters that train, those of the pruner among them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def states(model: nn.Module, method: str, processes: int, weights: int = 4) -> float:
    """Bytes a process holds of weights, gradients and AdamW's two states, sharded; and of a teacher, which is not."""
    held = parameters(model) * (weights * 2 + 8) / processes
    return held + (sum(p.numel() for p in dense_of(model)) * weights if method == "dynamicvit" else 0)


def dense_of(model: nn.Module) -> list[nn.Parameter]:
    """The ViT's own parameters."""
    return [p for name, p in model.named_parameters() if not name.startswith("prunex")]


def table() -> None:
    """One row a model and method."""
    print("| model | method | parameters | weights, gradients, AdamW: ddp | by 8 | by 64 | activations of an image |")
    print("|---|---|---|---|---|---|---|")
    for title, (name, options) in MODELS.items():
        for method in METHODS:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = timm.create_model(name, num_classes=1000, **options)
                attach(model, method)
            held = " | ".join(f"{states(model, method, n) / GIB:.3g}" for n in (1, 8, 64))
            images = activations(model, method) / GIB
            count = parameters(model) / 1e6
            print(f"| {title} | {method} | {count:,.0f} M | {held} | {images:.3g} |")


def measured(method: str, batch: int = 8) -> tuple[float, float, float, float]:
    """Bytes counted and bytes held, of a small ViT: activations an image, then weights, gradients and states."""
    torch.manual_seed(0)
    size = {"img_size": 128, "embed_dim": 96, "depth": 8, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    attach(model, method)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    optimiser = torch.optim.AdamW(model.parameters())
    images = torch.randn(batch, 3, 128, 128)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().mean()
        more = prunex.attached(model)
        loss = loss + sum(more.losses().values()) if more is not None else loss
    held = sum(saved.values()) / batch
    loss.backward()
    optimiser.step()
    kept = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    kept += [t for t in tree_leaves([dict(s) for s in optimiser.state.values()]) if isinstance(t, torch.Tensor)]
    teacher = getattr(prunex.attached(model).pruner, "_teacher", ()) if method != "dense" else ()
    kept += [p for m in teacher for p in m.parameters()]
    return activations(model, method), held, states(model, method, 1), sum(t.nbytes for t in kept)


def main() -> None:
    """The table, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        table()
        return
    torch.set_num_threads(1)
    for method in METHODS:
        counted, held, on_paper, kept = measured(method)
        print(
            f"{method}: activations {counted / 2**20:.2f} MiB an image on paper, {held / 2**20:.2f} held "
            f"({counted / held - 1:+.1%}); weights and states {on_paper / 2**20:.2f} and {kept / 2**20:.2f} "
            f"({on_paper / kept - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
