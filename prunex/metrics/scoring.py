"""Many measures of one map at once: what ``prunex score`` and ``FaithfulnessMonitor`` print.

Measures that read the same thing share it: all curve measures one set of removal curves, all segmentation measures one
count. Everything is kept per image, so that intervals come after (:func:`interval`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.attach import attached
from prunex.errors import PrunexError, unknown
from prunex.metrics.agreement import (
    chance,
    corrected_overlap,
    equal_area_iou,
    kept_auc,
    mass_efficiency,
    mass_kept,
    sign_agreement,
    topk_overlap,
)
from prunex.metrics.bootstrap import Interval, bootstrap, bootstrap_ratios
from prunex.metrics.curves import (
    aopc,
    comprehensiveness,
    deletion,
    insertion,
    log_odds,
    removal_curves,
    srg,
    sufficiency,
)
from prunex.metrics.faithfulness import faithfulness_correlation, infidelity, saco, sensitivity_n
from prunex.metrics.localization import (
    energy_inside,
    foreground_auc,
    foreground_f1,
    mean_ap,
    pointing_game,
    rank_accuracy,
    segmentation_counts,
)
from prunex.metrics.perturbation import perturbation, perturbation_auc
from prunex.metrics.robustness import sensitivity_of
from prunex.removal.occlusion import Route
from prunex.vit.anatomy import find, read
from prunex.vit.embedding import over_pixels
from prunex.vit.units import Backbone

GROUPS = ("faithfulness", "localisation", "agreement", "robustness")


@dataclass(frozen=True)
class Measure:
    """What one number of the table is.

    Attributes:
        name: As it is asked for; the function's in ``prunex.metrics``, perturbation by its order.
        group: One of :data:`GROUPS`.
        kind: What measures share: "positive", "negative" (perturbation), "curves", "mask", "counts", "kept", or the
            name where nothing is shared.
        higher: Whether more is better.
        usual: Whether it is taken when all are asked for.
    """

    name: str
    group: str
    kind: str
    higher: bool = True
    usual: bool = True


_CURVES: dict[str, Callable[[Any], Tensor]] = {
    "deletion": deletion,
    "insertion": insertion,
    "aopc": aopc,
    "log_odds": log_odds,
    "comprehensiveness": comprehensiveness,
    "sufficiency": sufficiency,
    "srg": srg,
}
_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy_inside": energy_inside,
    "pointing_game": pointing_game,
    "rank_accuracy": rank_accuracy,
    "mean_ap": mean_ap,
    "foreground_auc": foreground_auc,
    "foreground_f1": foreground_f1,
}
_COUNTS = {"pixel_accuracy": slice(0, 2), "mean_iou": slice(2, 6)}  # columns of segmentation_counts
_KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "corrected_overlap": corrected_overlap,
    "kept_auc": kept_auc,
    "mass_kept": mass_kept,
    "equal_area_iou": equal_area_iou,
    "topk_overlap": topk_overlap,
    "mass_efficiency": mass_efficiency,
    "sign_agreement": sign_agreement,
}
_MODEL: dict[str, Callable[..., Tensor]] = {
    "saco": saco,
    "faithfulness_correlation": faithfulness_correlation,
    "sensitivity_n": sensitivity_n,
    "infidelity": infidelity,
}
_LOW = ("deletion", "log_odds", "sufficiency", "infidelity")
_USUAL = (
    *("deletion", "insertion", "aopc", "log_odds", "comprehensiveness", "sufficiency"),
    *("energy_inside", "pointing_game", "rank_accuracy", "mean_ap", "pixel_accuracy", "mean_iou"),
    *("corrected_overlap", "kept_auc", "mass_kept"),
)


def _of(names: Iterable[str], group: str, kind: str | None) -> list[Measure]:
    return [Measure(n, group, kind or n, n not in _LOW, n in _USUAL) for n in names]


MEASURES: dict[str, Measure] = {
    m.name: m
    for m in [
        Measure("perturbation_positive", "faithfulness", "positive", higher=False),
        Measure("perturbation_negative", "faithfulness", "negative"),
        *_of(_CURVES, "faithfulness", "curves"),
        *_of(_MODEL, "faithfulness", None),
        *_of(_MASKS, "localisation", "mask"),
        *_of(_COUNTS, "localisation", "counts"),
        *_of(_KEPT, "agreement", "kept"),
        Measure("max_sensitivity", "robustness", "max_sensitivity", higher=False, usual=False),
    ]
}


def measures(names: str | Sequence[str] = "all") -> list[Measure]:
    """Measures by name, in the table's order.

    Args:
        names: Names in a list or with commas between. "all" stands for the usual ones: those that cost a hundred
            forwards an image or say what another says already are taken by name alone. "perturbation" stands for both
            of its orders.

    Raises:
        PrunexError: For a name that is not known, or no name.

    >>> [m.name for m in measures("deletion, perturbation")]
    ['perturbation_positive', 'perturbation_negative', 'deletion']
    """
    given = names.split(",") if isinstance(names, str) else names
    if not isinstance(given, list | tuple) or not all(isinstance(n, str) for n in given):
        raise PrunexError(f"metrics={names!r} is not allowed: give names in a list, or with commas between")
    wanted: set[str] = set()
    for name in (n.strip() for n in given if n.strip()):
        if name == "all":
            wanted |= {m.name for m in MEASURES.values() if m.usual}
        elif name == "perturbation":
            wanted |= {"perturbation_positive", "perturbation_negative"}
        elif name in MEASURES:
            wanted.add(name)
        else:
            raise unknown("metric", name, ["all", "perturbation", *MEASURES])
    if not wanted:
        raise PrunexError(f"metrics={names!r} names no metric: give all, or names with commas between")
    return [m for m in MEASURES.values() if m.name in wanted]


def scores(
    metrics: Sequence[str],
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    pixels: Tensor | None = None,
    kept: Tensor | None = None,
    judge: Tensor | None = None,
    explainer: str | None = None,
    options: Mapping[str, Any] | None = None,
    removal: Route | None = None,
    selection: Literal["free", "frozen"] = "free",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Measure the maps of a batch of images.

    Faithfulness is measured on the patch grid for every method, so that a map in pixels has no finer order than others;
    localisation on the finest map there is.

    Args:
        metrics: Names in :data:`MEASURES`.
        model: A supported ViT, pruned or dense, or a module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects.
        maps: float [B, gh, gw] on the patch grid.
        target: The class explained, an int or int [B]; None: the predicted one.
        labels: int [B], the true class, which is what perturbation counts as a hit; None: the predicted one.
        masks: bool [B, H, W], or 1, 0 and -1 for ignored; localisation needs them.
        pixels: float [B, H, W], the finest map; None: ``maps`` brought up bilinearly.
        kept: bool [B, gh, gw], the patches a pruned model keeps; agreement needs it and the judge.
        judge: float [B, gh, gw], the dense model's map for the same classes.
        explainer: The method's name, for "max_sensitivity".
        options: Its options.
        removal: How patches are taken away. None: as published, which is "black" pixels for perturbation and "drop"
            (tokens) for everything else but "saco", whose is "mean".
        selection: "free" or "frozen", of a pruned model.
        mean: Of the normalisation, for "black"; None: as the model's ``pretrained_cfg`` says.
        std: Likewise.
        chunk: Most altered images in one forward.

    Returns:
        By name, on the CPU, float64 [B]; for pixel_accuracy and mean_iou, which are ratios of sums over images,
        numerators and denominators [B, 2] and [B, 4]. :func:`interval` makes one number of either.

    Raises:
        PrunexError: For an unknown name, one that lacks what it needs, and whatever the measure refuses.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2).eval()
    >>> images = torch.randn(2, 3, 224, 224)
    >>> e = prunex.explain("rollout", model, images)
    >>> found = scores(["deletion"], model, images, e.maps, e.target)
    >>> found["deletion"].shape
    torch.Size([2])
    """
    chosen = measures(list(metrics))
    kinds = {m.kind for m in chosen}
    _check_given(chosen, masks, kept, judge, explainer)
    painted: dict[str, Any] = {"selection": selection, "mean": mean, "std": std, "chunk": chunk}
    found: dict[str, Tensor] = {}
    for order in ("positive", "negative"):
        if order in kinds:
            hits = perturbation(model, images, maps, labels, order=order, removal=removal or "black", **painted).hits
            found[f"perturbation_{order}"] = perturbation_auc(hits)
    if "curves" in kinds:
        orders: list[Any] = ["without", "only", *(["least"] if any(m.name == "srg" for m in chosen) else [])]
        curves = removal_curves(model, images, maps, target, removal=removal or "drop", orders=orders, **painted)
        found |= {m.name: _CURVES[m.name](curves) for m in chosen if m.kind == "curves"}
    if masks is not None and kinds & {"mask", "counts"}:
        fine = _pixels(model, images, maps, masks) if pixels is None else pixels
        found |= {m.name: _MASKS[m.name](fine, masks) for m in chosen if m.kind == "mask"}
        if "counts" in kinds:
            counts = segmentation_counts(fine, masks)
            found |= {m.name: counts[:, _COUNTS[m.name]] for m in chosen if m.kind == "counts"}
    if kept is not None and judge is not None:
        found |= {m.name: _KEPT[m.name](kept, judge) for m in chosen if m.kind == "kept"}
    for name, measure in _MODEL.items():
        if name in kinds:
            route = {} if removal is None else {"removal": removal}
            values = measure(model, images, maps, target, **route, **painted)
            found[name] = values if values.ndim == 1 else values.nanmean(1)
    if explainer is not None and "max_sensitivity" in kinds:
        found["max_sensitivity"] = sensitivity_of(explainer, model, images, target, dict(options or {}))
    return {m.name: found[m.name].detach().double().cpu() for m in chosen}


