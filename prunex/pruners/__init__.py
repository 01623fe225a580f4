"""One published token or unit pruner a file, named as its paper names it."""

from prunex.pruners.diffmask import DiffMask
from prunex.pruners.diffrate import DiffRate
from prunex.pruners.dynamicvit import DynamicViT
from prunex.pruners.evit import EViT
from prunex.pruners.hvt import HVT
from prunex.pruners.ia_red2 import IARED2
from prunex.pruners.patch_slimming import PatchSlimming
from prunex.pruners.ppt import PPT
from prunex.pruners.tome import ToMe
from prunex.pruners.topk import TopK
from prunex.units.magnitude import Magnitude
from prunex.units.random import Random
from prunex.units.relevance import Relevance
from prunex.units.taylor import Taylor
from prunex.units.xpruner import XPruner

__all__ = [
    "HVT",
    "PPT",
    "DiffMask",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "IARED2",
    "Magnitude",
    "PatchSlimming",
    "Random",
    "Relevance",
    "Taylor",
    "ToMe",
    "TopK",
    "XPruner",
]
