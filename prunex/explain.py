"""One door to every explainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import prunex.explainers  # noqa: F401  (registers the explainers)
from prunex.brief import Brief
from prunex.checks import called_as
from prunex.errors import PrunexError, Unreached, unknown
from prunex.registry import lookup
from prunex.vit.anatomy import check_images, find, read
from prunex.vit.aside import as_found
from prunex.vit.embedding import over_pixels
from prunex.vit.methods import check_methods
from prunex.vit.recording import Relevance
from prunex.vit.surroundings import look
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
        image_size: Height and width in pixels of what entered the ViT: the images', unless a module resizes or crops.
        covered: Height and width in pixels that the patch grid lies over: the images', unless they are no whole number
            of patches.
        fine: float [B, H, W], the map at pixel size of a method that is finer than a patch; else None.
        info: What the method found out beside the map, by name: tensors whose first dimension is B, such as ``delta``
            of integrated_gradients. Empty for most.
        entered: float [B, C, h, w], what entered the ViT, where the module round it prepared the images; else None.
        resized: Whether it has another size than the images, so that the maps lie over it alone.
        output: Which part of the module's output is explained, such as ``"logits"``; empty where it is one tensor.
        class_specific: Whether the maps are those of ``target``; a method without a class, such as rollout, has the
            same map for all of them.
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
    entered: Tensor | None = None
    resized: bool = False
    output: str = ""
    class_specific: bool = True

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

        if images is None and self.entered is None:
            raise PrunexError("the ViT was given the images as they were: give them to overlay(), too")
        images = self.entered if images is None else images
        pictures: Any
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
        shape = tuple(getattr(pictures, "shape", ()))
        if not shape or shape[0] != len(self.maps):
            came = f"of shape {list(shape)}" if shape else f"a {type(pictures).__name__}"
            raise PrunexError(f"images are {came}: give those that were explained, {len(self.maps)} of them")
        size = shape[1:3]
        if self.resized and size != self.image_size:
            raise PrunexError(
                f"pictures have size {list(size)}, and the maps lie over what the module made of them, "
                f"{list(self.image_size)}: call overlay() without pictures"
            )
        maps = self.maps if self.covered == self.image_size else self.upsample()
        return overlay(pictures, maps.float().cpu().numpy(), signed=self.signed)


@called_as('prunex.explain("tokentm", model, images)', method=str, model=nn.Module)
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
        model: A supported ViT, or any module that holds exactly one and takes images. It is called once as it is: what
            enters its ViT is explained, and the classes are those that it gives itself, whatever head, softmax or
            dictionary follows the ViT. One without a forward is explained by its ViT alone, with a warning.
        images: float [B, C, H, W], normalised as the model expects.
        target: Class index, integer tensor [B], or None for the predicted class; of the model's own output.
        path: Dotted path to the ViT when ``model`` holds several.
        **options: The method's own.

    Returns:
        The explanation.

    Raises:
        PrunexError: Unknown method or option, images or target the model cannot take, NaN in the images; a model whose
            own forward gives something else than what would be explained, or cannot be followed (a ViT called several
            times, or not as a whole; several outputs); a method that needs gradients where a layer lets none through.

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
    if model is vit:
        check_images(anatomy, images, values=True)
    with as_found(model, train=False):
        call = look(model, vit, images, path is not None)
        check_images(anatomy, call.entered, values=True)
        try:
            answer: Relevance = make(call.vit, call.entered, target, **options)
        except Unreached as error:
            raise PrunexError(f"{method} needs gradients: {error}") from error
        call.check(method, answer.logits, answer.trace)
    size = (call.entered.shape[2], call.entered.shape[3])
    return Explanation(
        method,
        {**defaults, **options},
        answer.maps,
        answer.raw,
        answer.target,
        answer.signed,
        answer.trace,
        answer.logits,
        size,
        (answer.maps.shape[1] * anatomy.patch[0], answer.maps.shape[2] * anatomy.patch[1]),
        answer.pixels,
        answer.info,
        call.prepared,
        size != tuple(images.shape[2:]),
        call.field,
        answer.class_specific,
    )
