"""Object detection by a head that has no anchors, on the full grid of a pruned ViT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from prunex.checks import check_share
from prunex.errors import PrunexError
from prunex.recipes.modules.grid_model import GridModel
from prunex.recipes.modules.training import images_of

PRIOR = 0.01  # what classes score before training, so that the many cells of none do not swamp the first steps
MOST = 100  # boxes of an image, those that the metric looks at
RADIUS = 1.5  # how far, in cells, a positive cell may lie from the middle of its box
WEAKEST = 0.05  # scores of boxes that are left out


class DetectionModel(GridModel):
    """A timm ViT and FCOS's head (Tian et al., ICCV 2019, arXiv 1904.01355) on its patch grid; one level, no anchors.

    Every cell of the grid predicts classes, the distances from its middle to the edges of a box, and how near it is to
    that box's middle. A cell is positive where its middle lies in a box, and within 1.5 cells of the box's; of several
    boxes the smallest is its target. The loss is focal for classes, 1 - GIoU for boxes, and binary cross-entropy for
    centre-ness, means over positive cells. On a pruned model the grid comes from ``forward_intermediates(fill=...)``,
    so that a cell whose patch is gone may still predict a box.

    Batches are ``(images [B, 3, H, W], targets)``: a list of B dicts as torchvision has them, ``boxes`` float [n, 4]
    (left, top, right, bottom, in pixels) and ``labels`` int64 [n]; what else they hold is left to callbacks. The score
    is COCO's average precision over IoU 0.5 to 0.95, ``val_box_ap``; it needs pycocotools.

    Args:
        architecture: Name of a timm model.
        num_classes: Number of classes, without a background; on the command line, None takes it from the data module.
        model_args: Overrides for timm's constructor, such as ``img_size``, ``patch_size``, ``embed_dim``, ``depth``.
        weights: Path of a safetensors file, or the name of weights shipped with prunex (``digits``). A classifier in
            them is left out.
        pretrained: Download timm's weights; needs a network.
        blocks: After which blocks grids are taken, as timm's ``indices``: how many last ones, or a list of blocks.
        fill: What patches that were removed hold: a number, or None for their token as it left. Members of a fused or
            merged token hold that token either way.
        overlap: IoU (0..1) above which, of two boxes of one class, only the surer one stays.
        learning_rate: Peak learning rate.
        head_lr_scale: The head's learning rate, as a multiple of the ViT's.
        weight_decay: Not applied to biases, norms, position embeddings and class tokens.
        warmup: Share (0..1) of all steps over which the learning rate rises linearly; a cosine follows.
        final_learning_rate: Learning rate of the last step, as a share (0..1) of the peak.
        pruning: ``method`` and its options, as for ``prunex.attach``; checkpoints carry it, also where the callback
            ``TokenPruning`` did the pruning.
        unit_pruning: The same for heads and MLP channels, and the callback ``MaskPruning``.
        from_scratch: Train from random weights: without it, and without weights, training is refused.

    Raises:
        PrunexError: If an argument is outside its range, the weights cannot be loaded, the ViT is not supported, or
            pycocotools is not installed.

    >>> module = DetectionModel("vit_tiny_patch16_224", 10, {"img_size": 32, "depth": 2})
    >>> {name: tuple(part.shape) for name, part in module(torch.zeros(2, 3, 32, 32)).items()}
    {'classes': (2, 10, 2, 2), 'boxes': (2, 4, 2, 2), 'centres': (2, 2, 2)}
    """

    score = "box_ap"

    def __init__(
        self,
        architecture: str = "vit_small_patch16_224",
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
        blocks: int | list[int] = 1,
        fill: float | None = None,
        overlap: float = 0.5,
        learning_rate: float = 1e-3,
        head_lr_scale: float = 1.0,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        final_learning_rate: float = 0.01,
        pruning: dict[str, Any] | None = None,
        unit_pruning: dict[str, Any] | None = None,
        from_scratch: bool = False,
    ) -> None:
        if find_spec("pycocotools") is None:
            raise PrunexError("DetectionModel scores boxes as COCO does, by pycocotools: pip install pycocotools")
        super().__init__(
            architecture, num_classes, model_args, weights, pretrained, blocks, fill, learning_rate=learning_rate,
            head_lr_scale=head_lr_scale, weight_decay=weight_decay, warmup=warmup,
            final_learning_rate=final_learning_rate,
        )  # fmt: skip
        self.save_hyperparameters()
        self.overlap = check_share("overlap", overlap)
        # As wide as the ViT, however many grids: a wider one would cost as much as a small ViT itself.
        embed_dim = int(self.model.embed_dim)
        self.trunk = nn.Sequential(nn.Conv2d(self.width, embed_dim, 3, padding=1), nn.GELU())
        self.head = nn.Conv2d(embed_dim, self.num_classes + 5, 1)
        bias: Any = self.head.bias
        nn.init.constant_(bias[: self.num_classes], math.log(PRIOR / (1 - PRIOR)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """By cell of the grid: ``classes`` [B, C, gh, gw], ``boxes`` [B, 4, gh, gw] and ``centres`` [B, gh, gw].

        Classes and centre-ness are logits, boxes (left, top, right, bottom) in pixels.
        """
        answer = self.head(self.trunk(self.grid(images))).float()
        classes, edges, centres = answer.split([self.num_classes, 4, 1], 1)
        middles, cell = self._cells(images)
        # Distances from the cell's middle to the edges, in cells and never negative.
        away = F.softplus(edges) * cell.repeat(2).view(4, 1, 1)
        boxes = torch.cat([middles - away[:, :2], middles + away[:, 2:]], 1)
        return {"classes": classes, "boxes": boxes, "centres": centres[:, 0]}

    def loss(self, output: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """``class``, ``box`` and ``centre`` loss, each a mean over positive cells."""
        middles, cell = self._cells(self.images(batch))
        targets = self._targets(batch)
        pairs = [assigned(t["boxes"].to(middles), middles, cell) for t in targets]
        which, boxes = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        positive = which >= 0
        count = positive.sum().clamp(min=1)
        labels = torch.zeros_like(output["classes"])
        for image, target in enumerate(targets):
            rows, columns = positive[image].nonzero(as_tuple=True)
            classes = target["labels"].to(labels.device)[which[image, rows, columns]]
            labels[image, classes, rows, columns] = 1
        predicted, boxes = output["boxes"].permute(0, 2, 3, 1)[positive], boxes[positive]
        nearness = centreness(boxes, middles.permute(1, 2, 0).expand(*positive.shape, 2)[positive])
        # Boxes of cells near the middle count most, as these are the ones that are kept.
        apart = generalized_box_iou_loss(predicted, boxes, reduction="none")
        centre = F.binary_cross_entropy_with_logits(output["centres"][positive], nearness, reduction="sum")
        return {
            "class": sigmoid_focal_loss(output["classes"], labels, reduction="sum") / count,
            "box": (apart * nearness).sum() / nearness.sum().clamp(min=1e-6),
            "centre": centre / count,
        }

    def meter(self) -> Metric:
        """COCO's average precision."""
        return MeanAveragePrecision(box_format="xyxy", iou_type="bbox")

    def update(self, meter: Metric, output: dict[str, Tensor], batch: Any) -> None:
        """Take in predicted boxes and the targets."""
        images, device = self.images(batch), output["boxes"].device
        targets = []
        for target in self._targets(batch):
            targets.append({name: target[name].to(device) for name in ("boxes", "labels")})
        meter.update(self.detections(output, (images.shape[-2], images.shape[-1])), targets)

    def read(self, meter: Metric) -> float:
        """Average precision over classes and IoU 0.5 to 0.95."""
        return float(meter.compute()["map"])

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Tensor]]:
        """What :meth:`detections` gives."""
        images = images_of(batch)
        return self.detections(self(images), (images.shape[-2], images.shape[-1]))

    def detections(self, output: dict[str, Tensor], size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """For each image ``boxes`` [n, 4] in pixels, ``scores`` [n] and ``labels`` [n], the surest first."""
        # As torchvision's FCOS ranks boxes: the geometric mean of class and centre-ness.
        scores = (output["classes"].sigmoid() * output["centres"].sigmoid().unsqueeze(1)).sqrt().flatten(1)
        boxes = clip_boxes_to_image(output["boxes"].flatten(2).transpose(1, 2), size)
        cells = boxes.shape[1]
        answers = []
        for image_scores, image_boxes in zip(scores, boxes, strict=True):
            index = (image_scores > WEAKEST).nonzero()[:, 0]
            # Scores lie class by class, of each the cells of the grid.
            labels, likely, score = index // cells, image_boxes[index % cells], image_scores[index]
            kept = batched_nms(likely, score, labels, self.overlap)[:MOST]
            answers.append({"boxes": likely[kept], "scores": score[kept], "labels": labels[kept]})
        return answers

    def _cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The middles of the grid's cells, [2, gh, gw] of (x, y) in pixels, and a cell's width and height, [2]."""
        height, width = self.model.patch_embed.patch_size
        gh, gw = images.shape[-2] // height, images.shape[-1] // width
        x, y = ((torch.arange(n, device=images.device) + 0.5) * side for n, side in ((gw, width), (gh, height)))
        middles = torch.stack([x.expand(gh, gw), y.unsqueeze(1).expand(gh, gw)])
        return middles, torch.tensor([width, height], dtype=torch.float32, device=images.device)

    def _targets(self, batch: Any) -> Sequence[dict[str, Tensor]]:
        """A batch's boxes and labels, image by image."""
        images, targets = self.images(batch), batch[1]
        if not isinstance(targets, list | tuple) or len(targets) != len(images):
            what = f"{len(targets)} of them" if isinstance(targets, list | tuple) else f"a {type(targets).__name__}"
            raise PrunexError(f"the targets are {what}: give a list of {len(images)} dicts, one an image")
        for target in targets:
            boxes, labels = (target.get(name) if isinstance(target, dict) else None for name in ("boxes", "labels"))
            if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor) or boxes.shape != (len(labels), 4):
                raise PrunexError("a target holds no boxes [n, 4] with labels [n]: give dicts of both, as tensors")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise PrunexError(
                    f"labels of boxes run from {int(labels.min())} to {int(labels.max())}, the model has "
                    f"{self.num_classes} classes: set num_classes to the number of classes in the data"
                )
            if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
                raise PrunexError("a box has no area: give (left, top, right, bottom) in pixels")
        return targets


