"""What explainers share: one recorded forward, the target class, gradients of attention, the answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError, Unreached
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.aside import as_found
from prunex.vit.attention import KeyWeights
from prunex.vit.decisions import Pruner, Replay, TokenState
from prunex.vit.embedding import embed
from prunex.vit.forward import own_anatomy, own_pruners, record, resume
from prunex.vit.readout import classifies
from prunex.vit.tape import Tape
from prunex.vit.trace import TokenTrace
from prunex.vit.weights import by_name, check_gradients


@dataclass(eq=False, repr=False)
class Relevance(Brief):
    """What an explainer answers.

    Attributes:
        maps: float32 [B, gh, gw] on the original patch grid, raw values of the method.
        raw: The method's own finest output.
        target: int64 [B], the class explained (for methods that know no class: the predicted or asked one); -1 where
            the model has no classifier.
        signed: Whether negative values mean "against the class".
        trace: What the explained forward did to the patches.
        logits: float [B, classes] of the explained forward; the features where the model has no classifier.
        pixels: float32 (or 64) [B, H, W], for methods that are finer than a patch; else None.
        info: What the method found out beside the map, by name: tensors whose first dimension is B.
        class_specific: Whether the maps are those of ``target``; else they are the same for every class.
    """

    maps: Tensor
    raw: Tensor
    target: Tensor
    signed: bool
    trace: TokenTrace
    logits: Tensor
    pixels: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)
    class_specific: bool = True


@dataclass(eq=False, repr=False)
class Recording(Brief):
    """One forward of a model under a tape, as explainers use it.

    Attributes:
        model: The ViT.
        anatomy: Of the model.
        tape: What was recorded.
        state: How the forward ended: the trace, and the decisions that made it.
        target: int64 [B], the class explained.
        autocast: Whether the forward ran under the caller's autocast, and its dtype.
        class_specific: Whether the method explains a class, as it said when it asked for the forward.
    """

    model: ViT
    anatomy: Anatomy
    tape: Tape
    state: TokenState
    target: Tensor
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    class_specific: bool = True

    @property
    def trace(self) -> TokenTrace:
        """What the forward did to the patches."""
        return self.state.trace

    @property
    def embedded(self) -> Tensor:
        """The tokens that entered the first block, [B, prefix + P, D]."""
        return torch.as_tensor(self.tape.embedded)

    def again(
        self,
        tokens: Tensor,
        index: Tensor | None = None,
        *,
        before: Sequence[Pruner] = (),
        keys: KeyWeights | None = None,
        tape: Tape | None = None,
        masked: bool | None = None,
        frozen: bool = True,
    ) -> Tensor:
        """The model's output for altered tokens, with the selection of this forward frozen.

        It runs in the precision of this forward, the caller's autocast included.

        Args:
            tokens: [R, prefix + P, D], entering the first block.
            index: int64 [R], which image each is made from; None: one an image, in order.
            before: Asked before the frozen decisions, such as an ``Absent``.
            keys: Weights of the tokens as attention keys.
            tape: Records what it asks for.
            masked: Whether dropped tokens keep their slots; None: as in this forward, whose decisions must have been
                made likewise.
            frozen: Whether tokens leave as in this forward; False: the model's own pruner decides again.

        Returns:
            float [R, classes].
        """
        masked = self.state.masked if masked is None else masked
        decides = [Replay(self.state.decisions, index)] if frozen else own_pruners(self.model)
        with self._as_recorded():
            return resume(self.model, tokens, self.trace.grid, [*before, *decides], tape, masked, keys)

    def embed(self, images: Tensor) -> Tensor:
        """Other images as tokens for :meth:`again`, [R, prefix + P, D], off the graph."""
        with torch.no_grad(), self._as_recorded():
            return embed(self.model, images)[0]

    def _as_recorded(self) -> torch.autocast:
        enabled, dtype = self.autocast
        return torch.autocast(self.trace.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    @property
    def logits(self) -> Tensor:
        """The model's output [B, classes]."""
        if self.tape.logits is None:
            raise PrunexError("the recorded forward gave no logits")
        return self.tape.logits

    def one_hot(self) -> Tensor:
        """1 at each image's class: what a backward or relevance pass starts from, [B, classes]."""
        return torch.zeros_like(self.logits).scatter_(1, self.target[:, None], 1)

    def readout(self) -> Tensor:
        """Which tokens the head reads, as weights [B, n_last] summing to 1, in at least float32."""
        like = self.logits.detach()
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        if self.tape.readout is not None:
            return self.tape.readout.to(like.dtype)
        return self.anatomy.readout(self.tape.tokens, self.tape.policy, like, self.tape.sizes)

    def answer(
        self,
        row: Tensor,
        raw: Tensor | None = None,
        signed: bool = False,
        pixels: Tensor | None = None,
        info: dict[str, Tensor] | None = None,
    ) -> Relevance:
        """From one relevance a token to the answer on the patch grid.

        Args:
            row: [B, prefix + P].
            raw: The method's own finest output; None: ``row``.
            signed: Whether negative values mean "against the class".
            pixels: [B, H, W], where the method is finer than a patch.
            info: Further findings, one entry an image each.
        """
        row = row.detach()
        maps = row[:, self.anatomy.prefix :].unflatten(1, self.trace.grid)
        whole = row if raw is None else raw.detach()
        pixels = None if pixels is None else pixels.detach()
        found = {name: value.detach() for name, value in (info or {}).items()}
        trace, logits = self.trace.detach(), self.logits.detach()
        return Relevance(maps, whole, self.target, signed, trace, logits, pixels, found, self.class_specific)


