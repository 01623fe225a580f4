"""Sanity checks of explainers: does a map depend on the model's weights, and on nothing but its own image?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from prunex.brief import Brief
from prunex.checks import check_number, check_whole
from prunex.explain import explain
from prunex.metrics.ranks import spearman
from prunex.registry import register
from prunex.relevance.explanation import Explanation
from prunex.targets import Target
from prunex.vit.anatomy import find, read

_PAPER = "Adebayo et al., NeurIPS 2018, arXiv 1810.03292"


@dataclass(eq=False, repr=False)
class ModelRandomisation(Brief):
    """How much of an explainer's maps is left as the model's weights become random.

    Attributes:
        method: The explainer.
        options: Its options.
        cascade: Whether each stage adds to those before it; else each stands alone.
        stages: What was randomised, in order: "head" (final norm, pooling, head), "blocks.11" ... "blocks.0", "embed"
            (patch embedding, positions, prefix tokens); "all" at the end where stages stand alone.
        spearman: float64 [S, B], Spearman's correlation of the original and the randomised map, signed; NaN, as in the
            next two, where either is constant.
        absolute: float64 [S, B], the same of absolute values.
        ssim: float64 [S, B], structural similarity at pixel size (Gaussian window of 11, sigma 1.5), each map scaled
            to 0..1. Maps brought up from patches are smooth: compare it between methods, not with 0.
        chance: What the mean correlations stay below in 99 % of cases when the patches of one map are shuffled:
            2.58 / sqrt(B (P - 1)), by the normal approximation.
        threshold: The least mean correlation that counts as surviving, whatever chance is.
    """

    method: str
    options: dict[str, Any]
    cascade: bool
    stages: list[str]
    spearman: Tensor
    absolute: Tensor
    ssim: Tensor
    chance: float
    threshold: float

    @property
    def similarity(self) -> float:
        """What is left when all is random: the larger mean correlation, signed or of absolute values; NaN without."""
        means = torch.stack([self.spearman[-1].nanmean(), self.absolute[-1].nanmean()])
        return float(means.nan_to_num(-torch.inf).amax().where(~means.isnan().all(), torch.nan))

    @property
    def survives(self) -> bool:
        """Whether the maps of the fully random model are still like the original ones: such maps show the image alone.

        True where :attr:`similarity` is above both ``chance`` and ``threshold``; maps that turn constant do not.
        """
        return self.similarity > max(self.chance, self.threshold)

    def table(self) -> list[dict[str, Any]]:
        """One row a stage: its name and the means over images."""
        rows: list[dict[str, Any]] = []
        for number, stage in enumerate(self.stages):
            row: dict[str, Any] = {"stage": stage}
            for name in ("spearman", "absolute", "ssim"):
                row[name] = float(getattr(self, name)[number].nanmean())
            rows.append(row)
        return rows


@register("metric", "model_randomisation", _PAPER, "a model, images and an explainer's name")
def model_randomisation(
    method: str,
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    *,
    path: str | None = None,
    cascade: bool = True,
    seed: int = 0,
    threshold: float = 0.5,
    **options: Any,
) -> ModelRandomisation:
    """The model-randomisation test: maps of the model against maps of the same model with random weights.

    Stages go from the head down to the embedding. With ``cascade`` each keeps what was randomised before it, so the
    last is a model of random weights alone; else every stage is randomised by itself in the trained model, and one
    more, "all", closes the list. The class explained stays the original prediction.

    A parameter is replaced by normal noise of its own mean and standard deviation: attention stays as peaked as it was,
    where fresh initial weights would make it uniform and every map flat for that reason alone. The paper draws from the
    initial distribution. What does not vary within a tensor, such as norm scales of 1, stays. Parameters of an attached
    pruner stay too, though what they decide by is random then; so do networks that an explainer brings along as an
    option, whose maps therefore survive.

    The paper judges by eye. Here an explainer **survives** (fails) where its mean correlation at the end is above 0.5
    and above what 99 % of shuffled maps reach: our thresholds, not published ones.

    What is given and what is refused is as for :func:`prunex.explain`, beside ``cascade``, the ``seed`` of the noise
    and ``threshold``, the least mean correlation in 0..1 that counts as surviving. The model and the global random
    state stay as they are.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2).eval()
    >>> result = model_randomisation("raw_attention", model, torch.randn(2, 3, 224, 224))
    >>> result.stages, result.spearman.shape
    (['head', 'blocks.1', 'blocks.0', 'embed'], torch.Size([4, 2]))
    """
    check_whole("seed", seed, 0)
    check_number("threshold", threshold, 0, 1)
    original = explain(method, model, images, target, path=path, **options)
    stages: list[str] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    # The class stays the original prediction: a random model would be asked about another one.
    for stage, changed in _randomisations(find(model, path)[1], cascade, seed):
        stages.append(stage)
        rows.append(_alike(original, explain(method, changed, images, original.goal(), **options)))
    signed, absolute, ssim = (torch.stack(column) for column in zip(*rows, strict=True))
    chance = _chance(signed[-1], original.maps[0].numel())
    return ModelRandomisation(method, original.options, cascade, stages, signed, absolute, ssim, chance, threshold)


def randomised(model: nn.Module, *, path: str | None = None, seed: int = 0) -> nn.Module:
    """A copy of the ViT with random weights everywhere, as the last stage of :func:`model_randomisation`.

    An attached pruner is on the copy too; ``path`` leads to the ViT where ``model`` holds several.
    """
    check_whole("seed", seed, 0)
    changed = _copy(find(model, path)[1])
    _draw_all(changed, seed)
    return changed


@dataclass(eq=False, repr=False)
class BatchOrder(Brief):
    """How much a map depends on the images beside its own; rounding aside, nothing should be.

    Attributes:
        alone: float64 [B], largest difference between an image's map in the batch and alone, over the largest absolute
            value of the map; 0 at best.
        shuffled: float64 [B], the same between the batch and the batch in reverse order.
    """

    alone: Tensor
    shuffled: Tensor

    @property
    def worst(self) -> float:
        """The largest of all; NaN where a map holds NaN."""
        return float(torch.cat([self.alone, self.shuffled]).amax())


@register(
    "metric", "batch_order", "prunex's own check: an image's map is the same whatever is beside it", "an explainer"
)
def batch_order(
    method: str,
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    *,
    path: str | None = None,
    **options: Any,
) -> BatchOrder:
    """Whether an image's map is the same alone, in a batch and in another order.

    All that is given is as for :func:`prunex.explain`; the class is held fixed. A batch of one compares nothing but a
    rerun.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2).eval()
    >>> batch_order("rollout", model, torch.randn(2, 3, 224, 224)).worst < 1e-4
    True
    """
    together = explain(method, model, images, target, path=path, **options)

    def again(chosen: list[int]) -> Tensor:
        return explain(method, model, images[chosen], together.goal(chosen), path=path, **options).maps

    # Reversed, every image of the batch has other neighbours on both sides.
    order = list(range(len(images)))
    alone = torch.cat([again([i]) for i in order])
    shuffled = again(order[::-1]).flip(0)
    size = together.maps.double().abs().amax((1, 2))
    size = size.where(size != 0, 1)

    def difference(maps: Tensor) -> Tensor:
        return (maps.double() - together.maps.double()).abs().amax((1, 2)) / size

    return BatchOrder(difference(alone), difference(shuffled))


def _randomisations(vit: nn.Module, cascade: bool, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Stage names and the model as it is then; one copy, changed in place between them."""
    changed = _copy(vit)
    stages = _stages(changed)
    trained = {name: p.detach().clone() for name, p in changed.named_parameters()}
    for number, (stage, names) in enumerate(stages):
        _draw(changed, names, seed, number)
        yield stage, changed
        if not cascade:
            _put(changed, {name: trained[name] for name in names})
    if not cascade:
        _draw_all(changed, seed)
        yield "all", changed


