"""Tiny ViTs of transformers, every weight random: norms, LayerScale and biases at their defaults hide mistakes."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

SIZE, PATCH, CLASSES = 64, 16, 5
TOWER = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99}
RELATIVE = {"use_absolute_position_embeddings": False, "use_mask_token": False}
# By a name of ours: class, configuration's class, and what the configuration says beside the tower.
MODELS = {
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit_no_pooler": ("ViTModel", "ViTConfig", {}),
    "vit_classes": ("ViTForImageClassification", "ViTConfig", {"layer_norm_eps": 1e-6}),
    "vit_no_qkv_bias": ("ViTForImageClassification", "ViTConfig", {"qkv_bias": False, "hidden_act": "gelu_new"}),
    "vit_relu_grey": ("ViTForImageClassification", "ViTConfig", {"hidden_act": "relu", "num_channels": 1}),
    "deit": ("DeiTModel", "DeiTConfig", {}),
    "deit_classes": ("DeiTForImageClassification", "DeiTConfig", {}),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2_classes": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2_registers_classes": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"num_register_tokens": 3, "use_swiglu_ffn": True},
    ),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    "dinov2_no_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 0}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
    "dinov3_gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 2, "mlp_bias": False, "proj_bias": False},
    ),
    "dinov3_no_bias": ("DINOv3ViTModel", "DINOv3ViTConfig", {"query_bias": False, "value_bias": False}),
    "dinov3_value_bias": ("DINOv3ViTModel", "DINOv3ViTConfig", {"query_bias": False}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "clip_gelu": ("CLIPVisionModel", "CLIPVisionConfig", {"hidden_act": "gelu"}),
    "clip_projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 20}),
    "clip_whole": ("CLIPModel", "CLIPConfig", {"projection_dim": 20}),
    "clip_classes": ("CLIPForImageClassification", "CLIPConfig", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "siglip_tokens": ("SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}),
    "siglip_whole": ("SiglipModel", "SiglipConfig", {}),
    "siglip_classes": ("SiglipForImageClassification", "SiglipConfig", {}),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", {"num_patches": 16}),
    "siglip2_whole": ("Siglip2Model", "Siglip2Config", {"num_patches": 16}),
    "siglip2_classes": ("Siglip2ForImageClassification", "Siglip2Config", {"num_patches": 16}),
    "beit": ("BeitModel", "BeitConfig", {"use_absolute_position_embeddings": True}),
    "beit_class_token": ("BeitModel", "BeitConfig", RELATIVE | {"use_mean_pooling": False}),
    "beit_relative_class_token": (
        "BeitForImageClassification",
        "BeitConfig",
        RELATIVE | {"use_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "beit_relative": (
        "BeitForImageClassification",
        "BeitConfig",
        RELATIVE | {"use_relative_position_bias": True, "layer_scale_init_value": 0.0},
    ),
    "beit_shared": ("BeitForImageClassification", "BeitConfig", RELATIVE | {"use_shared_relative_position_bias": True}),
}
TWO_TOWERS = ("CLIPConfig", "SiglipConfig", "Siglip2Config")


def made(name, seed=0, **more):
    """A model by that name, in eval mode."""
    cls, kind, said = MODELS[name]
    said = TOWER | said | more
    if kind.startswith(("Dinov2", "Siglip2")):
        said = {k: v for k, v in said.items() if k not in ("image_size" if "Siglip2" in kind else "intermediate_size",)}
    if kind in TWO_TOWERS:
        tower = {k: v for k, v in said.items() if k != "projection_dim"}
        config = getattr(transformers, kind)(
            text_config=TEXT | ({"projection_size": 48} if kind != "CLIPConfig" else {}),
            vision_config=tower,
            **{k: v for k, v in said.items() if k == "projection_dim"},
        )
    else:
        config = getattr(transformers, kind)(**said)
    if "Classification" in cls:
        config.num_labels = CLASSES
    extra = {"add_pooling_layer": False} if name == "vit_no_pooler" else {}
    return randomised(getattr(transformers, cls)(config, **extra), seed)


def randomised(model, seed=0):
    """Every weight random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "lambda" in name:
                parameter.copy_(0.5 + 0.3 * noise)
            elif parameter.ndim < 2 or "position" in name or "token" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def images(size=SIZE, batch=3, channels=3, seed=5):
    """Random images."""
    size = size if isinstance(size, tuple) else (size, size)
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))
