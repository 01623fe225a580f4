"""LightningModule, data modules, command line and report."""

from typing import TYPE_CHECKING

from prunex.lazy import later

# The command line lies in this package, and says what it is without torch.
_PLACES = {
    "BoxQuestions": "data.box_questions",
    "DetectionModel": "modules.detection",
    "DiffMask": "modules.diffmask",
    "DigitScenes": "data.digits",
    "DrawnShapes": "data.drawn_shapes",
    "ImageClassifier": "modules.classifier",
    "ImageFolder": "data.folder",
    "RunReport": "report.callback",
    "SegmentationModel": "modules.segmentation",
    "TransformersModel": "modules.transformers_model",
    "ViTShapley": "modules.vit_shapley",
    "write_report": "report.page",
}

__all__ = [*_PLACES]

if TYPE_CHECKING:
    from prunex.recipes.data.box_questions import BoxQuestions as BoxQuestions
    from prunex.recipes.data.digits import DigitScenes as DigitScenes
    from prunex.recipes.data.drawn_shapes import DrawnShapes as DrawnShapes
    from prunex.recipes.data.folder import ImageFolder as ImageFolder
    from prunex.recipes.modules.classifier import ImageClassifier as ImageClassifier
    from prunex.recipes.modules.detection import DetectionModel as DetectionModel
    from prunex.recipes.modules.diffmask import DiffMask as DiffMask
    from prunex.recipes.modules.segmentation import SegmentationModel as SegmentationModel
    from prunex.recipes.modules.transformers_model import TransformersModel as TransformersModel
    from prunex.recipes.modules.vit_shapley import ViTShapley as ViTShapley
    from prunex.recipes.report.callback import RunReport as RunReport
    from prunex.recipes.report.page import write_report as write_report
else:
    __getattr__ = later(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
