"""R-Cut: class-weighted patch features, split in two by a normalised cut."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.features import features, features_tape, log_odds
from prunex.vit.anatomy import ViT
from prunex.vit.readout import before_softmax, scalar
from prunex.vit.recording import check_layer, recording

_FLOOR = 1e-5  # affinity of two patches that are not alike
_GAP = 1e-6  # eigenvalues closer than this leave the second eigenvector open
_BEYOND = 3.0  # above every eigenvalue of a normalised Laplacian, which end at 2


@register("explainer", "r_cut", "Niu et al., Sensors 24(9):2695, 2024, arXiv 2307.09050", "one forward, one backward")
def r_cut(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    layer: int = -1,
    threshold: float = 0.2,
    orient: Literal["peak", "grad_cam"] = "peak",
    objective: Literal["probability", "logit"] = "probability",
) -> Explanation:
    """Relationship weighted out and cut (arXiv 2307.09050): Grad-CAM's weighted features, kept apart, then cut.

    With A the output of a block's first norm, G the gradient of the class's score for it and alpha_d the mean of G over
    the patches: r_i = alpha * A_i stays a vector of D channels. W_ij = 1 where cos(r_i, r_j) > ``threshold``, else
    1e-5; d_i = sum_j W_ij; the map is the eigenvector y of the second-smallest eigenvalue of (D - W) y = lambda D y,
    scaled to y^T D y = 1. Class-specific. One forward, one backward and a P x P eigenproblem (float64) an image.

    This follows the authors' **code**; whether the paper's own equations differ is **unverified**. Departures: no final
    scaling to 0..1; the probability's gradient is taken from the log odds, of which it is a positive multiple, so that
    a saturated softmax does not cancel it away. Where lambda_3 - lambda_2 < 1e-6, as when all patches are alike, y is
    arbitrary: such an image gets its Grad-CAM map instead, with a warning. A cosine within rounding of ``threshold``
    can turn a whole region over, so maps in different precisions may differ at once and not by little.

    On a pruned model the graph is made of the patches that still are tokens of their own when they enter the block; all
    others get the smallest value.

    Args:
        layer: Block whose first norm is read, negative from the end.
        threshold: Cosine above which two patches belong together, in [-1, 1).
        orient: Which side of the cut is the object. "peak" (the authors): the one above the mean that holds the largest
            |y|, which goes wrong where the background is the smaller part. "grad_cam" (ours): the one whose mean
            Grad-CAM value is larger; on small objects it has chosen worse, so look at both.
        objective: "probability" (softmax) or "logit" of the class.

    Returns:
        ``maps`` >= 0, y with negative values set to 0; ``raw`` [B, gh, gw] is y itself, which also orders the zeros.

    Raises:
        PrunexError: For the probability of a model with a single class.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("r_cut", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    layer = check_layer(layer, len(model.blocks))
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold < 1:
        raise PrunexError(f"threshold={threshold!r} is not allowed: give a cosine in [-1, 1)")
    with recording(model, images, target, features_tape(layer), needs_class=True) as recorded:
        if objective == "logit" or scalar(model):
            objective, score = "logit", recorded.score()
        elif recorded.logits.shape[1] == 1:
            raise PrunexError("the probability of a single class is always 1: explain it with objective='logit'")
        else:
            score = log_odds(before_softmax(model, recorded.logits), recorded.target)
        seen = features(recorded, layer, score)
        with torch.no_grad():
            weighted = seen.weights().double().unsqueeze(1) * seen.activation.double()
            y, arbitrary = normalised_cut(weighted, seen.present, threshold)
            cam = weighted.sum(-1)
            y = oriented(y, seen.present, cam.clamp(min=0) if orient == "grad_cam" else None)
            # dp = p (1 - p) d log odds: back to the probability's own gradient.
            if objective == "probability":
                cam = cam * (score.double().sigmoid() * (-score.double()).sigmoid())[:, None]
            if arbitrary.any():
                _warn(arbitrary, (weighted == 0).flatten(1).all(1))
            y = torch.where(arbitrary[:, None], cam, y)
            # Below 0 for a cut; a Grad-CAM map all above it leaves 0 to the pruned patches.
            lowest = y.masked_fill(~seen.present, 0).amin(1).clamp(max=0)
            raw = seen.on_grid(y, lowest).to(seen.activation.dtype)
            return answer(recorded, raw.clamp(min=0).flatten(1), raw=raw)


def normalised_cut(tokens: Tensor, present: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The eigenvector that splits tokens [B, n, D] in two: of (D - W) y = lambda D y, second-smallest eigenvalue.

    Solved as D^(-1/2) (D - W) D^(-1/2) u = lambda u, y = D^(-1/2) u. ``present`` bool [B, n] says which tokens exist;
    the others are no part of the graph. y [B, n] is of either sign, 0 where no token is; beside it bool [B]: where it
    is arbitrary (or there is a single token).
    """
    count = tokens.shape[1]
    if count < 3:  # there is a third eigenvalue to look at then
        tokens, present = F.pad(tokens, (0, 0, 0, 3 - count)), F.pad(present, (0, 3 - count))
    # Gradients times features may be too small to be squared.
    largest = tokens.abs().amax((1, 2), keepdim=True)
    unit = F.normalize(tokens / torch.where(largest > 0, largest, 1), dim=-1, eps=torch.finfo(tokens.dtype).tiny)
    affinity = torch.where(unit @ unit.mT > threshold, 1.0, _FLOOR).to(tokens.dtype)
    affinity = affinity * (present.unsqueeze(1) & present.unsqueeze(2))
    root = torch.where(present, affinity.sum(-1), 1).rsqrt()
    identity = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    # What is no token gets an eigenvalue of its own above all others.
    ends = identity * torch.where(present, 1.0, _BEYOND).to(tokens.dtype).unsqueeze(1)
    values, vectors = torch.linalg.eigh(ends - root.unsqueeze(2) * affinity * root.unsqueeze(1))
    y = (root * vectors[:, :, 1]).masked_fill(~present, 0)
    return y[:, :count], (values[:, 2] - values[:, 1] < _GAP) | (present.sum(1) < 2)


def oriented(y: Tensor, present: Tensor, cam: Tensor | None = None) -> Tensor:
    """The cut's eigenvector [B, n] with the object's side up: y or -y, image by image.

    Without ``cam`` the largest |y| (the first within rounding) shall lie above the mean of y; with it, [B, n], the side
    above the mean shall have the larger mean of these values, and the largest |y| if both are equal.
    """
    mean = y.sum(1, keepdim=True) / present.sum(1, keepdim=True)
    above = present & (y > mean)
    size = y.abs().masked_fill(~present, -1)
    peak = (size >= size.amax(1, keepdim=True) * (1 - 1e-9)).int().argmax(1, keepdim=True)
    up = above.gather(1, peak)
    if cam is not None:
        inside, outside = (
            (cam * side).sum(1, keepdim=True) / side.sum(1, keepdim=True).clamp(min=1)
            for side in (above, present & ~above)
        )
        up = torch.where(inside == outside, up, inside > outside)
    return torch.where(up, y, -y)


def _warn(arbitrary: Tensor, silent: Tensor) -> None:
    which = arbitrary.nonzero().flatten().tolist()
    shown = f"{which[:8]}" + (" and more" if len(which) > 8 else "")
    why = "its second eigenvalue is not a single one"
    if bool(silent[arbitrary].all()):
        why = "no gradient of the class reaches this block's norm1, or its features are all 0"
    warnings.warn(
        f"r_cut has no cut for images {shown} of the batch ({why}): they get the Grad-CAM map instead", stacklevel=6
    )
