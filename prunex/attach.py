"""Putting a pruner on a model in place, and taking it off again bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

from torch import Tensor, nn

import prunex.pruners  # noqa: F401  (registers the pruners)
from prunex.checks import called_as, check_flag, check_number
from prunex.errors import PrunexError, unknown
from prunex.handle import Handle
from prunex.pruners.attachment import MOST, MOST_COMPILED, Attached, give_labels
from prunex.pruners.base import Forward, TokenPruner, accepted, strip_official
from prunex.pruners.budget import Budget
from prunex.pruners.units import UnitPruner
from prunex.registry import lookup
from prunex.unit_pruning import UnitPruning, check_readable, put_units
from prunex.vit.anatomy import find
from prunex.vit.mount import check_parity, put_on, take_off
from prunex.vit.readout import POOLS, over_patches
from prunex.vit.trace import TokenTrace
from prunex.vit.units import CHILD as UNITS
from prunex.vit.units import Backbone

CHILD = "prunex"
UnitMethod = Literal["xpruner", "magnitude", "taylor", "random", "relevance"]


class Pruning(Handle):
    """The handle on a pruned model, returned by :func:`prunex.attach`; also a context manager that detaches.

    Attributes:
        model: The ViT it is on.
    """

    child = CHILD

    @property
    def _attached(self) -> Attached:
        found: Attached = self._holder()
        return found

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
            labels: int64 [B], the images' classes, for a pruner that learns from being right; others ignore them. They
                go to every forward of B images, such as several views of one batch.

        Raises:
            PrunexError: For labels that fit no forward, or not all of them where the pruner learns from labels.
        """
        attached = self._attached
        if attached.crowded:
            attached.crowded = False
            warnings.warn(
                f"more than {MOST} training forwards ({MOST_COMPILED} compiled ones) ran since losses() was last asked:"
                " the earlier ones' losses are left out; ask after fewer, call forget(), or run them under no_grad()",
                stacklevel=2,
            )
        forwards = attached.take()
        if labels is not None and forwards:
            give_labels(forwards, labels, attached.pruner)
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

        While a method trains masked, dropped patches keep their slots in the features, and at inference they are
        gone: a plain mean over tokens is another feature then. This one is the same in both; where patches were merged
        a token counts as often as the patches it stands for.

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
        if kind not in POOLS:
            raise unknown("kind", str(kind), POOLS)
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

        Args:
            budget: As for :func:`prunex.attach`.

        Raises:
            PrunexError: For a budget that is none or out of reach, or a method without a rate to set.
        """
        return self._budget.meets(budget)

    def budgeted(self) -> list[str]:
        """Names of the options that a budget sets, such as ``keep_ratio``.

        Raises:
            PrunexError: For a method without a rate to set.
        """
        return self._budget.turned()

    def macs(self) -> int:
        """Multiply-adds of one image at the schedule's end; :func:`prunex.cost` counts them as they are now."""
        return self._budget.macs(self.options)

    def dense_macs(self) -> int:
        """Multiply-adds of one image without this pruning."""
        return self._budget.dense

    def load_official(self, state: Mapping[str, Any]) -> Pruning:
        """Load weights of the method's official repository, by their published names.

        Backbone weights among them (timm's names) are loaded too.

        Args:
            state: A state dict, or a checkpoint holding one under "model".

        Returns:
            This handle.

        Raises:
            PrunexError: For missing, foreign or ill-shaped entries; the model is then unchanged.
        """
        plain = strip_official(state)
        own = self.pruner.official(plain)
        needed = self.pruner.state_dict()
        missing = sorted(set(needed) - set(own))
        if missing:
            raise PrunexError(
                f"not an official {self.method} checkpoint: {len(missing)} of {len(needed)} parameters are missing, "
                f"such as {missing[0]}; it holds {', '.join(list(plain)[:4])}"
            )
        dense = {k: v for k, v in self.model.state_dict().items() if not k.startswith(CHILD + ".")}
        backbone = {k: v for k, v in plain.items() if k in dense}
        if not own and not backbone:
            raise PrunexError(f"nothing in this state dict fits: it holds {', '.join(list(plain)[:4])}")
        foreign = [k for k in own if k not in needed]
        wrong = [k for k, v in own.items() if k in needed and v.shape != needed[k].shape]
        wrong += [k for k, v in backbone.items() if v.shape != dense[k].shape]
        if foreign or wrong:
            raise PrunexError(
                f"entries do not fit this model: {', '.join((foreign + wrong)[:4])}; same sizes and stages needed"
            )
        self.pruner.load_state_dict(own)
        self.model.load_state_dict(backbone, strict=False)
        return self

    def detach(self) -> nn.Module:
        """Give the dense model back, bit for bit; harmless when done already.

        Returns:
            The model.
        """
        take_off(self.model)
        if CHILD in self.model._modules:
            del self.model._modules[CHILD]
        return self.model


