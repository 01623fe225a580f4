"""Lightning callbacks that prune, watch and export."""

from prunex.callbacks.kept_token_monitor import KeptTokenMonitor
from prunex.callbacks.relevancy_monitor import RelevancyMonitor
from prunex.callbacks.slim_export import SlimExport
from prunex.callbacks.token_pruning import TokenPruning, load_from_checkpoint

__all__ = ["KeptTokenMonitor", "RelevancyMonitor", "SlimExport", "TokenPruning", "load_from_checkpoint"]
