"""LightningModule, data modules, command line and report."""

from prunex.recipes.classifier import ImageClassifier
from prunex.recipes.diffmask import DiffMask
from prunex.recipes.digits import DigitScenes
from prunex.recipes.folder import ImageFolder
from prunex.recipes.report import write_report
from prunex.recipes.run_report import RunReport
from prunex.recipes.vit_shapley import ViTShapley

__all__ = ["DiffMask", "DigitScenes", "ImageClassifier", "ImageFolder", "RunReport", "ViTShapley", "write_report"]
