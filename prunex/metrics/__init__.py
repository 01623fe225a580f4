"""Measures: what a model costs, where a map lies, what it agrees with, and whether it tells what the model rests on."""

from prunex.metrics.agreement import (
    Agreement,
    CorrectedOverlap,
    DepthCorrelation,
    EqualAreaIoU,
    KeptAUC,
    MassEfficiency,
    MassKept,
    RankBiasedOverlap,
    RankKendall,
    RankSpearman,
    SignAgreement,
    TopKOverlap,
    agreement,
    corrected_overlap,
    depth_correlation,
    equal_area_iou,
    keep_scores,
    kept_auc,
    kept_share,
    mass_efficiency,
    mass_kept,
    rank_biased_chance,
    rank_biased_overlap,
    rank_kendall,
    rank_spearman,
    sign_agreement,
    topk_overlap,
)
from prunex.metrics.base import MeanOverImages
from prunex.metrics.bootstrap import Interval, bootstrap, bootstrap_ratios, compare
from prunex.metrics.curves import (
    AOPC,
    SRG,
    Comprehensiveness,
    Curves,
    Deletion,
    Insertion,
    LogOdds,
    Sufficiency,
    aopc,
    comprehensiveness,
    deletion,
    insertion,
    log_odds,
    removal_curves,
    srg,
    sufficiency,
)
from prunex.metrics.faithfulness import (
    FaithfulnessCorrelation,
    Infidelity,
    SaCo,
    SensitivityN,
    faithfulness_correlation,
    infidelity,
    saco,
    sensitivity_n,
)
from prunex.metrics.localization import (
    EnergyInMask,
    ForegroundAUC,
    ForegroundF1,
    MeanAP,
    MeanIoU,
    ObjectShare,
    PixelAccuracy,
    PointingGame,
    RankAccuracy,
    TopKIntersection,
    energy_inside,
    foreground_auc,
    foreground_f1,
    mean_ap,
    mean_iou,
    object_share,
    pixel_accuracy,
    pointing_game,
    rank_accuracy,
    segmentation_counts,
    topk_intersection,
)
from prunex.metrics.perturbation import (
    Perturbation,
    PerturbationAUC,
    perturbation,
    perturbation_auc,
    perturbation_maximum,
)
from prunex.metrics.reference import baselines, chance
from prunex.metrics.robustness import MaxSensitivity, max_sensitivity
from prunex.metrics.sanity import BatchOrder, ModelRandomisation, batch_order, model_randomisation, randomised
from prunex.metrics.scoring import Measure, by_chance, interval, measures, scores
from prunex.vit.cost import BlockCost, Cost, cost

__all__ = [
    "AOPC", "Agreement", "BatchOrder", "BlockCost", "Comprehensiveness", "CorrectedOverlap", "Cost", "Curves",
    "Deletion", "DepthCorrelation", "EnergyInMask", "EqualAreaIoU", "FaithfulnessCorrelation", "ForegroundAUC",
    "ForegroundF1", "Infidelity", "Insertion", "Interval", "KeptAUC", "LogOdds", "MassEfficiency", "MassKept",
    "MaxSensitivity", "MeanAP", "MeanIoU", "MeanOverImages", "Measure", "ModelRandomisation", "ObjectShare",
    "Perturbation", "PerturbationAUC", "PixelAccuracy", "PointingGame", "RankAccuracy", "RankBiasedOverlap",
    "RankKendall", "RankSpearman", "SRG", "SaCo", "SensitivityN", "SignAgreement", "Sufficiency", "TopKIntersection",
    "TopKOverlap", "agreement", "aopc", "baselines", "batch_order", "bootstrap", "bootstrap_ratios", "by_chance",
    "chance", "compare", "comprehensiveness", "corrected_overlap", "cost", "deletion", "depth_correlation",
    "energy_inside", "equal_area_iou", "faithfulness_correlation", "foreground_auc", "foreground_f1", "infidelity",
    "insertion", "interval", "keep_scores", "kept_auc", "kept_share", "log_odds", "mass_efficiency", "mass_kept",
    "max_sensitivity", "mean_ap", "mean_iou", "measures", "model_randomisation", "object_share", "perturbation",
    "perturbation_auc", "perturbation_maximum", "pixel_accuracy", "pointing_game", "randomised", "rank_accuracy",
    "rank_biased_chance", "rank_biased_overlap", "rank_kendall", "rank_spearman", "removal_curves", "saco", "scores",
    "segmentation_counts", "sensitivity_n", "sign_agreement", "srg", "sufficiency", "topk_intersection", "topk_overlap",
]  # fmt: skip