def removed_by(measure: Measure, removal: Route | None = None) -> str:
    """How :func:`scores` takes patches away for a measure: "drop", "black", "mean", ...; "" where it takes none.

    >>> removed_by(MEASURES["deletion"]), removed_by(MEASURES["perturbation_positive"]), removed_by(MEASURES["mean_ap"])
    ('drop', 'black', '')
    """
    if measure.group != "faithfulness":
        return ""
    if removal is not None:
        return removal
    if measure.kind in ("positive", "negative"):
        return "black"
    function: Any = _MODEL.get(measure.name)
    return "drop" if function is None else str(function.__kwdefaults__["removal"])


def by_chance(
    metrics: Sequence[str], masks: Tensor | None = None, kept: Tensor | None = None, judge: Tensor | None = None
) -> dict[str, Tensor]:
    """What a map that says nothing scores, as :func:`scores` returns it.

    Of localisation that is a constant map, which scores the object's share of the image (:func:`object_share`) on
    energy, pointing and rank accuracy; of agreement, :func:`chance`. Faithfulness has no closed form, and a constant
    map's segmentation (nothing is object) is one guess and not the level of guessing: score random maps for both.

    Args:
        metrics: Names; those without a chance level, or without what they need, are left out.
        masks: As for :func:`scores`.
        kept: Likewise.
        judge: Likewise.

    >>> masks = torch.tensor([[[True, False], [False, False]]])
    >>> by_chance(["energy_inside", "mean_ap"], masks)
    {'energy_inside': tensor([0.2500], dtype=torch.float64), 'mean_ap': tensor([0.5000], dtype=torch.float64)}
    """
    found: dict[str, Tensor] = {}
    chosen = measures(list(metrics))
    if masks is not None:
        flat = torch.ones(masks.shape, device=masks.device)
        found |= {m.name: _MASKS[m.name](flat, masks) for m in chosen if m.kind == "mask"}
    if kept is not None and judge is not None:
        told = chance(kept, judge)
        found |= {m.name: told[m.name] for m in chosen if m.kind == "kept"}
    return {name: v.double().cpu() for name, v in found.items()}


