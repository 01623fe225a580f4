"""Pictures of methods that need no training, drawn with the shipped model; docs/pictures/ has those of the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import prunex
from docs.site.methods import CONFIGS, UNDRAWN, UNTRAINED, folder
from prunex.pictures import unit_widths
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.registry import Method

SHIPPED = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
# Options that suit a picture: quick ones, and as many tokens merged as a grid of 64 patches has room for.
FEW: dict[str, dict[str, Any]] = {"shap": {"budget": 256}, "tome": {"r": 6}, "ppt": {"r": 10}}
SCENES, LOOKED_AT = 2, 32


def draw(out: Path) -> None:
    """Draw every method that nothing has to be trained for."""
    out.mkdir(parents=True, exist_ok=True)
    model, (images, labels) = shipped(), scenes()
    for method in untrained():
        picture = PICTURES[folder(method)](method, model, images, labels)
        Image.fromarray(np.asarray(picture)).save(out / f"{folder(method)}-{method.name}.png")


def untrained() -> Iterator[Method]:
    """The methods that are drawn here."""
    for method in prunex.methods():
        key = (folder(method), method.name)
        if key[0] in UNTRAINED and key not in UNDRAWN and key not in CONFIGS and ("heads", method.name) not in CONFIGS:
            yield method


def shipped() -> Any:
    """The model that ships with the package."""
    return ImageClassifier("vit_tiny_patch16_224", 10, SHIPPED, weights="digits").eval().model


def scenes() -> tuple[Tensor, Tensor]:
    """Validation scenes and their labels."""
    data = DigitScenes(batch_size=LOOKED_AT)
    data.setup("validate")
    images, labels, *_ = next(iter(data.val_dataloader()))
    return images, labels


def explained(method: Method, model: Any, images: Tensor, labels: Tensor) -> Any:
    """An explainer's maps."""
    e = prunex.explain(method.name, model, images[:SCENES], **FEW.get(method.name, {}))
    return e.show(images[:SCENES], class_names=[str(digit) for digit in range(10)])


def kept(method: Method, model: Any, images: Tensor, labels: Tensor) -> Any:
    """What a token pruner leaves."""
    with prunex.attach(model, method.name, **FEW.get(method.name, {})) as pruning:
        if method.name == "patch_slimming":
            pruning.calibrate([images])
        return kept_of(model, images[:SCENES])


def kept_of(model: Any, images: Tensor) -> Any:
    """What a pruned model leaves of each image, stage by stage."""
    with torch.no_grad():
        model(images)
    return prunex.attached(model).trace.show(images)


def widths(method: Method, model: Any, images: Tensor, labels: Tensor) -> Any:
    """What a criterion leaves of heads and MLP channels."""
    with prunex.attach(model, method.name, budget=0.5) as pruning:
        pruning.calibrate([(images, labels)])
        branches = pruning.pruner.branches
        dense, left = (np.zeros((1 + max(b.block for b in branches), 2), int) for _ in range(2))
        for b in branches:
            place = b.block, ("heads", "channels").index(b.kind)
            dense[place], left[place] = b.units, int(pruning.pruner.open(b.key).sum())
        return unit_widths(dense, left)


PICTURES = {"explainers": explained, "tokens": kept, "units": widths}
