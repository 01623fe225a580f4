"""What explainers share: one recorded forward, the class explained, gradients of what was recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_index, check_whole
from prunex.errors import PrunexError, Unreached
from prunex.later import refuse
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.arithmetic import PLAIN, promoted
from prunex.vit.aside import as_found
from prunex.vit.attention import KeyWeights
from prunex.vit.embedding import embed
from prunex.vit.forward import own_pruners, record, resume
from prunex.vit.readout import check_head, classifies
from prunex.vit.replay import Replay
from prunex.vit.state import TokenState
from prunex.vit.tape import Tape
from prunex.vit.trace import TokenTrace
from prunex.vit.weights import by_name, check_gradients


@dataclass(eq=False, repr=False)
class Recording(Brief):
    """One forward of a model under a tape, as explainers use it."""

    model: ViT  # the ViT
    tape: Tape  # what was recorded
    state: TokenState  # how the forward ended: the trace, and the decisions that made it
    target: Tensor  # int64 [B], the class explained
    image_size: tuple[int, int]  # height and width of the images in pixels
    autocast: tuple[bool, torch.dtype]  # whether the forward ran under the caller's autocast, and its dtype
    class_specific: bool  # whether the method explains a class, as it said when it asked for the forward

    @property
    def anatomy(self) -> Anatomy:
        """Of the forward, as a pruner may have altered it."""
        return self.state.anatomy

    @property
    def trace(self) -> TokenTrace:
        """What the forward did to the patches."""
        return self.state.trace

    @property
    def embedded(self) -> Tensor:
        """The tokens that entered the first block, [B, prefix + P, D]."""
        return torch.as_tensor(self.tape.embedded)

    @property
    def logits(self) -> Tensor:
        """The model's output [B, classes]."""
        return torch.as_tensor(self.tape.logits)

    def again(
        self,
        tokens: Tensor,
        index: Tensor | None = None,
        *,
        keys: KeyWeights | None = None,
        tape: Tape | None = None,
        frozen: bool = True,
    ) -> Tensor:
        """The model's output [R, classes] for altered tokens [R, prefix + P, D], in the precision of this forward.

        ``index`` int64 [R]: which image each is made from (None: one an image, in order). ``keys``: weights of the
        tokens as attention keys. ``frozen``: tokens leave as in this forward, else the model's own pruner decides
        again.
        """
        # Frozen: what the clean run decided is decided again, and the model's own pruner is not asked.
        decides = [Replay(self.state.decisions, index)] if frozen else own_pruners(self.model)
        with self._as_recorded():
            return resume(self.model, tokens, self.trace.grid, decides, tape, self.state.masked, keys)

    def embed(self, images: Tensor) -> Tensor:
        """Other images as tokens for :meth:`again`, [R, prefix + P, D], off the graph."""
        with torch.no_grad(), self._as_recorded():
            return embed(self.model, images)[0]

    def _as_recorded(self) -> torch.autocast:
        enabled, dtype = self.autocast
        return torch.autocast(self.trace.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    def score(self) -> Tensor:
        """The logit of each image's class, [B]."""
        return self.logits.gather(1, self.target[:, None])[:, 0]

    def one_hot(self) -> Tensor:
        """1 at each image's class: what a backward or relevance pass starts from, [B, classes]."""
        return torch.zeros_like(self.logits).scatter_(1, self.target[:, None], 1)

    def readout(self) -> Tensor:
        """Which tokens the head reads, as weights [B, n_last] summing to 1, in at least float32."""
        check_head(self.model)
        like = promoted(self.logits.detach())
        if self.tape.readout is not None:
            return self.tape.readout.to(like.dtype)
        return self.anatomy.readout(self.tape.tokens, self.tape.policy, like, self.tape.sizes)

    def entering(self, block: int) -> TokenTrace:
        """The trace up to a block's attention."""
        return replace(self.trace, stages=self.tape.stages_before(block))

    def leaving(self, block: int) -> TokenTrace:
        """The trace from a block's attention on."""
        return replace(self.trace, stages=self.trace.stages[len(self.tape.stages_before(block)) :])


@contextmanager
def recording(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None,
    tape: Tape,
    needs_class: bool = False,
    precise: bool = False,
) -> Iterator[Recording]:
    """Run the model once under a tape, in eval mode and full view of autograd if gradients are asked for.

    ``target``: the class to explain (None: the predicted one). ``needs_class``: a model without a head is refused.
    ``precise``: run the forward outside the caller's autocast too. Train flags, the last training forward and the
    caller's grad mode are left as they were.
    """
    if tape.gradients:
        check_made_outside(model, "use rollout")
        check_gradients(model, "rollout")
    device = images.device.type
    with (
        as_found(model, train=False),
        torch.inference_mode(False),
        torch.set_grad_enabled(tape.gradients),
        by_name(model),
    ):
        original = images
        # A tensor of the caller's inference mode can be part of no graph.
        images = images.clone() if images.is_inference() else images
        with torch.autocast(device, enabled=False) if precise else nullcontext():
            state = _recorded(model, images, tape, original)
        if classifies(model):
            chosen = choose_target(tape.logits, target)
        elif needs_class or target is not None:
            raise PrunexError("this model has no classifier (num_classes=0): explain a class with one, or use rollout")
        else:
            chosen = torch.full((len(images),), -1, device=images.device)
        # Explainers compute in the precision of what was recorded, whatever the caller casts to.
        size = (images.shape[2], images.shape[3])
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            yield Recording(model, tape, state, chosen, size, autocast, needs_class)


_SHARED: ContextVar[dict[Any, tuple[TokenState, Tape]] | None] = ContextVar("shared", default=None)


@contextmanager
def one_forward() -> Iterator[None]:
    """Explanations that are made inside, of one model and the same images, share forwards that record the same."""
    running = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(running)


def _recorded(model: ViT, images: Tensor, tape: Tape, original: Tensor) -> TokenState:
    """Run the model under a tape, or fill the tape from a forward that was recorded by one like it."""
    shared = _SHARED.get()
    # Relevance rules are part of the graph, and each pass has its own.
    if shared is None or tape.ops is not PLAIN:
        return record(model, images, tape)
    key = (id(model), id(original), tape.asked(), torch.is_grad_enabled())
    if key not in shared:
        shared[key] = record(model, images, tape), tape
    state, known = shared[key]
    vars(tape).update(vars(known))
    return state


def check_made_outside(model: nn.Module, instead: str) -> None:
    """Refuse weights that no graph can hold, and say what to do instead."""
    if any(p.is_inference() for p in model.parameters()):
        raise PrunexError(
            "the model's weights were made under torch.inference_mode, and nothing can be differentiated through them: "
            f"build or load the model outside of it, or {instead}"
        )


def choose_target(logits: Tensor | None, target: Any) -> Tensor:
    """The class of each image, int64 [B]: of an int, an integer tensor [B], or None for the predicted one."""
    allowed = "a class index, an integer tensor [B], or None; or a function of the output (prunex.targets)"
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
    chosen = chosen.expand(batch) if chosen.ndim == 0 else chosen
    if chosen.shape != (batch,):
        raise PrunexError(
            f"target has shape {list(chosen.shape)} for {batch} images: give one class for all or one each"
        )
    refuse(
        ((chosen < 0) | (chosen >= classes)).any(),
        lambda: f"target has values {int(chosen.min())}..{int(chosen.max())}, out of range: {known}",
    )
    # A new one: a tensor of the caller's inference mode cannot be part of a graph. What is refused later must not end
    # in a device's own assertion.
    return chosen.long().clamp(0, classes - 1)


def attention_gradients(recorded: Recording) -> list[Tensor]:
    """Gradients of each image's target logit for every attention that the tape kept, [B, H, n, n] each."""
    return gradients(recorded.score().sum(), [matrix for _, matrix in recorded.tape.matrices()])


def gradients(
    output: Tensor, inputs: Sequence[Tensor], start: Tensor | None = None, retain_graph: bool = False
) -> list[Tensor]:
    """What ``torch.autograd.grad`` gives for activations; :class:`Unreached` where a layer computes without one."""
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    # A place off the graph would raise in torch's words; it is told in ours.
    if output.requires_grad and all(x.requires_grad for x in inputs):
        # Explanations that share a forward go through its graph one after another.
        keep = retain_graph or _SHARED.get() is not None
        grads = torch.autograd.grad(output, inputs, start, keep, allow_unused=True)
    if any(g is None and x.numel() for g, x in zip(grads, inputs, strict=True)):  # a block without heads has no entries
        raise unreached()
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def unreached() -> Unreached:
    """The error for a place that no gradient came to."""
    return Unreached(
        "no gradient of the class reached all that is differentiated: some layer computes without autograd (quantised "
        "weights, torch.no_grad, detach); use rollout, or the model as it was before"
    )


def widened(model: ViT, images: Tensor) -> tuple[ViT, Tensor]:
    """The model and its images in at least float32, a copy where need be: relevance is divided by layer outputs."""
    if images.dtype in (torch.float32, torch.float64):
        return model, images
    with torch.inference_mode(False):  # weights made under it cannot be differentiated through
        return copy.deepcopy(model).float(), images.float()


def check_chunk(value: Any) -> None:
    """Refuse anything but a number of sequences that go through the model at once, or None for what is fastest."""
    if value is not None:
        check_whole("chunk", value, 1)


def sequences(chunk: int | None, tokens: Tensor, most: int = 64, graph: bool = False) -> int:
    """How many sequences [B, N, D] go through the model at once: the caller's ``chunk``, else as many as run fastest.

    ``most`` is for accelerators and small models; ``graph`` says that gradients are recorded.
    """
    if chunk is not None:
        return chunk
    if tokens.device.type != "cpu":
        return most
    # A processor is fastest while what the blocks work on stays in its caches; measured: eight of a deit_small.
    room = 300_000 if graph else 600_000
    return max(1, min(most, round(room / (tokens.shape[1] * tokens.shape[2]))))


def check_layer(value: Any, depth: int) -> int:
    """A block index in 0..depth-1, counted from the end when negative."""
    return check_index("layer", value, depth, f"this model has blocks 0..{depth - 1}")


def rounded(values: Tensor, bits: int) -> Tensor:
    """Values of which so many leading bits count: what rounding alone keeps apart becomes equal."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent)
