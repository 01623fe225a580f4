"""The one block-by-block forward: decide, attend, decide, feed, decide.

Pruners decide where it is their :class:`~prunex.vit.turns.Turn`, explainers ask for what they need through a
:class:`~prunex.vit.recorder.Recorder`. A block that nobody asks anything of is called whole; one that is opened runs
inside its own call, so that hooks on it see the stream that comes and the one that goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, ViT, check_images, read
from prunex.vit.arithmetic import PLAIN
from prunex.vit.attention import KeyWeights
from prunex.vit.calls import hooked_within, inside
from prunex.vit.embedding import embed, enter, grid_of
from prunex.vit.halves import Halves
from prunex.vit.handover import Handed
from prunex.vit.late import finish, left_by
from prunex.vit.mount import mounted
from prunex.vit.positions import Places, positions_of
from prunex.vit.readout import TAIL, check_head, head, pool_attention, reads_grids
from prunex.vit.recorder import SILENT, Recorder
from prunex.vit.state import TokenState
from prunex.vit.tape import Attended, Tape
from prunex.vit.trace import TokenTrace
from prunex.vit.turns import NOBODY, Pruner, Turns


@dataclass(eq=False, repr=False)
class Prediction(Brief):
    """What a model makes of some images."""

    logits: Tensor  # [B, classes], or the pooled features without a head
    state: TokenState  # how the forward ended, with its trace and decisions


def begin(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    anatomy: Anatomy,
    masked: bool = False,
    keys: KeyWeights | None = None,
    places: Places | None = None,
    rope: Tensor | None = None,
) -> TokenState:
    """The state in which embedded tokens x [B, prefix + P, D], as :func:`embed` gives them, enter the first block.

    ``keys``: weights of the tokens as attention keys in every block. ``places``: which patches the P tokens are, where
    not all of ``grid`` in order. ``rope``: the blocks' rotary table, where embedding gave one already.
    """
    trace = TokenTrace(grid, anatomy.prefix, x.shape[0], x.device)
    # torch.compile cannot follow the default of ops, and can follow the name.
    state = TokenState(x, anatomy, trace, masked, model.training, ops=PLAIN, keys=keys, model=model)
    state.left = grid[0] * grid[1]
    state.positions = positions_of(model, anatomy.prefix, grid, places, rope)
    return state


def encode(state: TokenState, turns: Turns, recorder: Recorder = SILENT) -> TokenState:
    """The stream of a state as :func:`begin` makes it, through the model's blocks and its final norm."""
    if recorder.tape is not None:
        recorder.tape.embedded = state.tokens
    if recorder.watch is not None:
        state.leaving = []
    state.ops = recorder.ops
    blocks: Any = state.model.blocks
    through_all = partial(_through_blocks, state, turns, recorder)
    # timm calls the blocks as one module where it may; a watch wants some of them alone.
    together = isinstance(blocks, nn.Sequential) and recorder.watch is None
    state.tokens = inside(blocks, through_all, state.tokens) if together else through_all(state.tokens)
    finish(state, recorder)
    return state


def _through_blocks(state: TokenState, turns: Turns, recorder: Recorder, x: Tensor) -> Tensor:
    """Decide, attend, decide, feed, decide: from the tokens [B, N, D] entering to those that leave the last block."""
    state.tokens = x
    for number, block in enumerate(list(state.model.blocks)[: recorder.stop]):
        with recorder.graph(number):
            turns.decide("before", number, state, recorder)
            halves = Halves(block, number, state, turns, recorder)
            if halves.closed:
                halves.whole()
            else:
                halves.inside_call(partial(_opened, turns))
            turns.decide("after", number, state, recorder)
        recorder.passed(number, state)
    return state.tokens


def _opened(turns: Turns, halves: Halves) -> None:
    halves.attend()
    turns.decide("inside", halves.number, halves.state, halves.recorder, halves.entered)
    halves.feed()


def run(
    model: ViT,
    images: Tensor,
    pruners: Sequence[Pruner] | None = None,
    recorder: Recorder = SILENT,
    masked: bool | None = None,
) -> TokenState:
    """Images [B, C, H, W] through embedding, blocks and the final norm.

    ``pruners`` are asked in this order at every place (None: the model's own); ``masked``: whether dropped tokens keep
    their slots (None: as the model is set). The final tokens are [B, prefix + n_last, D], only those that the head
    reads where a tape asked for no others.
    """
    anatomy = own_anatomy(model)
    check_images(anatomy, images)
    _check_dtype(model, images)
    rope = None
    # Rules for relevance want the embedding opened too; timm's own gives rotary tables beside the tokens.
    if recorder.ops.opened:
        x, grid = embed(model, images, recorder.ops)
    else:
        patches = model.patch_embed(images)
        grid = grid_of(model, patches)
        x, rope = enter(model, patches)
    if masked is None:
        masked = bool(getattr(mounted(model), "masked", False))
    state = begin(model, x, grid, anatomy, masked, rope=rope)
    return encode(state, Turns(own_pruners(model) if pruners is None else pruners), recorder)


