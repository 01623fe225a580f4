"""Robustness: how far a map moves when the image hardly does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.checks import check_choice, check_number, check_options, check_whole
from prunex.errors import PrunexError
from prunex.explain import explain
from prunex.metrics.base import MeanOverImages
from prunex.registry import lookup, register
from prunex.removal.coalitions import seeded
from prunex.targets import Target

Explainer = str | Callable[[nn.Module, Tensor, Tensor], Tensor]


@register(
    "metric",
    "max_sensitivity",
    "Yeh et al., NeurIPS 2019, arXiv 1901.09392",
    "an explainer; eleven explanations an image",
)
def max_sensitivity(
    explainer: Explainer,
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    of: Literal["maps", "raw"] = "maps",
    seed: int = 0,
    chunk: int = 64,
    **options: Any,
) -> Tensor:
    """The largest ||map(x + d) - map(x)|| / ||map(x)|| over random |d| <= r (arXiv 1901.09392), [B]; low is better.

    Captum's definition and defaults: r = 0.02 in normalised values, 10 draws, uniform, Frobenius norm, a denominator
    of 0 counts as 1, and the class stays the clean image's. Quantus draws 200 within 0.2: store r and the number with
    the result. A Monte-Carlo maximum rises with the number of draws.

    Args:
        explainer: An explainer's name, or ``callable(model, images, target) -> maps`` [B, ...].
        model: A supported ViT, pruned or dense.
        images: float [B, C, H, W].
        target: Class explained; None: the predicted one of the clean image.
        radius: r, at least 0.
        samples: Draws an image. Every image gets the same ones.
        of: "maps" on the patch grid, or "raw", the method's own finest output.
        seed: Of the draws.
        chunk: Most altered images explained at once: bounds memory, changes no result.
        **options: The explainer's own.

    Returns:
        float64 [B]; NaN for an image whose maps hold NaN. What ``explain`` refuses is refused.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> max_sensitivity("rollout", model, torch.randn(1, 3, 224, 224), samples=2).shape
    torch.Size([1])
    """
    return sensitivity_of(
        explainer, model, images, target, options, radius=radius, samples=samples, of=of, seed=seed, chunk=chunk
    )


def sensitivity_of(
    explainer: Explainer,
    model: nn.Module,
    images: Tensor,
    target: Target,
    options: dict[str, Any],
    *,
    radius: float = 0.02,
    samples: int = 10,
    of: Literal["maps", "raw"] = "maps",
    seed: int = 0,
    chunk: int = 64,
) -> Tensor:
    """:func:`max_sensitivity` with the explainer's options apart: both have, say, a seed."""
    check_number("radius", radius, 0)
    check_whole("samples", samples, 1)
    check_whole("seed", seed, 0)
    check_whole("chunk", chunk, 1)
    check_choice("of", of, ("maps", "raw"))
    # The class is that of the clean image; an explainer of one's own cannot be asked for it.
    if callable(explainer):
        if callable(target):
            raise PrunexError("an explainer of one's own is asked for classes: give target as a class, or [B], or None")
        target = explain("raw_attention", model, images, target).target
    explained = partial(_explained, explainer, model, of, options)
    clean, goal = explained(images, target)
    images = images.detach()
    # Drawn on the CPU in float64, so that every device and precision sees the same noise.
    noise = torch.empty(samples, *images.shape[1:], dtype=torch.float64)
    noise = noise.uniform_(-radius, radius, generator=seeded(seed)).to(images.device, images.dtype)
    batch = len(images)
    image = torch.arange(batch, device=images.device).repeat(samples)
    draw = torch.arange(samples, device=images.device).repeat_interleave(batch)
    norms = []
    for part in torch.arange(len(image), device=images.device).split(chunk):
        rows = image[part]
        same = goal[rows.to(goal.device)] if isinstance(goal, Tensor) else goal
        maps, _ = explained(images[rows] + noise[draw[part]], same)
        norms.append(_norm(maps - clean[rows.to(clean.device)]))
    # A map of zeros has no size to compare with: its change is taken as it is.
    size = _norm(clean)
    ratios = torch.cat(norms).view(samples, batch) / size.where(size != 0, 1)
    return ratios.amax(0)


def _explained(
    explainer: Explainer, model: nn.Module, of: str, options: dict[str, Any], images: Tensor, target: Any
) -> tuple[Tensor, Target]:
    """Maps float64 [B, ...], and what they explain."""
    if isinstance(explainer, str):
        explanation = explain(explainer, model, images, target, **options)
        return (explanation.maps if of == "maps" else explanation.raw).double(), explanation.goal()
    if not callable(explainer):
        lookup("explainer", explainer)
    target = torch.full((len(images),), -1, device=images.device) if target is None else torch.as_tensor(target)
    maps = explainer(model, images, target)
    if not isinstance(maps, Tensor) or maps.ndim < 2 or len(maps) != len(images):
        came = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise PrunexError(f"the explainer gave {came}: it must give one map an image, a tensor [{len(images)}, ...]")
    return maps.detach().double(), target


def _norm(maps: Tensor) -> Tensor:
    return maps.flatten(1).square().sum(1).sqrt()


class MaxSensitivity(MeanOverImages):
    """Mean of :func:`max_sensitivity` over images; ``update(model, images, target=None)``.

    ``explainer`` is a name or a callable, ``options`` are its own; all else is the function's, or torchmetrics'.
    """

    higher_is_better = False

    def __init__(
        self, explainer: Explainer, *, options: dict[str, Any] | None = None, keep: bool = False, **drawn: Any
    ) -> None:
        names: dict[str, Any] = sensitivity_of.__kwdefaults__ or {}
        super().__init__(keep, **{name: value for name, value in drawn.items() if name not in names})
        if not callable(explainer):
            lookup("explainer", explainer)
        self.explainer, self.options = explainer, check_options(options)
        self.drawn = {name: drawn.get(name, default) for name, default in names.items()}

    def measure(self, model: nn.Module, images: Tensor, target: Target = None) -> Tensor:
        """See :func:`max_sensitivity`."""
        return sensitivity_of(self.explainer, model, images, target, self.options, **self.drawn)
