"""LightningModule, data modules, command line and report."""

from typing import TYPE_CHECKING

from prunex.lazy import later

__all__ = [
    "BoxQuestions",
    "DetectionModel",
    "DiffMask",
    "DigitScenes",
    "DrawnShapes",
    "ImageClassifier",
    "ImageFolder",
    "RunReport",
    "SegmentationModel",
    "TransformersModel",
    "ViTShapley",
    "write_report",
]

if TYPE_CHECKING:
    from prunex.recipes.data.box_questions import BoxQuestions
    from prunex.recipes.data.digits import DigitScenes
    from prunex.recipes.data.drawn_shapes import DrawnShapes
    from prunex.recipes.data.folder import ImageFolder
    from prunex.recipes.modules.classifier import ImageClassifier
    from prunex.recipes.modules.detection import DetectionModel
    from prunex.recipes.modules.diffmask import DiffMask
    from prunex.recipes.modules.segmentation import SegmentationModel
    from prunex.recipes.modules.transformers_model import TransformersModel
    from prunex.recipes.modules.vit_shapley import ViTShapley
    from prunex.recipes.report.callback import RunReport
    from prunex.recipes.report.page import write_report
else:
    # The command line lies in this package, and says what it is without torch.
    __getattr__ = later(
        __name__,
        {
            "BoxQuestions": "data.box_questions",
            "DigitScenes": "data.digits",
            "DrawnShapes": "data.drawn_shapes",
            "ImageFolder": "data.folder",
            "ImageClassifier": "modules.classifier",
            "DetectionModel": "modules.detection",
            "DiffMask": "modules.diffmask",
            "SegmentationModel": "modules.segmentation",
            "TransformersModel": "modules.transformers_model",
            "ViTShapley": "modules.vit_shapley",
            "RunReport": "report.callback",
            "write_report": "report.page",
        },
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
