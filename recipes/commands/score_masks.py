"""``prunex score --protocol masks``: what relevance covers of detected objects (arXiv 2103.15679), beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prunex.errors import NothingDetected, PrunexError
from prunex.multimodal.coco import CocoFolder
from prunex.multimodal.explanation import Query
from prunex.multimodal.mask_scores import BySize, Detections, MaskScorer, MaskScores
from prunex.multimodal.masks import cell_masks
from prunex.recipes.commands.multimodal_explainers import Explainers
from prunex.recipes.commands.multimodal_model import OpenedFolder
from prunex.recipes.commands.multimodal_results import prepare, write_results
from prunex.recipes.commands.options import RANDOM
from prunex.recipes.commands.score_data import spaced


def score_masks(args: Any) -> int:
    """Do what ``prunex score --protocol masks`` was asked for, and give back the exit code."""
    explainers, root = Explainers(args), Path(args.data)
    opened = OpenedFolder(args.folder, (), args.device)
    data, numbered = _coco(root, opened.model)
    prepare(args)
    names = [*explainers.names, RANDOM]
    scorers = {name: MaskScorer() for name in names}
    generator = torch.Generator().manual_seed(0)
    places = spaced(len(data), args.images)
    for place in tqdm(places, desc="scoring", unit="image"):
        image, objects = data[place]
        inputs, size = opened.batch([opened.image(image)]), (image.height, image.width)
        for name in explainers.names:
            queries: list[Query] = []
            with suppress(NothingDetected):
                queries = [*(explainers.explain(opened, inputs, name).queries or ())]
            scorers[name].update(_detections(queries, size, args.mask_rule), objects)
        # Of what was detected a map that says nothing: all methods explain the same detections.
        chance = [replace(each, map=torch.rand(each.map.shape, generator=generator)) for each in queries]
        scorers[RANDOM].update(_detections(chance, size, args.mask_rule), objects)
    measured = {name: scorer.compute() for name, scorer in scorers.items()}
    first = measured[RANDOM]
    if not first.detections:
        raise PrunexError(
            f"no object above --threshold {explainers.threshold:g} in {first.images} images, so no map can be scored: "
            "lower it"
        )
    conditions = {
        "images": first.images,
        "detections": first.detections,
        "objects": int(first.objects.all),
        "threshold": explainers.threshold,
        "mask_rule": args.mask_rule,
        "iou_thresholds": "0.20 to 0.95 in steps of 0.05",
        "classes": numbered,
        "constant_maps": {name: each.constant for name, each in measured.items()},
    }
    write_results(args, _rows(measured), conditions)
    return 0


def _coco(root: Path, model: Any) -> tuple[CocoFolder, str]:
    """The data, with classes by the model's names where it knows all of them, else by their numbers."""
    by_name = {str(name): int(number) for name, number in (getattr(model.config, "label2id", None) or {}).items()}
    data = CocoFolder(root / "annotations.json", root / "images")
    # Annotations and models number classes each in their own way: names say which is which.
    if set(data.names.values()) <= set(by_name):
        return CocoFolder(root / "annotations.json", root / "images", by_name), "by name"
    most = int(getattr(model.config, "num_labels", 0))
    beyond = [number for number in data.names if not 0 <= number < most]
    if beyond:
        raise PrunexError(
            f"{root / 'annotations.json'}: category {data.names[beyond[0]]!r} is number {beyond[0]}, and the model has "
            f"{most} classes, none of that name: name categories as the model's config.json does"
        )
    return data, "by number"


def _detections(queries: Sequence[Query], size: tuple[int, int], mask_rule: Any) -> Detections:
    """The explained object queries of one image, as masks of its own size."""
    masks = [each.at(size, mask_rule).cpu() for each in queries]
    return Detections(
        # Of an empty list torch makes no stack.
        torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool),
        torch.tensor([each.probability for each in queries]),
        torch.tensor([each.target for each in queries], dtype=torch.int64),
        sum(bool(cell_masks(each.map).constant) for each in queries),
    )


def _rows(measured: Mapping[str, MaskScores]) -> list[list[str]]:
    """A row a method: AP of all, medium and large objects, the IoU likewise, average recall of all."""
    head = ["method", *(f"{name} {size}" for name in ("AP", "IoU") for size in ("all", "medium", "large")), "AR all"]

    def three(values: BySize) -> list[str]:
        return [_number(value) for value in (values.all, values.medium, values.large)]

    rows = [[name, *three(each.ap), *three(each.iou), _number(each.ar.all)] for name, each in measured.items()]
    return [head, *rows]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4f}"
