"""The one block-by-block forward: decide, attend, decide, feed, decide.

Pruners act before a block, between its halves or after it, explainers ask for what they need through a :class:`Tape`.
A block that nobody asks anything of is called whole; one that is opened runs inside its own call, so that hooks on it
see the stream that comes and the one that goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, ViT, check_images, read
from prunex.vit.arithmetic import PLAIN
from prunex.vit.attention import KeyWeights
from prunex.vit.blocks.plain import Layout
from prunex.vit.calls import hooked_within, inside
from prunex.vit.decisions import Answer, Keep, Pruner, TokenState, apply, carried_out
from prunex.vit.embedding import embed, enter, grid_of
from prunex.vit.halves import attend, attend_packed, feed, feed_packed
from prunex.vit.intermediates import Watch
from prunex.vit.layouts import layout_of
from prunex.vit.mount import mounted
from prunex.vit.packing import Packing
from prunex.vit.positions import Places, Positions, positions_of
from prunex.vit.readout import head, pool_attention
from prunex.vit.tape import Attended, Fed, Tape
from prunex.vit.trace import TokenTrace


def look_ahead(
    model: ViT,
    x: Tensor,
    anatomy: Anatomy,
    blocks: int,
    policy: Tensor | None = None,
    keys: KeyWeights | None = None,
    positions: Positions | None = None,
) -> list[Tensor]:
    """The stream entering the first ``blocks`` + 1 blocks if nothing were decided: [B, N, D] each.

    The one after the last block is what the final norm will read. Call it with the model in eval mode.

    Args:
        model: The ViT; a pruner on it is not asked.
        x: [B, N, D], entering the first block.
        anatomy: Of the model.
        blocks: How many are run.
        policy: [B, N] or None: 0 for slots of tokens that are not there.
        keys: Weights of the tokens as keys, or None.
        positions: As the state has them.
    """
    streams = [x]
    for i, block in enumerate(list(model.blocks)[:blocks]):
        layout, rope = layout_of(block), None if positions is None else positions.rope_of(i)
        if policy is None and keys is None and (positions is None or positions.whole):
            x = _whole(block, layout, positions, rope)(x)
        else:

            def opened(x: Tensor, rope: Tensor | None = rope, block: Any = block, **_: Any) -> Tensor:
                relative = None if positions is None else positions.relative_of(layout_of(block).relative(block))
                entered = x if layout_of(block).parallel else None
                x = attend(block, x, anatomy, policy, keys=keys, rope=rope, relative=relative)[0]
                return feed(block, x, policy=policy, entered=entered)[0]

            layout.check_hooks(block)
            x = inside(block, opened, x, **layout.given(rope, None if positions is None else positions.shared))
        streams.append(x)
    return streams


def run(
    model: ViT,
    images: Tensor,
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    watch: Watch | None = None,
) -> tuple[Tensor, TokenState]:
    """Images through all blocks and the final norm, with pruners deciding and a tape recording.

    Args:
        model: A supported ViT.
        images: [B, C, H, W].
        anatomy: Of the model.
        pruners: Asked in this order at every place.
        tape: Records what it asks for, or None.
        masked: Dropped tokens keep their slots under a policy instead of leaving the tensor.
        watch: Is shown the stream after every block, and may want no more than the first ones; or None.

    Returns:
        Tokens [B, prefix + n_last, D] after the final norm, and the final state with its trace.
    """
    check_images(anatomy, images)
    _check_dtype(model, images)
    ops, rope = PLAIN if tape is None else tape.ops, None
    if ops.opened:
        x, grid = embed(model, images, ops)
    else:
        patches = model.patch_embed(images)
        grid = grid_of(model, patches)
        x, rope = enter(model, patches)
    return encode(model, x, grid, anatomy, pruners, tape, masked, watch=watch, rope=rope)


def encode(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
    watch: Watch | None = None,
    places: Places | None = None,
    rope: Tensor | None = None,
) -> tuple[Tensor, TokenState]:
    """Embedded tokens through all blocks and the final norm; :func:`run` without the embedding.

    Args:
        model: A supported ViT.
        x: [B, prefix + P, D], as :func:`embed` gives them.
        grid: Their patch grid.
        anatomy: Of the model.
        pruners: Asked in this order at every place.
        tape: Records what it asks for, or None.
        masked: Dropped tokens keep their slots.
        keys: Weights of the tokens as attention keys in every block, or None.
        watch: As for :func:`run`.
        places: Which patches the P tokens are, where they are not all patches of ``grid`` in order; or None.
        rope: The rotary table of the blocks, where embedding gave one already.

    Returns:
        Tokens [B, prefix + n_last, D] after the final norm (only those that the head reads, where the tape asked for no
        others), and the final state with its trace.
    """
    trace = TokenTrace(grid, anatomy.prefix, x.shape[0], x.device)
    state = TokenState(x, anatomy, trace, masked, model.training, left=grid[0] * grid[1], keys=keys, model=model)
    state.positions = positions_of(model, anatomy.prefix, grid, places, rope)
    if tape is not None:
        tape.embedded, state.ops = x, tape.ops
    if watch is not None:
        state.leaving = []
    walk = _Walk(model, state, pruners, tape, watch)
    # timm calls the blocks as one module where it may; a watch wants some of them alone.
    whole = isinstance(model.blocks, nn.Sequential) and watch is None
    state.tokens = inside(model.blocks, walk, x) if whole else walk(x)
    state.tokens = (PLAIN if tape is None else tape.ops).norm(model.norm, state.tokens)
    return state.tokens, state


class _Walk:
    """One forward's way through the blocks, its state as it goes."""

    def __init__(
        self, model: ViT, state: TokenState, pruners: Sequence[Pruner], tape: Tape | None, watch: Watch | None
    ) -> None:
        self.model, self.state, self.pruners, self.tape, self.watch = model, state, pruners, tape, watch
        self.blocks: list[Any] = list(model.blocks)
        self.rows: set[int] = set() if tape is None else set(tape.rows)
        self.matched: set[int] = set()
        for pruner in pruners:
            self.rows.update(pruner.rows())
            self.matched.update(pruner.key_means())
        self.recompute = model.grad_checkpointing and torch.is_grad_enabled() and tape is None
        self.packing: Packing | None = None
        self.packs: bool | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """From the tokens entering the first block to those that leave the last."""
        state, watch, tape = self.state, self.watch, self.tape
        state.tokens = x
        for i, block in enumerate(self.blocks[: None if watch is None else watch.stop]):
            off: Any = torch.no_grad() if tape is not None and i < tape.graph_from else nullcontext()
            with off:
                self._pass(i, block)
            if watch is not None:
                watch.after(i, state)
        return state.tokens

    def _pass(self, i: int, block: nn.Module) -> None:
        """One block: decide, run it whole or opened, decide."""
        state, tape = self.state, self.tape
        for pruner in self.pruners:
            _note(tape, apply(pruner.before(i, state), i, False, state))
        within = [p for p in self.pruners if p.acts_between(i)]
        at, layout = state.positions, layout_of(block)
        turned, shared = (None, None) if at is None else (at.rope_of(i), at.shared)
        known = _known_queries(self.pruners, i, state, tape)
        if known is not None and hooked_within(block):  # hooks expect all tokens
            known = None
        plain = tape is None and state.policy is None and state.attending is None and (at is None or at.whole)
        if plain and known is None and i not in self.rows and not within:
            state.tokens = _maybe_checkpoint(self.recompute, _whole(block, layout, at, turned), state.tokens)
        else:
            layout.check_hooks(block)

            def opened(x: Tensor, rope: Tensor | None = turned, **_: Any) -> Tensor:
                state.tokens = x
                self._halves(i, block, rope, within, known)
                return state.tokens

            state.tokens = inside(block, opened, state.tokens, **layout.given(turned, shared))
        for pruner in self.pruners:
            if pruner.acts_after(i):
                _note(tape, apply(pruner.after(i, state), i, False, state, after=True))
                self._ends()

    def _halves(
        self, i: int, block: nn.Module, rope: Tensor | None, within: Sequence[Pruner], known: Tensor | None
    ) -> None:
        """One block opened: attend, decide, feed."""
        state, tape, layout, last = self.state, self.tape, layout_of(block), i == len(self.blocks) - 1
        relative = None if state.positions is None else state.positions.relative_of(layout.relative(block))
        entered = state.tokens if layout.parallel else None
        share = layout.draw(block, state.tokens)
        queries: tuple[int, ...] | Tensor | None = known
        if last and self._narrow(block, within):
            queries = state.anatomy.readers
        if last:
            self._ends()
        state.trace.bare = known is not None and not within
        came, want, match = state.patches.shape[1], i in self.rows, i in self.matched
        self.packing = self._packed()
        if self.packing is not None:
            state.tokens, state.row = attend_packed(block, state.tokens, self.packing, state.anatomy, want)
        else:
            # Run again in a backward pass it must see what it saw now: nothing of the state, which has gone on.
            asked = (want, tape, i, state.attending, queries, state.sizes, match, rope, relative, share)
            anatomy = state.anatomy

            def first(x: Tensor, policy: Tensor | None) -> tuple[Tensor, Tensor | None, Attended | None, Tensor | None]:
                return attend(block, x, anatomy, policy, *asked)

            state.tokens, state.row, attended, state.key_mean = _maybe_checkpoint(
                self.recompute, first, state.tokens, state.policy
            )
            _note(tape, [] if attended is None else [attended])
        if entered is not None and queries is not None:
            entered = attention.some(entered, queries)
        for pruner in within:
            answer = pruner.between(i, state)
            if known is not None and isinstance(answer, Keep):
                carried_out(answer, i, came, state)
                continue
            stages, entered = _decide(answer, i, True, state, entered)
            _note(tape, stages)
        if last and within:
            self._ends()
        state.row = state.key_mean = None
        self._feed(i, block, entered, share)

    def _feed(self, i: int, block: nn.Module, entered: Tensor | None, share: Tensor | None) -> None:
        state, tape = self.state, self.tape
        self.packing = self._packed()
        if self.packing is not None:
            state.tokens = feed_packed(block, state.tokens, self.packing)
            return

        def second(x: Tensor, entered: Tensor | None) -> tuple[Tensor, Fed | None]:
            return feed(block, x, tape, state.policy, entered, share)

        state.tokens, fed = _maybe_checkpoint(self.recompute, second, state.tokens, entered)
        if fed is not None:
            fed.block = i
            _note(tape, [fed])

    def _narrow(self, block: nn.Module, within: Sequence[Pruner]) -> bool:
        """Whether only the tokens that the head reads go on from the last block's attention."""
        tape, last = self.tape, len(self.blocks) - 1
        if tape is None or not tape.narrow or tape.streams or not self.state.anatomy.readers:
            return False
        return not within and not any(p.acts_after(last) for p in self.pruners) and not hooked_within(block)

    def _ends(self) -> None:
        """Tell the tape which tokens there are now, which may be the last."""
        state = self.state
        if self.tape is not None:
            self.tape.policy, self.tape.tokens, self.tape.sizes = state.policy, state.tokens.shape[1], state.sizes

    def _packed(self) -> Packing | None:
        """Which slots hold a token, where images differ in length and nobody asks for more than the output."""
        state, known = self.state, self.packing
        if not state.ragged or state.policy is None or state.masked or state.training:
            return None
        if self.tape is not None or state.attending is not None or state.positions is not None:
            return None
        if self.packs is None:  # the halves of others are not known token by token, and hooks expect whole images
            self.packs = all(layout_of(b).opens and not hooked_within(b) for b in self.blocks)
        if not self.packs:
            return None
        return known if known is not None and known.policy is state.policy else Packing.of(state.policy)


