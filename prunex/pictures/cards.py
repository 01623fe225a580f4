"""What an object shows of itself in a notebook: a few facts, tables and pictures, as HTML that needs nothing else.

Every text is escaped, pictures are held in the page itself, and colours are those of the page round it, so that a card
is at home on light and dark ones.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from prunex.brief import brief
from prunex.pictures.arrays import Picture, png_bytes

_PNG_BYTES = 30_000  # a picture larger than this is a photo, which JPEG holds in a tenth of the space
_LINE = "1px solid rgba(128, 128, 128, 0.35)"
_CELL = f"padding: 3px clamp(3px, 1.2vw, 10px); text-align: {{}}; border-bottom: {_LINE}; white-space: nowrap"
_BAR = "display: block; height: 4px; border-radius: 2px; background: #0a7bd6; width: {:.1f}%"


def card(title: str, facts: Mapping[str, Any], *parts: str) -> str:
    """A title, a line of facts by name, and what :func:`picture` and :func:`table` made, below one another.

    A fact that is None was not asked for, and says nothing.

    >>> "&lt;b&gt;" in card("Explanation", {"method": "<b>"})
    True
    """
    said = []
    for name, value in facts.items():
        if value is not None:
            text = value if isinstance(value, str) else brief(value)
            said.append(f"{escape(name)} <b>{escape(text)}</b>")
    head = f'<div style="font-weight: 600; font-size: 1.1em">{escape(title)}</div>'
    return (
        f'<div style="max-width: 100%; padding: 6px 0; line-height: 1.5">{head}'
        f'<div style="overflow-wrap: anywhere">{" · ".join(said)}</div>{"".join(parts)}</div>'
    )


def picture(pixels: Picture, words: str) -> str:
    """A picture, uint8 [H, W, 3], and what it shows in words; one wider than the page can be scrolled.

    >>> import numpy as np
    >>> "a &quot;map&quot;" in picture(np.zeros((2, 2, 3), dtype=np.uint8), 'a "map"')
    True
    """
    height, width = pixels.shape[:2]
    image = (
        f'<img style="max-width: none; margin: 0; border-radius: 4px" width="{width}" height="{height}" '
        f'src="{data_uri(pixels)}" alt="{escape(words)}">'
    )
    return f'<div style="overflow-x: auto; margin-top: 8px">{image}</div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[float] = ()) -> str:
    """Rows of texts below headings; the first column to the left, the others to the right.

    ``bars`` are shares 0..1, one a row, drawn below the last cell.

    >>> table(["block", "tokens"], [["0", "<197>"]]).count("&lt;197&gt;")
    1
    """

    def line(cells: Sequence[str], tag: str, bar: float | None = None) -> str:
        drawn = [escape(cell) for cell in cells]
        if bar is not None:
            drawn[-1] += f'<span style="{_BAR.format(100 * bar)}"></span>'
        styled = (_CELL.format("right" if number else "left") for number in range(len(drawn)))
        held = "".join(f'<{tag} style="{style}">{cell}</{tag}>' for style, cell in zip(styled, drawn, strict=True))
        return f"<tr>{held}</tr>"

    body = "".join(line(row, "td", bars[number] if bars else None) for number, row in enumerate(rows))
    return (
        '<div style="overflow-x: auto; margin-top: 8px"><table style="border-collapse: collapse; margin: 0; '
        f'font-variant-numeric: tabular-nums"><thead>{line(headings, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


def data_uri(pixels: Picture, most: int = _PNG_BYTES) -> str:
    """A picture, uint8 [H, W, 3], as an address that holds it; JPEG above ``most`` bytes."""
    content, kind = png_bytes(pixels), "png"
    # A photo as PNG takes ten times the space, and a page holds dozens.
    if len(content) > most:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=88, subsampling=0)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
