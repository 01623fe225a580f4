"""Reference vectors made by public implementations, when they lie beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
SEEDS = (0, 1)
present = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference vectors at {GOLDEN}")


def arrays(name, seed):
    """One file's arrays of numbers by name."""
    with np.load(GOLDEN / f"{name}-seed{seed}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind != "U"}


def model_and_images(seed, dtype=torch.float32):
    """The reference model, its images, and the rest of its file."""
    stored = arrays("vit", seed)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=5)
    model.load_state_dict({k[3:]: v for k, v in stored.items() if k.startswith("sd/")})
    return model.eval().to(dtype), stored["inputs"].to(dtype), stored