def _draw_all(vit: nn.Module, seed: int) -> None:
    for number, (_, names) in enumerate(_stages(vit)):
        _draw(vit, names, seed, number)


def _copy(vit: nn.Module) -> nn.Module:
    with torch.inference_mode(False):  # weights made under it cannot be differentiated through
        return copy.deepcopy(vit)


def _stages(vit: Any) -> list[tuple[str, list[str]]]:
    """Parameters by stage, from the head down; those of a pruner are in none."""
    depth = read(vit).depth
    # What a pruner decides by is no part of the model that is tested.
    names = [name for name, _ in vit.named_parameters() if not name.startswith(("prunex.", "prunex_units."))]
    blocks = {}
    for i in reversed(range(depth)):
        blocks[f"blocks.{i}"] = [n for n in names if n.startswith(f"blocks.{i}.")]
    after = ("blocks_token_only.", "norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")
    head = [n for n in names if n.startswith(after)]
    later = set(head).union(*blocks.values())
    stages = [("head", head), *blocks.items(), ("embed", [n for n in names if n not in later])]
    return [(stage, part) for stage, part in stages if part]


def _draw(vit: nn.Module, names: Sequence[str], seed: int, number: int) -> None:
    """Put noise of each parameter's own mean and spread in its place; a stage's noise is the same in any order."""
    # Each stage has a seed of its own: its noise is the same whether stages add up or stand alone.
    generator = torch.Generator().manual_seed(seed * 1009 + number)
    weights = dict(vit.named_parameters())
    drawn = {}
    for name in names:
        wide = weights[name].detach().double()
        spread = wide.std(correction=0) if wide.numel() > 1 else wide.new_zeros(())
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64).to(wide.device)
        drawn[name] = wide.mean() + spread * noise
    _put(vit, drawn)


