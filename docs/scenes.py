"""What the scripts of this folder share: a trained model, methods, and validation images with the masks of objects."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.pictures.mosaic import spaced
from prunex.recipes import ImageFolder
from prunex.recipes.commands.explain import Explainers, read_options
from prunex.recipes.data.folder import IMAGENET_MEAN, IMAGENET_STD
from prunex.recipes.runs import open_model
from prunex.vit.anatomy import find, read


class Scenes:
    """Images of ``ROOT/val/<class>/`` with masks, evenly spread over the classes, and a model to explain.

    Args:
        args: What the command line of :func:`parser` said.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.vit = find(open_model(args.run))[1]
        self.explainers = Explainers(args.methods, read_options(args.option))
        known: Any = getattr(self.vit, "pretrained_cfg", None) or {}
        self.mean, self.std = known.get("mean") or IMAGENET_MEAN, known.get("std") or IMAGENET_STD
        height, width = read(self.vit).image
        if height != width:
            raise PrunexError(f"this model takes images of {height} x {width}: give one of square images")
        data = ImageFolder(args.root, image_size=height, mean=tuple(self.mean), std=tuple(self.std), verify=False)
        data.setup("validate")
        self.names = data.class_names
        self.dataset: Any = data.val_dataloader().dataset
        if self.dataset.masks is None:
            raise PrunexError(f"{args.root} has no masks/val: give a folder with the masks of objects")
        self.chosen = spaced(range(len(self.dataset)), args.images)

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images float [B, 3, S, S], labels int64 [B] and masks bool [B, S, S]."""
        for start in range(0, len(self.chosen), size):
            images, labels, masks = zip(*(self.dataset[i] for i in self.chosen[start : start + size]), strict=True)
            yield torch.stack(images), torch.tensor(labels), torch.stack(masks)


def parser(description: str | None, images: int) -> argparse.ArgumentParser:
    """The options that all scripts take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path, help="run folder, slim folder or checkpoint")
    made.add_argument("root", type=Path, help="folder that holds val/<class>/* and masks/val/<class>/*")
    made.add_argument("--images", type=int, default=images, help=f"validation images; default {images}")
    made.add_argument("--methods", default="all", help="names with commas between, or all that the model can take")
    made.add_argument("--option", action="append", default=[], metavar="METHOD.NAME=VALUE")
    return made
