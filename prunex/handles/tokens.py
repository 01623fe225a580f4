"""What hangs on a pruned model: the pruner, the trace of the last forward, and the training forwards of this step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import prunex.pruners  # noqa: F401  (registers the pruners)
from prunex.checks import check_choice, check_flag, check_number
from prunex.errors import PrunexError
from prunex.handles.base import Handle, accept_dense, drop_mark
from prunex.handles.steps import Steps
from prunex.pruners.base import Forward, TokenPruner, strip_official
from prunex.pruners.budget import Budget
from prunex.registry import lookup
from prunex.vit.anatomy import Anatomy, ViT, head_classes, pixels_of, read
from prunex.vit.cost import tally
from prunex.vit.forward import run
from prunex.vit.handover import Handed, Handover
from prunex.vit.intermediates import Watch
from prunex.vit.late import left_by
from prunex.vit.methods import route
from prunex.vit.mount import TOKENS, mounted, unmount
from prunex.vit.readout import POOLS, for_heads, masked_pool, over_patches
from prunex.vit.recorder import SILENT, Recorder
from prunex.vit.sharded import COPY, check_gathered, gather
from prunex.vit.trace import TokenTrace


class Attached(nn.Module):
    """What hangs on a pruned model as ``model.prunex``: the pruner's parameters, and what forwards left.

    Dense parameter names stay as they are; a pruner's own are called ``prunex.<method>.*``. A dense state dict loads
    strictly into a pruned model: the pruner's parameters keep their values.

    Attributes:
        trace: What the last forward, of any thread, did to the patches.
        steps: The training forwards whose losses were not asked for yet.
        more: Losses beside the method's own.
        ran: Set by every forward, for whoever wants to know whether one came.
    """

    def __init__(self, pruner: TokenPruner, anatomy: Anatomy) -> None:
        super().__init__()
        self.add_module(pruner.name, pruner)
        self.method = pruner.name
        self.dense = anatomy
        self.anatomy = pruner.alter(anatomy)
        self.masked: bool | None = None
        self.trace: TokenTrace | None = None
        self.steps: Steps[Forward] = Steps()
        self.handover = Handover()
        self.more: list[Callable[[Forward], Mapping[str, Tensor]]] = []
        self.ran = False
        self.register_load_state_dict_pre_hook(drop_mark)
        self.register_load_state_dict_pre_hook(accept_dense)

    @property
    def pruner(self) -> TokenPruner:
        """The pruner itself."""
        return getattr(self, self.method)

    def __getstate__(self) -> dict[str, Any]:
        # A trace is of images that are gone, and losses that were added may hold anything.
        return self.__dict__ | {"trace": None, "more": []}

    @property
    def forwards(self) -> list[Forward]:
        """Training forwards of this step, so far."""
        return self.steps.waiting

    def current(self, model: ViT) -> Anatomy:
        """The pruned forward's anatomy, read again after ``reset_classifier`` or ``set_input_size`` changed it."""
        embed: Any = model.patch_embed
        known = self.dense
        now = (head_classes(model), model.global_pool, tuple(embed.img_size), pixels_of(embed))
        if now != (known.classes, known.pool, known.image, known.patch):
            self.refit(model)
        return self.anatomy

    def refit(self, model: ViT) -> None:
        """Read the anatomy again, after heads or MLP channels were taken out of the model."""
        self.dense = read(model)
        self.anatomy = self.pruner.alter(self.dense)

    def features(self, model: ViT, images: Tensor, watch: Watch | None = None) -> Tensor:
        """The pruned ``forward_features``: [B, prefix + n, D]; a watch takes full grids on the way."""
        pruner = self.pruner
        masked = self.masked if self.masked is not None else model.training and pruner.trains_masked
        recorder = SILENT if watch is None else Recorder(watch=watch)
        state = run(model, images, (pruner,), recorder, masked)
        tokens, known = state.tokens, left_by(state)
        self.ran = True
        # Off the graph, which the next step would otherwise keep alive.
        self.trace = replace(state.trace.detach(), prefix=known.anatomy.prefix)
        # The user's own code may pool these tokens later: it needs to know which are there.
        self.handover.give(tokens, replace(known, trace=self.trace, read=watch is not None))
        if model.training and Steps.counts():
            forward = Forward(images, tokens, known.policy, known.anatomy, state.masks, trace=state.trace, model=model)
            self.steps.remember(forward, tokens)
        return tokens

    def forget(self) -> None:
        """Let go of all training forwards."""
        self.steps.forget()
        self.handover.forget()

    def pool(self, model: ViT, x: Tensor, pool_type: str | None) -> Tensor:
        """The head's pooling, over tokens that are there, by size where some were merged."""
        return masked_pool(model, x, self.handed(x), pool_type)

    def handed(self, x: Tensor) -> Handed:
        """What is known of final tokens; of such as no forward gave, that all are there."""
        return self.handover.take(x) or Handed(self.anatomy)

    def for_heads(self, model: ViT, x: Tensor) -> Tensor:
        """Final tokens as timm's ``forward_head`` wants them."""
        return for_heads(model, x, self.handed(x))

    def saw_logits(self, tokens: Tensor, logits: Any) -> None:
        """Remember the logits of a training forward, for losses that need them; a model without a head has none."""
        if not self.training or not torch.is_grad_enabled():
            return
        forward = self._forward_of(tokens)
        if forward is None or forward.anatomy.classes == 0:
            return
        # The model's answer at inference, as losses that compare it with a teacher's want it.
        if isinstance(logits, tuple):  # a distilled DeiT in distilled training: two heads
            logits = sum(logits) / len(logits)
        forward.logits = logits

    def _forward_of(self, tokens: Tensor) -> Forward | None:
        """The training forward that gave some tokens, or the last one without logits, had they been changed since."""
        if torch.compiler.is_compiling():
            return self.forwards[-1] if self.forwards else None
        fitting = [f for f in self.forwards if f.tokens.shape == tokens.shape]
        # Dropout or a cast between features and head makes other tensors of the same shape.
        changed = [f for f in fitting if f.logits is None]
        return next((f for f in fitting if f.tokens is tokens), changed[-1] if changed else None)