def _put(vit: nn.Module, values: dict[str, Tensor]) -> None:
    weights = dict(vit.named_parameters())
    with torch.inference_mode(False), torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def _alike(original: Explanation, other: Explanation) -> tuple[Tensor, Tensor, Tensor]:
    """Spearman's correlation, that of absolute values, and SSIM: float64 [B] each."""
    first, second = original.maps.flatten(1).double(), other.maps.flatten(1).double()
    broken = ~(first.isfinite().all(1) & second.isfinite().all(1))
    # Maps that keep their places but lose their sign are still maps of the image alone.
    signed = spearman(first, second).masked_fill(broken, torch.nan)
    absolute = spearman(first.abs(), second.abs()).masked_fill(broken, torch.nan)
    return signed.cpu(), absolute.cpu(), _ssim(original.pixels, other.pixels).cpu()


def _ssim(one: Tensor, two: Tensor) -> Tensor:
    """Of each pair of maps [B, H, W], scaled to 0..1."""
    scaled, flat = [], torch.zeros(len(one), dtype=torch.bool, device=one.device)
    for pixels in (one.double(), two.double()):
        low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
        scaled.append(((pixels - low) / (high - low))[:, None])
        flat = flat | ~(high - low > 0).flatten() | ~(high - low).isfinite().flatten()
    if min(one.shape[1:]) < 6:  # the border is mirrored, half a window wide
        return torch.full((len(one),), torch.nan, dtype=torch.float64)
    first, second = (s.masked_fill(flat[:, None, None, None], 0) for s in scaled)
    similarity: Any = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    return similarity.reshape(len(one)).masked_fill(flat, torch.nan)


def _chance(alike: Tensor, patches: int) -> float:
    """What 99 % of shuffled maps stay below on both mean correlations, by the normal approximation."""
    # A correlation with shuffled values has mean 0 and variance 1 / (P - 1), ties or not. Two means are looked at, so
    # that each may pass one time in 200.
    images = int((~alike.isnan()).sum())
    return NormalDist().inv_cdf(0.995) / math.sqrt(images * (patches - 1)) if images and patches > 1 else math.nan