@contextmanager
def recording(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None,
    tape: Tape,
    needs_class: bool = False,
    masked: bool | None = None,
    precise: bool = False,
) -> Iterator[Recording]:
    """Run the model once under a tape, in eval mode and full view of autograd if gradients are asked for.

    The model's train flags, its last training forward and the caller's grad mode are left as they were.

    Args:
        model: A supported ViT, pruned or dense.
        images: float [B, C, H, W].
        target: Class to explain, or None for the predicted one.
        tape: Says what to record.
        needs_class: Whether the method explains a class, so that a model without a head is refused.
        masked: Whether dropped tokens keep their slots; None: as the model is set.
        precise: Run the forward outside the caller's autocast too.

    Raises:
        PrunexError: For a target out of range, a headless model where a class is needed or asked for, or weights that
            cannot be read or differentiated through.
    """
    if tape.gradients and any(p.is_inference() for p in model.parameters()):
        raise PrunexError(
            "the model's weights were made under torch.inference_mode, and nothing can be differentiated through them: "
            "build or load the model outside of it, or use rollout"
        )
    if tape.gradients:
        check_gradients(model, "rollout")
    with (
        as_found(model, train=False),
        torch.inference_mode(False),
        torch.set_grad_enabled(tape.gradients),
        by_name(model),
    ):
        if images.is_inference():
            images = images.clone()
        with torch.autocast(images.device.type, enabled=False) if precise else nullcontext():
            state = record(model, images, tape, masked)
        anatomy = own_anatomy(model)
        if classifies(model):
            chosen = choose_target(tape.logits, target)
        elif needs_class or target is not None:
            raise PrunexError("this model has no classifier (num_classes=0): explain a class with one, or use rollout")
        else:
            chosen = torch.full((len(images),), -1, device=images.device)
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            yield Recording(model, anatomy, tape, state, chosen, autocast, needs_class)


def choose_target(logits: Tensor | None, target: Any) -> Tensor:
    """The class of each image: int64 [B].

    Args:
        logits: float [B, classes].
        target: An int, an integer tensor [B], or None for the predicted class.

    Raises:
        PrunexError: For anything else, or a class out of range.
    """
    allowed = "a class index, an integer tensor [B], or None"
    if logits is None or logits.ndim != 2:
        raise PrunexError("this model gives no logits [B, classes]: explain a model with a pooled head")
    batch, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    if isinstance(target, bool) or not isinstance(target, int | Tensor):
        raise PrunexError(f"target={target!r} is not allowed: give {allowed}")
    known = f"this model has classes 0..{classes - 1}"
    if isinstance(target, int) and not 0 <= target < classes:
        raise PrunexError(f"target={target} is out of range: {known}")
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise PrunexError(f"target has dtype {chosen.dtype}: give {allowed}")
    if chosen.ndim == 0:
        chosen = chosen.expand(batch)
    if chosen.shape != (batch,):
        raise PrunexError(
            f"target has shape {list(chosen.shape)} for {batch} images: give one class for all or one each"
        )
    if chosen.min() < 0 or chosen.max() >= classes:
        raise PrunexError(f"target has values {int(chosen.min())}..{int(chosen.max())}, out of range: {known}")
    return chosen.long().clone()  # a tensor of the caller's inference mode cannot be part of a graph


