"""Tiny models of text and image with random weights, and what they are called with."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

TEXT, BOXES = 6, 5
BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
    "num_labels": 5,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def randomised(model, seed=0):
    """Every weight random, biases and norms too: zero biases hide whole terms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def text(batch, generator, length=TEXT, vocabulary=60):
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def lxmert(batch=2, seed=0, cross=3):
    config = transformers.LxmertConfig(
        **BERT, num_qa_labels=7, visual_feat_dim=16, l_layers=2, r_layers=2, x_layers=cross, num_hidden_layers=2
    )
    g = torch.Generator().manual_seed(seed + 1)
    inputs = {
        "input_ids": text(batch, g),
        "attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "visual_feats": torch.randn(batch, BOXES, 16, generator=g),
        "visual_pos": torch.rand(batch, BOXES, 4, generator=g),
    }
    return randomised(transformers.LxmertForQuestionAnswering(config), seed), inputs


def visual_bert(batch=2, seed=0):
    config = transformers.VisualBertConfig(**BERT, num_hidden_layers=3, visual_embedding_dim=16, num_labels=7)
    g = torch.Generator().manual_seed(seed + 1)
    inputs = {
        "input_ids": text(batch, g),
        "attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "visual_embeds": torch.randn(batch, BOXES, 16, generator=g),
        "visual_attention_mask": torch.ones(batch, BOXES),
        "visual_token_type_ids": torch.ones(batch, BOXES, dtype=torch.long),
    }
    return randomised(transformers.VisualBertForQuestionAnswering(config), seed), inputs


def vilt(batch=2, seed=0):
    config = transformers.ViltConfig(**BERT, num_hidden_layers=3, image_size=32, patch_size=8, num_labels=7)
    g = torch.Generator().manual_seed(seed + 1)
    inputs = {
        "input_ids": text(batch, g),
        "attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "pixel_values": torch.randn(batch, 3, 32, 24, generator=g),
        "pixel_mask": torch.ones(batch, 32, 24, dtype=torch.long),
    }
    return randomised(transformers.ViltForQuestionAnswering(config), seed), inputs


def detector(kind, batch=2, seed=0, size=(96, 128), **more):
    """A DETR of some kind: its configuration's and its model's names share their beginning."""
    backbone = transformers.ResNetConfig(**RESNET)
    kinds = {**DECODER, **more}
    if kind == "DabDetr":
        kinds["hidden_size"] = kinds.pop("d_model")
    config = getattr(transformers, f"{kind}Config")(**kinds, use_timm_backbone=False, backbone_config=backbone)
    model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    g = torch.Generator().manual_seed(seed + 1)
    inputs = {"pixel_values": torch.randn(batch, 3, *size, generator=g), "pixel_mask": torch.ones(batch, *size)}
    return randomised(model, seed), inputs


def clip(images=2, texts=3, seed=0):
    text_config = {**TOWER, "vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 58, "eos_token_id": 59}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=16)
    g = torch.Generator().manual_seed(seed + 1)
    ids = text(texts, g, vocabulary=50)
    ids[:, -1] = 59
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(texts, TEXT, dtype=torch.long),
        "pixel_values": torch.randn(images, 3, 32, 32, generator=g),
    }
    return randomised(transformers.CLIPModel(config), seed), inputs


def owlvit(images=2, texts=2, seed=0):
    text_config = {**TOWER, "vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 58, "eos_token_id": 59}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    config = transformers.OwlViTConfig(text_config=text_config, vision_config=vision, projection_dim=32)
    g = torch.Generator().manual_seed(seed + 1)
    ids = text(images * texts, g, vocabulary=50)
    ids[:, -1] = 59
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(images * texts, TEXT, dtype=torch.long),
        "pixel_values": torch.randn(images, 3, 32, 32, generator=g),
    }
    return randomised(transformers.OwlViTForObjectDetection(config), seed), inputs


MAKERS = {
    "lxmert": lxmert,
    "visual_bert": visual_bert,
    "vilt": vilt,
    "detr": lambda **k: detector("Detr", **k),
    "conditional_detr": lambda **k: detector("ConditionalDetr", **k),
    "dab_detr": lambda **k: detector("DabDetr", **k),
    "table_transformer": lambda **k: detector("TableTransformer", **k),
    "clip": clip,
    "owlvit": owlvit,
}
