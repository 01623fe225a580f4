"""Beyond Intuition: a weighted rollout, multiplied by the gradient of the last attention along a path of images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.walk import propagate, times
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.attention import over_heads
from prunex.vit.blocks import layout_of
from prunex.vit.recording import Recording, attention_gradients, gradients, recording
from prunex.vit.tape import Attended, Tape


@register("explainer", "beyond_intuition", "Chen et al., TMLR 2023, OpenReview rm0zIzlhcX", "21 forwards")
def beyond_intuition(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    variant: Literal["token", "head"] = "token",
    start_layer: int = 1,
    steps: int = 20,
    feedback: Literal["survivor", "none"] = "survivor",
    chunk: int = 64,
) -> Explanation:
    """Attention perception times reasoning feedback ("Beyond Intuition", TMLR 2023): T = sum_i w_i P_i * F_i.

    Perception P = (Abar_{L-1} + I) ... (Abar_s + I), not normalised. ``variant="token"``: Abar[i, j] is the head mean
    of A[i, j] times ||W_O v_j|| / ||z_j||, the length of the value that token j gives away over that of its stream
    before the norm (output bias and a norm or gate behind heads or projection left out, LayerScale taken in).
    ``variant="head"``: Abar = sum_h theta_h A_h, theta_h the head's share in mean |A_h^T G_h|, G the gradient of the
    class's logit; shares are those of each image alone (the authors' code mixes a batch).

    Feedback F is the gradient of the logit for the last block's attention, averaged over images scaled by ``steps``
    values from 0 to 1 (both ends; of the *normalised* image, so that 0 is the mean colour), then ReLU, then the head
    mean. The class and the tokens that leave are those of the unscaled image at every step.

    w says which rows the head reads: the class token's; half of each token's in a distilled model; the mean over the
    pooled tokens in a pooled one, which needs the whole of P (O(L n^3)).

    After pruning, each patch gets the F of the token of the last block that it is part of, undivided, and 0 where it
    was removed (order such ties by ``trace.depth()``).

    Args:
        variant: "token" (the paper's Ours-T) or "head" (Ours-H).
        start_layer: First block of the rollout, counted from 1 as the authors do: 1 takes all. For ViT-B they evaluate
            with 7 (token) and 4 (head).
        steps: Images on the path, at least 1, which takes the image itself.
        feedback: "survivor", or "none": perception alone, for models without supervision as in the authors' ``ssl``
            option; class-agnostic with "token".
        chunk: Scaled images in one forward; changes memory and speed only.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P], all tokens.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("beyond_intuition", model, torch.randn(2, 3, 64, 64), variant="head", steps=4).maps.shape
    torch.Size([2, 4, 4])
    """
    start, last = _check_start(start_layer, len(model.blocks)), len(model.blocks) - 1
    check_whole("steps", steps, 1)
    check_whole("chunk", chunk, 1)
    felt = feedback != "none"
    if variant == "head":
        tape = Tape(attention=True, gradients=True)
    else:  # Nothing of this forward is part of a graph; gradients are taken along the path alone.
        tape = Tape(attention=True, reduce=over_heads, shares=True, streams=True, gradients=felt, graph_from=last + 1)
    with recording(model, images, target, tape, needs_class=felt or variant == "head") as recorded:
        weights = _head_weighted(recorded) if variant == "head" else _token_weighted(recorded)
        gradient = _path_gradient(recorded, images, steps, chunk) if felt else None
        with torch.no_grad():
            # What the head reads sits behind the last stage, P and F in front of the last attention.
            read = recorded.leaving(last).lift(recorded.readout())
            if recorded.anatomy.readers:
                read = read[:, list(recorded.anatomy.readers)]
            perceived = _perception(recorded, weights, start - 1)
            if gradient is not None:
                perceived = perceived * recorded.entering(last).paint(gradient)
            return answer(recorded, torch.einsum("br,brn->bn", read, perceived))


def _check_start(value: Any, depth: int) -> int:
    """A block counted from 1, as the authors count."""
    if type(value) is not int or not 1 <= value <= depth:
        raise PrunexError(
            f"start_layer={value!r} is not allowed: blocks count from 1 here (1 takes all), this model has 1..{depth}"
        )
    return value


@torch.no_grad()
def _token_weighted(recorded: Recording) -> dict[int, Tensor]:
    """Abar of each block from the lengths of values and streams, [B, n, n]."""
    weights = {}
    for step, attention in recorded.tape.matrices():
        block = recorded.model.blocks[step.block]
        # W_O v_j of all heads together: the length of their sum, not the sum of lengths.
        value, before = promoted(torch.as_tensor(step.value)), promoted(torch.as_tensor(step.before))
        given = value.transpose(1, 2).flatten(2) @ layout_of(block).output(block).to(value).T
        length = torch.linalg.vector_norm(before, dim=-1).clamp(min=1e-12)
        ratio = torch.linalg.vector_norm(given, dim=-1) / length
        weights[step.block] = attention * ratio.unsqueeze(1)
    return weights


def _head_weighted(recorded: Recording) -> dict[int, Tensor]:
    """Abar of each block from the heads' shares in |A^T G|, [B, n, n]."""
    gradients = attention_gradients(recorded)
    weights = {}
    with torch.no_grad():
        for (step, attention), gradient in zip(recorded.tape.matrices(), gradients, strict=True):
            if step.policy is not None:  # a dropped key is not attended to, yet attending to it would change the logit
                gradient = gradient * (step.policy > 0)[:, None, None, :]
            weights[step.block] = torch.einsum("bh,bhnm->bnm", _head_shares(attention, gradient), attention)
    return weights


