"""A ViT of transformers, taken apart: what each part is called in any of the classes that are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.sources.classes import CLASSES, no_twin

# What a part is called: in one family or another, in transformers 5.0 or since.
_PATHS = {
    "patches": ("patch_embeddings.projection", "patch_embeddings", "patch_embedding"),
    "positions": ("position_embeddings", "position_embedding.weight"),
    "class token": ("cls_token", "class_embedding"),
    "distillation token": ("distillation_token",),
    "registers": ("register_tokens",),
    "blocks": ("layers", "layer", "encoder.layers", "encoder.layer", "model.layer"),
    "first norm": ("pre_layrnorm",),
    "last norm": ("layernorm", "post_layernorm", "norm"),
    "norm of the mean": ("pooler.layernorm",),
    "attention pooling": ("head",),
    "norm1": ("norm1", "layernorm_before", "layer_norm1"),
    "norm2": ("norm2", "layernorm_after", "layer_norm2"),
    "query": ("attention.q_proj", "self_attn.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "self_attn.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "self_attn.v_proj", "attention.attention.value"),
    "projection": ("attention.o_proj", "self_attn.out_proj", "attention.output.dense"),
    "gate": ("mlp.gate_proj",),
    "gate and fc1": ("mlp.weights_in",),
    "fc1": ("mlp.fc1", "mlp.up_proj", "intermediate.dense"),
    "fc2": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense"),
    "scale1": ("layer_scale1.lambda1", "lambda_1"),
    "scale2": ("layer_scale2.lambda1", "lambda_2"),
    "relative bias": ("relative_position_bias", "attention.attention.relative_position_bias"),
    "shared relative bias": ("shared_position_bias", "encoder.relative_position_bias"),
}


def part(module: Any, name: str) -> Any:
    """What is called so in a module; None where it has none, or leaves it out."""
    for path in _PATHS[name]:
        value = module
        for step in path.split("."):
            value = getattr(value, step, None)
        if isinstance(value, nn.Module | Tensor) and not isinstance(value, nn.Identity):
            return value
    return None


def needed(module: Any, name: str) -> Any:
    """The same where there must be one; a model without it is refused."""
    value = part(module, name)
    if value is None:
        raise PrunexError(f"{type(module).__name__} has no {name} that is known: was the model altered?")
    return value


def known_class(model: Any) -> str:
    """The name of a model's class, or of one that it derives from, among those that have a twin; others are refused."""
    # By name, so that transformers need not be imported to know a model of it.
    for kind in type(model).__mro__:
        if kind.__module__.split(".")[0] == "transformers" and kind.__name__ in CLASSES:
            return kind.__name__
    raise no_twin(type(model).__name__)


