"""Beyond Intuition: a weighted rollout, multiplied by the gradient of the last attention along a path of images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prunex.checks import check_choice, check_whole
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.walk import propagate, times
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.attention import over_heads
from prunex.vit.layouts import layout_of
from prunex.vit.recording import Recording, Relevance, attention_gradients, gradients, recording
from prunex.vit.tape import Attended, Tape
from prunex.vit.trace import Stage

_VARIANTS = ("token", "head")
_FEEDBACKS = ("survivor", "exit", "none")


@register(
    "explainer",
    "beyond_intuition",
    "Chen et al., TMLR 2023, OpenReview rm0zIzlhcX",
    "21 forwards",
)
def beyond_intuition(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    variant: Literal["token", "head"] = "token",
    start_layer: int = 1,
    steps: int = 20,
    feedback: Literal["survivor", "exit", "none"] = "survivor",
    chunk: int = 64,
) -> Relevance:
    r"""Attention perception times reasoning feedback ("Beyond Intuition", TMLR 2023): T = sum_i w_i P_i * F_i.

    Perception P = (Abar_{L-1} + I) ... (Abar_s + I), without normalisation. ``variant="token"``: Abar[i, j] is the head
    mean of A[i, j] times ||W_O v_j|| / ||z_j||, the length of the value that token j gives away over the length of its
    stream before the norm (output bias left out; LayerScale taken in, which the paper's models have not; a norm or gate
    after the heads or the projection, ``scale_attn_norm``, gated attention and post-norm blocks, left out).
    ``variant="head"``: Abar = sum_h theta_h A_h, theta_h the share of the head in mean |A_h^T G_h|, G the gradient of
    the class's logit; shares are those of each image alone (the authors' code mixes a batch).

    Feedback F is the gradient of the logit for the last block's attention, averaged over images scaled by ``steps``
    values from 0 to 1 (both ends; of the *normalised* image, so that 0 is the mean colour), then ReLU, then the head
    mean. The class and the tokens that leave are those of the unscaled image at every step. Only the last block
    (``feedback="exit"``: from the first block that tokens left after) is part of the graph.

    w says which rows the head reads: the class token's; half of each token's in a distilled model; the mean over the
    pooled tokens in a pooled one, which needs the whole of P (O(L n^3)).

    After pruning, P's columns are the original patches, F's the tokens of the last block. ``feedback="survivor"``
    gives each patch the F of the token it is part of, undivided, and 0 where it was removed, whose relevance is then 0
    (order such ties by ``trace.depth()``). ``feedback="exit"`` (ours) gives a removed patch the F of the last block it
    was in, rescaled so that the patches which stay to the end have the same mean F in both blocks. ``feedback="none"``
    is perception alone, for models without supervision as in the authors' ``ssl`` option; class-agnostic with "token".

    Args:
        model: A supported ViT, pruned or dense.
        images: float [B, C, H, W].
        target: Class whose logit is explained; None: the predicted one.
        variant: "token" (the paper's Ours-T) or "head" (Ours-H).
        start_layer: First block of the rollout, counted from 1 as the authors do: 1 takes all. For ViT-B they evaluate
            with 7 (token) and 4 (head).
        steps: Images on the path; 1 takes the image itself.
        feedback: "survivor", "exit" or "none".
        chunk: Scaled images in one forward; changes memory and speed only.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P], all tokens.

    Raises:
        PrunexError: For an unknown variant or feedback, a block that does not exist, or steps or chunk below 1.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("beyond_intuition", model, torch.randn(2, 3, 64, 64), variant="head", steps=4).maps.shape
    torch.Size([2, 4, 4])
    """
    check_choice("variant", variant, _VARIANTS)
    check_choice("feedback", feedback, _FEEDBACKS)
    start = _check_start(start_layer, len(model.blocks))
    _check_steps(steps)
    check_whole("chunk", chunk, 1)
    last = len(model.blocks) - 1
    felt = feedback != "none"
    if variant == "head":
        tape = Tape(attention=True, gradients=True)
    else:  # Nothing of this forward is part of a graph; gradients are taken along the path alone.
        tape = Tape(attention=True, reduce=over_heads, streams=True, gradients=felt, graph_from=last + 1)
    with recording(model, images, target, tape, needs_class=felt or variant == "head") as recorded:
        weights = _head_weighted(recorded) if variant == "head" else _token_weighted(recorded)
        read = _read(recorded, last)
        perceived = _perception(recorded, weights, start - 1)
        if not felt:
            return recorded.answer(torch.einsum("br,brn->bn", read, perceived))
        blocks = _exits(recorded) if feedback == "exit" else [last]
        gradients = _path_gradients(recorded, images, blocks, steps, chunk)
        with torch.no_grad():
            row = torch.einsum("br,brn,brn->bn", read, perceived, _to_patches(recorded, gradients[last], last))
            if feedback == "exit":
                whole = torch.einsum("br,brn->bn", read, perceived)
                row = row + whole * _of_removed(recorded, gradients)
            return recorded.answer(row)


def _check_start(value: Any, depth: int) -> int:
    """A block counted from 1.

    Raises:
        PrunexError: For anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= depth:
        raise PrunexError(
            f"start_layer={value!r} is not allowed: blocks count from 1 here (1 takes all), this model has 1..{depth}"
        )
    return value


