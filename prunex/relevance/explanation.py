"""What explainers answer, and what everybody who asks for an explanation gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.targets import Function, Target
from prunex.vit.embedding import over_pixels
from prunex.vit.recording import Recording
from prunex.vit.trace import TokenTrace

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(eq=False, repr=False)
class Explanation(Brief):
    """One map per image, and what it was made from.

    Attributes:
        maps: float [B, gh, gw] on the patch grid, the method's raw values.
        raw: The method's own finest output; its docstring gives the shape.
        target: int64 [B], the class explained (the predicted or asked one for methods without a class); -1 where the
            model has no classifier.
        signed: Whether negative values mean "against the class".
        trace: What the explained forward did to the patches.
        logits: float [B, classes]; the features where the model has no classifier.
        image_size: Height and width in pixels of what entered the ViT: the images', unless a module resizes or crops.
        covered: Height and width in pixels that the patch grid lies over: the images', unless they are no whole number
            of patches.
        fine: float [B, H, W], the map at pixel size of a method that is finer than a patch; else None.
        info: What the method found out beside the map, by name: tensors whose first dimension is B, such as ``delta``
            of integrated_gradients. Empty for most.
        class_specific: Whether the maps are those of ``target``; a method without a class, such as rollout, has the
            same map for all of them.
        method: The explainer's name.
        options: Every option in force, defaults included.
        entered: float [B, C, h, w], what entered the ViT, where the module round it prepared the images; else None.
        resized: Whether it has another size than the images, so that the maps lie over it alone.
        output: Which part of the module's output is explained, such as ``"logits"``; empty where it is one tensor.
        function: What was explained in the place of a class; ``logits`` are its numbers, [B, 1], and ``target`` is -1.
    """

    in_repr = ("method", "maps", "target", "signed", "image_size")

    maps: Tensor
    raw: Tensor
    target: Tensor
    signed: bool
    trace: TokenTrace
    logits: Tensor
    image_size: tuple[int, int]
    covered: tuple[int, int]
    fine: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)
    class_specific: bool = True
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    entered: Tensor | None = None
    resized: bool = False
    output: str = ""
    function: Function | None = None

    def goal(self, rows: Tensor | Sequence[int] | None = None) -> Target:
        """What to ask for so that other images are explained for the same; the classes are those of ``rows``."""
        if self.function is not None or bool((self.target < 0).any()):  # a model without a classifier
            return self.function
        return self.target if rows is None else self.target[rows]

    def upsample(self, size: tuple[int, int] | None = None) -> Tensor:
        """The maps at pixel size, bilinear: float [B, H, W]; 0 at pixels beyond the last whole patch.

        Args:
            size: Height and width in pixels; None: those of what entered the ViT.

        Raises:
            PrunexError: For a size that is not two positive integers.
        """
        size = self.image_size if size is None else size
        if not isinstance(size, tuple | list) or len(size) != 2 or not all(type(s) is int and s > 0 for s in size):
            raise PrunexError(f"size={size!r} is not allowed: give (height, width) in pixels, or None for the images'")
        return over_pixels(self.maps, self.image_size, self.covered, (size[0], size[1]))

    @property
    def pixels(self) -> Tensor:
        """The finest map the method has, [B, H, W]; for methods on the patch grid, that grid upsampled."""
        return self.upsample() if self.fine is None else self.fine

    def overlay(self, images: Tensor | NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The maps over the images, for looking at.

        Args:
            images: uint8 [B, H, W, 3], or float [B, C, H, W] of 1 or 3 channels (scaled to 0..1 per image when outside
                that range). None: what entered the ViT, which is where the maps lie if a module resizes or crops.

        Returns:
            uint8 [B, H, W, 3]; colours are scaled per image.

        Raises:
            PrunexError: For images of another shape, number or type, or of another size than what entered the ViT.
        """
        from prunex.pictures import overlay

        pictures = self._drawn_on(images)
        # Pictures that end with the grid are drawn from it; others need the pixels beyond it left out.
        maps = self.maps if self.covered == self.image_size else self.upsample()
        return overlay(pictures, maps.float().cpu().numpy(), signed=self.signed)

    def _drawn_on(self, images: Any) -> NDArray[np.uint8]:
        """The pictures that maps lie over, uint8 [B, H, W, 3]: those given, or what entered the ViT."""
        from prunex.vit.showing import pictures_for

        if images is None and self.entered is None:
            raise PrunexError("the ViT was given the images as they were: give them to overlay(), too")
        pictures = pictures_for(self.entered if images is None else images, len(self.maps))
        size = pictures.shape[1:3]
        if self.resized and size != self.image_size:
            raise PrunexError(
                f"pictures have size {list(size)}, and the maps lie over what the module made of them, "
                f"{list(self.image_size)}: leave pictures out"
            )
        return pictures

    def show(self, images: Any = None, class_names: Sequence[str] | None = None, most: int = 16) -> Image:
        """The maps over the images, each with the class it explains and the patches that the model kept.

        Args:
            images: As for :meth:`overlay`; None, where nothing but the images entered the ViT: over plain cells.
            class_names: Names of the classes; None: numbers.
            most: Images drawn at most, the first ones.

        Returns:
            A PIL image: a notebook shows it, and ``e.show(images).save("map.png")`` keeps it.

        Raises:
            PrunexError: For images that :meth:`overlay` would refuse.

        >>> import prunex, timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
        >>> images = torch.rand(1, 3, 224, 224)
        >>> prunex.explain("rollout", model, images).show(images, class_names=["cat", "dog", "fox"]).mode
        'RGB'
        """
        from PIL import Image

        from prunex.relevance.showing import sheet

        return Image.fromarray(sheet(self, images, class_names, check_whole("most", most, 1)))

    def plot(self, index: int = 0, axes: Axes | None = None) -> Axes:
        """One image's map in its own values, as a matplotlib chart with a colour bar, for figures of your own.

        Args:
            index: Number of the image in the batch.
            axes: What to draw on; None: a new figure of pyplot's.

        Returns:
            The axes: ``e.plot().figure.savefig("map.pdf")``.

        Raises:
            PrunexError: For an image that is not there.
        """
        from prunex.relevance.showing import plot

        return plot(self, index, axes)

    def _repr_html_(self) -> str:
        from prunex.relevance.showing import explanation_card

        return explanation_card(self)


