"""What an explanation of a model of text and image holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.multimodal.masks import MaskRule, cell_masks, image_masks

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(eq=False, repr=False)
class Query(Brief):
    """One object query of one image.

    Attributes:
        image: Number of the image in the batch.
        query: Number of the query.
        target: The class explained.
        label: Its name.
        score: Its score, before softmax or sigmoid.
        probability: After it.
        map: float [h, w], relevance of the cells that lie on the image; padding is cut off.
        box: float [4]: centre x and y, width, height, as shares of the image.
        text: float [T], relevance of the text's tokens, where a text asks for the object; else None.
        text_number: Which of the inputs' texts it belongs to.
        size: Height and width in pixels of the image in the model's input, without padding.
        input_size: The same with padding.
        grid: Height and width of the whole input in cells.
    """

    in_repr = ("image", "query", "label", "score", "map")

    image: int
    query: int
    target: int
    label: str
    score: float
    probability: float
    map: Tensor
    box: Tensor
    text: Tensor | None
    text_number: int
    size: tuple[int, int]
    input_size: tuple[int, int]
    grid: tuple[int, int]

    @property
    def mask(self) -> Tensor:
        """The map as a mask, bool [H, W], of the image in the model's input; foreground from half way on."""
        return self.at()

    def at(self, size: tuple[int, int] | None = None, mask_rule: MaskRule = "half") -> Tensor:
        """The map as a mask, bool [H, W]: Otsu over the cells, see :func:`prunex.multimodal.image_masks`.

        Args:
            size: Height and width of the image as it came; None: as the model saw it.
            mask_rule: "half", or "reference" as in the paper's experiment, whose masks are about a cell wider.
        """
        # The threshold is that of the image's own cells, and the mask lies over the padded input.
        cells = self.map.new_zeros(self.grid).bool()
        cells[: self.map.shape[0], : self.map.shape[1]] = cell_masks(self.map).masks
        return image_masks(cells[None], self.input_size, size, size=self.size, mask_rule=mask_rule)[0]


class Queries:
    """The explained object queries: ``queries[q]`` of a single image, ``queries[b, q]`` of any; loops give all."""

    def __init__(self, entries: list[Query], images: int) -> None:
        self._entries, self._images = {(entry.image, entry.query): entry for entry in entries}, images

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Query]:
        return iter(self._entries.values())

    def __getitem__(self, key: int | tuple[int, int]) -> Query:
        if isinstance(key, int) and self._images != 1:
            raise PrunexError(f"query {key} of {self._images} images: say of which, as in queries[0, {key}]")
        place = (0, key) if isinstance(key, int) else key
        if place not in self._entries:
            raise PrunexError(
                f"object query {key!r} is not explained. Explained, by image and query: "
                f"{', '.join(map(str, self._entries)) or 'none'}; explain(..., queries=[...]) takes others"
            )
        return self._entries[place]

    def __repr__(self) -> str:
        return f"Queries({list(self._entries)})"


@dataclass(eq=False, repr=False)
class MultimodalExplanation(Brief):
    """Relevance of text and image tokens for each sample's target, and the matrices behind it.

    With K targets a sample, or a detector's K object queries, every array has a dimension for them after the batch's.

    Attributes:
        text: float [B, T], or [B, K, T]: relevance of text tokens; None without a text.
        image: float [B, I], or [B, K, I]: of boxes, or of the image's cells row by row.
        relevance: Matrices by name, [B, n, m] or [B, K, n, m]: R_tt, R_ti, R_ii, R_it of two streams, R_ss of one,
            R_qq, R_qi, R_ii of a detector with a decoder.
        target: int64 [B], or [B, K]: the class explained, or the text of a model that compares.
        scores: float like ``target``: the scores that were explained.
        logits: What the scores were taken from.
        grid: Height and width of the image's cells; None where the image is a list of boxes.
        text_valid: bool [N, T] of each text in the inputs, false for padding.
        texts: int64 like ``target``: which of those each target is about.
        labels: By sample the name of what is explained, or K names: the class's as the model's configuration has it;
            of a model that compares the text, where a processor was given.
        image_valid: bool [B, I].
        boxes: float [B, n, 4], of the image's boxes as they were given, or of each object query as it is predicted.
        queries: A detector's explained object queries, one by one; else None.
        dropped: bool [B, layers], or [B, K, layers]: the cross maps that ``literal=True`` left out, where a row of
            zeros was divided by its sum.
        words: The tokens of each text in the inputs, where a processor was given.
        pictures: float [B, C, H, W], the images as the model saw them, where it sees pixels.
        sizes: Height and width of each in pixels, without padding.
        method: The method's name.
        options: Every option in force.
    """

    in_repr = ("method", "text", "image", "target", "grid")

    text: Tensor | None
    image: Tensor
    relevance: dict[str, Tensor]
    target: Tensor
    scores: Tensor
    logits: Tensor
    grid: tuple[int, int] | None
    text_valid: Tensor | None
    texts: Tensor
    labels: list[Any]
    image_valid: Tensor
    boxes: Tensor | None = None
    queries: Queries | None = None
    dropped: Tensor | None = None
    words: list[list[str]] | None = None
    pictures: Tensor | None = None
    sizes: list[tuple[int, int]] | None = None
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def same(self, query: Query) -> Query:
        """An object query of another method's explanation as this one has it."""
        if self.queries is None:
            raise PrunexError(f"query {query.query} of image {query.image}: this explanation has no object queries")
        return self.queries[query.image, query.query]

    def show(self, images: Sequence[Any] | Tensor | None = None, words: Sequence[Sequence[str]] | None = None) -> Image:
        """The explanation drawn: words coloured, and boxes or cells over the image; of a detector each object query.

        Every map and every text has its own scale, from 0 to its largest value. Twelve object queries of an image are
        drawn at most, the most probable ones.

        Args:
            images: Pictures to draw on, one a sample: uint8 [B, H, W, 3], float [B, C, H, W] of 1 or 3 channels, or a
                list of arrays or PIL images of any sizes; maps lie over the whole of each, so that of a processor that
                crops, such as CLIP's, they are left out. None: what the model saw, stretched to 0..1, without
                padding; boxes without a picture become bars.
            words: The tokens of each text in the inputs; None: :attr:`words`, or numbers without these.

        Returns:
            A PIL image, samples below each other: a notebook shows it, and ``e.show().save("map.png")`` keeps it.

        Raises:
            PrunexError: For images or words of another number or kind.
        """
        from prunex.multimodal.showing import show

        return show(self, images, words)
