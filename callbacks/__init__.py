"""Lightning callbacks that prune, watch and export."""

from typing import TYPE_CHECKING

from prunex.lazy import later

_PLACES = {
    "ExactResume": "exact_resume",
    "ExplainableHead": "explainable_head",
    "FaithfulnessMonitor": "faithfulness_monitor",
    "HeadMonitor": "head_monitor",
    "KeptTokenMonitor": "kept_token_monitor",
    "MaskPruning": "mask_pruning",
    "RelevancyGuidance": "relevancy_guidance",
    "RelevancyMonitor": "relevancy_monitor",
    "SafeCheckpointIO": "checkpoints",
    "SlimExport": "slim_export",
    "TokenPruning": "token_pruning",
    "UnitMonitor": "unit_monitor",
    "load_from_checkpoint": "checkpoints",
}

__all__ = [*_PLACES]

if TYPE_CHECKING:
    from prunex.callbacks.checkpoints import SafeCheckpointIO as SafeCheckpointIO
    from prunex.callbacks.checkpoints import load_from_checkpoint as load_from_checkpoint
    from prunex.callbacks.exact_resume import ExactResume as ExactResume
    from prunex.callbacks.explainable_head import ExplainableHead as ExplainableHead
    from prunex.callbacks.faithfulness_monitor import FaithfulnessMonitor as FaithfulnessMonitor
    from prunex.callbacks.head_monitor import HeadMonitor as HeadMonitor
    from prunex.callbacks.kept_token_monitor import KeptTokenMonitor as KeptTokenMonitor
    from prunex.callbacks.mask_pruning import MaskPruning as MaskPruning
    from prunex.callbacks.relevancy_guidance import RelevancyGuidance as RelevancyGuidance
    from prunex.callbacks.relevancy_monitor import RelevancyMonitor as RelevancyMonitor
    from prunex.callbacks.slim_export import SlimExport as SlimExport
    from prunex.callbacks.token_pruning import TokenPruning as TokenPruning
    from prunex.callbacks.unit_monitor import UnitMonitor as UnitMonitor
else:
    __getattr__ = later(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
