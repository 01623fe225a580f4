"""What a module does round its ViT: what enters the ViT, and what becomes of its output.

A LightningModule, a pipeline or a wrapper may normalise, resize or crop before its ViT, and have a head of its own
behind it. One real call of the module is watched, with another ViT in the place of its own. The module itself is never
altered, so that several threads may look at it. What follows the ViT is a function of its output, a :class:`Tail`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.errors import PrunexError, Unfollowed
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.forward import own_anatomy, own_pruners, run
from prunex.vit.readout import TAIL, head
from prunex.vit.trace import TokenTrace
from prunex.vit.weights import is_packed, wrapped_layers

Forward = Callable[..., Tensor]
ROWS = 64  # unit vectors that go through a tail at once


@dataclass(eq=False, repr=False)
class Call(Brief):
    """What a model's own forward made of some images, and the ViT by which it is explained.

    Attributes:
        model: The model.
        vit: A ViT that answers as the model does: its own where the model gives its output on, else a copy that shares
            all with it and ends in the model's :class:`Tail`.
        given: What the model was called on, on its device and in its dtype.
        entered: [B, C, h, w], what its ViT was given.
        output: [B, classes], what the model gave, or the one such tensor in it; None where it is a ViT that was not
            asked yet.
        field: Where in the model's output that was, such as ``"logits"``; empty for a plain tensor.
        trace: What a pruned ViT did to the patches.
    """

    model: nn.Module
    vit: ViT
    given: Tensor
    entered: Tensor
    output: Tensor | None = None
    field: str = ""
    trace: TokenTrace | None = None

    @property
    def prepared(self) -> Tensor | None:
        """What entered the ViT, where that is not the images themselves."""
        same = self.entered is self.given or (
            self.entered.shape == self.given.shape and torch.equal(self.entered, self.given.to(self.entered))
        )
        return None if same else self.entered

    def check(self, method: str, logits: Tensor, trace: TokenTrace) -> None:
        """See that what was explained is what the model gives; a ViT itself is asked once for each of its states.

        Args:
            method: Who explains.
            logits: [B, classes], what was explained.
            trace: What that forward did to the patches.

        Raises:
            PrunexError: Where it is not.
        """
        output, own, state = self.output, self.trace, None
        if output is None:
            state = _state(self.vit)
            known = _CHECKED.get(self.vit)
            if known is not None and known[0] == state and method in known[1]:
                return
            with torch.no_grad():
                output, own = own_output(self.vit, self.entered[:1])
        if output.ndim != 2:
            return  # tokens, of which an explainer may need some alone
        # Quantised layers round their inputs, too, and fall on the other side wherever these differ in the last bit.
        precise = _precise(self.entered) and not any(is_packed(layer) for *_, layer in wrapped_layers(self.vit))
        if alike(logits[: len(output)], output, precise):
            if state is not None:
                known = _CHECKED.get(self.vit)
                methods = known[1] if known is not None and known[0] == state else frozenset()
                _CHECKED[self.vit] = (state, methods | {method})
            return
        if own is not None and not own.tokens().equal(trace.tokens()[: len(output)]):
            return  # scores within rounding of each other: other patches left, which says nothing of the model
        hooked = [name for name, m in self.vit.named_modules() if m._forward_hooks and name]
        why = f"are there hooks or layers that change what it computes{', such as on ' * bool(hooked)}"
        text = (
            f"{method} would explain another model: its logits are not those of {_name(self.model)}'s own forward; "
            f"{why}{', '.join(hooked[:3])}? Take them off first, or use rollout"
        )
        if precise:
            raise PrunexError(text)
        warnings.warn(f"{text} (in low precision this may be rounding)", stacklevel=3)


_CHECKED: WeakKeyDictionary[nn.Module, tuple[int, frozenset[str]]] = WeakKeyDictionary()


def _state(vit: nn.Module) -> int:
    """A number that changes with a ViT's weights, layers and hooks."""
    layers = [
        (id(m), type(m), tuple(m._forward_hooks), tuple(m._forward_pre_hooks), tuple(vars(m))) for m in vit.modules()
    ]
    tensors = [
        (id(t), type(t), -1 if t.is_inference() else t._version) for t in (*vit.parameters(), *vit.buffers())
    ]  # fmt: skip
    return hash((tuple(layers), tuple(tensors)))


