"""Lightning callbacks that prune, watch and export."""

from typing import TYPE_CHECKING

from prunex.lazy import later

__all__ = [
    "ExactResume",
    "ExplainableHead",
    "FaithfulnessMonitor",
    "HeadMonitor",
    "KeptTokenMonitor",
    "MaskPruning",
    "RelevancyGuidance",
    "RelevancyMonitor",
    "SafeCheckpointIO",
    "SlimExport",
    "TokenPruning",
    "UnitMonitor",
    "load_from_checkpoint",
]

if TYPE_CHECKING:
    from prunex.callbacks.checkpoints import SafeCheckpointIO, load_from_checkpoint
    from prunex.callbacks.exact_resume import ExactResume
    from prunex.callbacks.explainable_head import ExplainableHead
    from prunex.callbacks.faithfulness_monitor import FaithfulnessMonitor
    from prunex.callbacks.head_monitor import HeadMonitor
    from prunex.callbacks.kept_token_monitor import KeptTokenMonitor
    from prunex.callbacks.mask_pruning import MaskPruning
    from prunex.callbacks.relevancy_guidance import RelevancyGuidance
    from prunex.callbacks.relevancy_monitor import RelevancyMonitor
    from prunex.callbacks.slim_export import SlimExport
    from prunex.callbacks.token_pruning import TokenPruning
    from prunex.callbacks.unit_monitor import UnitMonitor
else:
    __getattr__ = later(
        __name__,
        {
            "SafeCheckpointIO": "checkpoints",
            "load_from_checkpoint": "checkpoints",
            "ExactResume": "exact_resume",
            "ExplainableHead": "explainable_head",
            "FaithfulnessMonitor": "faithfulness_monitor",
            "HeadMonitor": "head_monitor",
            "KeptTokenMonitor": "kept_token_monitor",
            "MaskPruning": "mask_pruning",
            "RelevancyGuidance": "relevancy_guidance",
            "RelevancyMonitor": "relevancy_monitor",
            "SlimExport": "slim_export",
            "TokenPruning": "token_pruning",
            "UnitMonitor": "unit_monitor",
        },
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
