"""Many measures of one map at once: what ``prunex score`` and ``FaithfulnessMonitor`` print.

Measures that read the same thing share it: all curve measures one set of removal curves, all segmentation measures one
count. Everything is kept per image, so that intervals come after (:func:`interval`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError, unknown
from prunex.handles.tokens import Pruning
from prunex.handles.units import UnitPruning
from prunex.metrics.bootstrap import Interval, bootstrap, bootstrap_ratios
from prunex.metrics.curves import removal_curves
from prunex.metrics.localization import segmentation_counts
from prunex.metrics.perturbation import perturbation, perturbation_auc
from prunex.metrics.reference import chance
from prunex.metrics.robustness import sensitivity_of
from prunex.registry import lookup
from prunex.removal.game import GameOptions, Route
from prunex.targets import Target
from prunex.vit.anatomy import find, read
from prunex.vit.embedding import over_pixels
from prunex.vit.mount import mounted, mounted_units
from prunex.vit.units import Backbone

GROUPS = ("faithfulness", "localisation", "agreement", "robustness", "complexity")


@dataclass(frozen=True)
class Measure:
    """What one number of the table is; measures of one ``kind`` share what they compute."""

    name: str  # as it is asked for; the function's in ``prunex.metrics``, perturbation by its order
    group: str  # one of GROUPS
    kind: str  # "positive", "negative" (perturbation), "curves", "mask", "counts", "kept", "map", or the name
    higher: bool = True  # whether more is better
    usual: bool = True  # whether it is taken when all are asked for


# What a group is about, and in words.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "localisation": (("masks",), "object masks"),
    "agreement": (("kept", "judge"), "the patches kept and the dense model's map"),
    "robustness": (("explainer",), "the explainer's name"),
}
# Names of metrics that share what they read: curves, a mask, counts of pixels, kept patches, a model.
_CURVES = ("deletion", "insertion", "aopc", "log_odds", "comprehensiveness", "sufficiency", "srg")
_MASKS = ("energy_inside", "pointing_game", "rank_accuracy", "mean_ap", "foreground_auc", "foreground_f1")
_COUNTS = {"pixel_accuracy": slice(0, 2), "mean_iou": slice(2, 6)}  # columns of segmentation_counts
_KEPT = (
    *("corrected_overlap", "kept_auc", "mass_kept", "equal_area_iou"),
    *("topk_overlap", "mass_efficiency", "sign_agreement"),
)
_MODEL = ("saco", "faithfulness_correlation", "sensitivity_n", "infidelity", "road", "completeness")
_MAP = ("sparseness", "complexity")
_LOW = ("deletion", "log_odds", "sufficiency", "infidelity", "completeness", "complexity")
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
        *_of(_MAP, "complexity", "map"),
    ]
}


def measures(names: str | Sequence[str] = "all") -> list[Measure]:
    """Measures by name, in the table's order.

    Names come in a list or with commas between. "all" stands for the usual ones: those that cost a hundred forwards an
    image or say what another says already are taken by name alone. "perturbation" stands for both of its orders.

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


class Evidence(GameOptions, total=False):
    """What measures are about, beside the maps; and how the model is asked, see ``prunex.removal.game.GameOptions``."""

    labels: Tensor | None  # int [B], the true class, which perturbation counts as a hit; None: the predicted one
    masks: Tensor | None  # bool [B, H, W], or 1, 0 and -1 for ignored; localisation needs them
    pixels: Tensor | None  # float [B, H, W], the finest map; None: ``maps`` brought up bilinearly
    kept: Tensor | None  # bool [B, gh, gw], the patches a pruned model keeps; agreement needs it and the judge
    judge: Tensor | None  # float [B, gh, gw], the dense model's map for the same classes
    explainer: str | None  # the method's name, for "max_sensitivity"
    options: Mapping[str, Any] | None  # its options


