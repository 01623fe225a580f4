"""Putting the forward on a timm model, checking it against timm's own, and taking it off again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, ViT, read
from prunex.vit.aside import as_found
from prunex.vit.forward import run
from prunex.vit.intermediates import intermediates
from prunex.vit.mount import mounted, mounted_head
from prunex.vit.readout import norm_behind_pool
from prunex.vit.recorder import Recorder
from prunex.vit.tape import Tape


def _with_grid(name: str, self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A method of timm's own, with its final tokens' patch grid for the head: where sizes differ, no token says it."""
    out = getattr(type(self), name)(self, x, *args, **kwargs)
    tokens = out[0] if isinstance(out, tuple) else out
    if isinstance(tokens, Tensor):
        mounted_head(self).came_from(self, x, tokens)
    return out


def _forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    _check_no_mask(attn_mask, *kwargs.values())
    return mounted(self).features(self, x)


def _check_no_mask(attn_mask: Tensor | None, *flags: Any) -> None:
    if attn_mask is not None or any(flags):
        raise PrunexError("attn_mask and is_causal cannot be combined with token pruning: call detach() first")


def _pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
    return mounted(self).pool(self, x, pool_type)


def _forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
    tokens, explainable = mounted(self), mounted_head(self)
    if explainable is not None and not pre_logits:
        out = explainable.logits(self, x, explainable.handed(self, x) if tokens is None else tokens.handed(x))
    elif tokens is None:
        return type(self).forward_head(self, x, pre_logits=pre_logits)
    # timm's own heads, which must not pool tokens that are not there; some pool inside, whoever is there.
    elif not hasattr(type(self), "pool"):
        out = _pooling_head(self, x, pre_logits)
    else:
        out = type(self).forward_head(self, tokens.for_heads(self, x), pre_logits=pre_logits)
    if tokens is not None and not pre_logits:
        tokens.saw_logits(x, out)
    return out


def _forward_intermediates(
    self: Any, x: Tensor, *args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
) -> Any:
    _check_no_mask(attn_mask, is_causal)
    return intermediates(self, x, *args, **kwargs)


def _pooling_head(self: Any, x: Tensor, pre_logits: bool) -> Tensor:
    pooled = self.head_drop(norm_behind_pool(self)(mounted(self).pool(self, x, None)))
    return pooled if pre_logits else self.head(pooled)


_METHODS: dict[str, Callable[..., Any]] = {
    "forward_features": _forward_features,
    "forward_head": _forward_head,
    "pool": _pool,
    "forward_intermediates": _forward_intermediates,
}


_TOKENS = ("forward_features", "forward_intermediates")  # which give final tokens
_TOLERANCE = 1e-4  # of the largest number that timm's forward gives


def route(model: ViT) -> None:
    """Lead the model's methods through what hangs on it, and the others to its class again.

    A token pruner (an object with features, pool, handed, for_heads and saw_logits) needs all of them. A head (logits,
    handed, came_from) needs ``forward_head``, and beside it where images may have any size what gives it tokens.
    """
    pruned, headed = mounted(model) is not None, mounted_head(model) is not None
    sizes = headed and getattr(model, "dynamic_img_size", False)
    for name, function in _METHODS.items():
        model.__dict__.pop(name, None)
        if not hasattr(type(model), name):
            continue
        # Partial, since pickle would look a bound method up by its name.
        if pruned or (headed and name == "forward_head"):
            model.__dict__[name] = partial(function, model)
        elif sizes and name in _TOKENS:
            model.__dict__[name] = partial(_with_grid, name, model)


def check_methods(model: nn.Module) -> None:
    """Refuse a model with a forward of its own, set on the object by others than prunex or torch.compile."""
    suspects = ("forward",) if mounted(model) is not None or mounted_head(model) is not None else ("forward", *_METHODS)
    set_here = [name for name in suspects if name in vars(model)]
    foreign = [name for name in set_here if not hasattr(vars(model)[name], "_torchdynamo_orig_callable")]
    if foreign:
        raise PrunexError(
            f"this {type(model).__name__} has its own {', '.join(foreign)}, set on the object: restore the class's "
            "methods first, or make a subclass and give the plain model"
        )


def check_routes(model: nn.Module) -> None:
    """Refuse a model one of whose methods was compiled on the object, where :func:`route` would put its own."""
    compiled = [name for name in _METHODS if hasattr(vars(model).get(name), "_torchdynamo_orig_callable")]
    if compiled:
        raise PrunexError(
            f"{', '.join(compiled)} of this {type(model).__name__} is compiled on the object, and what is attached "
            f"would take its place: del model.{compiled[0]}, and compile the model (model.compile()) instead"
        )


def check_parity(model: ViT) -> Anatomy:
    """Refuse, by name, a model of whose small random input our forward makes something else; else its anatomy."""
    anatomy = read(model)
    check_methods(model)
    weight = next(model.parameters())
    if weight.is_meta:
        return anatomy
    # A generator of its own: the user's random numbers stay as they were.
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, anatomy.channels, *anatomy.image, generator=generator).to(weight)
    with as_found(model, train=False), torch.no_grad():
        inner: Any = model
        timms = type(inner).forward_features(inner, image)
        # With the rows asked for every block is opened, so that both halves are compared.
        rows = Tape(rows=frozenset(range(anatomy.depth)))
        ours = run(model, image, (), Recorder(rows)).tokens
    scale = timms.abs().max().clamp(min=1e-6)
    gap = float((ours - timms).abs().max() / scale)
    coarse = {torch.float16: 2e-2, torch.bfloat16: 6e-2}  # either way of computing it is as far from the exact one
    if not gap <= max(_TOLERANCE, coarse.get(weight.dtype, 0)):
        raise PrunexError(
            f"{type(model).__name__} computes something prunex does not know (outputs differ by {gap:.1e} of their "
            "size): it is not supported as it is"
        )
    return anatomy
