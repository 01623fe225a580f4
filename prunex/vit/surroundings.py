"""What a module does round its ViT: what enters the ViT, and what becomes of its output.

A LightningModule, a pipeline or a wrapper may normalise, resize or crop before its ViT, and have a head of its own
behind it. One real call of the module is watched, with another ViT in the place of its own. The module itself is never
altered, so that several threads may look at it. What follows the ViT is a function of its output, a :class:`Tail`.
"""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.errors import PrunexError, Unfollowed
from prunex.targets import Aimed, Function, fields
from prunex.vit.anatomy import ViT, channels_of, check_values, find, head_classes
from prunex.vit.aside import as_found, shallow
from prunex.vit.forward import predict, run
from prunex.vit.intermediates import FORMATS, GridCall
from prunex.vit.mount import mounted
from prunex.vit.readout import TAIL
from prunex.vit.recorder import Recorder
from prunex.vit.tail import Tail, alike, cannot, fits, kind, precise, rows_of, stand_in, with_another
from prunex.vit.trace import TokenTrace
from prunex.vit.weights import is_packed, wrapped_layers


@dataclass(eq=False, repr=False)
class Call(Brief):
    """What a model's own forward made of some images, and the ViT by which it is explained."""

    model: nn.Module  # the model
    # a ViT that answers as the model does: its own where the model gives its output on, else a copy that shares all
    # with it and ends in the model's :class:`Tail`
    vit: ViT
    given: Tensor  # what the model was called on, on its device and in its dtype
    entered: Tensor  # [B, C, h, w], what its ViT was given
    # [B, classes], what the model gave, or the one such tensor in it; None where it is a ViT that was not asked yet
    output: Tensor | None = None
    field: str = ""  # where in the model's output that was, such as ``"logits"``; empty for a plain tensor
    trace: TokenTrace | None = None  # what a pruned ViT did to the patches

    @property
    def prepared(self) -> Tensor | None:
        """What entered the ViT, where that is not the images themselves."""
        same = self.entered is self.given or (
            self.entered.shape == self.given.shape and torch.equal(self.entered, self.given.to(self.entered))
        )
        return None if same else self.entered

    def check(self, method: str, logits: Tensor, trace: TokenTrace) -> None:
        """See that what was explained, [B, classes], is what the model gives; a ViT is asked once for each state."""
        output, own_trace, state = self.output, self.trace, None
        if output is None:
            state = _state(self.vit)
            if method in _methods_checked(self.vit, state):
                return
            # Who counts a method's forwards shall not count this one.
            running = ASKING.set(True)
            try:
                with torch.no_grad():
                    output, own_trace = own_output(self.vit, self.entered[:1])
            finally:
                ASKING.reset(running)
        if output.ndim != 2:  # tokens, of which an explainer may need some alone
            return
        # Quantised layers round their inputs, too, and fall on the other side wherever these differ in the last bit.
        exact = precise(self.entered) and not any(is_packed(layer) for *_, layer in wrapped_layers(self.vit))
        if alike(logits[: len(output)], output, exact):
            if state is not None:
                _CHECKED[self.vit] = (state, _methods_checked(self.vit, state) | {method})
            return
        if own_trace is not None and not own_trace.tokens().equal(trace.tokens()[: len(output)]):
            return  # scores within rounding of each other: other patches left, which says nothing of the model
        # Hooks are the usual reason: name some.
        hooked = [name for name, m in self.vit.named_modules() if m._forward_hooks and name]
        such_as = f", such as on {', '.join(hooked[:3])}" if hooked else ""
        text = (
            f"{method} would explain another model: its logits are not those of {kind(self.model)}'s own forward; are "
            f"there hooks or layers that change what it computes{such_as}? Take them off first, or use rollout"
        )
        if exact:
            raise PrunexError(text)
        warnings.warn(f"{text} (in low precision this may be rounding)", stacklevel=5)


ASKING: ContextVar[bool] = ContextVar("asking", default=False)  # whether a check runs, for who counts forwards
_CHECKED: WeakKeyDictionary[nn.Module, tuple[int, frozenset[str]]] = WeakKeyDictionary()
_HANDING_ON: WeakKeyDictionary[nn.Module, tuple[int, Tensor]] = WeakKeyDictionary()  # state, one row of output


def _methods_checked(vit: nn.Module, state: int) -> frozenset[str]:
    """The methods that were compared with a ViT's own forward in this state."""
    known, methods = _CHECKED.get(vit, (None, frozenset()))
    return methods if known == state else frozenset()


def _state(vit: nn.Module) -> int:
    """A number that changes with a ViT's weights, layers and hooks; prunex's own are known."""
    parts: list[Any] = []
    for m in vit.modules():
        parts += (id(m), type(m), tuple(vars(m)))
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()):
            if not str(getattr(hook, "__module__", "")).startswith("prunex."):
                parts.append(id(hook))
    # torch counts what is written into a tensor in place; one made in inference mode has no count.
    for t in (*vit.parameters(), *vit.buffers()):
        parts += (id(t), type(t), -1 if t.is_inference() else t._version)
    return hash(tuple(parts))


