"""What a layer computes with, whatever was put on it: adapters, masks, reparametrised and quantised weights.

``layer.weight`` is what a linear layer, or the patch embedding's convolution, computes with only where nothing else
takes part in its forward. Of any other layer that is linear all the same, the weight is f(1) - f(0), 1 the identity and
f the layer in eval mode: that needs no knowledge of who wrapped it. Nothing is remembered from one reading to the next,
since adapters are switched, scaled and merged by attributes that nobody can watch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from timm.layers import HybridEmbed, LayerScale, PatchEmbed
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.aside import as_found, shallow
from prunex.vit.mount import mounted, mounted_units

# Under which names timm's ViTs and Swins hold linear layers.
_SLOTS = (
    "qkv", "q_proj", "k_proj", "v_proj", "proj", "gate", "fc1", "fc1_g", "fc1_x", "fc2", "in_proj", "out_proj",
    "attn_out_proj", "mlp_out_proj", "q", "kv", "head", "head_dist", "fc", "reduction",
)  # fmt: skip
_HEADS = ("head", "head_dist")  # which may also hold several layers, and are called as they are
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_SMALL = (torch.int8, torch.uint8)  # numbers that weights are packed into


class OwnHook:
    """A forward hook of prunex itself: it takes part in what a layer computes, and is no part of its weights.

    What a ``functools.partial`` is, but for its name: torch.compile takes those of a class derived from it for plain.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self, *more: Any) -> Any:
        """The hook, as torch calls it."""
        return self.function(*self.args, *more)


class Unread(PrunexError):
    """A layer whose weights cannot be told; :func:`by_name` adds the name that it has in its model."""

    def __init__(self, layer: nn.Module, why: str, name: str = "") -> None:
        super().__init__(f"{name or 'a layer'} ({_kind(layer)}) {why}")
        self.layer, self.why = layer, why

    def __reduce__(self) -> Any:
        return PrunexError, (str(self),)  # to another process goes the message alone


@contextmanager
def by_name(model: nn.Module) -> Iterator[None]:
    """Let an :class:`Unread` that is raised inside say which of a model's layers it is."""
    try:
        yield
    except Unread as error:
        name = next((n for n, m in model.named_modules() if m is error.layer), "")
        raise (Unread(error.layer, error.why, name) if name else error) from error.__cause__


def is_linear(layer: Any) -> bool:
    """Whether a module stands where a linear layer does: one itself, or what somebody put round one."""
    if not isinstance(layer, nn.Module) or convolution_of(layer) is not None:
        return False
    return _tells_sizes(layer) or _inner(layer) is not None


def stands_for_linear(layer: Any, name: str) -> bool:
    """Whether a module stands, under its name in timm's models, where a linear layer does; not a head of several."""
    # By name first: every module of a model is asked, and looking inside walks through all that it holds.
    named = name in _SLOTS and name not in _HEADS
    return (_tells_sizes(layer) or (named and _inner(layer) is not None)) and convolution_of(layer) is None


def sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, also of a wrapper that does not tell them itself."""
    linear = layer if _tells_sizes(layer) else _inner(layer)
    if linear is None:
        raise Unread(layer, "is no linear layer")
    return linear.in_features, linear.out_features


def convolution_of(layer: Any) -> nn.Conv2d | None:
    """The convolution that a layer is, or that somebody put something round; None of a linear layer, or of neither."""
    if not isinstance(layer, nn.Module):
        return None
    # By all customs the first layer in a wrapper is the one that was there before.
    first = next((m for m in layer.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
    return first if isinstance(first, nn.Conv2d) else None


def _stands_for_convolution(parent: nn.Module, name: str, layer: nn.Module) -> bool:
    return name == "proj" and isinstance(parent, PatchEmbed | HybridEmbed) and convolution_of(layer) is not None


def kind_of(layer: nn.Module) -> type[nn.Linear] | type[nn.Conv2d]:
    """What a layer is, or stands in the place of."""
    return nn.Linear if convolution_of(layer) is None else nn.Conv2d


def _tells_sizes(layer: Any) -> bool:
    return all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))


def _inner(layer: nn.Module) -> nn.Linear | None:
    return next((m for m in layer.modules() if isinstance(m, nn.Linear)), None)


def has_others_hooks(module: nn.Module) -> bool:
    """Whether hooks are on a module that are not prunex's own."""
    return any(not isinstance(hook, OwnHook) for name in _HOOKS for hook in getattr(module, name).values())


