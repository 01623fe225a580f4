"""One door to every explainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import prunex.explainers  # noqa: F401  (registers the explainers)
from prunex.brief import Brief
from prunex.errors import PrunexError, unknown
from prunex.explainers.base import Relevance
from prunex.registry import lookup
from prunex.vit.anatomy import check_images, find, read
from prunex.vit.embedding import over_pixels
from prunex.vit.mount import check_methods
from prunex.vit.trace import TokenTrace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(eq=False, repr=False)
class Explanation(Brief):
    """One map per image, and what it was made from.

    Attributes:
        method: The explainer's name.
        options: Every option in force, defaults included.
        maps: float [B, gh, gw] on the patch grid, the method's raw values.
        raw: The method's own finest output; its docstring gives the shape.
        target: int64 [B], the class explained; -1 where the model has no classifier.
        signed: Whether negative values mean "against the class".
        trace: What the explained forward did to the patches.
        logits: float [B, classes]; the features where the model has no classifier.
        image_size: Height and width of the images in pixels.
        covered: Height and width in pixels that the patch grid lies over: the images', unless they are no whole number
            of patches.
        fine: float [B, H, W], the map at pixel size of a method that is finer than a patch; else None.
        info: What the method found out beside the map, by name: tensors whose first dimension is B, such as ``delta``
            of integrated_gradients. Empty for most.
    """

    shown = ("method", "maps", "target", "signed", "image_size")

    method: str
    options: dict[str, Any]
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

    def upsample(self, size: tuple[int, int] | None = None) -> Tensor:
        """The maps at pixel size, bilinear: float [B, H, W]; 0 at pixels beyond the last whole patch.

        Args:
            size: Height and width in pixels; None: the images' own.

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

    def overlay(self, images: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The maps over the images, for looking at.

        Args:
            images: uint8 [B, H, W, 3], or float [B, C, H, W] of 1 or 3 channels (scaled to 0..1 per image when outside
                that range).

        Returns:
            uint8 [B, H, W, 3]; colours are scaled per image.

        Raises:
            PrunexError: For images of another shape, number or type.
        """
        from prunex.pictures import overlay

        if isinstance(images, Tensor):
            shown = images.detach().float().cpu()
            if shown.ndim != 4 or shown.shape[1] not in (1, 3):
                raise PrunexError(
                    f"images have shape {list(shown.shape)}: give [B, 3, H, W], or a uint8 array [B, H, W, 3]"
                )
            shown = shown.expand(-1, 3, -1, -1)
            low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
            outside = (low < 0) | (high > 1)
            shown = (shown - low * outside) / ((high - low) * outside + ~outside).clamp(min=1e-8)
            pictures = (shown.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        else:
            pictures = images
        maps = self.maps if self.covered == self.image_size else self.upsample()
        return overlay(pictures, maps.float().cpu().numpy(), signed=self.signed)


def explain(
    method: str,
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    path: str | None = None,
    **options: Any,
) -> Explanation:
    """Explain what a ViT's prediction rests on, dense or pruned.

    Runs in eval mode on its own and leaves the model, its gradients, its train flags and the caller's grad mode as they
    were; it works under ``torch.no_grad`` and ``torch.inference_mode``. Each image's map is the same alone and in a
    batch.

    Args:
        method: An explainer's name; :func:`prunex.methods` lists them.
        model: A supported ViT, or any module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects.
        target: Class index, integer tensor [B], or None for the predicted class.
        path: Dotted path to the ViT when ``model`` holds several.
        **options: The method's own.

    Returns:
        The explanation.

    Raises:
        PrunexError: Unknown method or option, images or target the model cannot take, NaN in the images.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> e = prunex.explain("rollout", model, torch.randn(2, 3, 224, 224))
    >>> e.maps.shape, e.upsample().shape
    (torch.Size([2, 14, 14]), torch.Size([2, 224, 224]))
    """
    known = lookup("explainer", method)
    make, defaults = known.make, known.options
    for name in options:
        if name not in defaults:
            raise unknown(f"option of {method}", name, defaults)
    vit = find(model, path)[1]
    anatomy = read(vit)
    check_methods(vit)
    weight = next(vit.parameters())
    if weight.is_meta:
        raise PrunexError("the model is on the meta device, where nothing is computed: load its weights first")
    check_images(anatomy, images, values=True)
    answer: Relevance = make(vit, images.detach().to(weight.device, weight.dtype), target, **options)
    return Explanation(
        method,
        {**defaults, **options},
        answer.maps,
        answer.raw,
        answer.target,
        answer.signed,
        answer.trace,
        answer.logits,
        (images.shape[2], images.shape[3]),
        (answer.maps.shape[1] * anatomy.patch[0], answer.maps.shape[2] * anatomy.patch[1]),
        answer.pixels,
        answer.info,
    )
