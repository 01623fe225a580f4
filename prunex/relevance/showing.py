"""Explanations as a notebook shows them: the maps over the images, and what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunex.brief import brief
from prunex.errors import PrunexError
from prunex.pictures import contact_sheet, under_grid
from prunex.pictures.arrays import Picture, as_numpy
from prunex.pictures.cards import card, picture
from prunex.pictures.mosaic import class_name
from prunex.pictures.sheet import SIGNED
from prunex.vit.showing import FEW, first_of

if TYPE_CHECKING:
    from prunex.relevance.explanation import Explanation


def explained(e: Explanation, class_names: Sequence[str] | None = None) -> str:
    """What an explanation is of, in a few words."""
    if e.function is not None:
        return brief(e.function)
    if not e.class_specific or bool((e.target < 0).all()):
        return "of no class"
    classes = list(dict.fromkeys(e.target.tolist()))
    names = [class_name(number, class_names) for number in classes[:FEW]]
    return f"for {', '.join(names)}{', ...' if len(classes) > FEW else ''}"


def sheet(e: Explanation, images: Any, class_names: Sequence[str] | None, most: int) -> Picture:
    """What :meth:`Explanation.show` draws, of the first ``most`` images."""
    pictures = None
    if images is not None or e.entered is not None:
        pictures = e._drawn_on(images)[:most]
        # Where images are no whole number of patches, the grid lies over a part of them, or of what pads them.
        size = [round(s * c / i) for s, c, i in zip(pictures.shape[1:3], e.covered, e.image_size, strict=True)]
        pictures = under_grid(pictures, (size[0], size[1]))
    pruned = bool(e.trace.stages) and not e.trace.pooled
    named = e.class_specific and e.function is None and not bool((e.target < 0).any())
    heading = [f"{e.method or 'explanation'}, {explained(e, class_names)}"]
    if len(e.maps) > most:
        heading.append(f"the first {most} of {len(e.maps)} images")
    return contact_sheet(
        pictures,
        {e.method or "map": e.maps[:most]},
        signed=[e.method or "map"] if e.signed else (),
        kept=e.trace.kept()[:most] if pruned else None,
        labels=e.target[:most] if named else None,
        class_names=class_names,
        heading=heading,
    )


def explanation_card(e: Explanation) -> str:
    """An explanation as HTML."""
    facts = {
        "method": e.method,
        "explained": explained(e),
        "images": len(e.maps),
        "patch grid": f"{e.maps.shape[1]} × {e.maps.shape[2]}",
        "values": "signed" if e.signed else "unsigned",
        **e.options,
    }
    drawn = sheet(e, None, None, FEW)
    return card("Explanation", facts, picture(drawn, f"{e.method} of {first_of(len(e.maps))}"))


def plot(e: Explanation, index: int, axes: Any) -> Any:
    """What :meth:`Explanation.plot` draws."""
    count = len(e.maps)
    if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
        raise PrunexError(f"index={index!r} is not allowed: this explanation has images 0..{count - 1}")
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(layout="constrained")[1]
    values = as_numpy(e.maps[index])
    # Both ends alike, so that 0 has the middle colour; and a range at all for a map of zeros.
    largest = float(abs(values).max()) or 1.0
    signed = {"cmap": SIGNED, "vmin": -largest, "vmax": largest}
    shown = axes.imshow(values, **(signed if e.signed else {"cmap": "inferno"}))
    axes.figure.colorbar(shown, ax=axes, label="relevance")
    target = int(e.target[index])
    of = explained(e) if e.function is not None or not e.class_specific or target < 0 else f"for class {target}"
    axes.set_title(f"{e.method}, {of}", parse_math=False)
    axes.set(xlabel="patch column", ylabel="patch row")
    return axes
