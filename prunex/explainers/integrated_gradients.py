"""Integrated gradients: signed shares of the change from a baseline image to the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.embedding import embed, embed_patches, place
from prunex.vit.recording import Recording, check_chunk, gradients, recording, sequences
from prunex.vit.tape import Tape


@register(
    "explainer",
    "integrated_gradients",
    "Sundararajan et al., ICML 2017, arXiv 1703.01365",
    "one forward and backward a step",
)
def integrated_gradients(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    steps: int = 50,
    baseline: float | Tensor = 0.0,
    space: Literal["pixels", "tokens"] = "pixels",
    rule: Literal["gausslegendre", "middle", "trapezoid", "left", "right"] = "gausslegendre",
    chunk: int | None = None,
) -> Explanation:
    """IG = (x - x0) * integral of dy/dx from x0 to x (arXiv 1703.01365, Eq. 1; a weighted sum of gradients, Eq. 3).

    Attributions sum to y(x) - y(x0), up to the error of the sum: ``info["delta"]``. In "pixels" space the images
    themselves are moved; in "tokens" space what the patches are embedded as, while positions and prefix tokens stay
    (and get 0). Both start from the same output, since nothing but patches depends on the image.

    **On a pruned model the selection of the image itself is frozen**, EViT's fusing weights too, for every step and for
    the baseline: along the path it would jump, which no gradient sees, and the sum would be wrong without notice. A
    patch dropped before it met another one gets exactly 0 (in masked mode up to rounding).

    "trapezoid" weighs by 1 / (steps - 1), so that the weights sum to 1; Captum's sum to 1 - 1 / steps. ``rule="right",
    steps=1`` with baseline 0 is input times gradient. A baseline of 0 is the mean colour of normalised images, not
    black, and what equals the baseline gets 0. Attention stays fused, sums are at least float32.

    Args:
        steps: Points on the path (two at least for "trapezoid"). 32 do for watching, 100 and more for tables.
        baseline: What is "nothing": a finite number, or a tensor that broadcasts to the images, normalised as they are.
        space: What is moved.
        rule: Where the points lie and what they weigh; see :func:`quadrature`.
        chunk: Sequences in one forward, over images and steps; changes memory and speed only. None: what is fastest.

    Returns:
        ``maps`` signed, a patch's pixels and channels summed; ``raw`` [B, C, H, W] in pixels space, [B, prefix + P] in
        tokens space; ``pixels`` [B, H, W] in pixels space, channels summed. ``info``: ``difference`` = y(x) - y(x0) and
        ``delta`` = sum - difference, [B] each: judge |delta / difference|, and with doubt run twice the steps.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("integrated_gradients", model, torch.randn(2, 3, 64, 64), steps=8).maps.shape
    torch.Size([2, 4, 4])
    """
    nodes, weights = quadrature(rule, steps)
    check_chunk(chunk)
    _check_baseline(baseline, images)
    # Of the clean run only decisions, class and logits are needed: its blocks stay off the graph.
    tape = Tape(gradients=True, graph_from=len(model.blocks), narrow=True)
    with recording(model, images, target, tape, needs_class=True) as recorded:
        path = _Path(recorded, images, baseline, space, sequences(chunk, recorded.embedded, 32, graph=True))
        total = path.integral(nodes, weights)
        with torch.no_grad():
            shares = (path.end - path.start) * total
            difference = promoted(recorded.score()) - path.at_start()
            info = {"delta": shares.flatten(1).sum(1) - difference, "difference": difference}
            if space == "tokens":
                row = F.pad(shares.sum(2), (recorded.anatomy.prefix, 0))
                return answer(recorded, row, signed=True, info=info)
            return answer(recorded, _per_patch(shares, recorded), shares, True, shares.sum(1), info)


class _Path:
    """The straight line from baseline to image, and the model on it with the selection frozen."""

    def __init__(self, recorded: Recording, images: Tensor, baseline: float | Tensor, space: str, chunk: int) -> None:
        self.recorded, self.space, self.chunk = recorded, space, chunk
        with torch.no_grad():
            # New tensors: the caller's may be of an inference mode, which no graph can hold.
            value = baseline
            if not isinstance(value, Tensor):  # an int may be too long for torch
                value = torch.tensor(float(value), dtype=images.dtype)
            end, start = images.detach().clone(), torch.empty_like(images).copy_(value)
            if space == "tokens":
                end, start = (embed_patches(recorded.model, x)[0] for x in (end, start))
            self.dtype, self.end, self.start = end.dtype, promoted(end), promoted(start)

    def integral(self, nodes: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of gradients over the nodes, shaped as what is moved."""
        total = torch.zeros_like(self.end)
        for image, step in self._pairs(len(nodes)):
            # One node a sequence, whatever is moved.
            shape = (-1, *[1] * (total.ndim - 1))
            alpha, weight = (t.to(total)[step].view(shape) for t in (nodes, weights))
            start = self.start[image]
            point = (start + alpha * (self.end[image] - start)).to(self.dtype).requires_grad_()
            gradient = gradients(self._score(point, image).sum(), [point])[0]
            total.index_add_(0, image, weight * gradient)
        return total

    def at_start(self) -> Tensor:
        """The score at the baseline, [B]."""
        return torch.cat([self._score(self.start[image].to(self.dtype), image) for image, _ in self._pairs(1)])

    def _pairs(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Image and step of every sequence, some at a time: int64 [R] each."""
        for pairs in torch.arange(len(self.end) * steps, device=self.end.device).split(self.chunk):
            yield pairs // steps, pairs % steps

    def _score(self, point: Tensor, image: Tensor) -> Tensor:
        """The explained class's logit, [R], at least float32."""
        model, grid = self.recorded.model, self.recorded.trace.grid
        tokens = place(model, point, grid) if self.space == "tokens" else embed(model, point)[0]
        logits = self.recorded.again(tokens, image)
        return promoted(logits.gather(1, self.recorded.target[image, None])[:, 0])


def quadrature(rule: str, steps: int) -> tuple[Tensor, Tensor]:
    """Points in 0..1 and their weights, which sum to 1: float64 [steps] each.

    "gausslegendre" is exact for polynomials up to degree 2 steps - 1, "trapezoid" takes both ends in, "left" and
    "right" are an even grid from 0, or to 1, and "middle" lies between them.
    """
    least = 2 if rule == "trapezoid" else 1
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise PrunexError(f"steps={steps!r} is not allowed: {rule} takes an integer of at least {least}")
    if rule == "gausslegendre":
        nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(steps))
        return (1 + nodes) / 2, weights / 2
    if rule == "trapezoid":
        weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return torch.linspace(0, 1, steps, dtype=torch.float64), weights
    offset = {"left": 0.0, "middle": 0.5, "right": 1.0}[rule]
    nodes = (torch.arange(steps, dtype=torch.float64) + offset) / steps
    return nodes, torch.full_like(nodes, 1 / steps)