def _head_shares(attention: Tensor, grad: Tensor) -> Tensor:
    """Each head's share of the image's mean |A^T G|, [B, H]; equal shares where all are 0."""
    size = (attention.transpose(2, 3) @ grad).abs().mean((2, 3))
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 1 / max(1, size.shape[1]))


def _perception(recorded: Recording, weights: dict[int, Tensor], start: int) -> Tensor:
    """The rows of P that the head reads, [B, R, prefix + P]."""
    # P ends at the last attention: what leaves behind it is already in what the head reads.
    steps = recorded.tape.steps
    at = max(i for i, step in enumerate(steps) if isinstance(step, Attended))
    last = next(reversed(weights.values()))
    rows = torch.eye(last.shape[1], dtype=last.dtype, device=last.device)
    if recorded.anatomy.readers:
        rows = rows[list(recorded.anatomy.readers)]

    def mix(row: Tensor, step: Attended) -> Tensor:
        return row + times(row, weights[step.block])

    walked = Tape(steps=steps[: at + 1])
    return propagate(walked, rows.expand(len(last), -1, -1), recorded.anatomy.prefix, mix, start=start)


def _path_gradient(recorded: Recording, images: Tensor, steps: int, chunk: int) -> Tensor:
    """Gradient of the last attention along the path, averaged, positive part, head mean: [B, R, n]."""
    batch, readers, last = len(images), list(recorded.anatomy.readers), recorded.anatomy.depth - 1
    wide = torch.promote_types(images.dtype, torch.float32)
    alphas = torch.linspace(1 if steps == 1 else 0, 1, steps, dtype=wide, device=images.device).to(images.dtype)
    total: Tensor | None = None
    # Points of all images share forwards; each goes to its own image's sum.
    for part in torch.arange(steps * batch, device=images.device).split(chunk):
        index = part % batch
        tokens = recorded.embed(images[index] * alphas[part // batch, None, None, None])
        tape = Tape(attention=True, gradients=True, blocks=frozenset({last}), graph_from=last, narrow=True)
        with torch.enable_grad():
            logits = recorded.again(tokens, index, tape=tape)
            score = logits.gather(1, recorded.target[index, None]).sum()
            ((step, attention),) = tape.matrices()
            rows = gradients(score, [attention])[0]
        rows = rows[:, :, readers] if readers and step.queries is None else rows
        total = rows.new_zeros(batch, *rows.shape[1:]) if total is None else total
        total.index_add_(0, index, rows)
    return over_heads((torch.as_tensor(total) / steps).clamp(min=0))
