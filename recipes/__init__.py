"""LightningModule, data modules, command line and report."""

from prunex.recipes.classifier import ImageClassifier
from prunex.recipes.digits import DigitScenes

__all__ = ["DigitScenes", "ImageClassifier"]
