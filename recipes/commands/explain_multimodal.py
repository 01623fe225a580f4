"""``prunex explain`` of a transformers folder: sheets, maps and tables of models of text and image, and detectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor
from tqdm import tqdm

import prunex.multimodal
from prunex.errors import NothingDetected, PrunexError
from prunex.multimodal.showing import pictures_of
from prunex.pictures.arrays import Picture
from prunex.recipes.commands.explain import option_value
from prunex.recipes.commands.multimodal_model import OpenedFolder
from prunex.recipes.commands.multimodal_options import METHODS
from prunex.recipes.commands.multimodal_tables import MultimodalOutput
from prunex.recipes.commands.options import split_names, split_option
from prunex.recipes.commands.sheets import check_out, name_of_model
from prunex.recipes.data.images import choose_range, read_image
from prunex.recipes.given import image_files


def explain_multimodal(args: Any) -> int:
    """Do what ``prunex explain`` was asked for with a transformers folder, and give back the exit code."""
    explainers = _Explainers(args)
    root, out = Path(args.images), Path(args.out or Path("explained", name_of_model(args.run)))
    files = image_files(root, besides=out if args.out else Path("explained"))
    check_out(out, root, files)
    opened = OpenedFolder(args.folder, args.text, args.device)
    # All of them now: a broken one at the end would cost the whole run.
    value_range = choose_range(tqdm(files, desc="reading", unit="image", leave=False, delay=1), args.range)
    output = MultimodalOutput(out, files, root, opened)
    try:
        with tqdm(total=len(files) * len(explainers.names), desc="explaining", unit="map") as bar:
            for batch in _batches(opened, files, value_range, args.batch):
                explanations = explainers(opened, batch, bar)
                output.add(batch.sizes, batch.drawn(opened, explanations), explanations)
        output.finish(explainers.times(len(files)))
    except PrunexError:
        # What is done stays; a disk that is full has been told of already.
        with suppress(PrunexError):
            output.finish(explainers.times(output.done))
        raise
    except KeyboardInterrupt:
        output.finish(explainers.times(output.done))
        print(f"\nprunex: interrupted: maps of {output.done} of {len(files)} images are in {out}", file=sys.stderr)
        return 130
    if output.empty:
        print(f"no object above --threshold {explainers.threshold:g} in {output.empty} of {len(files)} images")
    print(out)
    return 0


@dataclass
class _Batch:
    """Images that the model sees at one size: what it sees of each, and their sizes in pixels as they came."""

    images: list[dict[str, Tensor]]
    sizes: list[tuple[int, int]]

    def drawn(self, opened: OpenedFolder, explanations: dict[str, Any]) -> list[Picture | None]:
        """What maps lie over: in the images' own colours where the processor says how to get them back."""
        pictures = [opened.picture(image) for image in self.images]
        if explanations and any(picture is None for picture in pictures):
            return pictures_of(next(iter(explanations.values())), None)
        return pictures


def _batches(opened: OpenedFolder, files: Sequence[Path], value_range: int | None, most: int) -> Iterator[_Batch]:
    """Images that follow each other and have one size: what pads an image would change its map by a little."""
    batch = _Batch([], [])
    for file in files:
        image = read_image(file, value_range)
        prepared = opened.image(image)
        same = batch.images and all(prepared[n].shape == batch.images[0][n].shape for n in prepared)
        if batch.images and (not same or len(batch.images) == most):
            yield batch
            batch = _Batch([], [])
        batch.images.append(prepared)
        batch.sizes.append((image.height, image.width))
    yield batch


class _Explainers:
    """The methods asked for, with their options, and what each took."""

    def __init__(self, args: Any) -> None:
        given = split_names(args.methods)
        self.names = list(dict.fromkeys([*(METHODS if "all" in given else ()), *(n for n in given if n != "all")]))
        self.threshold, self.target = 0.5 if args.threshold is None else args.threshold, args.target
        self.options: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for text in args.option:
            method, name, value = split_option(text)
            self.options[method][name] = option_value(text, value)
        self._seconds = dict.fromkeys(self.names, 0.0)

    def __call__(
        self, opened: OpenedFolder, batch: _Batch, bar: Any
    ) -> dict[str, prunex.multimodal.MultimodalExplanation]:
        """One explanation a method; none where no object is detected in any of the images."""
        inputs = opened.batch(batch.images)
        more = {"threshold": self.threshold} if opened.folder.kind.detects else {}
        explanations = {}
        for name in self.names:
            bar.set_postfix_str(name)
            start = perf_counter()
            with suppress(NothingDetected):
                explanations[name] = prunex.multimodal.explain(
                    opened.model,
                    inputs,
                    self.target,
                    name,
                    processor=opened.tokenizer,
                    **more,
                    **self.options[name],
                )
                # Waits for the device, so that its time counts.
                explanations[name].image = explanations[name].image.float().cpu()
                opened.name(explanations[name])
            self._seconds[name] += perf_counter() - start
            bar.update(len(batch.images))
        return explanations

    def times(self, images: int) -> list[list[Any]]:
        """Rows of a table: method, seconds an image, images."""
        return [[name, f"{self._seconds[name] / max(1, images):.4g}", images] for name in self.names]
