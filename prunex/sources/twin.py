"""The timm model that answers as a ViT of transformers does, with its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm
from timm.layers.activations import GELUTanh, QuickGELU
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.sources.parts import Parts, needed, part
from prunex.vit.arguments import ratio
from prunex.vit.rebuild import Still

_ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU,
    "gelu_new": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}


def twin_of(parts: Parts) -> Any:
    """The twin in eval mode, on the parts' device and in their dtype."""
    make = {"dinov3_vit": _eva, "beit": _beit}.get(parts.config.model_type, _vision_transformer)
    with torch.random.fork_rng(devices=[]), Still():
        twin = make(parts).eval()
    weight = needed(parts.embeddings, "patches").weight
    twin.to(weight)
    weights = {name: value.detach().clone() for name, value in _Weights(parts, twin).all().items()}
    lost = twin.load_state_dict(weights, strict=False)
    # Tables that are computed may be in a state dict, by timm's version.
    missing = sorted(set(lost.missing_keys) & {name for name, _ in twin.named_parameters()})
    if missing or lost.unexpected_keys:
        names = ", ".join([*missing, *lost.unexpected_keys][:4])
        raise PrunexError(f"{type(parts.model).__name__} and its timm twin have other parts ({names}): was it altered?")
    return twin


def _shape(parts: Parts) -> dict[str, Any]:
    """What every family's constructor is told."""
    block, head = parts.blocks[0], parts.head
    norm = needed(block, "norm1")
    return {
        "img_size": parts.size,
        "patch_size": parts.patch,
        "in_chans": parts.config.num_channels,
        "embed_dim": parts.config.hidden_size,
        "depth": len(parts.blocks),
        "num_heads": parts.config.num_attention_heads,
        "num_classes": 0 if head is None else head.out_features,
        "global_pool": parts.pool,
        "norm_layer": partial(LayerNorm, eps=norm.eps),
    }


def _gated(block: Any) -> bool:
    return part(block, "gate") is not None or part(block, "gate and fc1") is not None


def _hidden(block: Any) -> int:
    """The width that an MLP's second layer reads."""
    return int(needed(block, "fc2").in_features)