def answer(
    recorded: Recording,
    row: Tensor,
    raw: Tensor | None = None,
    signed: bool = False,
    fine: Tensor | None = None,
    info: dict[str, Tensor] | None = None,
) -> Explanation:
    """From one relevance a token, [B, prefix + P], or a patch, [B, P], to the answer on the patch grid.

    ``raw`` is the method's own finest output, where it has one beside the row; the others are as in the explanation.
    """
    grid, patch = recorded.trace.grid, recorded.anatomy.patch
    row = row.detach()
    # Prefix tokens come first, where the row has them: the patches are the last of it.
    return Explanation(
        maps=row[:, row.shape[1] - grid[0] * grid[1] :].unflatten(1, grid),
        raw=row if raw is None else raw.detach(),
        target=recorded.target,
        signed=signed,
        trace=recorded.trace.detach(),
        logits=recorded.logits.detach(),
        image_size=recorded.image_size,
        covered=(grid[0] * patch[0], grid[1] * patch[1]),
        fine=None if fine is None else fine.detach(),
        info={name: value.detach() for name, value in (info or {}).items()},
        class_specific=recorded.class_specific,
    )


def answer_of_classes(recorded: Recording, values: Tensor) -> Explanation:
    """From one value a patch and class, [B, P, C], to the answer: ``maps`` of the target class, ``raw`` all of them."""
    values = values.to(torch.promote_types(recorded.logits.dtype, torch.float32))
    index = recorded.target[:, None, None].expand(-1, values.shape[1], 1)
    return answer(recorded, values.gather(2, index)[:, :, 0], values, signed=True)