def through(
    block: Any,
    x: Tensor,
    anatomy: Anatomy,
    queries: tuple[int, ...] | Tensor | None = None,
    tape: Tape | None = None,
    number: int = -1,
) -> tuple[Tensor, Attended | None]:
    """One whole block on its own, for methods that compare a block with itself: attend, then feed.

    Args:
        block: timm's block.
        x: [B, N, D].
        anatomy: Of the model.
        queries: The tokens that come out, as numbers or int64 [m]; None: all of them.
        tape: Records what it asks for, or None.
        number: The block's index, as the tape knows it.

    Returns:
        The stream [B, m, D], and the recording of the attention half if a tape runs.
    """
    whole = queries is not None and hooked_within(block)  # hooks expect all tokens
    recorded: Attended | None = None

    def opened(x: Tensor) -> Tensor:
        nonlocal recorded
        x, _, recorded, _ = attend(block, x, anatomy, tape=tape, number=number, queries=None if whole else queries)
        return feed(block, x, tape)[0]

    x = inside(block, opened, x)
    return x if not whole or queries is None else attention.some(x, queries), recorded


def _known_queries(pruners: Sequence[Pruner], block: int, state: TokenState, tape: Tape | None) -> Tensor | None:
    """The tokens that will go on after a block's attention, where the one pruner there is knows them beforehand.

    Whoever records, watches, masks or weighs keys needs all rows: then tokens leave after the attention, as always.
    """
    asked = tape is not None or state.leaving is not None or state.masked
    if len(pruners) != 1 or asked or state.policy is not None or state.keys is not None:
        return None
    ask = getattr(pruners[0], "queries", None)
    return None if ask is None else ask(block, state)