def _activation(parts: Parts) -> Any:
    name = parts.config.hidden_act
    if name not in _ACTIVATIONS:
        raise PrunexError(f"hidden_act={str(name)[:40]!r} is in no timm model: known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _vision_transformer(parts: Parts) -> Any:
    """ViT, DeiT, DINOv2, CLIP and SigLIP."""
    block, embeddings = parts.blocks[0], parts.embeddings
    width, hidden = parts.config.hidden_size, _hidden(block)
    args: dict[str, Any] = _shape(parts) | {
        "qkv_bias": needed(block, "query").bias is not None,
        "init_values": None if part(block, "scale1") is None else 1e-5,
        "mlp_ratio": ratio(hidden, width),
        # DINOv2's SwiGLU has the one activation; elsewhere the configuration says which.
        "act_layer": nn.SiLU if _gated(block) else _activation(parts),
    }
    if _gated(block):
        args |= {"mlp_layer": partial(GluMlp, gate_last=False), "mlp_ratio": ratio(2 * hidden, width)}
    if hasattr(parts.model, "distillation_classifier"):
        return VisionTransformerDistilled(**args)
    registers = _registers(parts)
    # A distillation token that no head reads is a register, with a position.
    idle = part(embeddings, "distillation token") is not None
    return VisionTransformer(
        **args,
        class_token=part(embeddings, "class token") is not None,
        reg_tokens=int(idle) if registers is None else registers.shape[1],
        no_embed_class=registers is not None,
        pre_norm=part(parts.tower, "first norm") is not None,
        final_norm=parts.known.pooled_norm,
        fc_norm=False,
    )


def _eva(parts: Parts) -> Any:
    """DINOv3, whose positions are rotary: images of any size are taken as the model itself takes them."""
    block = parts.blocks[0]
    # timm builds either MLP with the one activation.
    if parts.config.hidden_act != ("silu" if _gated(block) else "gelu"):
        raise PrunexError(
            f"hidden_act={str(parts.config.hidden_act)[:40]!r} is not timm's for this DINOv3: silu where it is gated, "
            "else gelu"
        )
    for number, other in enumerate(parts.blocks):
        bias = needed(other, "key").bias
        if bias is not None and bias.any():
            raise PrunexError(f"block {number} has a key bias, which timm's DINOv3 has no place for")
    biased = any(needed(block, name).bias is not None for name in ("query", "value"))
    return Eva(
        **_shape(parts),
        qkv_bias=biased,
        init_values=1e-5,
        mlp_ratio=ratio(_hidden(block), parts.config.hidden_size),
        swiglu_mlp=_gated(block),
        num_reg_tokens=parts.config.num_register_tokens,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=parts.config.rope_theta,
        rope_rotate_half=True,
        use_fc_norm=False,
        dynamic_img_size=True,
    )


def _beit(parts: Parts) -> Any:
    """BEiT, also with a relative bias of each block or a shared one."""
    if _activation(parts) is not nn.GELU:
        raise PrunexError(f"hidden_act={parts.config.hidden_act!r} is not timm's for BEiT: gelu is")
    block = parts.blocks[0]
    return Beit(
        **_shape(parts),
        qkv_bias=True,
        init_values=None if part(block, "scale1") is None else 1e-5,
        mlp_ratio=ratio(_hidden(block), parts.config.hidden_size),
        use_abs_pos_emb=part(parts.embeddings, "positions") is not None,
        use_rel_pos_bias=part(block, "relative bias") is not None,
        use_shared_rel_pos_bias=part(parts.tower, "shared relative bias") is not None,
    )


def _registers(parts: Parts) -> Tensor | None:
    """Register tokens [1, R, D]; None for none."""
    registers: Tensor | None = part(parts.embeddings, "registers")
    return None if registers is None or registers.shape[1] == 0 else registers


class _Weights:
    """A twin's state dict, from the parts: names of timm, values of transformers."""

    def __init__(self, parts: Parts, twin: Any) -> None:
        self.parts, self.twin = parts, twin
        self.wanted = set(twin.state_dict())
        self.state: dict[str, Tensor] = {}

    def all(self) -> dict[str, Tensor]:
        parts = self.parts
        self.embedding()
        for number, block in enumerate(parts.blocks):
            self.block(f"blocks.{number}.", block)
        if "norm.weight" in self.wanted:
            self.layer("norm", needed(parts.tower, "last norm"))
        if "fc_norm.weight" in self.wanted:
            self.layer("fc_norm", needed(parts.tower, "norm of the mean"))
        if parts.pool == "map":
            self.attention_pooling(needed(parts.tower, "attention pooling"))
        if parts.head is not None:
            self.layer("head", parts.head)
        if parts.known.both and parts.head is not None:  # what reads the mean patch is a head of ours
            self.state["head.weight"] = self.state["head.weight"][:, : parts.config.hidden_size]
        if "head_dist.weight" in self.wanted:
            self.layer("head_dist", parts.model.distillation_classifier)
        return self.state

    def layer(self, name: str, layer: Any) -> None:
        """A norm, a convolution or a linear layer; where timm's has a bias and this one none, it is of zeros."""
        self.state[f"{name}.weight"] = layer.weight
        if f"{name}.bias" in self.wanted:
            self.state[f"{name}.bias"] = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias

    def embedding(self) -> None:
        """Patches, tokens in front of them, and positions."""
        parts, embeddings = self.parts, self.parts.embeddings
        self.layer("patch_embed.proj", needed(embeddings, "patches"))
        if parts.packed:  # a linear layer over pixels, channels last
            flat = self.state["patch_embed.proj.weight"].unflatten(1, (*parts.patch, parts.config.num_channels))
            self.state["patch_embed.proj.weight"] = flat.permute(0, 3, 1, 2)
        first, registers = part(embeddings, "class token"), _registers(parts)
        idle, positions = part(embeddings, "distillation token"), parts.positions()
        if first is not None:
            self.state["cls_token"] = first = first.reshape(1, 1, -1)
        if registers is not None:
            self.state["reg_token"] = registers
            if positions is not None:  # timm's registers and its class token beside them have none
                self.state["cls_token"], positions = first + positions[:, :1], positions[:, 1:]
        if idle is not None:
            self.state["dist_token" if "dist_token" in self.wanted else "reg_token"] = idle
        if positions is not None:
            self.state["pos_embed"] = positions
        if "norm_pre.weight" in self.wanted:
            self.layer("norm_pre", needed(parts.tower, "first norm"))
        if "rel_pos_bias.relative_position_bias_table" in self.wanted:
            self.relative("rel_pos_bias", needed(parts.tower, "shared relative bias"))

    def block(self, name: str, block: Any) -> None:
        for norm in ("norm1", "norm2"):
            self.layer(name + norm, needed(block, norm))
        three = [needed(block, which) for which in ("query", "key", "value")]
        self.state[f"{name}attn.qkv.weight"] = torch.cat([layer.weight for layer in three])
        # timm's BEiT and EVA have no bias of keys.
        q, k, v = (layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in three)
        biases = {"attn.qkv.bias": torch.cat([q, k, v]), "attn.q_bias": q, "attn.v_bias": v}
        self.state |= {name + n: value for n, value in biases.items() if name + n in self.wanted}
        self.layer(f"{name}attn.proj", needed(block, "projection"))
        self.mlp(f"{name}mlp.", block)
        for number in "12":
            scale = part(block, f"scale{number}")
            if scale is not None:
                ours = f"{name}ls{number}.gamma"
                self.state[ours if ours in self.wanted else f"{name}gamma_{number}"] = scale
        if f"{name}attn.relative_position_bias_table" in self.wanted:
            self.relative(f"{name}attn", needed(block, "relative bias"))

    def mlp(self, name: str, block: Any) -> None:
        """Its MLP; of a gated one timm has the gate and what it gates in one layer."""
        self.layer(f"{name}fc2", needed(block, "fc2"))
        gate, joint = part(block, "gate"), part(block, "gate and fc1")
        self.layer(f"{name}fc1", needed(block, "fc1") if joint is None else joint)
        if gate is not None:
            first = needed(block, "fc1")
            self.state[f"{name}fc1.weight"] = torch.cat([gate.weight, first.weight])
            if first.bias is None:
                self.state[f"{name}fc1.bias"] = first.weight.new_zeros(2 * len(first.weight))
            else:
                self.state[f"{name}fc1.bias"] = torch.cat([gate.bias, first.bias])

    def relative(self, name: str, bias: Any) -> None:
        """A table of relative biases for the images' grid: read back from the bias that the model itself makes."""
        # Pairs of tokens that lie alike share an entry, and write the same number into it.
        index = self.twin.get_submodule(name).relative_position_index
        pairs = bias(self.parts.grid)[0].permute(1, 2, 0).flatten(0, 1)  # [pairs of tokens, heads]
        table = pairs.new_zeros(int(index.max()) + 1, pairs.shape[1])
        table[index.flatten()] = pairs
        self.state[f"{name}.relative_position_bias_table"] = table

    def attention_pooling(self, head: Any) -> None:
        """SigLIP's, whose query, key and value are rows of one matrix."""
        # transformers pools by torch's own MultiheadAttention.
        width = self.parts.config.hidden_size
        weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        self.state |= {
            "attn_pool.latent": head.probe,
            "attn_pool.q.weight": weight[:width],
            "attn_pool.q.bias": bias[:width],
            "attn_pool.kv.weight": weight[width:],
            "attn_pool.kv.bias": bias[width:],
        }
        self.layer("attn_pool.proj", head.attention.out_proj)
        self.layer("attn_pool.norm", head.layernorm)
        self.layer("attn_pool.mlp.fc1", head.mlp.fc1)
        self.layer("attn_pool.mlp.fc2", head.mlp.fc2)
