"""Attributes: class scores as a sum over places that a model finds by itself; prunex's own, no published method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_index, check_number, check_whole
from prunex.heads.base import Evidence, Reading, TokenHead, on_grid
from prunex.heads.final_tokens import FinalTokens
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.trace import TokenTrace
from prunex.vit.weights import effective

NORM = 1e-6  # the least norm that a cosine divides by
ROOT = 1e-8  # the least attention whose root has a gradient
CONTRAST = 0.2  # temperature of the comparison of attributes between views


@dataclass(eq=False, repr=False)
class AttributeReading(Reading):
    """What the attributes make of final tokens.

    Attributes:
        attention: a, float [B, M, n]: each attribute's attention to the patch tokens that are left, rows summing to 1.
        features: F, float [B, M, D]: the mean of the tokens by that attention.
        similarity: S, float [B, n, M]: cosine of token and attribute over the temperature.
    """

    in_repr = ("logits", "attention")

    attention: Tensor
    features: Tensor
    similarity: Tensor

    @property
    def assignment(self) -> Tensor:
        """r, float [B, n, M]: which attribute a token is nearest to, softmax over attributes."""
        return self.similarity.softmax(-1)


@dataclass(eq=False, repr=False)
class AttributeEvidence(Evidence):
    """What the scores are made of: they are sums, exactly.

    Attributes:
        names: "attribute 1" to "attribute M": nobody knows what they are of.
        contributions: float [B, M, classes]; summed over attributes, plus ``bias``, these are the logits.
        bias: float [classes].
        attention: float [B, M, gh, gw], each attribute's attention; a map sums to 1. A softmax always points somewhere,
            also where an attribute is absent: show it beside the contribution.
        spatial: float [B, M, gh, gw], what each patch adds to an attribute's contribution to the target, signed; a map
            sums to that contribution.
        reading: What it is evidence for.
        weights: w, float [M, classes], at least 0.
        vectors: v, float [classes, D].
    """

    in_repr = ("target", "logits", "names", "contributions")

    names: tuple[str, ...]
    contributions: Tensor
    bias: Tensor
    attention: Tensor
    spatial: Tensor
    reading: AttributeReading
    weights: Tensor
    vectors: Tensor

    def class_maps(self, classes: int | Sequence[int] | None = None) -> Tensor:
        """Where there is something for a class: relu(sum_m w_mk a_pm (v_k . x_p)), from 0 to 1 by map.

        Args:
            classes: Which ones; None for all.

        Returns:
            float [B, len(classes), gh, gw], least 0 and largest 1; all 0 where nothing speaks for the class, or every
            patch as much. Removed patches have what a removed patch adds: nothing.

        Raises:
            PrunexError: For a class that does not exist.
        """
        count = self.logits.shape[1]
        if classes is None:
            classes = range(count)
        elif isinstance(classes, int):
            classes = [classes]
        chosen = [check_index("classes", k, count, f"classes are 0..{count - 1}") for k in classes]
        tokens = self.reading.tokens.patches @ self.vectors[chosen].T
        row = torch.einsum("bmn,mk,bnk->bkn", self.reading.attention, self.weights[:, chosen], tokens)
        maps = on_grid(row, self.trace).clamp(min=0)
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        # A map of one value becomes 0, where 0 / 0 would be NaN.
        return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)

    def info(self) -> dict[str, Tensor]:
        """``contributions`` [B, M, classes], ``attribute_maps`` [B, M, gh, gw], ``attention`` [B, M, gh, gw]."""
        return {"contributions": self.contributions, "attribute_maps": self.spatial, "attention": self.attention}


@register(
    "head",
    "attributes",
    "ours; inspired by Yu et al., 2022, arXiv 2207.05358",
    "training; two views of an image in each step help",
)
class Attributes(TokenHead):
    """Attributes of the object, found without labels of them; scores are linear in what each attends to.

    **Ours, not a paper's.** It fits what the abstract of eX-ViT (Yu et al., arXiv 2207.05358) says, whose equations we
    do not know: nobody may label its results "eX-ViT". All numbers are our starting values, not published ones.

    With x_p the patch tokens that are left (prefix tokens are not read), M learned vectors u_m and two linear maps,
    S_pm = cos(W x_p, W' u_m) / temperature, a_m = softmax of S_m over tokens, F_m = sum_p a_pm x_p, and
    z_k = b_k + sum_m w_mk (v_k . F_m) with w = softplus of what is learned, so at least 0. Attribute m's contribution
    to class k is its summand, and a patch's part of that is a_pm w_mk (v_k . x_p), exactly. A merged token counts as
    often as it has patches.

    Losses, between two forwards of one step that have as many images (they are taken for two views of the same ones;
    means over all such pairs; with one view there are none), and of each forward by itself:

    * ``consistency`` = 1 - cos(sum_m F_m, stop-gradient(sum_m F'_m)), mean of both directions.
    * ``discriminability``: F_m must find F'_m among the F'_n of the same image; cross-entropy of cosines over 0.2, mean
      of both directions. Absent with one attribute.
    * ``diversity``: mean over pairs m != n of the Bhattacharyya overlap sum_p sqrt(a_pm a_pn), in 0..1; attention below
      1e-8 has no gradient there. Absent with one attribute.

    Their weights rise linearly from 0 while ``progress`` goes from 0 to ``warmup``. The loss of the task, of one label
    or several, is the module's own. Attributes that attend to disjoint background are diverse too: what they contribute
    tells.

    At the start u is orthogonal with rows of norm sqrt(D), the norm of layer-normed tokens; w is 1 / M; v and b are the
    model's classifier's where that is a plain ``nn.Linear`` from the width to the classes.

    Args:
        anatomy: Of the model.
        attributes: M, how many.
        temperature: Of the attention, at least 0.01.
        consistency_weight: Of that loss, at least 0.
        discriminability_weight: Likewise.
        diversity_weight: Likewise.
        warmup: Share of training, in 0..1, over which these weights rise.
        attribute_width: Width in which tokens and attributes are compared.

    Raises:
        PrunexError: For a number outside its range, or a model without classes.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=2).eval()
    >>> head = prunex.attach(model, "attributes", attributes=3)
    >>> evidence = head.evidence(torch.randn(2, 3, 64, 64))
    >>> evidence.names, evidence.attention.shape
    (('attribute 1', 'attribute 2', 'attribute 3'), torch.Size([2, 3, 4, 4]))
    >>> torch.allclose(evidence.contributions.sum(1) + evidence.bias, evidence.logits, atol=1e-5)
    True
    """

    name = "attributes"

    def __init__(
        self,
        anatomy: Anatomy,
        attributes: int = 8,
        temperature: float = 0.1,
        consistency_weight: float = 0.5,
        discriminability_weight: float = 0.5,
        diversity_weight: float = 0.1,
        warmup: float = 0.1,
        attribute_width: int = 64,
    ) -> None:
        super().__init__(anatomy)
        self.count = check_whole("attributes", attributes, 1)
        self.temperature = check_number("temperature", temperature, 0.01)
        self.consistency_weight = check_number("consistency_weight", consistency_weight, 0)
        self.discriminability_weight = check_number("discriminability_weight", discriminability_weight, 0)
        self.diversity_weight = check_number("diversity_weight", diversity_weight, 0)
        self.warmup = check_number("warmup", warmup, 0, 1)
        inner = check_whole("attribute_width", attribute_width, 1)
        self.names = tuple(f"attribute {i}" for i in range(1, self.count + 1))
        self.attributes = nn.Parameter(torch.empty(self.count, self.width))
        nn.init.orthogonal_(self.attributes)
        with torch.no_grad():  # more rows than columns are orthogonal by column, and shorter
            self.attributes.copy_(F.normalize(self.attributes, dim=1) * math.sqrt(self.width))
        self.of_tokens = nn.Linear(self.width, inner, bias=False)
        self.of_attributes = nn.Linear(self.width, inner, bias=False)
        start = math.log(math.expm1(1 / self.count))  # whose softplus is 1 / M
        self.strength = nn.Parameter(torch.full((self.count, self.classes), start))
        self.values = nn.Linear(self.width, self.classes)
        self.options = {
            "attributes": self.count,
            "temperature": self.temperature,
            "consistency_weight": self.consistency_weight,
            "discriminability_weight": self.discriminability_weight,
            "diversity_weight": self.diversity_weight,
            "warmup": self.warmup,
            "attribute_width": inner,
        }

    def prepare(self, model: ViT) -> None:
        """Begin with the model's own classifier, where it is one that reads single tokens."""
        given: Any = model.head
        mine = self.values
        # By type: what is derived from a linear layer may compute more than its weight says.
        if type(given) is not nn.Linear or given.weight.shape != mine.weight.shape or given.weight.is_meta:
            return
        with torch.no_grad():
            mine.weight.copy_(given.weight)
            if given.bias is None:
                mine.bias.zero_()
            else:
                mine.bias.copy_(given.bias)

    @property
    def weights(self) -> Tensor:
        """w, float [M, classes], at least 0."""
        return F.softplus(self.strength)

    def forward(self, tokens: FinalTokens, classifier: Tensor | None = None) -> AttributeReading:
        """Where each attribute is, what it is like, and the scores."""
        x = tokens.patches
        keys = F.normalize(self.of_tokens(x), dim=-1, eps=NORM)
        queries = F.normalize(self.of_attributes(self.attributes), dim=-1, eps=NORM)
        similarity = keys @ queries.T / self.temperature
        attention = tokens.softmax(similarity).transpose(1, 2)
        features = attention @ x
        logits = self._contributions(features).sum(1) + self.values.bias
        return AttributeReading(logits, tokens, attention, features, similarity)

    def _contributions(self, features: Tensor) -> Tensor:
        """What attributes with features [B, M, D] add to each score, [B, M, classes]."""
        if type(self.values) is nn.Linear:
            return self.weights * (features @ self.values.weight.T)
        # An adapter put round it has a part in the scores too.
        return self.weights * (self.values(features) - self.values.bias)

    def _warm(self, weight: float) -> float:
        """A weight as training has warmed up to it."""
        return weight if self.warmup == 0 else weight * min(1.0, self.progress / self.warmup)

    def losses(
        self, reading: Any, labels: Tensor | None = None, concepts: Tensor | None = None, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``diversity``, weighted; labels have no part in it."""
        if self.count == 1 or self.diversity_weight == 0:
            return {}
        return {"diversity": self._warm(self.diversity_weight) * overlap(promoted(reading.attention))}

    def losses_between(self, readings: Sequence[Any]) -> dict[str, Tensor]:
        """``consistency`` and ``discriminability``, weighted, mean over pairs of forwards with as many images."""
        features = [promoted(reading.features) for reading in readings]
        # Another number of images cannot be another view of these.
        pairs = [(a, b) for a, b in itertools.combinations(features, 2) if len(a) == len(b)]
        losses = {}
        if pairs and self.consistency_weight > 0:
            gaps = torch.stack([(apart(a, b.detach()) + apart(b, a.detach())) / 2 for a, b in pairs])
            losses["consistency"] = self._warm(self.consistency_weight) * gaps.mean()
        if pairs and self.discriminability_weight > 0 and self.count > 1:
            errors = torch.stack([mistaken(a, b) for a, b in pairs])
            losses["discriminability"] = self._warm(self.discriminability_weight) * errors.mean()
        return losses

    def evidence(self, reading: Any, target: Tensor, trace: TokenTrace) -> AttributeEvidence:
        """Contributions attribute by attribute, and those to the target patch by patch."""
        # Copies: evidence stays what it was while training goes on.
        x, weights = reading.tokens.patches, self.weights.detach()
        vectors, bias = effective(self.values)[0].clone(), self.values.bias.detach().clone()
        worth = torch.einsum("bnd,bd->bn", x, vectors[target])
        parts = reading.attention * weights[:, target].T.unsqueeze(2) * worth.unsqueeze(1)
        row = F.pad(parts.sum(1), (trace.prefix, 0))
        contributions = self._contributions(reading.features)
        return AttributeEvidence(
            target,
            reading.logits,
            trace.lift(row),
            trace,
            self.names,
            contributions,
            bias,
            on_grid(reading.attention, trace),
            on_grid(parts, trace),
            reading,
            weights,
            vectors,
        )

    def outputs(self, reading: Any) -> dict[str, Tensor]:
        """``attributes``: float [B, M, classes], the contributions."""
        return {"attributes": self._contributions(reading.features)}

    def macs(self, patches: int) -> int:
        """Both maps, cosines, features, and scores."""
        inner, width = self.of_tokens.out_features, self.width
        mapped = (patches + self.count) * width * inner
        attended = patches * self.count * (inner + width)
        return mapped + attended + self.count * self.classes * (width + 1)


def overlap(attention: Tensor) -> Tensor:
    """The mean Bhattacharyya overlap of two rows of attention [B, M, n], M > 1: a scalar in 0..1."""
    # A root has no gradient at 0. The clamp is for that alone: added to each token it would be no small overlap.
    roots = torch.where(attention < ROOT, attention.detach().sqrt(), attention.clamp(min=ROOT).sqrt())
    both = roots @ roots.transpose(1, 2)
    count = both.shape[1]
    others = ~torch.eye(count, dtype=torch.bool, device=both.device)
    return (both * others).sum((1, 2)).mean() / (count * (count - 1))


def apart(features: Tensor, others: Tensor) -> Tensor:
    """One minus the cosine of summed features, both [B, M, D], mean over images: a scalar."""
    a, b = (F.normalize(f.sum(1), dim=-1, eps=NORM) for f in (features, others))
    return 1 - (a * b).sum(-1).mean()


def mistaken(features: Tensor, others: Tensor) -> Tensor:
    """How hard it is to find each attribute among the other view's, [B, M, D] both, in both directions: a scalar."""
    a, b = (F.normalize(f, dim=-1, eps=NORM) for f in (features, others))
    alike = a @ b.transpose(1, 2) / CONTRAST
    right = torch.arange(alike.shape[1], device=alike.device).expand(len(alike), -1)
    return (F.cross_entropy(alike, right) + F.cross_entropy(alike.transpose(1, 2), right)) / 2