def interval(name: str, values: Tensor, *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """One number for all images from :func:`scores`, with its bootstrap interval.

    Args:
        name: Which measure.
        values: Its values of all images, [N] or [N, 2 K].
        draws: As for :func:`bootstrap`.
        level: Likewise.
        seed: Likewise.

    Raises:
        PrunexError: As :func:`bootstrap`.

    >>> print(interval("pixel_accuracy", torch.tensor([[1.0, 2.0], [3.0, 4.0]])).mean)
    0.6666666666666666
    """
    if name in _COUNTS:
        return bootstrap_ratios(values, draws=draws, level=level, seed=seed)
    return bootstrap(values, draws=draws, level=level, seed=seed)


def columns(name: str) -> tuple[int, ...]:
    """How many numbers a measure has an image: () for one, (2,) or (4,) for numerators and denominators.

    >>> columns("deletion"), columns("mean_iou")
    ((), (4,))
    """
    part = _COUNTS.get(name)
    return () if part is None else (part.stop - part.start,)


def random_maps(images: Tensor, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Uniform noise for maps, the same for the same number of images whatever the device: float32 [B, gh, gw]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((len(images), *grid), generator=generator).to(images.device)


def without_pruning(model: nn.Module) -> nn.Module:
    """A copy of the ViT with its pruners taken off, in eval mode: the dense model of the same weights.

    Args:
        model: A ViT, or a module that holds exactly one.
    """
    with torch.inference_mode(False):  # weights made under it cannot be differentiated through
        dense = copy.deepcopy(find(model, kinds=Backbone)[1])
    for handle in (attached(dense), attached(dense, units=True)):
        if handle is not None:
            handle.detach()
    return dense.eval()


def _pixels(model: nn.Module, images: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """Patch maps over the masks, as an explanation's ``upsample``."""
    height, width = read(find(model)[1]).patch
    covered = (maps.shape[1] * height, maps.shape[2] * width)
    image, size = (images.shape[2], images.shape[3]), (masks.shape[1], masks.shape[2])
    return over_pixels(maps.float(), image, covered, size)


def _check_given(
    chosen: Sequence[Measure], masks: Tensor | None, kept: Tensor | None, judge: Tensor | None, explainer: str | None
) -> None:
    """Refuse measures that lack what they are about."""
    for measure in chosen:
        if measure.group == "localisation" and masks is None:
            raise PrunexError(f"{measure.name} needs object masks: give masks, or leave it out")
        if measure.group == "agreement" and (kept is None or judge is None):
            raise PrunexError(f"{measure.name} needs the patches kept and the dense model's map: give kept and judge")
        if measure.group == "robustness" and explainer is None:
            raise PrunexError(f"{measure.name} needs the explainer's name: give explainer")