def give_labels(forwards: Sequence[Forward], labels: Any) -> None:
    """Labels [B] to every forward of B images; such as fit none are refused."""
    counts = [len(f.images) for f in forwards]
    whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    fitting = [f for f, count in zip(forwards, counts, strict=True) if whole and len(labels) == count]
    if not fitting:
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        sizes = " and ".join(str(c) for c in dict.fromkeys(counts))
        raise PrunexError(f"labels are {what}: give one class index for each of the {sizes} images")
    for forward in fitting:
        forward.labels = labels


class Pruning(Handle):
    """The handle on a pruned model, returned by :func:`prunex.attach`; also a context manager that detaches.

    Attributes:
        model: The ViT it is on.
    """

    kind = TOKENS

    @property
    def _attached(self) -> Attached:
        attached: Attached = self._holder()
        return attached

    @property
    def pruner(self) -> TokenPruner:
        """The module that decides."""
        return self._attached.pruner

    @property
    def trace(self) -> TokenTrace:
        """What the last forward did to the patches.

        Raises:
            PrunexError: Before the first forward.
        """
        if self._attached.trace is None:
            raise PrunexError("no forward has run yet: call the model on images first, then read the trace")
        return self._attached.trace

    @property
    def progress(self) -> float:
        """Fraction of training done, 0..1, read by schedules; 1 unless set."""
        return self.pruner.progress

    @progress.setter
    def progress(self, value: float) -> None:
        self.pruner.progress = check_number("progress", value, 0, 1)

    @property
    def masked(self) -> bool | None:
        """True: dropped tokens keep their slots, masked. False: they leave. None: as the method trains and infers."""
        return self._attached.masked

    @masked.setter
    def masked(self, value: bool | None) -> None:
        self._attached.masked = None if value is None else check_flag("masked", value)

    def losses(self, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted auxiliary losses of this step's training forwards, each a scalar, summed over forwards by name.

        A step's forwards are those in training mode with a graph since the losses were last asked for: two views add
        twice, as their task losses do, whatever their numbers of images. Forwards in eval mode, without gradients,
        or run again by a gradient checkpoint add nothing, nor do those that a backward pass went through already.
        Asked again before the next training forward, the same come out.

        Args:
            labels: int64 [B], the images' classes, for losses that look at them (:meth:`also`). They go to every
                forward of B images, such as several views of one batch.

        Raises:
            PrunexError: For labels that fit no forward.
        """
        attached = self._attached
        gather(self.model)
        forwards = attached.steps.take()
        if labels is not None and forwards:
            give_labels(forwards, labels)
        total: dict[str, Tensor] = {}
        for forward in forwards:
            parts = dict(attached.pruner.losses(forward))
            for more in attached.more:
                parts |= more(forward)
            for name, value in parts.items():
                total[name] = total[name] + value if name in total else value
        return total

    def also(self, loss: Callable[[Forward], Mapping[str, Tensor]]) -> None:
        """Add a loss to those of the method: :meth:`losses` will hold what it makes of each training forward.

        Args:
            loss: From a :class:`~prunex.pruners.base.Forward` (images, tokens, trace with scores on the graph, labels)
                to named scalars, weighted. Copies of the model, such as slim ones, do not have it.
        """
        self._attached.more.append(loss)

    def forget(self) -> None:
        """Let go of this step's training forwards and their graphs (after their losses were used)."""
        self._attached.forget()

    def pool(self, tokens: Tensor, kind: Literal["avg", "max", "avgmax"] = "avg") -> Tensor:
        """Pool the patches that are left, for a head of one's own on ``model.forward_features``.

        While a method trains masked, dropped patches keep their slots in the features, and at inference they are gone:
        a plain mean over tokens is another feature then. This one is the same in both; where patches were merged a
        token counts as often as the patches it stands for.

        Args:
            tokens: [B, prefix + n, D], what ``model.forward_features(images)`` returned, or made of it token by token.
            kind: "avg", "max", or the mean of both.

        Returns:
            [B, D], of the patch tokens alone.

        Raises:
            PrunexError: For another kind, or tokens that are of no forward of this model.

        >>> import prunex, timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        >>> pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.7)
        >>> pruning.pool(model.train().forward_features(torch.randn(2, 3, 224, 224))).shape
        torch.Size([2, 192])
        """
        check_choice("kind", kind, POOLS)
        handed = self._attached.handover.take(tokens)
        if handed is None:
            raise PrunexError(
                f"tokens {list(tokens.shape)} are of no forward of this model: give what "
                "model.forward_features(images) returned"
            )
        return over_patches(tokens, handed.policy, handed.sizes, handed.anatomy.prefix, kind)

    def calibrate(self, images: Any, **options: Any) -> Any:
        """Let a method look at some images first; what it found is kept.

        One that decides once for all images (``patch_slimming``) finds its sets. One whose images keep their own
        numbers of patches (``count="adaptive"``) measures their mean shares, which ``counts``, ``prunex.cost`` and
        ``prunex.export`` then go by.

        Args:
            images: A data loader, or any iterable of batches (the first float [B, C, H, W] of each is taken), or one
                such tensor.
            **options: The method's own, such as ``tolerance`` of ``patch_slimming``.

        Returns:
            The method's report; of adaptive counts the mean share of the patches kept after each stage.

        Raises:
            PrunexError: For a method that needs none, options it does not know, or images the model cannot take.
        """
        check_gathered(self.model, COPY)
        return self.pruner.calibrate(self.model, images, **options)

    def counts(self, patches: int | None = None) -> list[int]:
        """Patch tokens left after each stage at inference; ``patches`` defaults to the model's own grid.

        EViT's fused token is one of them, though no patch: shares in pictures and logs leave it out.

        With ``count="adaptive"`` they depend on the image, and these are the expected ones: see :meth:`calibrate`.
        """
        gh, gw = self._attached.current(self.model).grid
        return self.pruner.counts(gh * gw if patches is None else patches)

    @property
    def _budget(self) -> Budget:
        anatomy, make = self._attached.current(self.model), lookup("pruner", self.method).make
        return Budget(self.model, anatomy, make, self.options)

    def meets(self, budget: float | str) -> bool:
        """Whether this pruning costs, at its schedule's end, what ``prunex.attach(model, method, budget=...)`` would.

        Raises:
            PrunexError: For a budget that is none or out of reach, or a method without a rate to set.
        """
        return self._budget.meets(budget)

    def budgeted(self) -> list[str]:
        """Names of the options that a budget sets, such as ``keep_ratio``; none to set is an error."""
        return self._budget.turned()

    def macs(self) -> int:
        """Multiply-adds of one image at the schedule's end; :func:`prunex.cost` counts them as they are now."""
        return self._budget.macs(self.options)

    def dense_macs(self) -> int:
        """Multiply-adds of one image without this pruning."""
        return self._budget.dense

    def load_official(self, state: Mapping[str, Any]) -> Pruning:
        """Load weights of the method's official repository, by their published names; timm's backbone weights too.

        Args:
            state: A state dict, or a checkpoint holding one under "model".

        Raises:
            PrunexError: For missing, foreign or ill-shaped entries; the model is then unchanged.
        """
        plain = strip_official(state)
        renamed = self.pruner.official(plain)
        needed = self.pruner.state_dict()
        missing = sorted(set(needed) - set(renamed))
        if missing:
            raise PrunexError(
                f"not an official {self.method} checkpoint: {len(missing)} of {len(needed)} parameters are missing, "
                f"such as {missing[0]}; it holds {', '.join(list(plain)[:4])}"
            )
        dense = {k: v for k, v in self.model.state_dict().items() if not k.startswith(TOKENS + ".")}
        backbone = {k: v for k, v in plain.items() if k in dense}
        if not renamed and not backbone:
            raise PrunexError(f"nothing in this state dict fits: it holds {', '.join(list(plain)[:4])}")
        foreign = [k for k in renamed if k not in needed]
        wrong = [k for k, v in renamed.items() if k in needed and v.shape != needed[k].shape]
        wrong += [k for k, v in backbone.items() if v.shape != dense[k].shape]
        if foreign or wrong:
            raise PrunexError(
                f"entries do not fit this model: {', '.join((foreign + wrong)[:4])}; same sizes and stages needed"
            )
        self.pruner.load_state_dict(renamed)
        self.model.load_state_dict(backbone, strict=False)
        return self

    def _repr_html_(self) -> str:
        from prunex.pictures.cards import card
        from prunex.vit.showing import trace_parts

        if mounted(self.model, self.kind) is None:
            return card("Pruning", {"detached": "the model is dense"})
        left, dense = self.counts(), self._attached.dense.grid
        macs, whole = tally(self.model).macs, tally(self.model, tokens=False).macs
        facts = {
            "method": self.method,
            "tokens left": ", ".join(map(str, left)) + f" of {dense[0] * dense[1]}",
            "multiply-adds": f"{macs / whole:.0%} of the dense model's",
            **self.options,
        }
        trace = self._attached.trace
        return card("Pruning", facts, *([] if trace is None else trace_parts(trace)))

    def detach(self) -> nn.Module:
        """Give the dense model back, bit for bit, and return it; harmless when done already."""
        unmount(self.model, TOKENS)
        route(self.model)
        return self.model
