"""LightningModule, data modules, command line and report."""

from prunex.recipes.data.digits import DigitScenes
from prunex.recipes.data.folder import ImageFolder
from prunex.recipes.modules.classifier import ImageClassifier
from prunex.recipes.modules.diffmask import DiffMask
from prunex.recipes.modules.vit_shapley import ViTShapley
from prunex.recipes.report.callback import RunReport
from prunex.recipes.report.page import write_report

__all__ = ["DiffMask", "DigitScenes", "ImageClassifier", "ImageFolder", "RunReport", "ViTShapley", "write_report"]