def look(model: nn.Module, vit: ViT, images: Tensor, named: bool = False) -> Call:
    """Call a model in eval mode once as it is, and note what goes in and out of its ViT.

    A ViT without hooks of its own is called later, if at all. ``named``: somebody chose this ViT among several, so that
    one the model does not call is meant by itself.
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
            f"{kind(model)} has no forward that calls its {kind(vit)}, so images are taken to enter it as they are: "
            "normalise and resize them as the ViT expects",
            stacklevel=3,
        )
        return Call(model, vit, images, images)
    return call


def _batch(images: Any) -> Tensor:
    """A batch of images of any type, its values finite."""
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        what = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"type {type(images).__name__}"
        raise PrunexError(f"images have {what}: give a tensor [B, C, H, W] of at least one image")
    check_values(images)
    return images.detach()


class _Heard:
    """Stands for a ViT in one call of its module: answers as it does, and notes what it was asked.

    With a ``sample``, a row of its output, it repeats that instead of running the ViT.
    """

    def __init__(self, module: nn.Module, vit: ViT, sample: Tensor | None) -> None:
        self.module, self.vit, self.sample = module, vit, sample
        self.calls: list[tuple[Tensor, Tensor, Tensor, TokenTrace | None]] = []  # given, answer, the tensor handed out
        self.grid_calls: list[GridCall] = []  # of the calls those for grids
        self.answer: Any = None  # of the module

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        if any(value is not None and value is not False for value in (*more, *named.values())):
            raise cannot(self.module, f"calls its {kind(self.vit)} with more than images")
        trace = None
        if self.sample is None:
            out, trace = own_output(self.vit, x)
        else:
            out = self.sample.repeat(len(x), *[1] * (self.sample.ndim - 1))
        self.calls.append((x, out.clone(), out, trace))  # the module may write into it
        return out

    def grids(self, x: Tensor, *more: Any, **named: Any) -> list[Tensor]:
        call = GridCall.of(self.vit, *more, **named)
        if not call.grids_alone:
            raise cannot(
                self.module, f"asks its {kind(self.vit)} for more than grids", "ask with intermediates_only=True"
            )
        result, trace = own_grids(self.vit, x, call)
        self.calls.append((x, call.row(result).clone(), x, trace))
        self.grid_calls.append(call)
        return result

    def listen(self, images: Tensor) -> bool:
        """Call the module; whether it has a forward."""
        module = self.module
        try:
            self.answer = with_another(module, self.vit, stand_in(self.vit, self.forward, self.grids))(images)
        except NotImplementedError as error:  # as nn.Module raises where no forward is written
            if self.calls:
                raise cannot(module, f"raised {type(error).__name__} ({error})") from error
            return False
        except (PrunexError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a stranger's forward raises
            if module is self.vit:
                raise
            raise cannot(module, f"raised {type(error).__name__} when called on the images ({error})") from error
        return True

    def only_call(self, count: int) -> tuple[Tensor, Tensor, Tensor, TokenTrace | None]:
        """The one call, of so many images; anything else is refused."""
        name = kind(self.vit)
        if not self.calls:
            raise cannot(
                self.module, f"never calls its {name} as a whole (does it use forward_features, or the blocks?)"
            )
        if len(self.calls) > 1:
            raise cannot(self.module, f"calls its {name} {len(self.calls)} times for one batch")
        entered = self.calls[0][0]
        if not isinstance(entered, Tensor) or len(entered) != count:
            what = len(entered) if isinstance(entered, Tensor) else type(entered).__name__
            raise cannot(self.module, f"gives its {name} {what} images for {count}")
        return self.calls[0]


def watch(module: nn.Module, vit: ViT, images: Tensor, named: bool = False) -> Call | None:
    """Call a module in eval mode once, without gradients, and note what goes in and out of its ViT.

    None for a module that has no forward, or does not call a ViT that was ``named``. Refused is one that fails, calls
    its ViT several times or on other images, gives no [B, classes] or several, or answers by more than its ViT's
    output.
    """
    state = hash((_state(module), images.dtype, torch.is_autocast_enabled(images.device.type)))
    # A module that gave its ViT's output on, in this very state, is only looked at for what enters and comes out.
    known, sample = _HANDING_ON.get(module, (None, None))
    sample = sample if known == state else None
    heard = _Heard(module, vit, sample)
    with torch.no_grad():
        if not heard.listen(images) or (named and not heard.calls):
            return None
        entered, out, handed, trace = heard.only_call(len(images))
        answer = heard.answer
        # The ViT's very tensor came out unchanged: nothing follows it.
        if answer is handed and torch.equal(answer, out):
            if sample is not None:
                return Call(module, vit, images, entered)
            _HANDING_ON[module] = (state, out[:1].clone())
            return Call(module, vit, images, entered, out, "", trace)
        if sample is not None:  # on these images it does something else
            _HANDING_ON.pop(module, None)
            return watch(module, vit, images, named)
        # Something follows the ViT: the ViT that is explained ends in it.
        field, output = _chosen(module, answer, len(images))
        seen = shallow(vit)
        seen.__dict__[TAIL] = Tail(module, vit, torch.zeros_like(images[:1]), field, out, output, *heard.grid_calls)
        return Call(module, seen, images, entered, output, field, trace)


def aimed(model: nn.Module, target: Function, images: Tensor) -> ViT:
    """The ViT of a model, ending in a target's number, [B, 1], in the place of what the model answers."""
    whole = Aimed(model, target)
    with as_found(whole, train=False):
        return look(whole, find(whole)[1], images).vit