def predict(
    model: ViT,
    images: Tensor,
    pruners: Sequence[Pruner] | None = None,
    recorder: Recorder = SILENT,
    masked: bool | None = None,
) -> Prediction:
    """:func:`run`, and what the head makes of it."""
    recorder = _for_tail(model, recorder)
    state = run(model, images, pruners, recorder, masked)
    return Prediction(answer(state, recorder), state)


def _for_tail(model: ViT, recorder: Recorder) -> Recorder:
    """A recorder that takes grids as well, where the model stands for a module that reads them."""
    return Recorder(recorder.tape, vars(model)[TAIL].grid_call.watch(model)) if reads_grids(model) else recorder


def answer(state: TokenState, recorder: Recorder = SILENT) -> Tensor:
    """What the head makes of the final tokens: [B, classes], or the pooled features without one.

    Of a model that stands for a module which reads grids, what that makes of those.
    """
    if reads_grids(state.model):
        if recorder.ops.opened:
            check_head(state.model)
        tail = vars(state.model)[TAIL]
        rows: Tensor = tail(tail.grid_call.taken(recorder.watch))
        return rows
    return head(state.model, state.tokens, left_by(state), recorder.ops)


def record(model: ViT, images: Tensor, tape: Tape, masked: bool | None = None) -> TokenState:
    """Run a model, pruned or dense and in eval mode, under a tape, whose ``logits`` are filled too; as :func:`run`."""
    prediction = predict(model, images, recorder=Recorder(tape), masked=masked)
    state, tape.logits = prediction.state, prediction.logits
    if state.anatomy.pool == "map":
        with torch.no_grad():
            tape.readout = pool_attention(model, state.tokens, Handed(state.anatomy, state.policy, state.sizes))
    return state


def resume(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
    places: Places | None = None,
) -> Tensor:
    """From embedded tokens, as for :func:`begin`, to the model's output, with decisions of one's own choice.

    The model's own pruner decides only if it is among ``pruners``, such as a :class:`~prunex.vit.replay.Replay` of the
    clean run's decisions. Without a tape only what the head reads is carried through the last block.
    """
    tape = Tape(narrow=True) if tape is None else tape
    state = begin(model, x, grid, own_anatomy(model), masked, keys, places)
    recorder = _for_tail(model, Recorder(tape))
    tape.logits = answer(encode(state, Turns(pruners), recorder), recorder)
    return tape.logits


def look_ahead(state: TokenState, blocks: int) -> list[Tensor]:
    """The streams [B, N, D] entering the first ``blocks`` + 1 blocks (or the last norm) if nothing were decided."""
    streams = _Streams(blocks, [state.tokens])
    _through_blocks(state, NOBODY, Recorder(watch=streams), state.tokens)
    return streams.seen


@dataclass(eq=False, repr=False)
class _Streams(Brief):
    """A watch that takes the stream itself."""

    stop: int | None
    seen: list[Tensor] = field(default_factory=list)

    def after(self, block: int, state: TokenState) -> None:
        self.seen.append(state.tokens)


def through(
    block: Any,
    x: Tensor,
    anatomy: Anatomy,
    queries: tuple[int, ...] | Tensor | None = None,
    tape: Tape | None = None,
    number: int = -1,
) -> tuple[Tensor, Attended | None]:
    """One whole block on its own, for methods that compare a block with itself: attend, then feed.

    Of x [B, N, D] the ``queries`` come out, as numbers or int64 [m] (None: all), and the recording of the attention
    half if a tape runs, which knows the block by its ``number``.
    """
    state = TokenState(x, anatomy, TokenTrace(anatomy.grid, anatomy.prefix, x.shape[0], x.device), False, False)
    recorder = Recorder(tape)
    halves = Halves(block, number, state, NOBODY, recorder)
    expected = queries is not None and hooked_within(block)  # hooks expect all tokens
    # Nobody decides here, so what goes on is said by hand.
    halves.only = None if expected else queries
    halves.inside_call(partial(_opened, NOBODY))
    recorded = None if tape is None else tape.attended()[-1]
    return state.tokens if not expected or queries is None else attention.some(state.tokens, queries), recorded


def own_anatomy(model: ViT) -> Anatomy:
    """What a model's forward is made of: its anatomy, as the attached pruner may have altered it."""
    attached = mounted(model)
    if attached is None:
        return read(model)
    anatomy: Anatomy = attached.current(model)
    return anatomy


def own_pruners(model: ViT) -> tuple[Pruner, ...]:
    """The pruner attached to a model, or nothing."""
    attached = mounted(model)
    return () if attached is None else (attached.pruner,)


def _check_dtype(model: ViT, images: Tensor) -> None:
    wanted = next(model.parameters()).dtype
    # Autocast brings 16- and 32-bit floats together, but leaves float64 (numpy's own) alone.
    if images.dtype != wanted and (
        torch.float64 in (images.dtype, wanted) or not torch.is_autocast_enabled(images.device.type)
    ):
        raise PrunexError(
            f"images have dtype {images.dtype}, the model {wanted}: convert them with images.to({wanted})"
        )