def attention_gradients(recorded: Recording) -> list[Tensor]:
    """Gradients of each image's target logit for every block's attention, float32 (or 64): a list of [B, H, n, n].

    Raises:
        Unreached: Where some block's attention has none.
    """
    maps = [a.attention for a in recorded.tape.attended()]
    score = recorded.logits.gather(1, recorded.target[:, None]).sum()
    return gradients(score, [m for m in maps if m is not None])


def gradients(
    output: Tensor, inputs: Sequence[Tensor], start: Tensor | None = None, retain_graph: bool = False
) -> list[Tensor]:
    """What ``torch.autograd.grad`` gives. A place that nothing reaches is refused, and not taken for one without worth.

    Only activations are differentiated, never parameters; nothing is accumulated into ``.grad``.

    Args:
        output: A scalar, or a tensor that ``start`` is shaped as.
        inputs: Where to differentiate.
        start: What the backward pass starts from.
        retain_graph: Whether the graph is walked again.

    Raises:
        Unreached: Where a layer computes without autograd.
    """
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if output.requires_grad and all(x.requires_grad for x in inputs):
        found = torch.autograd.grad(output, inputs, start, retain_graph, allow_unused=True)
    if any(g is None and x.numel() for g, x in zip(found, inputs, strict=True)):  # a block without heads has no entries
        raise unreached()
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def unreached() -> Unreached:
    """The error for a place that no gradient came to."""
    return Unreached(
        "no gradient of the class reached all that is differentiated: some layer computes without autograd (quantised "
        "weights, torch.no_grad, detach); use rollout, or the model as it was before"
    )


def widened(model: ViT, images: Tensor) -> tuple[ViT, Tensor]:
    """The model and its images in at least float32; a copy where the weights are of half precision.

    Relevance is divided by layer outputs, which half precision cannot carry.
    """
    if images.dtype in (torch.float32, torch.float64):
        return model, images
    with torch.inference_mode(False):  # weights made under it cannot be differentiated through
        return copy.deepcopy(model).float(), images.float()


def check_chunk(value: Any) -> None:
    """See that it says how many sequences go through the model at once: at least 1, or None for what is fastest.

    Raises:
        PrunexError: For anything else.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise PrunexError(f"chunk={value!r} is not allowed: give the number of sequences in one forward, at least 1")


def sequences(chunk: int | None, tokens: Tensor, most: int = 64, graph: bool = False) -> int:
    """How many sequences go through the model at once.

    Args:
        chunk: The caller's wish; None: as many as run fastest. A processor is fastest while what the blocks work on
            stays in its caches (measured: about 600,000 numbers in the stream, half of that with a graph; eight
            sequences of a deit_small), an accelerator when it is full.
        tokens: [B, N, D], the stream entering the first block.
        most: On an accelerator, and for small models.
        graph: Whether gradients are recorded.
    """
    if chunk is not None:
        return chunk
    if tokens.device.type != "cpu":
        return most
    room = 300_000 if graph else 600_000
    return max(1, min(most, round(room / (tokens.shape[1] * tokens.shape[2]))))


def start_layer(value: Any, depth: int) -> int:
    """A block index in 0..depth-1, counted from the end when negative.

    Raises:
        PrunexError: For anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -depth <= value < depth:
        raise PrunexError(
            f"layer {value!r} does not exist: this model has blocks 0..{depth - 1} (or negative from the end)"
        )
    return value % depth


def rounded(values: Tensor, bits: int) -> Tensor:
    """Values of which so many leading bits count: what rounding alone keeps apart becomes equal.

    >>> rounded(torch.tensor([1.0, 1.0001, 3.0]), 8).tolist()
    [1.0, 1.0, 3.0]
    """
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent)