def _precise(images: Tensor) -> bool:
    """Whether a model computes with them to at least float32, so that two ways of doing it agree."""
    kind = images.device.type
    if images.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(kind):
        return False
    return kind != "cuda" or not torch.backends.cuda.matmul.allow_tf32


def look(model: nn.Module, vit: ViT, images: Tensor, named: bool = False) -> Call:
    """Call a model once as it is, and note what goes in and out of its ViT.

    Args:
        model: In eval mode; it holds the ViT, or is it. A ViT without hooks of its own is called later, if at all.
        vit: The ViT.
        images: float [B, C, H, W], or what else the model takes.
        named: Whether somebody chose this ViT among several, so that one the model does not call is meant by itself.

    Returns:
        The call.

    Raises:
        PrunexError: See :func:`watch`; for images that are no batch or not finite.
    """
    weight = next(vit.parameters())
    images = _batch(images)
    # In a new tensor: one of the caller's inference mode can be part of no graph.
    images = images.to(weight.device, weight.dtype if images.is_floating_point() else None)
    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images
        if model is vit and not (vit._forward_hooks or vit._forward_pre_hooks):
            return Call(model, vit, images, images)
        call = watch(model, vit, images, named)
    if call is None:
        warnings.warn(
            f"{_name(model)} has no forward that calls its {_name(vit)}, so the images are explained as they are: "
            "normalise and resize them as the ViT expects",
            stacklevel=3,
        )
        return Call(model, vit, images, images)
    return call


