"""``prunex explain`` of a transformers folder: sheets, maps and tables of models of text and image, and detectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from prunex.errors import PrunexError
from prunex.multimodal.showing import pictures_of
from prunex.pictures.arrays import Picture
from prunex.recipes.commands.multimodal_explainers import Explainers
from prunex.recipes.commands.multimodal_model import OpenedFolder
from prunex.recipes.commands.multimodal_tables import MultimodalOutput
from prunex.recipes.commands.sheets import check_out, name_of_model, sheet_names
from prunex.recipes.data.images import choose_range, read_image
from prunex.recipes.given import image_files


def explain_multimodal(args: Any) -> int:
    """Do what ``prunex explain`` was asked for with a transformers folder, and give back the exit code."""
    explainers = Explainers(args)
    root, out = Path(args.images), Path(args.out or Path("explained", name_of_model(args.run)))
    files = image_files(root, besides=out if args.out else Path("explained"))
    check_out(out, root, sheet_names(files, root), files, ours=(out / "maps.npz").exists())
    opened = OpenedFolder(args.folder, args.text, args.device)
    # All of them now: a broken one at the end would cost the whole run.
    value_range = choose_range(tqdm(files, desc="reading", unit="image", leave=False, delay=1), args.range)
    output = MultimodalOutput(out, files, root, opened)
    try:
        with tqdm(total=len(files) * len(explainers.names), desc="explaining", unit="map") as bar:
            for batch in _batches(opened, files, value_range, args.batch):
                explanations = explainers(opened, opened.batch(batch.images), len(batch.images), bar)
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