def _decide(
    answer: Answer, block: int, inside: bool, state: TokenState, entered: Tensor | None
) -> tuple[Sequence[Any], Tensor | None]:
    """Carry an answer out; the stream that entered a parallel block goes through the same, beside its tokens."""
    if entered is None or answer is None:
        return apply(answer, block, inside, state), entered
    width = entered.shape[-1]
    state.tokens = torch.cat([state.tokens, entered], -1)
    stages = apply(answer, block, inside, state)
    state.tokens, entered = state.tokens.split(width, -1)
    return stages, entered


def own_anatomy(model: ViT) -> Anatomy:
    """What a model's forward is made of: its anatomy, as the attached pruner may have altered it."""
    attached = mounted(model)
    return read(model) if attached is None else attached.current(model)


def _whole(block: nn.Module, layout: Layout, at: Any, rope: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Timm's own block, given what it looks positions up in."""
    if at is None:
        return block
    return lambda x: layout.whole(block, x, rope, at.shared)


def own_pruners(model: ViT) -> tuple[Pruner, ...]:
    """The pruner attached to a model, or nothing."""
    attached = mounted(model)
    return () if attached is None else (attached.pruner,)


def record(model: ViT, images: Tensor, tape: Tape, masked: bool | None = None) -> TokenState:
    """Run a model, pruned or dense, under a tape, leaving no trace of it on the model.

    Args:
        model: A supported ViT; call it in eval mode.
        images: [B, C, H, W].
        tape: Says what to record; its ``logits`` are filled too ([B, classes], or pooled features without a head).
        masked: Whether dropped tokens keep their slots; None: as the model is set.

    Returns:
        The final state, with the trace and the decisions.
    """
    attached = mounted(model)
    if attached is not None:
        masked = bool(attached.masked) if masked is None else masked
    anatomy = own_anatomy(model)
    tokens, state = run(model, images, anatomy, own_pruners(model), tape, bool(masked))
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops, state.sizes)
    if anatomy.pool == "map":
        with torch.no_grad():
            tape.readout = pool_attention(model, tokens, state.policy, anatomy, state.sizes)
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
    """From embedded tokens to the model's output, with decisions of one's own choice.

    Args:
        model: A supported ViT, pruned or dense; its own pruner decides only if it is among ``pruners``.
        x: [B, prefix + P, D], as :func:`embed` gives them.
        grid: Their patch grid.
        pruners: Such as a :class:`~prunex.vit.decisions.Replay` of the clean run's decisions, or an ``Absent`` before
            it.
        tape: Records what it asks for. None: only what the head reads is carried through the last block.
        masked: Dropped tokens keep their slots.
        keys: Weights of the tokens as attention keys, or None.
        places: Which patches the tokens are, where they are not all patches of ``grid`` in order; or None.

    Returns:
        [B, classes], or the pooled features without a head.
    """
    anatomy = own_anatomy(model)
    tape = Tape(narrow=True) if tape is None else tape
    tokens, state = encode(model, x, grid, anatomy, pruners, tape, masked, keys, places=places)
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops, state.sizes)
    return tape.logits


def _check_dtype(model: ViT, images: Tensor) -> None:
    wanted = model.patch_embed.proj.weight.dtype
    # Autocast brings 16- and 32-bit floats together, but leaves float64 (numpy's own) alone.
    if images.dtype != wanted and (
        torch.float64 in (images.dtype, wanted) or not torch.is_autocast_enabled(images.device.type)
    ):
        raise PrunexError(
            f"images have dtype {images.dtype}, the model {wanted}: convert them with images.to({wanted})"
        )


def _maybe_checkpoint(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)


def _note(tape: Tape | None, stages: Sequence[Any]) -> None:
    if tape is not None:
        tape.steps.extend(stages)