@overload
def attach(
    model: nn.Module, method: UnitMethod, *, path: str | None = ..., budget: float | str | None = ..., **options: Any
) -> UnitPruning: ...


@overload
def attach(
    model: nn.Module, method: str, *, path: str | None = ..., budget: float | str | None = ..., **options: Any
) -> Pruning: ...


@called_as('prunex.attach(model, "evit", keep_ratio=0.7)', method=str)
def attach(
    model: nn.Module, method: str, *, path: str | None = None, budget: float | str | None = None, **options: Any
) -> Pruning | UnitPruning:
    """Make a timm ViT prune its tokens, or its heads and MLP channels, in place; both may be attached, in any order.

    Args:
        model: A supported ViT, or any module that holds exactly one.
        method: A pruner's name; :func:`prunex.methods` lists them.
        path: Dotted path to the ViT when ``model`` holds several.
        budget: What the pruned model may cost at its own image size, instead of ``keep_ratio``: a share of the dense
            multiply-adds in (0, 1], or "2.9GMACs", "400MMACs" for one image. The rates are solved for in closed form
            and then are options like any others: :func:`prunex.cost` agrees with the budget within 1 %, or a warning
            says how near whole tokens let it come.
            Unit pruners (``xpruner``, ``magnitude``, ...) count the tokens that are left too: what they aim at is the
            cost of the whole model.
        **options: The method's own, such as ``keep_ratio`` in (0, 1] and ``stages`` (block indices).

    Returns:
        The handle: trace, losses, progress, detach (:class:`Pruning`); of a unit pruner its widths, relevance table,
        remove, detach (:class:`~prunex.unit_pruning.UnitPruning`).

    Raises:
        PrunexError: Unknown method or option, a value out of range, a budget out of reach or beside the option it sets,
            no ViT or several, an unsupported family, or a model that is pruned already. The model is then unchanged.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    >>> pruning = prunex.attach(model, "evit", keep_ratio=0.7, stages=(3, 6, 9))
    >>> logits = model(torch.randn(2, 3, 224, 224))
    >>> pruning.trace.kept().shape, pruning.counts()
    (torch.Size([2, 14, 14]), [139, 99, 71])
    >>> _ = pruning.detach()
    >>> prunex.attach(model, "evit", budget="0.9GMACs").options["keep_ratio"]
    0.769
    """
    make = lookup("pruner", method).make
    allowed = accepted(make)
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {method}", name, allowed)
    if issubclass(make, UnitPruner):  # type: ignore[arg-type]
        own = options if budget is None else {"budget": budget, **options}
        return put_units(find(model, path, Backbone)[1], make, own)
    vit = find(model, path)[1]
    if hasattr(vit, CHILD):
        raise PrunexError(f"{type(vit).__name__} is pruned already by {getattr(vit, CHILD).method}: detach() it first")
    anatomy = check_parity(vit)
    if budget is not None:
        options = Budget(vit, anatomy, make, options).solve(budget)
    pruner: TokenPruner = make(anatomy, **options)
    check_readable(vit, pruner, getattr(vit, UNITS, None))
    pruner.prepare(vit)
    weight = next(vit.parameters())
    pruner.to(device=weight.device, dtype=weight.dtype)
    pruner.train(vit.training)
    attached = Attached(pruner, anatomy)
    attached.train(vit.training)
    vit.add_module(CHILD, attached)
    put_on(vit)
    return Pruning(vit)


@overload
def attached(model: nn.Module, path: str | None = ..., units: Literal[False] = ...) -> Pruning | None: ...


@overload
def attached(model: nn.Module, path: str | None = ..., *, units: Literal[True]) -> UnitPruning | None: ...


@called_as("prunex.attached(model)")
def attached(model: nn.Module, path: str | None = None, units: bool = False) -> Pruning | UnitPruning | None:
    """The handle on a model that is pruned, or None when it is dense.

    Args:
        model: A ViT or a module that holds exactly one.
        path: Dotted path to the ViT when there are several.
        units: The handle of the unit pruner instead of the token pruner's.

    Raises:
        PrunexError: When there is no ViT, or several.
    """
    if units:
        backbone = find(model, path, Backbone)[1]
        return UnitPruning(backbone) if hasattr(backbone, UNITS) else None
    vit = find(model, path)[1]
    return Pruning(vit) if hasattr(vit, CHILD) else None
