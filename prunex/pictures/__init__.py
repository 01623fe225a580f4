"""Overlays, mosaics of kept tokens and curves: drawn from arrays and maps, never from a model."""

from prunex.pictures.arrays import from_tensor, png_bytes, resized, save_npz, save_png, under_grid
from prunex.pictures.bars import bars, bars_svg
from prunex.pictures.contact_sheet import contact_sheet
from prunex.pictures.curves import curves, curves_svg
from prunex.pictures.heads import attribute_rows, concept_contributions
from prunex.pictures.mosaic import kept_mosaic, relevancy_mosaic, share_mosaic
from prunex.pictures.multimodal import Detection, boxes_over, colored_words, detection_sheet, relevance_bars
from prunex.pictures.overlay import dim_dropped, outline, overlay
from prunex.pictures.trees import prototype_tree
from prunex.pictures.units import class_heads, head_attention, unit_widths

__all__ = [
    "Detection",
    "attribute_rows",
    "bars",
    "bars_svg",
    "boxes_over",
    "class_heads",
    "colored_words",
    "concept_contributions",
    "contact_sheet",
    "curves",
    "curves_svg",
    "detection_sheet",
    "dim_dropped",
    "from_tensor",
    "head_attention",
    "kept_mosaic",
    "outline",
    "overlay",
    "png_bytes",
    "prototype_tree",
    "relevance_bars",
    "relevancy_mosaic",
    "resized",
    "save_npz",
    "save_png",
    "share_mosaic",
    "under_grid",
    "unit_widths",
]
