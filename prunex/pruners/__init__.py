"""One published token pruner a file, named as its paper names it."""

from prunex.pruners.dynamicvit import DynamicViT
from prunex.pruners.evit import EViT
from prunex.pruners.hvt import HVT
from prunex.pruners.topk import TopK

__all__ = ["HVT", "DynamicViT", "EViT", "TopK"]
