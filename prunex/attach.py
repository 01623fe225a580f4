"""Putting a pruner on a model in place, and taking it off again bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import nn

import prunex.pruners  # noqa: F401  (registers the pruners)
from prunex.checks import called_as
from prunex.errors import PrunexError, unknown
from prunex.handles.base import handle_on
from prunex.handles.heads import Head, put_head
from prunex.handles.pretrained import tell_on_save
from prunex.handles.tokens import Attached, Pruning
from prunex.handles.units import UnitPruning, check_readable, put_units
from prunex.heads.base import TokenHead
from prunex.pruners.base import TokenPruner, accepted
from prunex.pruners.budget import Budget
from prunex.registry import METHODS, lookup
from prunex.units.base import UnitPruner
from prunex.vit.anatomy import Anatomy, ViT, find
from prunex.vit.methods import check_methods, check_parity, check_routes, route
from prunex.vit.mount import TOKENS, mounted, mounted_head, mounted_units
from prunex.vit.sharded import check_gathered
from prunex.vit.units import Backbone

_BEFORE = (
    "attach before fully_shard; of a ViT that is made in configure_model by prunex.attach(...) there, and the callback "
    "takes what is attached"
)
UnitMethod = Literal["xpruner", "magnitude", "taylor", "random", "relevance"]
HeadMethod = Literal["concept_transformer", "vit_net", "attributes", "mean_patch"]


@overload
def attach(
    model: nn.Module, method: UnitMethod, *, path: str | None = ..., budget: float | str | None = ..., **options: Any
) -> UnitPruning: ...


@overload
def attach(
    model: nn.Module, method: HeadMethod, *, path: str | None = ..., budget: float | str | None = ..., **options: Any
) -> Head: ...


@overload
def attach(
    model: nn.Module, method: str, *, path: str | None = ..., budget: float | str | None = ..., **options: Any
) -> Pruning: ...


@called_as('prunex.attach(model, "evit", keep_ratio=0.7)', method=str)
def attach(
    model: nn.Module, method: str, *, path: str | None = None, budget: float | str | None = None, **options: Any
) -> Pruning | UnitPruning | Head:
    """Make a timm ViT prune its tokens, or its attention heads and MLP channels, or explain itself, in place.

    One of each kind may be attached, in any order.

    Args:
        model: A supported ViT, or any module that holds exactly one.
        method: A pruner's name, or that of a head that explains itself; :func:`prunex.methods` lists them.
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
        remove, detach (:class:`~prunex.handles.units.UnitPruning`); of a head its evidence, losses, detach
        (:class:`~prunex.handles.heads.Head`).

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
    # What is made in inference mode could never be trained, and what is made on the meta device holds no values.
    with torch.inference_mode(False), torch.device("cpu"):
        handle = _attach(model, method_of(method, options), path, budget, options)
        tell_on_save(model, handle.model)
        return handle


def _attach(
    model: nn.Module, make: Any, path: str | None, budget: float | str | None, options: dict[str, Any]
) -> Pruning | UnitPruning | Head:
    if issubclass(make, TokenHead) and budget is not None:
        raise PrunexError(f"budget={budget!r} is for pruners, and {make.name} prunes nothing: leave it out")
    # Units are gated in Swins as well, from which no tokens can leave.
    vit = find(model, path, Backbone if issubclass(make, UnitPruner) else ViT)[1]
    check_gathered(vit, _BEFORE)
    if issubclass(make, TokenHead):
        check_methods(vit)
        check_routes(vit)
        return put_head(vit, make, options, model)
    if issubclass(make, UnitPruner):
        return put_units(vit, make, options if budget is None else {"budget": budget, **options})
    if mounted(vit) is not None:
        raise PrunexError(f"{type(vit).__name__} is pruned already by {mounted(vit).method}: detach() it first")
    anatomy = check_parity(vit)
    check_routes(vit)
    if budget is not None:
        options = Budget(vit, anatomy, make, options).solve(budget)
    return put_tokens(vit, anatomy, make, options)


def method_of(name: str, options: Iterable[str]) -> Any:
    """The class of a pruner or a head; a name that is unknown, or an option that it has not, is refused."""
    make = lookup("head" if ("head", name) in METHODS else "pruner", name).make
    allowed = accepted(make)
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name}", option, allowed)
    return make


def put_tokens(vit: ViT, anatomy: Anatomy, make: Any, options: Mapping[str, Any]) -> Pruning:
    """Mount a token pruner on a ViT whose forward is timm's, as is known."""
    pruner: TokenPruner = make(anatomy, **options)
    # Before anything is put on the model: whatever is refused leaves it as it was.
    check_readable(vit, pruner, mounted_units(vit))
    if mounted_head(vit) is not None:
        mounted_head(vit).head.check(pruner.alter(anatomy))
        mounted_head(vit).head.check_pruned()
    pruner.prepare(vit)
    # As the weights are: predictors in float32 would end the forward of a model in half precision.
    weight = next(vit.parameters())
    pruner.to(device=weight.device, dtype=weight.dtype)
    pruner.train(vit.training)
    attached = Attached(pruner, anatomy)
    attached.train(vit.training)
    # A submodule, so that it moves, trains and is saved with the model.
    vit.add_module(TOKENS, attached)
    route(vit)
    return Pruning(vit)


@overload
def attached(model: nn.Module, path: str | None = ..., units: Literal[False] = ...) -> Pruning | None: ...


@overload
def attached(model: nn.Module, path: str | None = ..., *, units: Literal[True]) -> UnitPruning | None: ...


@overload
def attached(model: nn.Module, path: str | None = ..., *, head: Literal[True]) -> Head | None: ...


@called_as("prunex.attached(model)")
def attached(
    model: nn.Module, path: str | None = None, units: bool = False, head: bool = False
) -> Pruning | UnitPruning | Head | None:
    """The handle on what is attached to a model, or None where nothing is.

    Args:
        model: A ViT or a module that holds exactly one.
        path: Dotted path to the ViT when there are several.
        units: The handle of the unit pruner instead of the token pruner's.
        head: That of the head that explains itself.

    Raises:
        PrunexError: When there is no ViT, or several.
    """
    if units:
        return handle_on(UnitPruning, find(model, path, Backbone)[1])
    vit = find(model, path)[1]
    return handle_on(Head, vit) if head else handle_on(Pruning, vit)
