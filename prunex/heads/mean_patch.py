"""A linear head that reads the mean patch beside the class token, as DINOv2's classifiers do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.heads.base import Evidence, Reading, TokenHead, on_grid
from prunex.heads.final_tokens import FinalTokens
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.trace import TokenTrace
from prunex.vit.weights import effective


@dataclass(eq=False, repr=False)
class MeanPatchReading(Reading):
    """What the two parts of the head make of final tokens.

    Attributes:
        classifier: float [B, classes], what timm's own classifier gives.
        patches: float [B, classes], what the mean patch adds.
    """

    in_repr = ("logits", "classifier", "patches")

    classifier: Tensor
    patches: Tensor


@dataclass(eq=False, repr=False)
class MeanPatchEvidence(Evidence):
    """What the scores are made of: they are sums, exactly.

    Attributes:
        names: Of the two parts.
        contributions: float [B, 2, classes]; summed over both they are the logits.
        attention: float [B, 1, gh, gw], the share that each patch has in the mean; a map sums to 1.
        spatial: float [B, 1, gh, gw], what each patch adds to the score of the target, signed; a map sums to what the
            mean patch adds.
        reading: What it is evidence for.
    """

    in_repr = ("target", "logits", "names", "contributions")

    names: tuple[str, ...]
    contributions: Tensor
    attention: Tensor
    spatial: Tensor
    reading: MeanPatchReading

    def info(self) -> dict[str, Tensor]:
        """``contributions`` [B, 2, classes] and ``patch_maps`` [B, 1, gh, gw]."""
        return {"contributions": self.contributions, "patch_maps": self.spatial}


@register(
    "head",
    "mean_patch",
    "Oquab et al., TMLR 2024, arXiv 2304.07193; its maps: Zhou et al., CVPR 2016, arXiv 1512.04150",
    "training, or a classifier of DINOv2's kind (prunex.from_transformers)",
)
class MeanPatch(TokenHead):
    """A second linear classifier, of the mean patch, whose scores are added to timm's own.

    DINOv2's linear classifiers read the class token and the mean patch side by side (arXiv 2304.07193, B.3), which is a
    sum: z = W [x_cls; mean_p x_p] + b = (W_c x_cls + b) + W_p mean_p x_p. The bracket is timm's classifier of a model
    with ``global_pool="token"``; this head adds the rest. A patch's part of it is W_p x_p / P: the class activation map
    of Zhou et al. (arXiv 1512.04150, equation 2), exact for that part, while nobody knows where the class token's comes
    from. Where a pruner took patches, the mean is over those that are left, and a merged token counts as often as it
    has patches.

    Args:
        anatomy: Of the model.

    Raises:
        PrunexError: For a model without classes.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    >>> head = prunex.attach(model, "mean_patch")
    >>> evidence = head.evidence(torch.randn(2, 3, 64, 64), target=3)
    >>> torch.allclose(evidence.contributions.sum(1), evidence.logits, atol=1e-5)
    True
    >>> torch.allclose(evidence.maps.sum((1, 2)), evidence.contributions[:, 1, 3], atol=1e-5)
    True
    """

    name = "mean_patch"
    uses_classifier = True
    names = ("classifier", "mean patch")

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__(anatomy)
        self.values = nn.Linear(self.width, self.classes, bias=False)

    def forward(self, tokens: FinalTokens, classifier: Tensor | None) -> MeanPatchReading:
        """Both classifiers, and their sum."""
        if classifier is None:
            raise PrunexError("mean_patch adds to what timm's classifier gives, and was given nothing of it")
        patches = self.values(tokens.mean(tokens.patches))
        return MeanPatchReading(classifier + patches, tokens, classifier, patches)

    def evidence(self, reading: Any, target: Tensor, trace: TokenTrace) -> MeanPatchEvidence:
        """Both parts by class, and the patches' by patch."""
        tokens = reading.tokens
        # What the layer computes with: an adapter that was put round it has its part.
        vectors = effective(self.values)[0][target]
        parts = (tokens.patches * vectors.unsqueeze(1)).sum(-1) * tokens.shares
        return MeanPatchEvidence(
            target,
            reading.logits,
            trace.lift(F.pad(parts, (trace.prefix, 0))),
            trace,
            self.names,
            self._parts(reading),
            on_grid(tokens.shares.unsqueeze(1), trace),
            on_grid(parts.unsqueeze(1), trace),
            reading,
        )

    def outputs(self, reading: Any) -> dict[str, Tensor]:
        """``parts``: float [B, 2, classes], what either classifier adds."""
        return {"parts": self._parts(reading)}

    def _parts(self, reading: Any) -> Tensor:
        return torch.stack([reading.classifier, reading.patches], 1)

    def macs(self, patches: int) -> int:
        """The mean, and the second classifier."""
        return self.width * (patches + self.classes)