def follow(model: nn.Module, vit: ViT, images: Tensor, who: str, named: bool = False) -> Call:
    """As :func:`look`, for who goes on with the ViT itself, with a warning, where a model cannot be followed."""
    try:
        return look(model, vit, images, named)
    except Unfollowed as error:
        warnings.warn(f"{who} goes by the {kind(vit)} alone: {error}", stacklevel=2)
        return Call(model, vit, images, images)


def check_own_classes(model: nn.Module, vit: Any, who: str, classes: int | None = None) -> None:
    """Refuse a model whose classes (or, of ``classes``, their number) are others than its ViT's own."""
    try:
        call = _tried(model, vit)
    except PrunexError as error:
        warnings.warn(f"{who} takes labels for classes of the {kind(vit)} itself: {error}", stacklevel=2)
        return
    tail = vars(call.vit).get(TAIL)
    if tail is not None and tail.classes != classes:
        raise PrunexError(
            f"{who} goes by the {kind(vit)}'s own {head_classes(vit)} classes, and {kind(model)} makes {tail.classes} "
            f"others of them: give the ViT itself that head, or leave {who} out"
        )


def warn_of_the_rest(model: nn.Module, vit: Any, who: str) -> None:
    """Say what a model does round its ViT, for who takes the ViT alone out of it."""
    try:
        call = _tried(model, vit)
    except PrunexError:  # nothing is known of it
        return
    tail = vars(call.vit).get(TAIL)
    done = [] if call.prepared is None else [f"prepares images before its {kind(vit)}"]
    done += [] if tail is None else [f"makes {tail.classes} outputs of that one's {tail.given.shape[1]}"]
    if done:
        warnings.warn(f"{who} goes by the {kind(vit)} alone, and {kind(model)} {' and '.join(done)}", stacklevel=2)


def answering(model: nn.Module, vit: Any) -> Any:
    """The ViT ending in what follows it in a model, as far as one call tells; else the ViT itself."""
    try:
        return _tried(model, vit).vit
    except PrunexError:
        return vit


def _tried(model: nn.Module, vit: Any) -> Call:
    """A call on one image of the ViT's size."""
    weight, embed = next(vit.parameters()), vit.patch_embed
    # Any image does: what is looked at is where it goes, not what is on it.
    image = torch.rand(1, channels_of(embed), *embed.img_size, generator=torch.Generator().manual_seed(0))
    with as_found(model, train=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return look(model, vit, image.to(weight), named=True)


def own_output(vit: ViT, images: Tensor) -> tuple[Tensor, TokenTrace | None]:
    """What a ViT answers, in its mode and by the forward of its class, and what it did to patches if it is pruned."""
    if mounted(vit) is None:
        inner: Any = vit
        out, tail = type(inner).forward(inner, images), vars(vit).get(TAIL)
        return out if tail is None else tail(out), None
    prediction = predict(vit, images)
    return prediction.logits, prediction.state.trace


def own_grids(vit: ViT, images: Tensor, call: GridCall) -> tuple[list[Tensor], TokenTrace | None]:
    """As :func:`own_output`, the grids of a call."""
    if mounted(vit) is None:
        inner: Any = vit
        layout = FORMATS[0] if call.channels_first else FORMATS[1]
        options = {"norm": call.norm, "output_fmt": layout, "stop_early": call.stop is not None}
        return inner.forward_intermediates(images, call.wanted, intermediates_only=True, **options), None
    watch = call.watch(vit)
    state = run(vit, images, recorder=Recorder(watch=watch))
    return [watch.grids[i] for i in call.wanted], state.trace


def _chosen(module: nn.Module, answer: Any, count: int) -> tuple[str, Tensor]:
    """The one [B, classes] in a module's output, and where it is."""
    parts = fields(answer)
    fitting = [name for name, value in parts.items() if fits(value, count)]
    if "logits" in fitting:
        fitting = ["logits"]
    if len(fitting) != 1:
        what = f"several tensors [B, classes] ({', '.join(fitting)})" if fitting else "no tensor [B, classes]"
        raise cannot(module, f"gives {what} in its {type(answer).__name__}", "wrap it so that it gives logits alone")
    return fitting[0], rows_of(parts[fitting[0]], count)