class Parts:
    """A model of transformers in eval mode, and what its twin is made from.

    Attributes:
        known: What is known of its class.
        model: The whole.
        tower: Its image tower.
        config: The tower's.
        embeddings: The tower's, from images to tokens.
        blocks: The tower's.
        size: Of the images, height and width in pixels.
        patch: Of a patch, likewise.
    """

    def __init__(self, model: Any, size: tuple[int, int] | None = None) -> None:
        name = known_class(model)
        self.known, self.model = CLASSES[name], model
        self.tower = getattr(model, self.known.tower) if self.known.tower else model
        self.tower = getattr(self.tower, "vision_model", self.tower)  # transformers 5.0 had one more round CLIP's
        self.config: Any = self.tower.config
        self.embeddings = self.tower.embeddings
        self.blocks = list(needed(self.tower, "blocks"))
        if not self.blocks:
            raise PrunexError(f"{name} has no blocks: nothing to prune or explain")
        self.patch = pair(self.config.patch_size)
        # SigLIP 2 has a grid of positions, and images of any size; the others say how large theirs are.
        self.packed = name.startswith("Siglip2")
        grid = round(self.config.num_patches**0.5) if self.packed else 0
        self.own = (grid * self.patch[0], grid * self.patch[1]) if self.packed else pair(self.config.image_size)
        self.size = self.own if size is None else size
        if self.size[0] % self.patch[0] or self.size[1] % self.patch[1]:
            raise PrunexError(f"img_size={list(self.size)} is not allowed: give multiples of the patch, {self.patch}")

    @property
    def grid(self) -> tuple[int, int]:
        """The patch grid of the images."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @property
    def head(self) -> Any:
        """The linear layer behind the tower, or None."""
        head = getattr(self.model, self.known.head) if self.known.head else None
        return head if isinstance(head, nn.Linear) else None

    @property
    def pool(self) -> str:
        """As timm's ``global_pool`` has it."""
        if self.config.model_type == "beit" and self.config.use_mean_pooling:
            return "avg"
        if self.known.pool == "map" and part(self.tower, "attention pooling") is None:
            return ""  # without its pooling SigLIP gives tokens
        return self.known.pool

    def positions(self) -> Tensor | None:
        """Position embeddings [1, prefix + P, D] for the images' size, resampled as the model itself does it."""
        table = part(self.embeddings, "positions")
        if table is None:
            return None
        high, wide = self.grid
        if self.packed:
            side = self.embeddings.position_embedding_size
            shapes = torch.tensor([self.grid], device=table.device)
            plane = table.reshape(side, side, -1)
            resize: Callable[..., Tensor] = self.embeddings.resize_positional_embeddings
            return resize(plane, shapes, max_length=high * wide)
        table = table if table.ndim == 3 else table[None]
        if self.size == self.own:
            return table
        prefix = sum(part(self.embeddings, f"{kind} token") is not None for kind in ("class", "distillation"))
        # The model's own method reads no more of its tokens than their shape.
        counted = table.new_zeros(1, prefix + high * wide, table.shape[2])
        resample: Callable[..., Tensor] = self.embeddings.interpolate_pos_encoding
        return resample(counted, *self.size)

    def answer(self, images: Tensor) -> Tensor:
        """What the model gives for images [B, C, h, w], and its twin must give."""
        what, model = self.known.answer, self.model
        inputs: dict[str, Any] = {"pixel_values": images}
        if self.packed:
            inputs = _packed(images, self.patch, self.grid)
        elif "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters and self.size != self.own:
            inputs["interpolate_pos_encoding"] = self.config.model_type != "beit"  # which does so unasked
        if what == "image_embeds" and hasattr(model, "get_image_features"):
            features = model.get_image_features(**inputs)
            return features if isinstance(features, Tensor) else features.pooler_output
        outputs = model(**inputs, return_dict=True)
        if what == "class token":
            first: Tensor = outputs.last_hidden_state[:, 0]
            return first
        given: Tensor | None = outputs.last_hidden_state if self.pool == "" else getattr(outputs, what)
        if given is None:
            raise PrunexError(f"{type(model).__name__} was built without its pooling layer: build it with it")
        return given


def _packed(images: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Images [B, C, h, w] as SigLIP 2 takes them: rows of patches [B, P, p * p * C], and their grids."""
    # Channels last within a patch, as its processor lays them out.
    rows = images.unflatten(3, (grid[1], patch[1])).unflatten(2, (grid[0], patch[0])).permute(0, 2, 4, 3, 5, 1)
    count = grid[0] * grid[1]
    return {
        "pixel_values": rows.reshape(len(images), count, -1),
        "pixel_attention_mask": torch.ones(len(images), count, dtype=torch.long, device=images.device),
        "spatial_shapes": torch.tensor([grid], device=images.device).expand(len(images), -1),
    }


def pair(value: Any) -> tuple[int, int]:
    """Height and width from one number for both, or from two."""
    numbers = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers):
        raise PrunexError(f"{str(value)[:80]!r} is no size: give a whole number above 0, or height and width")
    return numbers[0], numbers[1]
