"""DETR and what has its plain attention (arXiv 2005.12872): an encoder of image cells, a decoder of object queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.checks import check_share
from prunex.errors import PrunexError
from prunex.multimodal.adapter import Adapter, Targets, classes_of, known, passes_of
from prunex.multimodal.recorder import Recording
from prunex.multimodal.rules import Attended, between, by_role, last, rollout


def queries_of(queries: Any, probability: Tensor, threshold: float) -> list[int]:
    """Which object queries are explained, from the probability [B, Q] of each one's class.

    None: those above the threshold in any image. "all", or numbers, which are explained in every image.
    """
    count = probability.shape[1]
    if queries is None:
        return (probability > threshold).any(0).nonzero()[:, 0].tolist()
    if isinstance(queries, str) and queries == "all":
        return list(range(count))
    given = queries if isinstance(queries, Sequence) and not isinstance(queries, str) else [queries]
    if not given or not all(type(q) is int and 0 <= q < count for q in given) or len({*given}) < len(given):
        raise PrunexError(
            f"queries={queries!r} is not allowed: give object queries of 0..{count - 1}, each once, 'all', or None for "
            f"those of a probability above threshold={threshold}"
        )
    return list(given)


class Detector(Adapter):
    """What explains object queries one by one."""

    needs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    options = {"queries": None, "threshold": 0.5}

    def probability(self, logits: Tensor) -> Tensor:
        """[B, Q, classes], without one for "no object"."""
        raise NotImplementedError

    def targets(self, recording: Recording, target: Any, options: Mapping[str, Any]) -> Targets:
        """A class of each query: None is its best, a number one for all, int64 [B, Q] one each."""
        threshold = check_share("threshold", options["threshold"], zero=True)
        logits = self.logits(recording.outputs)
        probability = self.probability(logits)
        best = probability.amax(-1)
        queries = queries_of(options["queries"], best, threshold)
        if target is None:
            classes = probability.argmax(-1)
        elif isinstance(target, Tensor) and target.ndim == 2 and target.shape != logits.shape[:2]:
            raise PrunexError(
                f"target has shape {list(target.shape)}: give one class for each query, {list(logits.shape[:2])}, or "
                "one number for all"
            )
        else:
            # Against one query's classes, which all queries have.
            classes = classes_of(target, probability[:, 0]).expand(logits.shape[:2])
        chosen = logits.gather(2, classes[..., None])[..., 0][:, queries]
        # Queries that were asked for are explained in every image, whatever they see there.
        kept = best[:, queries] > threshold if options["queries"] is None else torch.ones_like(chosen, dtype=torch.bool)
        return Targets(classes[:, queries], passes_of(chosen), chosen.detach(), queries, kept)

    def text_valid(self) -> Tensor | None:
        return None

    def boxes(self, recording: Recording) -> Tensor | None:
        """Predicted boxes [B, Q, 4]: centre, width and height as shares of the image."""
        return recording.outputs.pred_boxes.detach()


@known
class Detr(Detector):
    """DETR: each cell of the feature map is a token of the encoder, which each layer of the decoder asks."""

    models: ClassVar[tuple[str, ...]] = ("DetrForObjectDetection", "TableTransformerForObjectDetection")
    roles = {
        r"encoder\.layers\.\d+\.self_attn": ("ii",),
        r"decoder\.layers\.\d+\.self_attn": ("qq",),
        r"decoder\.layers\.\d+\.encoder_attn": ("qi",),
    }
    crossed = ("qi",)
    reads = ("qi",)
    feature_map = r"model\.input_projection"

    def count(self) -> int:
        # A layer of the decoder attends twice: queries among themselves, and to the image.
        return self.config.encoder_layers + 2 * self.config.decoder_layers

    def probability(self, logits: Tensor) -> Tensor:
        # The last class is "no object".
        return logits.softmax(-1)[..., :-1]

    def rollout(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Both streams, and the last cross map between them."""
        streams = by_role(maps)
        queries, image = rollout(streams["qq"]), rollout(streams["ii"])
        cross = between(queries, last(maps, "qi").attention.mean(1), image)
        rolled = {"R_qq": queries, "R_ii": image, "R_qi": cross}
        return {name: matrix for name, matrix in rolled.items() if matrix is not None}

    def answering(self, targets: Targets, column: Tensor) -> Mapping[str, Tensor]:
        return {"qi": targets.query(column)[:, None]}

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[None, Tensor]:
        return None, matrices["R_qi"][torch.arange(len(column), device=column.device), targets.query(column)]

    def image_valid(self, count: int, grid: tuple[int, int] | None) -> Tensor:
        pixels, mask = self.inputs["pixel_values"], self.inputs.get("pixel_mask")
        if mask is None or grid is None:
            return torch.ones(len(pixels), count, dtype=torch.bool, device=pixels.device)
        # Nearest, as the model brings its mask to the feature map's size.
        return F.interpolate(mask[None].float(), size=grid)[0].bool().flatten(1)


@known
class ConditionalDetr(Detr):
    """Conditional DETR (arXiv 2108.06152): a sigmoid for each class, and none for "no object"."""

    models = ("ConditionalDetrForObjectDetection",)

    def probability(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


@known
class DabDetr(ConditionalDetr):
    """DAB-DETR (arXiv 2201.12329): its decoder's attention lies one module deeper."""

    models = ("DabDetrForObjectDetection",)
    roles = {
        r"encoder\.layers\.\d+\.self_attn": ("ii",),
        r"decoder\.layers\.\d+\.self_attn\.self_attn": ("qq",),
        r"decoder\.layers\.\d+\.cross_attn\.cross_attn": ("qi",),
    }