def _batch(images: Any) -> Tensor:
    """A batch of images of any type.

    Raises:
        PrunexError: For anything else, or values that are not finite.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        what = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"type {type(images).__name__}"
        raise PrunexError(f"images have {what}: give a tensor [B, C, H, W] of at least one image")
    if images.is_meta:
        raise PrunexError("images are on the meta device, which holds no values: give them on the CPU or a GPU")
    if images.is_floating_point() and not torch.isfinite(images).all():
        raise PrunexError("images hold NaN or infinite values: clean them first")
    return images.detach()


def watch(module: nn.Module, vit: ViT, images: Tensor, named: bool = False) -> Call | None:
    """Call a module once, without gradients, and note what goes in and out of its ViT.

    Args:
        module: In eval mode; it holds the ViT, or is it.
        vit: The ViT.
        images: What the module takes, [B, ...].
        named: As for :func:`look`.

    Returns:
        The call; None for a module that has no forward, or does not call a ViT that was named.

    Raises:
        PrunexError: For a module that fails on the images, calls its ViT never, several times or on another number of
            images, gives no [B, classes] or more than one, or answers by more than its ViT's output.
    """
    calls: list[tuple[Tensor, Tensor, Tensor, TokenTrace | None]] = []

    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        if any(value is not None and value is not False for value in (*more, *named.values())):
            raise _cannot(module, f"calls its {_name(vit)} with more than images")
        out, trace = own_output(vit, x)
        calls.append((x, out.clone(), out, trace))  # the module may write into it
        return out

    with torch.no_grad():
        try:
            answer = _with(module, vit, _answering(vit, forward))(images)
        except NotImplementedError as error:
            if calls:
                raise _cannot(module, f"raised {type(error).__name__} ({error})") from error
            return None
        except (PrunexError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a stranger's forward raises
            if module is vit:
                raise
            raise _cannot(module, f"raised {type(error).__name__} when called on the images ({error})") from error
        if named and not calls:
            return None
        if not calls:
            raise _cannot(
                module, f"never calls its {_name(vit)} as a whole (does it use forward_features, or the blocks?)"
            )
        if len(calls) > 1:
            raise _cannot(module, f"calls its {_name(vit)} {len(calls)} times for one batch")
        entered, out, handed, trace = calls[0]
        if not isinstance(entered, Tensor) or len(entered) != len(images):
            what = len(entered) if isinstance(entered, Tensor) else type(entered).__name__
            raise _cannot(module, f"gives its {_name(vit)} {what} images for {len(images)}")
        if answer is handed and torch.equal(answer, out):
            return Call(module, vit, images, entered, out, "", trace)
        field, output = _chosen(module, answer, len(images))
        seen = _shallow(vit)
        seen.__dict__[TAIL] = Tail(module, vit, torch.zeros_like(images[:1]), field, out, output)
        return Call(module, seen, images, entered, output, field, trace)


def follow(model: nn.Module, vit: ViT, images: Tensor, who: str, named: bool = False) -> Call:
    """As :func:`look`, for those who go on with the ViT itself where a model does more than can be followed.

    Args:
        model: As for :func:`look`.
        vit: As for :func:`look`.
        images: As for :func:`look`.
        who: Goes on; a warning says so and why.
        named: As for :func:`look`.
    """
    try:
        return look(model, vit, images, named)
    except Unfollowed as error:
        warnings.warn(f"{who} goes by the {_name(vit)} alone: {error}", stacklevel=2)
        return Call(model, vit, images, images)


def own_output(vit: ViT, images: Tensor) -> tuple[Tensor, TokenTrace | None]:
    """What a ViT answers, in its mode and by the forward of its class, and what it did to the patches if it is pruned.

    Nothing is left on the model.
    """
    if not hasattr(vit, "prunex"):
        inner: Any = vit
        out, tail = type(inner).forward(inner, images), vars(vit).get(TAIL)
        return out if tail is None else tail(out), None
    anatomy, attached = own_anatomy(vit), vit.prunex
    tokens, state = run(vit, images, anatomy, own_pruners(vit), masked=bool(attached.masked))
    return head(vit, tokens, state.policy, anatomy, sizes=state.sizes), state.trace


class Tail:
    """What a module makes of its ViT's output: rows [R, D] to rows [R, classes], each by itself.

    Args:
        module: The module, in eval mode.
        vit: Its ViT.
        blank: [1, ...], an image without content, which the module is called on when its ViT's answer is known.
        field: Which part of the module's output is taken.
        given: [B, D], what the ViT gave in a real call.
        output: [B, classes], what the module gave then.

    Raises:
        PrunexError: Where images and batch have a part in the module's output beside the ViT's.
    """

    def __init__(self, module: nn.Module, vit: ViT, blank: Tensor, field: str, given: Tensor, output: Tensor) -> None:
        self.module, self.vit, self.blank, self.field, self.given = module, vit, blank, field, given
        self.classes = output.shape[1]
        try:
            # The same rows again, on blank images and among others.
            again = self._run(torch.cat([given, -given]))
        except PrunexError:
            raise
        except Exception as error:  # whatever a stranger's forward raises
            raise _cannot(module, f"raised {type(error).__name__} on other images ({error})") from error
        if not alike(again[: len(given)], output, _precise(given)):
            raise _cannot(
                module,
                f"answers by more than its {_name(vit)}'s output for each image (by the image itself, by other images "
                "of the batch, or by chance)",
            )
        self._answers = torch.cat([output, again[len(given) :]])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tail:
        # A copy of the ViT, such as a wider one, is followed by the same module.
        return self

    def __call__(self, out: Tensor, ops: Arithmetic = PLAIN) -> Tensor:
        """The module's output for a ViT's output; by an arithmetic's own rule where that opens every layer."""
        if ops.opened:
            return ops.linear(self.linear().to(out), out)
        answer = self._run(out.to(self.given.dtype))
        return answer if out.dtype == self.given.dtype else answer.to(out.dtype)

    def linear(self) -> nn.Linear:
        """The tail as one linear layer.

        Raises:
            PrunexError: Where it is more than that.
        """
        given, width = self.given, self.given.shape[1]
        with torch.no_grad():
            rows = torch.cat([given.new_zeros(1, width), torch.eye(width, dtype=given.dtype, device=given.device)])
            answers = torch.cat([self._run(part) for part in rows.split(ROWS)])
            layer = nn.Linear(width, answers.shape[1], device=given.device, dtype=answers.dtype).requires_grad_(False)
            layer.bias.copy_(answers[0])
            layer.weight.copy_((answers[1:] - answers[0]).T)
            both = layer(torch.cat([given, -given]).to(answers.dtype))
        if not alike(both, self._answers, _precise(given)):
            raise PrunexError(
                f"relevance rules know linear layers behind a ViT, and {_name(self.module)} does more: use "
                "generic_attention or rollout, or explain the ViT itself by what enters it"
            )
        return layer

    def _run(self, out: Tensor) -> Tensor:
        answered = []

        def forward(*_: Any, **__: Any) -> Tensor:
            answered.append(True)
            # The module may write into it, and may call its ViT without a graph where it trains its head alone.
            with torch.set_grad_enabled(out.requires_grad):
                return out.clone()

        whole = _with(self.module, self.vit, _answering(self.vit, forward))
        output = whole(self.blank.expand(len(out), *self.blank.shape[1:]))
        if len(answered) != 1:
            raise _cannot(self.module, f"calls its {_name(self.vit)} {len(answered)} times on other images")
        return _rows(_parts(output).get(self.field), len(out))