def scores(
    metrics: Sequence[str],
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    removal: Route | None = None,
    **evidence: Unpack[Evidence],
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
        removal: How patches are taken away. None: as published, which is "black" pixels for perturbation and "drop"
            (tokens) for everything else but "saco", whose is "mean".
        **evidence: See :class:`Evidence`.

    Returns:
        By name, on the CPU, float64 [B]; for pixel_accuracy and mean_iou, which are ratios of sums over images,
        numerators and denominators [B, 2] and [B, 4]. :func:`interval` makes one number of either.

    Raises:
        PrunexError: For an unknown name, one that lacks what it needs, and whatever the measure refuses.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2).eval()
    >>> images = torch.randn(2, 3, 224, 224)
    >>> e = prunex.explain("rollout", model, images)
    >>> scores(["deletion"], model, images, e.maps, e.target)["deletion"].shape
    torch.Size([2])
    """
    odd = evidence.keys() - Evidence.__optional_keys__
    if odd:
        raise unknown("option of scores", min(odd), Evidence.__optional_keys__)
    chosen = measures(list(metrics))
    _check_given(chosen, evidence)
    game: Any = {name: value for name, value in evidence.items() if name in GameOptions.__optional_keys__}
    # Tensors are read once, so that types know which of them are there.
    masks, kept, judge = evidence.get("masks"), evidence.get("kept"), evidence.get("judge")
    names: dict[str, list[str]] = {}
    for measure in chosen:
        names.setdefault(measure.kind, []).append(measure.name)
    values: dict[str, Tensor] = {}
    for order in ("positive", "negative"):
        if order in names:
            labels, route = evidence.get("labels"), removal or "black"
            hits = perturbation(model, images, maps, labels, order=order, removal=route, **game).hits
            values[f"perturbation_{order}"] = perturbation_auc(hits)
    # One set of curves serves all that read them; the third order costs forwards that only srg needs.
    if "curves" in names:
        orders: list[Any] = ["without", "only"]
        if "srg" in names["curves"]:
            orders.append("least")
        curves = removal_curves(model, images, maps, target, removal=removal or "drop", orders=orders, **game)
        values |= _each(names["curves"], curves)
    if masks is not None and ("mask" in names or "counts" in names):
        # Masks are in pixels: a map of patches is brought up once for all that compare with them.
        fine = evidence.get("pixels")
        if fine is None:
            fine = _pixels(model, images, maps, masks)
        values |= _each(names.get("mask", ()), fine, masks)
        if "counts" in names:
            counts = segmentation_counts(fine, masks)
            values |= {name: counts[:, _COUNTS[name]] for name in names["counts"]}
    if kept is not None and judge is not None:
        values |= _each(names.get("kept", ()), kept, judge)
    for name in _MODEL:
        if name in names:
            chosen_route = {} if removal is None else {"removal": removal}
            sampled = _each([name], model, images, maps, target, **chosen_route, **game)[name]
            values[name] = sampled if sampled.ndim == 1 else sampled.nanmean(1)
    values |= _each(names.get("map", ()), maps)
    explainer = evidence.get("explainer")
    if explainer is not None and "max_sensitivity" in names:
        options = dict(evidence.get("options") or {})
        values["max_sensitivity"] = sensitivity_of(explainer, model, images, target, options)
    return {m.name: values[m.name].detach().double().cpu() for m in chosen}


def _each(names: Iterable[str], *given: Any, **options: Any) -> dict[str, Tensor]:
    """What metrics of these names say of the same thing."""
    return {name: lookup("metric", name).make(*given, **options) for name in names}


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
    if measure.name in _MODEL:
        return str(lookup("metric", measure.name).options["removal"])
    return "drop"


def by_chance(
    metrics: Sequence[str], masks: Tensor | None = None, kept: Tensor | None = None, judge: Tensor | None = None
) -> dict[str, Tensor]:
    """What a map that says nothing scores, as :func:`scores` returns it.

    Of localisation that is a constant map, which scores the object's share of the image (:func:`object_share`) on
    energy, pointing and rank accuracy; of agreement, :func:`chance`. Faithfulness has no closed form, and a constant
    map's segmentation (nothing is object) is one guess and not the level of guessing: score random maps for both.

    Metrics without a chance level, or without what they need, are left out.

    >>> masks = torch.tensor([[[True, False], [False, False]]])
    >>> by_chance(["energy_inside", "mean_ap"], masks)
    {'energy_inside': tensor([0.2500], dtype=torch.float64), 'mean_ap': tensor([0.5000], dtype=torch.float64)}
    """
    levels: dict[str, Tensor] = {}
    chosen = measures(list(metrics))
    if masks is not None:
        # A constant map is what localisation makes of a map that says nothing.
        flat = torch.ones(masks.shape, device=masks.device)
        levels |= _each([m.name for m in chosen if m.kind == "mask"], flat, masks)
    if kept is not None and judge is not None:
        level = chance(kept, judge)
        levels |= {m.name: level[m.name] for m in chosen if m.kind == "kept"}
    return {name: value.double().cpu() for name, value in levels.items()}


def interval(name: str, values: Tensor, *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """One number for all images from :func:`scores`, its values [N] or [N, 2 K], with its :func:`bootstrap` interval.

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
    # Drawn on the CPU, so that every device compares with the same maps.
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((len(images), *grid), generator=generator).to(images.device)


def without_pruning(model: nn.Module) -> nn.Module:
    """A copy of the ViT with its pruners taken off, in eval mode: the dense model of the same weights."""
    with torch.inference_mode(False):  # weights made under it cannot be differentiated through
        dense = copy.deepcopy(find(model, kinds=Backbone)[1])
    # What is mounted is asked for, and not attached(): tokens of a Swin cannot be pruned.
    if mounted(dense) is not None:
        Pruning(dense).detach()
    if mounted_units(dense) is not None:
        UnitPruning(dense).detach()
    return dense.eval()


def _pixels(model: nn.Module, images: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """Patch maps over the masks, as an explanation's ``upsample``."""
    height, width = read(find(model)[1]).patch
    covered = (maps.shape[1] * height, maps.shape[2] * width)
    image, size = (images.shape[2], images.shape[3]), (masks.shape[1], masks.shape[2])
    return over_pixels(maps.float(), image, covered, size)


def _check_given(chosen: Sequence[Measure], evidence: Evidence) -> None:
    """Refuse measures that lack what they are about."""
    for measure in chosen:
        names, words = _NEEDS.get(measure.group, ((), ""))
        if any(evidence.get(name) is None for name in names):
            raise PrunexError(f"{measure.name} needs {words}: give {' and '.join(names)}, or leave it out")