def _check_steps(value: Any) -> None:
    """A number of steps of at least 1.

    Raises:
        PrunexError: For anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PrunexError(f"steps={value!r} is not allowed: give the number of images on the path, at least 1")


@torch.no_grad()
def _token_weighted(recorded: Recording) -> dict[int, Tensor]:
    """Abar of each block from the lengths of values and streams, [B, n, n]."""
    weights = {}
    for step in recorded.tape.attended():
        block = recorded.model.blocks[step.block]
        value, before = promoted(torch.as_tensor(step.value)), promoted(torch.as_tensor(step.before))
        given = value.transpose(1, 2).flatten(2) @ layout_of(block).output(block).to(value).T
        length = torch.linalg.vector_norm(before, dim=-1).clamp(min=1e-12)
        ratio = torch.linalg.vector_norm(given, dim=-1) / length
        weights[step.block] = torch.as_tensor(step.attention) * ratio.unsqueeze(1)
    return weights


def _head_weighted(recorded: Recording) -> dict[int, Tensor]:
    """Abar of each block from the heads' shares in |A^T G|, [B, n, n]."""
    grads = attention_gradients(recorded)
    weights = {}
    with torch.no_grad():
        for step, grad in zip(recorded.tape.attended(), grads, strict=True):
            attention = torch.as_tensor(step.attention)
            if step.policy is not None:  # a dropped key is not attended to, yet attending to it would change the logit
                grad = grad * (step.policy > 0)[:, None, None, :]
            weights[step.block] = torch.einsum("bh,bhnm->bnm", _head_shares(attention, grad), attention)
    return weights


def _head_shares(attention: Tensor, grad: Tensor) -> Tensor:
    """Each head's share of the image's mean |A^T G|, [B, H]; equal shares where all are 0."""
    size = (attention.transpose(2, 3) @ grad).abs().mean((2, 3))
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 1 / max(1, size.shape[1]))


@torch.no_grad()
def _read(recorded: Recording, block: int) -> Tensor:
    """How much the head reads of each query row that counts in a block, [B, R]: the class token's, or all rows."""
    row = recorded.readout()
    for step in reversed(recorded.tape.steps):
        if isinstance(step, Stage):
            row = step.lift(row, recorded.anatomy.prefix)
        elif isinstance(step, Attended) and step.block == block:
            break
    return row[:, list(recorded.anatomy.readers)] if recorded.anatomy.readers else row


@torch.no_grad()
def _perception(recorded: Recording, weights: dict[int, Tensor], start: int) -> Tensor:
    """The rows of P that the head reads, [B, R, prefix + P]."""
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


def _path_gradients(
    recorded: Recording, images: Tensor, blocks: list[int], steps: int, chunk: int
) -> dict[int, Tensor]:
    """Gradients of some blocks' attention along the path, averaged, positive part, head mean: [B, R, n] each."""
    batch, readers = len(images), list(recorded.anatomy.readers)
    wide = torch.promote_types(images.dtype, torch.float32)
    alphas = torch.linspace(1 if steps == 1 else 0, 1, steps, dtype=wide, device=images.device).to(images.dtype)
    total: dict[int, Tensor] = {}
    for part in torch.arange(steps * batch, device=images.device).split(chunk):
        index = part % batch
        tokens = recorded.embed(images[index] * alphas[part // batch, None, None, None])
        tape = Tape(attention=True, gradients=True, blocks=frozenset(blocks), graph_from=blocks[0], narrow=True)
        with torch.enable_grad():
            logits = recorded.again(tokens, index, tape=tape)
            score = logits.gather(1, recorded.target[index, None]).sum()
            wanted = [step for step in tape.attended() if step.attention is not None]
            grads = gradients(score, [torch.as_tensor(step.attention) for step in wanted])
        for step, grad in zip(wanted, grads, strict=True):
            rows = grad[:, :, readers] if readers and step.queries is None else grad
            if step.block not in total:
                total[step.block] = rows.new_zeros(batch, *rows.shape[1:])
            total[step.block].index_add_(0, index, rows)
    return {block: over_heads((rows / steps).clamp(min=0)) for block, rows in total.items()}


def _to_patches(recorded: Recording, row: Tensor, block: int) -> Tensor:
    """Values of the tokens in a block's attention, given to every patch inside them; [..., prefix + P]."""
    reached = False
    for step in reversed(recorded.tape.steps):
        if isinstance(step, Stage) and reached:
            row = step.paint(row, recorded.anatomy.prefix)
        elif isinstance(step, Attended) and step.block == block:
            reached = True
    return row


def _exits(recorded: Recording) -> list[int]:
    """The last block that some token was in, for every stage that removed any, and the last block of all."""
    blocks, seen = {recorded.anatomy.depth - 1}, -1
    for step in recorded.tape.steps:
        if isinstance(step, Attended):
            seen = step.block
        elif isinstance(step, Stage) and seen >= 0 and bool(step.gone.any()):
            blocks.add(seen)
    return sorted(blocks)


def _of_removed(recorded: Recording, gradients: dict[int, Tensor]) -> Tensor:
    """What removed patches felt in the last block they were in, on the scale of the last block of all.

    Returns:
        [B, prefix + P], 0 for tokens that stayed to the end.
    """
    prefix, blocks = recorded.anatomy.prefix, sorted(gradients, reverse=True)

    def at(block: int) -> tuple[Tensor, Tensor]:
        row = torch.einsum("br,brn->bn", _read(recorded, block), gradients[block])
        return tuple(_to_patches(recorded, r, block) for r in (row, torch.ones_like(row)))  # type: ignore[return-value]

    felt, stayed = at(blocks[0])
    known, found = stayed, torch.zeros_like(felt)
    wanted = (felt * stayed)[:, prefix:].sum(1, keepdim=True)
    for block in blocks[1:]:
        row, there = at(block)
        mean = (row * stayed)[:, prefix:].sum(1, keepdim=True)
        scale = torch.where(mean > 0, wanted / mean.clamp(min=torch.finfo(mean.dtype).tiny), 0)
        found = found + row * scale * (there - known).clamp(min=0)
        known = torch.maximum(known, there)
    return found
