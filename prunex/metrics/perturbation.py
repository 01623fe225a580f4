"""The perturbation test: accuracy while pixels or tokens are taken away in the order of a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_choice
from prunex.errors import PrunexError
from prunex.metrics.base import MeanOverImages
from prunex.metrics.checks import check_maps, check_steps
from prunex.metrics.occlusion import Occlusion, on_patches, on_pixels
from prunex.metrics.ranks import ranked
from prunex.registry import register
from prunex.removal.game import DEFAULTS, ROUTES, SELECTIONS, RemovalOptions
from prunex.vit.recording import choose_target

ORDERS = ("positive", "negative")
STEPS = tuple(k / 10 for k in range(10))


@dataclass(eq=False, repr=False)
class Perturbation(Brief):
    """What is left of each image's prediction after every step; float64 [B, K], NaN for an image with NaN in its map.

    Attributes:
        steps: The K fractions taken away; the first is 0.
        removed: int64 [K], how many units they are.
        units: "pixels" or "patches".
        hits: 1 where the predicted class is the label, else 0.
        probability: Of the label.
        logit: Of the label.
        top_probability: The largest of any class; its drop is ``top_probability[:, :1] - top_probability``.
        top_logit: Likewise.
        dissimilarity: ln(p of the label / second-largest p).
        ties: int64 [B], units that share their relevance with another: their order is that of their index.
        labels: int64 [B].
    """

    steps: tuple[float, ...]
    removed: Tensor
    units: str
    hits: Tensor
    probability: Tensor
    logit: Tensor
    top_probability: Tensor
    top_logit: Tensor
    dissimilarity: Tensor
    ties: Tensor
    labels: Tensor


@register(
    "metric",
    "perturbation",
    "Chefer, Gur & Wolf, CVPR 2021, arXiv 2012.09838",
    "labels; ten forwards an image, positive and negative order apart",
    DEFAULTS | {"removal": "black"},
)
def perturbation(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    labels: int | Tensor | None = None,
    *,
    order: Literal["positive", "negative"] = "positive",
    steps: Sequence[float] = STEPS,
    **options: Unpack[RemovalOptions],
) -> Perturbation:
    """Positive or negative perturbation of Chefer, Gur, Wolf (arXiv 2012.09838), all steps and images batched.

    Positive: the most relevant units leave first, so that accuracy should fall early; negative: the least relevant.
    Painting is by pixel, as the authors' code does: the map is brought to the image's size bilinearly, and at q the
    first int(H W q) pixels are painted, all channels of a pixel; removed areas cut through patches. Dropping is by
    patch: round(q P) of them leave with their tokens, prefix tokens never. Ties leave by index, in both orders.

    A hit is always the *label*. The tables' rows "predicted" and "target" differ only in the class that the maps were
    made for; class-agnostic methods have equal rows. A random-order curve belongs beside every table: black pixels
    reward compact maps. A pruned model mixes two effects: what is gone, and what its pruner then keeps;
    ``selection="frozen"`` leaves the second out. Report both.

    Args:
        model: A supported ViT, pruned or dense, or a module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects.
        maps: float [B, gh, gw] on the patch grid, or [B, H, W]; higher is more relevant.
        labels: The true class, an int or int [B]. None: the predicted one of the clean image (accuracy at 0 is then 1).
        order: "positive" or "negative".
        steps: Rising fractions that begin with 0.
        **options: ``removal`` (the authors' "black" where nothing is said), ``selection`` ("free"), ``mean``, ``std``
            and ``chunk``: see :class:`prunex.removal.game.RemovalOptions`.

    Raises:
        PrunexError: For maps, labels or options that do not fit, or a model with less than two classes.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> drop = perturbation(model, torch.randn(1, 3, 224, 224), torch.rand(1, 14, 14), steps=(0, 0.5), removal="drop")
    >>> drop.hits.shape, drop.removed.tolist()
    (torch.Size([1, 2]), [0, 98])
    """
    check_choice("order", order, ORDERS)
    steps = check_steps(steps, first=True)
    options = {"removal": "black", **options}
    occlusion = Occlusion(model, images, **options)
    maps = check_maps(maps, occlusion.images, occlusion.grid)
    # With one class every prediction is right, and accuracy says nothing.
    if occlusion.clean.shape[1] < 2:
        raise PrunexError("this model has one output, whose class is always right: give a model of two classes or more")
    labels = _labels(occlusion.clean, labels)
    dropping = options["removal"] == "drop"
    if dropping:
        values = on_patches(maps, occlusion.grid, occlusion.patch)
    else:
        values = on_pixels(maps, occlusion.size, occlusion.patch)
    counts = counted(steps, values.shape[1], dropping)
    place, ties = ranked(values, order)
    # Row k * B + b: image b after step k. Step 0 is the clean image.
    image = torch.arange(len(images), device=place.device).repeat(len(counts))
    limit = torch.tensor(counts, dtype=torch.int32, device=place.device).repeat_interleave(len(images))
    logits = occlusion.answers(image, lambda part: place[image[part]] < limit[part, None], limit)
    # A map with NaN has no order; the image counts nowhere, and its neighbours do not change.
    bad = maps.flatten(1).isnan().any(1)

    def table(column: Tensor) -> Tensor:
        return column.double().view(len(counts), -1).T.masked_fill(bad[:, None], torch.nan)

    label = labels[image, None]
    logp = logits.log_softmax(1)
    best = logp.topk(2, 1).values
    of_label = logp.gather(1, label)[:, 0]
    return Perturbation(
        steps=steps,
        removed=torch.tensor(counts, device=place.device),
        units="patches" if dropping else "pixels",
        hits=table(logits.argmax(1) == label[:, 0]),
        probability=table(of_label.exp()),
        logit=table(logits.gather(1, label)[:, 0]),
        top_probability=table(best[:, 0].exp()),
        top_logit=table(logits.amax(1)),
        dissimilarity=table(of_label - best[:, 1]),
        ties=ties,
        labels=labels,
    )


def counted(steps: Sequence[float], units: int, dropping: bool) -> list[int]:
    """How many units are gone after each step: int(U q) pixels as in the authors' code, or round(q P) patches.

    >>> counted((0, 0.1, 0.9), 50176, False), counted((0, 0.1, 0.9), 196, True)
    ([0, 5017, 45158], [0, 20, 176])
    """
    return [round(q * units) if dropping else int(units * q) for q in steps]


def perturbation_auc(accuracy: Tensor, steps: Sequence[float] = STEPS) -> Tensor:
    """100 * the trapezoid area under accuracy, float [..., K] in 0..1, over the K fractions taken away.

    It is not divided by their range: the maximum of the usual steps 0, 0.1, ..., 0.9 is **90**, and the mean of the
    accuracies is not this number.

    >>> round(perturbation_auc(torch.ones(10)).item(), 6)
    90.0
    """
    steps = check_steps(steps)
    if not isinstance(accuracy, Tensor) or not accuracy.is_floating_point() or accuracy.shape[-1:] != (len(steps),):
        came = list(accuracy.shape) if isinstance(accuracy, Tensor) else type(accuracy).__name__
        raise PrunexError(f"accuracy is {came}: give floats [..., {len(steps)}], one a step")
    # Over the true fractions: steps need not be even.
    x = torch.tensor(steps, dtype=torch.float64, device=accuracy.device)
    return 100 * torch.trapezoid(accuracy.double(), x, dim=-1)


def perturbation_maximum(steps: Sequence[float] = STEPS) -> float:
    """The largest :func:`perturbation_auc` there can be.

    >>> perturbation_maximum()
    90.0
    """
    steps = check_steps(steps)
    return 100 * (steps[-1] - steps[0])


class PerturbationAUC(MeanOverImages):
    """Area under the accuracy of a whole data set, as :func:`perturbation` and :func:`perturbation_auc` have it.

    Positive order: lower is better; negative: higher. On n images acc(q) has a standard error of
    sqrt(acc (1 - acc) / n); with 1,000 images that of the area can reach 1.4 points. Compare methods on the same
    images (``keep=True`` and a paired bootstrap over :meth:`values`). Options are those of :func:`perturbation`, and
    torchmetrics' own.
    """

    def __init__(
        self,
        order: Literal["positive", "negative"] = "positive",
        steps: Sequence[float] = STEPS,
        *,
        keep: bool = False,
        **options: Any,
    ) -> None:
        check_choice("order", order, ORDERS)
        self.order, self.steps = order, check_steps(steps, first=True)
        check_choice("removal", options.get("removal", "black"), ROUTES)
        check_choice("selection", options.get("selection", "free"), SELECTIONS)
        # One ** for two owners: what is no option of the game is torchmetrics' to take or refuse.
        rest = {name: value for name, value in options.items() if name not in DEFAULTS}
        super().__init__(keep, (len(self.steps),), **rest)
        self.options = {name: value for name, value in options.items() if name not in rest}

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Only where the least relevant leave first."""
        return self.order == "negative"

    @property
    def maximum(self) -> float:
        """The largest area there can be: 90 with the usual steps."""
        return perturbation_maximum(self.steps)

    def measure(self, model: nn.Module, images: Tensor, maps: Tensor, labels: int | Tensor | None = None) -> Tensor:
        """Hits of every image and step, [B, K]; see :func:`perturbation`."""
        options: Any = self.options
        return perturbation(model, images, maps, labels, order=self.order, steps=self.steps, **options).hits

    def accuracy(self) -> Tensor:
        """Accuracy after each step, float64 [K]; NaN before the first image."""
        return super().compute()

    def compute(self) -> Tensor:
        """The area; its maximum is :attr:`maximum`."""
        return perturbation_auc(self.accuracy(), self.steps)

    def values(self) -> Tensor:
        """Every image's area, float64 [images], NaN where undefined; their mean is the area of all. With ``keep``."""
        return perturbation_auc(super().values(), self.steps)


def _labels(logits: Tensor, labels: int | Tensor | None) -> Tensor:
    """The class of each image that counts as right: int64 [B]."""
    try:
        return choose_target(logits, labels)
    except PrunexError as error:
        raise PrunexError(str(error).replace("target", "labels")) from None