def _per_patch(values: Tensor, recorded: Recording) -> Tensor:
    """Sums over each patch's pixels and channels: [B, C, H, W] to [B, P]. Padding belongs to nobody and has 0."""
    (gh, gw), (height, width) = recorded.trace.grid, recorded.anatomy.patch
    whole = F.pad(values, (0, gw * width - values.shape[3], 0, gh * height - values.shape[2]))
    return whole.unflatten(3, (gw, width)).unflatten(2, (gh, height)).sum((1, 3, 5)).flatten(1)


def _check_baseline(value: Any, images: Tensor) -> None:
    allowed = "give a finite number, or a finite real tensor that broadcasts to the images"
    if isinstance(value, Tensor):
        shape, whole = list(value.shape), list(images.shape)
        if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape[::-1], whole[::-1], strict=False)):
            raise PrunexError(f"baseline has shape {shape} for images {whole}: {allowed}, such as [C, 1, 1]")
        if value.is_complex() or value.dtype == torch.bool:
            raise PrunexError(f"baseline has dtype {value.dtype}: {allowed}")
        finite = bool(torch.isfinite(value.to(images.dtype)).all())
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise PrunexError(f"baseline={value!r} is not allowed: {allowed}")
    else:
        finite = abs(value) <= torch.finfo(images.dtype).max
    if not finite:
        said = " is" if isinstance(value, Tensor) else f"={value} is"
        raise PrunexError(f"baseline{said} not finite in {images.dtype}: {allowed}")