def forwards_plainly(layer: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer's forward is torch's own, with no hooks around it but those of prunex."""
    if not isinstance(layer, kind) or has_others_hooks(layer):
        return False
    # Adapters, and who patches a layer, put a forward on the class or on the object.
    return type(layer).forward is kind.forward and "forward" not in vars(layer)


def is_plain(layer: Any, kind: type[nn.Module] = nn.Linear) -> TypeGuard[nn.Linear]:
    """Whether a layer computes with its own weight and bias, and with nothing else."""
    return isinstance(layer, kind) and forwards_plainly(layer, kind) and holds_plain(layer)


def holds_plain(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters of ordinary numbers, not computed from others and not packed."""
    parameters = layer._parameters
    return (
        parameters.get("weight") is not None
        and "bias" in parameters
        and all(p is None or _ordinary(p) for p in parameters.values())
    )


def _ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.element_size() > 1


def effective(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] (or [out, C, h, w]) and bias [out] or None that a layer computes with in eval mode, detached.

    Of an ``nn.Linear``, an ``nn.Conv2d`` whose stride is its kernel, or whatever stands in one's place. One that is not
    linear, or does not run on its own, is :class:`Unread`.
    """
    kind = kind_of(layer)
    if is_plain(layer, kind):
        return _held(layer)
    # What the layer computes is asked of itself, and compared: no list of wrappers would ever be whole.
    run = _bare(layer)
    with _aside(layer):
        try:
            weight, bias = _unpacked(layer) or _probed(layer, run)
            gap = _gap(layer, run, weight, bias)
        except Unread:
            raise
        except Exception as error:  # whatever somebody's forward stumbles over
            raise Unread(layer, f"cannot be run on its own ({type(error).__name__}: {error})") from error
        if not gap <= _tolerance(layer):
            raise Unread(
                layer,
                f"is not linear (its outputs differ by {gap:.1e} of their size from what a weight would make of the "
                "same inputs), so it has no weights to read; use a method that needs none, such as taylor or rollout",
            )
        # Hooks that only watch change nothing, not even rounding: the layer's own weights are exact then.
        if holds_plain(layer) and isinstance(layer, kind) and _equal(_held(layer), (weight, bias), _tolerance(layer)):
            return _held(layer)
    return weight, bias


def _held(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _unpacked(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Of a plain forward over a packed weight, such as torchao's: the weight unpacked."""
    weight = getattr(layer, "weight", None)
    if not forwards_plainly(layer) or not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter):
        return None
    return weight.dequantize().detach(), None if layer.bias is None else layer.bias.detach()


