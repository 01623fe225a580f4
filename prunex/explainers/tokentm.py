"""TokenTM: attention weighted by how much each token was stretched and turned, rolled out over all blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.walk import propagate, times
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.attention import over_heads
from prunex.vit.blocks import layout_of
from prunex.vit.recording import attention_gradients, recording
from prunex.vit.tape import Attended, Fed, Tape


@register("explainer", "tokentm", "Wu et al., CVPR 2024, arXiv 2403.14552", "one forward, one backward")
def tokentm(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    variant: Literal["per_head", "libragrad"] = "per_head",
    necc_scale: Literal["n0"] | None = None,
) -> Explanation:
    """Token transformation matters (arXiv 2403.14552, Eqs. 12-18): C_l = U_ffn U_att C_{l-1}, C_0 = diag(||E0||).

    A token-wise transformation from E to Et weighs each token by w = ||Et|| / ||E|| times NECC, the softmax over the
    tokens of cos(E, Et). Then U_att = I + mean_h(ReLU(dy/dA_h) * A_h diag(w_h)) and U_ffn = I + diag(w).
    Class-specific.

    **Unverified**: the authors published no code, and the paper's text beyond its introduction could not be read. Which
    E and Et are meant follows two public re-implementations that differ: ``variant="per_head"`` (default) takes the
    residual stream before the first norm and each head's own W_O v_h (with the value as computed: norm and value bias
    in, output bias out, LayerScale in) and, for the MLP, its output before the skip; ``variant="libragrad"`` takes the
    stream after the skips and one weight for all heads. That norm and bias are inside Et is our reading.

    A norm or gate behind heads or projection is left out of W_O v_h. The MLP of a parallel block is compared with the
    stream that attention has been added to. The class row alone is propagated; norms and angles come from Gram matrices
    of W_O, never from [n, H, D] tensors. After pruning, NECC spreads over fewer tokens, so maps of different keep
    ratios differ in scale.

    Args:
        variant: Which re-implementation's reading.
        necc_scale: None, or "n0" (ours, not the paper's), which multiplies by n / N_0 and takes that effect out.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P], all tokens.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("tokentm", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    tape = Tape(attention=True, gradients=True, streams=True)
    with recording(model, images, target, tape, needs_class=True) as recorded:
        gradients = attention_gradients(recorded)
        with torch.no_grad():
            first = recorded.embedded
            total = first.shape[1]
            updates = {}
            for (step, attention), gradient in zip(tape.matrices(), gradients, strict=True):
                up = gradient.clamp(min=0)
                if variant == "per_head":
                    w = _head_weights(model.blocks[step.block], step, total, necc_scale)
                    updates[step.block] = over_heads(up * attention * w.unsqueeze(2))
                else:
                    w = _weights(_wide(step.before), _wide(step.after), step.policy, total, necc_scale)
                    updates[step.block] = over_heads(up) * over_heads(attention) * w.unsqueeze(1)

            def mix(row: Tensor, step: Attended) -> Tensor:
                return row + times(row, updates[step.block])

            def feed(row: Tensor, step: Fed) -> Tensor:
                before, after = _wide(step.before), _wide(step.branch)
                if variant == "libragrad":
                    after = before + after
                return row + row * _weights(before, after, step.policy, total, necc_scale)

            row = propagate(tape, recorded.readout(), recorded.anatomy.prefix, mix, feed)
            return answer(recorded, row * torch.linalg.vector_norm(promoted(first), dim=-1))


def _wide(x: Tensor | None) -> Tensor:
    return promoted(torch.as_tensor(x))


def _weights(before: Tensor, after: Tensor, policy: Tensor | None, total: int, scale: str | None) -> Tensor:
    """Length ratio times NECC, [B, n]."""
    length, stretched = (torch.linalg.vector_norm(t, dim=-1) for t in (before, after))
    cosine = (before * after).sum(-1) / (length * stretched + 1e-8)
    return stretched / (length + 1e-8) * _necc(cosine, policy, total, scale)


def _head_weights(block: nn.Module, step: Attended, total: int, scale: str | None) -> Tensor:
    """Length ratio times NECC of each head's value-output map, [B, H, n]."""
    value, before = _wide(step.value), _wide(step.before)
    h, d = value.shape[1], value.shape[3]
    out = layout_of(block).output(block).to(value)
    # ||W_O v||^2 = v^T (W_O^T W_O) v: d x d a head instead of D numbers a token.
    gram = torch.einsum("xhd,xhe->hde", out.unflatten(1, (h, d)), out.unflatten(1, (h, d)))
    stretched = (value @ gram * value).sum(-1).clamp(min=0).sqrt()
    # z . (W_O v) = (W_O^T z) . v, likewise.
    back = (before @ out).unflatten(2, (h, d)).transpose(1, 2)
    length = torch.linalg.vector_norm(before, dim=-1).unsqueeze(1)
    cosine = (back * value).sum(-1) / (length * stretched + 1e-8)
    policy = None if step.policy is None else step.policy.unsqueeze(1)
    return stretched / (length + 1e-8) * _necc(cosine, policy, total, scale)


def _necc(cosine: Tensor, policy: Tensor | None, total: int, scale: str | None) -> Tensor:
    """Softmax of the cosine over the tokens that are there."""
    if policy is not None:
        cosine = cosine.masked_fill(policy <= 0, float("-inf"))
    share = cosine.softmax(-1)
    if scale == "n0":
        count = cosine.shape[-1] if policy is None else (policy > 0).sum(-1, keepdim=True)
        share = share * count / total
    return share
