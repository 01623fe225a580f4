"""Heads that explain themselves in a report: their pictures, and what was measured of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunex.pictures.mosaic import spaced
from prunex.recipes.report.gallery import EPOCHS, Tile
from prunex.recipes.report.reading import epochs_of
from prunex.recipes.report.units import chart_of

_TREE = {
    "soft": "tree, all leaves by their shares",
    "hard": "tree, one leaf by the path alone",
    "classifier": "timm's classifier alone, without the tree",
    "tree": "tree without timm's classifier in its leaves",
    "shuffled": "tree with the routing of other images",
}
_READ_TREE = (
    "The first two are the model's answers, the others controls: the tree decides something only where it beats the "
    "classifier alone, or loses much with other images' routing; where all three are alike, it decorates what the "
    "classifier answers."
)
_READ_CONCEPTS = (
    "A concept's name says what the model goes by only as far as attention lies on concepts that are there; where the "
    "share is low, read the names as numbers."
)


@dataclass
class Heads:
    """The last epoch's picture of each model, some earlier ones, and (what, by whom, share) with how to read them."""

    last: list[tuple[str, Tile]] = field(default_factory=list)
    earlier: list[tuple[str, Tile]] = field(default_factory=list)
    numbers: list[tuple[str, str]] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def heads_of(folder: Path, metrics: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Heads | None:
    """What maps/ and the metrics hold of a head that explains itself; None where there is nothing."""
    heads = Heads()
    pictures = epochs_of(folder / "maps", "head-epoch=*.png")
    for epoch in reversed(spaced(sorted(pictures), EPOCHS)):
        tile = chart_of(pictures[epoch], f"Head, epoch {epoch}", heads.notes)
        if tile is not None:
            (heads.earlier if heads.last else heads.last).append((f"epoch {epoch}", tile))
    for name, words in _TREE.items():
        _, values = metrics.get(f"prunex/val_tree_{name}", ((), ()))
        if values:
            heads.numbers.append((words, f"{values[-1]:.1%}"))
    heads.reading += [_READ_TREE] if heads.numbers else []
    _, values = metrics.get("prunex/val_top_concept", ((), ()))
    if values:
        heads.numbers.append(("the concept with most attention is present", f"{values[-1]:.1%}"))
        heads.reading.append(_READ_CONCEPTS)
    return heads if heads.last or heads.numbers or heads.notes else None
