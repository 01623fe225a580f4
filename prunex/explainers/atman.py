"""AtMan: how much the target's loss rises when the attention paid to one patch is damped in every block."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.checks import check_number
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.attention import KeyWeights
from prunex.vit.embedding import embed_patches
from prunex.vit.readout import before_softmax, scalar
from prunex.vit.recording import Recording, check_chunk, recording, sequences
from prunex.vit.tape import Tape


@register("explainer", "atman", "Deiseroth et al., NeurIPS 2023, arXiv 2301.08110", "one forward a patch, no gradients")
def atman(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    factor: float = 0.1,
    similarity: float | None = None,
    rule: Literal["log", "shift", "scale"] = "log",
    freeze_selection: bool = True,
    chunk: int | None = None,
) -> Explanation:
    """Attention manipulation (arXiv 2301.08110): delta_i = CE(y_t | patch i damped) - CE(y_t), one forward a patch.

    Patch i is damped as a key, in all blocks, heads and query rows; other keys gain what it loses, so that delta can be
    negative. Prefix tokens are never damped. Its factor f acts by one of three rules:

    - ``rule="log"`` (default, **ours, not the paper's**): the softmax weight is multiplied by f (log f is added to the
      score). It means the same at every scale of the scores, and attention stays fused.
    - ``rule="shift"``: the score's height above its row's lowest is multiplied, as the authors' code for language
      models does. It needs the matrix.
    - ``rule="scale"``: the score itself is multiplied, as the authors' code for vision encoders does, which *raises* a
      key whose score is negative; for comparison with their numbers alone.

    With ``similarity`` kappa (0.6 in the paper), patches whose embedding, taken before positions are added, has cosine
    s_ij >= kappa with that of i are damped along with it: f_j = (1 - f)(1 - s_ij) + f.

    On pruned models the unperturbed selection is frozen. A patch is damped in the blocks where it is; a token that
    holds a share u of it gets 1 - u (1 - f).

    Args:
        factor: f, at least 0; 1 changes nothing, more amplifies. 0 removes the key (nearly, so that no row is empty).
        similarity: kappa, at least 0, or None: i alone is damped.
        rule: "log", "shift" or "scale".
        freeze_selection: False: the model's own pruner decides again in every run, and delta holds that change too.
        chunk: Damped runs in one forward; changes memory and speed only. None: what is fastest.

    Returns:
        ``maps``, signed: positive where damping hurts the class. ``raw`` [B, P, classes]: the logits of every run.

    Raises:
        PrunexError: For a model with a single output, whose cross entropy is always 0.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("atman", model, torch.randn(2, 3, 64, 64), factor=0.8).maps.shape
    torch.Size([2, 4, 4])
    """
    check_number("factor", factor, 0)
    if similarity is not None:
        check_number("similarity", similarity, 0)
    check_chunk(chunk)
    # One output says nothing about itself: its softmax is 1.
    with recording(model, images, target, Tape(narrow=True), needs_class=True) as recorded:
        if recorded.logits.shape[1] == 1 and not scalar(model):
            raise PrunexError("this model has one output, whose cross entropy is always 0: use grad_sam or rollout")
        # Zeros are like nothing, themselves included: without a similarity i is damped alone.
        vectors = torch.zeros_like(recorded.embedded[:, recorded.anatomy.prefix :, :1])
        if similarity is not None:
            vectors = embed_patches(model, images)[0]
        factors = suppression(vectors, factor, math.inf if similarity is None else similarity)
        raw = promoted(_damped(recorded, factors, rule, freeze_selection, chunk))
        rise = _loss(recorded, raw) - _loss(recorded, recorded.logits.unsqueeze(1))
        return answer(recorded, rise, raw, signed=True)


def suppression(vectors: Tensor, factor: float, similarity: float) -> Tensor:
    """The factor of every patch when one is damped, [B, P, P], from vectors [B, P, D]: row i is that for patch i."""
    unit = F.normalize(promoted(vectors), dim=-1)
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1, 1)
    itself = torch.eye(cosine.shape[1], dtype=torch.bool, device=cosine.device)
    # Equal patches differ by rounding alone, which is no difference: their factors would be noise.
    apart = (1 - cosine).masked_fill(1 - cosine < 32 * torch.finfo(cosine.dtype).eps, 0)
    factors = torch.where(cosine >= similarity, (1 - factor) * apart + factor, 1)
    # Exactly 0 for every key of a model without prefix tokens would leave rows empty.
    return factors.masked_fill(itself, factor).clamp(min=torch.finfo(torch.float32).tiny)


def _damped(recorded: Recording, factors: Tensor, rule: Any, frozen: bool, chunk: int | None) -> Tensor:
    """Logits of one run for every patch, [B, P, classes]."""
    batch, patches, _ = factors.shape
    logits = []
    for part in torch.arange(batch * patches, device=factors.device).split(sequences(chunk, recorded.embedded)):
        # A run is an image and one of its patches; runs of several images share a forward.
        index, patch = part // patches, part % patches
        keys = KeyWeights(F.pad(factors[index, patch], (recorded.anatomy.prefix, 0), value=1), rule)
        logits.append(recorded.again(recorded.embedded[index], index, keys=keys, frozen=frozen))
    return torch.cat(logits).unflatten(0, (batch, patches))


def _loss(recorded: Recording, logits: Tensor) -> Tensor:
    """Cross entropy of logits [B, R, classes] with one class an image; less a target's number itself: [B, R]."""
    if scalar(recorded.model):
        return -promoted(logits)[..., 0]
    log_probabilities = promoted(before_softmax(recorded.model, logits)).log_softmax(-1)
    index = recorded.target[:, None, None].expand(-1, logits.shape[1], 1)
    return -log_probabilities.gather(2, index).squeeze(2)