def _probed(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    shape, like = _input_shape(layer), _numbers(layer)
    count = math.prod(shape)
    bias = run(_arranged(torch.zeros(1, *shape, **like))).reshape(-1)
    rows = run(_arranged(torch.eye(count, **like).view(count, *shape))).reshape(count, -1)
    base = convolution_of(layer) or _inner(layer)
    has_bias = getattr(base, "bias", None) is not None or bool(bias.any())
    return (rows - bias).T.reshape(-1, *shape), bias if has_bias else None


def _gap(layer: nn.Module, run: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None) -> float:
    """How far a layer's outputs for three random inputs are from those of a weight, as a share of the largest."""
    shape, convolution = _input_shape(layer), convolution_of(layer)
    if convolution is None:
        x = _random(layer, *shape)
        wanted = nn.functional.linear(x, weight.to(x), None if bias is None else bias.to(x))
    else:  # several patches, which one that turns or mixes pixels would not leave apart
        x = _random(layer, shape[0], 2 * shape[1], 2 * shape[2])
        how: Any = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        wanted = nn.functional.conv2d(x, weight.to(x), None if bias is None else bias.to(x), *how)
    out = run(_arranged(x)).reshape(wanted.shape)
    return float((out - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _random(layer: nn.Module, *shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(**_numbers(layer))


def _arranged(x: Tensor) -> Tensor:
    """Vectors as the tokens of one image [1, n, in], which all adapters take; patches as they are."""
    return x[None] if x.ndim == 2 else x


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    convolution: Any = convolution_of(layer)
    if convolution is not None:
        return (convolution.in_channels, *convolution.kernel_size)
    return (sizes(layer)[0],)


def _bare(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer without prunex's own hooks: its twin, which shares all else with it, since others may be using it."""
    twin: nn.Module = shallow(layer)
    hooks = layer._forward_pre_hooks
    others = {number: hook for number, hook in hooks.items() if not isinstance(hook, OwnHook)}
    twin.__dict__["_forward_pre_hooks"] = type(hooks)(others)
    return twin


@contextmanager
def _aside(layer: nn.Module, graph: bool = False) -> Iterator[None]:
    device = _numbers(layer)["device"].type
    with (
        as_found(layer, train=False),
        torch.inference_mode(False),
        torch.set_grad_enabled(graph),
        torch.autocast(device, enabled=False),
    ):
        yield


def _numbers(layer: nn.Module) -> dict[str, Any]:
    """Type and device of the numbers that a layer computes with: those of ordinary weights, if it has any."""
    held = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point() and t.element_size() > 1]
    first = next((t for t in held if _ordinary(t)), held[0] if held else torch.empty(0))
    return {"dtype": first.dtype, "device": first.device}


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weights are quantised, sharded or otherwise no numbers that arithmetic is done with."""
    held = list(layer.parameters())
    return not held or not all(_ordinary(p) for p in held) or any(b.dtype in _SMALL for b in layer.buffers())


def _tolerance(layer: nn.Module) -> float:
    """What rounding may do to a linear layer's outputs; inputs that are quantised too cost one part in a hundred."""
    kind = _numbers(layer)["dtype"]
    if is_packed(layer) or kind in (torch.float16, torch.bfloat16):
        return 5e-2
    return 1e-8 if kind == torch.float64 else 1e-3


def _equal(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None], tolerance: float) -> bool:
    if (a[1] is None) != (b[1] is None):
        return False
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            continue
        if not float((x - y).abs().max()) <= tolerance * float(x.abs().max().clamp(min=1e-12)):
            return False
    return True


def scale_of(module: nn.Module) -> Tensor | None:
    """What LayerScale, or whatever stands in its place, multiplies each channel by, [D]; None for an identity."""
    module = behind(module)
    if isinstance(module, nn.Identity):
        return None
    if type(module) is LayerScale and forwards_plainly(module, LayerScale):
        return module.gamma.detach()
    run, width = _bare(module), max((p.shape[-1] for p in module.parameters()), default=1)
    with _aside(module):
        # A row of ones shows the factors, the random rows that there is nothing else.
        x = _random(module, width)
        x[0] = 1
        try:
            scale, *others = run(x[None])[0]
        except Exception as error:
            raise Unread(module, f"cannot be run on its own ({type(error).__name__}: {error})") from error
        if not torch.allclose(torch.stack(others), scale * x[1:], rtol=_tolerance(module), atol=1e-6):
            raise Unread(module, "does more than to scale channels, and what it does cannot be read")
    return scale


def behind(module: Any) -> Any:
    """The module that runs inside of one that switches between several, as peft's ``modules_to_save`` are kept.

    Any other module itself.
    """
    saved = getattr(module, "modules_to_save", None)
    if not isinstance(saved, nn.ModuleDict) or not hasattr(module, "original_module"):
        return module
    # As peft's own forward chooses: the active adapter's module, else the one that was there before.
    active = module.active_adapters
    off = module.disable_adapters or not active or active[0] not in saved
    return module.original_module if off else saved[active[0]]


def is_identity(module: Any) -> bool:
    """Whether a module passes everything on, or there is none."""
    return isinstance(behind(module), nn.Identity | None)


def wrapped_layers(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Layers of a timm model that are not plain where linear ones, or the patch embedding's convolution, stand.

    Of each its path, its parent, its name there, and itself.
    """
    for name, child in model.named_children():
        if not stands_for_linear(child, name) and not _stands_for_convolution(model, name, child):
            if child not in (mounted(model), mounted_units(model)):
                yield from wrapped_layers(child, f"{path}{name}.")
        elif not is_plain(child, kind_of(child)):
            yield path + name, model, name, child


def misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Names that one side alone has, or whose tensors differ in shape or in whether they are whole numbers."""
    names = wanted.keys() ^ given.keys()
    for name in wanted.keys() & given.keys():
        a, b = wanted[name], given[name]
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            names.add(name)
    return sorted(names)


def check_gradients(model: nn.Module, instead: str) -> None:
    """Refuse, by name, layers that gradients do not pass, and say that ``instead`` would do."""
    for path, _, _, layer in wrapped_layers(model):
        if type(layer).forward is kind_of(layer).forward and holds_plain(layer) and "forward" not in vars(layer):
            continue  # it has hooks, which shall see nothing but what the model is given
        how = _stops_gradients(layer)
        if how:
            raise Unread(
                layer, f"{how}: use the model as it was before it was quantised or wrapped, or {instead}", path
            )


def _stops_gradients(layer: nn.Module) -> str:
    """What a layer does to gradients that it should not; of one that does not run on its own nothing is known."""
    with _aside(layer, graph=True):
        run, x = _bare(layer), _random(layer, *_input_shape(layer))
        # The third input is the sum of the others, by which it is seen whether the layer is linear at all.
        x[2] = x[0] + x[1]
        try:
            zero, out = (run(_arranged(v)).reshape(3, -1) for v in (torch.zeros_like(x), x.requires_grad_()))
        except Exception:
            return ""
        r = _random(layer, out.shape[1])
        gradient = torch.autograd.grad(out, x, r, allow_unused=True)[0] if out.requires_grad else None
    if gradient is None:
        return "lets no gradient through"
    with torch.no_grad():
        moved = out - zero
        linear = (moved[2] - moved[0] - moved[1]).abs() <= _tolerance(layer) * moved.abs().max()
        # Of a linear layer <r, f(x) - f(0)> is <gradient, x>: an equation that needs no weights.
        gap = ((r * moved).sum(1) - (gradient * x).flatten(1).sum(1)).abs()
        passed = gap <= _tolerance(layer) * (r * moved).abs().sum(1)
    return "lets only a part of the gradient through" if bool(linear.all()) and not bool(passed.all()) else ""


def _kind(layer: nn.Module) -> str:
    """A layer's class, with the package it comes from and what its weight is, where that is telling."""
    package, weight = type(layer).__module__.split(".")[0], getattr(layer, "weight", None)
    packed = isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter)
    return f"{package}.{type(layer).__name__}" + (f" of {type(weight).__name__}" if packed else "")