def alike(a: Tensor, b: Tensor, precise: bool = True) -> bool:
    """Whether two outputs are the same up to rounding, in relation to the largest of them.

    Args:
        a: [B, C].
        b: Likewise.
        precise: Whether both were computed in at least float32.
    """
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    both = torch.isfinite(a) | torch.isfinite(b)  # what is no number in both is alike
    scale = torch.where(torch.isfinite(b), b.abs(), 0).max().clamp(min=1e-6)
    return bool(((a - b).abs()[both] <= (1e-3 if precise else 0.15) * scale).all())


def _with(module: nn.Module, vit: nn.Module, other: nn.Module) -> nn.Module:
    """A module that shares all with this one, but for another ViT in the place of its own."""
    compiled = module._modules.get("_orig_mod")
    if compiled is not None:
        return _with(compiled, vit, other)
    if module is vit:
        return other
    if not any(m is vit for m in module.modules()):
        return module
    copied = _shallow(module)
    children = {name: None if m is None else _with(m, vit, other) for name, m in module._modules.items()}
    copied.__dict__["_modules"] = children
    if hasattr(copied.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        del copied.__dict__["forward"]  # compiled for the module that this is a copy of
    return copied


def _answering(vit: ViT, forward: Forward) -> ViT:
    """The ViT with another forward; hooks on it stay."""
    copied = _shallow(vit)
    copied.__dict__["forward"] = forward
    return copied


def _shallow(module: Any) -> Any:
    """A module of its own that shares parameters, children and hooks with another."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_compiled_call_impl"] = None
    return copied


def _chosen(module: nn.Module, answer: Any, count: int) -> tuple[str, Tensor]:
    """The one [B, classes] in a module's output, and where it is."""
    parts = _parts(answer)
    fitting = [name for name, value in parts.items() if _fits(value, count)]
    if "logits" in fitting:
        fitting = ["logits"]
    if len(fitting) != 1:
        what = f"several tensors [B, classes] ({', '.join(fitting)})" if fitting else "no tensor [B, classes]"
        raise _cannot(module, f"gives {what} in its {type(answer).__name__}", "wrap it so that it gives logits alone")
    return fitting[0], _rows(parts[fitting[0]], count)


def _parts(answer: Any) -> dict[str, Any]:
    """The parts of an output by name; a tensor is its own only one, named ""."""
    if isinstance(answer, Mapping):
        return {str(name): value for name, value in answer.items()}
    if isinstance(answer, tuple | list):
        return {f"[{i}]": value for i, value in enumerate(answer)}
    if dataclasses.is_dataclass(answer):
        return dict(vars(answer))
    return {"": answer[:, None] if isinstance(answer, Tensor) and answer.ndim == 1 else answer}


def _fits(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2 and len(value) == count


def _rows(value: Any, count: int) -> Tensor:
    if not _fits(value, count):
        raise Unfollowed(f"what follows the ViT gave no tensor [{count}, classes] for {count} images")
    return value


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _cannot(module: nn.Module, what: str, instead: str = "") -> Unfollowed:
    """The error for a module that cannot be explained as a whole."""
    return Unfollowed(
        f"{_name(module)} {what}, so it cannot be explained as a whole: {instead and instead + ', or '}explain the ViT "
        "itself (module.model or as it is called there) by the tensor that enters it"
    )