def assigned(boxes: Tensor, middles: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Which of an image's boxes [n, 4] is each cell's target: int64 [gh, gw], -1 for none, and that box [gh, gw, 4].

    ``middles`` [2, gh, gw] of the cells, and ``cell`` [2], their size.

    >>> middles = torch.tensor([[[4.0, 12.0]], [[4.0, 4.0]]])
    >>> assigned(torch.tensor([[8.0, 0.0, 16.0, 8.0]]), middles, torch.tensor([8.0, 8.0]))[0].tolist()
    [[-1, 0]]
    """
    grid = middles.shape[1:]
    if not len(boxes):
        return torch.full(grid, -1, device=middles.device), middles.new_zeros(*grid, 4)
    x, y = (axis[..., None] for axis in middles)
    left, top, right, bottom = boxes.unbind(1)
    inside = (x > left) & (x < right) & (y > top) & (y < bottom)
    near = ((x - (left + right) / 2).abs() < RADIUS * cell[0]) & ((y - (top + bottom) / 2).abs() < RADIUS * cell[1])
    area = ((right - left) * (bottom - top)).expand(inside.shape).masked_fill(~(inside & near), torch.inf)
    smallest, which = area.min(-1)
    return which.masked_fill(smallest.isinf(), -1), boxes[which]


def centreness(boxes: Tensor, points: Tensor) -> Tensor:
    """How near points [n, 2] are to the middles of boxes [n, 4] round them, 1 there and 0 at edges (FCOS, Eq. 3).

    >>> centreness(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[4.0, 2.0]])).round(decimals=4)
    tensor([0.5774])
    """
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.clamp(min=0).prod(1).sqrt()
