"""Attention maps of one forward of somebody's model, and gradients of any score with respect to them."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunex.brief import brief
from prunex.errors import PrunexError, Unreached
from prunex.multimodal.rules import Attended
from prunex.vit.aside import as_found

# What is changed for the call belongs to models and to configurations that models share.
_ONE_AT_A_TIME = threading.RLock()
_ROUNDING = 0.02  # rows of maps in half precision sum to 1 within that


class Recording:
    """What one forward showed.

    Attributes:
        outputs: What the model returned.
        maps: Attention maps in the order in which they were computed, without gradients.
        grid: Height and width of the feature map that entered, where the model makes one by convolution.
    """

    def __init__(self) -> None:
        self.outputs: Any = None
        self.maps: list[Attended] = []
        self.grid: tuple[int, int] | None = None

    def with_gradients(self, score: Tensor, last: bool, unread: Sequence[int] = ()) -> list[Attended]:
        """The maps with the gradient of a score; a map that the score does not depend on has zeros.

        Parameters' gradients are left alone. ``last`` says that nothing else will be asked, so that the graph can go.

        Raises:
            Unreached: The score depends on no attention, or not on a map, but for those at the places ``unread``.
        """
        attention = [map_.attention for map_ in self.maps]
        if not score.requires_grad:
            raise Unreached("the scores do not depend on the model's attention: something on their way is detached")
        # Unused is allowed here and told below: a map that the score was not computed from is no map of gradient 0.
        gradients = torch.autograd.grad(score, attention, retain_graph=not last, allow_unused=True)
        # Places count from the end, since models differ in depth.
        expected = {range(len(attention))[place] for place in unread}
        for place, (map_, gradient) in enumerate(zip(self.maps, gradients, strict=True)):
            if gradient is None and place not in expected:
                raise Unreached(
                    f"the scores do not depend on the attention map that {map_.path} returned: it is a copy, or what "
                    "follows it is detached"
                )
        return [
            replace(map_, gradient=torch.zeros_like(map_.attention) if g is None else _single(g))
            for map_, g in zip(self.plain(), gradients, strict=True)
        ]

    def plain(self) -> list[Attended]:
        """The maps alone."""
        return [replace(map_, attention=_single(map_.attention.detach())) for map_ in self.maps]


def _single(values: Tensor) -> Tensor:
    """Half precision as single: relevance is sums of many small products."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def attention_modules(
    model: nn.Module, roles: Mapping[str, Sequence[str]]
) -> dict[str, tuple[nn.Module, Sequence[str]]]:
    """The modules whose dotted path ends as a pattern says, with the roles of their calls, by path."""
    patterns = {re.compile(rf"(?:.*\.)?{pattern}"): calls for pattern, calls in roles.items()}
    chosen = {}
    for path, module in model.named_modules():
        for pattern, calls in patterns.items():
            if pattern.fullmatch(path):
                chosen[path] = (module, calls)
    return chosen


def refuse(model: nn.Module) -> None:
    """A model whose attention cannot be seen."""
    name = type(model).__name__
    # torch.compile(model) wraps the module, model.compile() marks it.
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        raise PrunexError(
            f"{name} is compiled, and a compiled forward shows no attention: give the model as it was before"
        )
    if any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules()):
        raise PrunexError(
            f"{name} uses gradient checkpointing, which computes attention a second time: call its "
            "gradient_checkpointing_disable() first"
        )
    weights = [*model.parameters()]
    if any(p.is_meta for p in weights):
        raise PrunexError(f"{name} is on the meta device, where nothing is computed: load its weights first")
    if any(p.is_inference() for p in weights):
        raise PrunexError(
            f"{name} was made under torch.inference_mode, so it has no gradients: make it outside of that"
        )


@contextmanager
def recorded(
    model: nn.Module,
    inputs: Callable[[], Mapping[str, Any]],
    roles: Mapping[str, Sequence[str]],
    feature_map: str | None = None,
) -> Iterator[Recording]:
    """One forward in eval mode, seen by hooks; flags, hooks and the kind of attention are put back as they were.

    Safe inside ``torch.no_grad`` and ``torch.inference_mode``. Fused attention keeps no map, so that eager attention
    takes its place for the call; where it was eager already, what the model returns is the same bit for bit.

    Args:
        model: A transformers model, or one that keeps to their conventions: an attention module returns its output and
            its map.
        inputs: Gives what it is called with, by name.
        roles: Roles of the first, second, ... call of the attention modules whose dotted path ends as a pattern says.
        feature_map: Pattern of the path of the convolution whose output's size is the image's grid.

    Raises:
        PrunexError: A compiled or checkpointed model; one that fails on its inputs; an attention
            module that was called more or less often than its roles say, that returned no map or one that
            is no attention after a softmax, or one through which no gradient goes.
    """
    refuse(model)
    modules, recording = attention_modules(model, roles), Recording()
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(as_found(model, train=False))
        # Whatever mode the caller is in, maps are differentiated here.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_same_draws(model))
        stack.callback(_thawed(model))
        stack.callback(_eager([module for module, _ in modules.values()]))
        calls = dict.fromkeys(modules, 0)
        for path, (module, known) in modules.items():
            stack.callback(module.register_forward_pre_hook(_asks_for_maps(module), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_keeps(path, known, calls, recording)).remove)
        if feature_map is not None:
            for module, _ in attention_modules(model, {feature_map: ()}).values():
                stack.callback(module.register_forward_hook(_keeps_size(recording)).remove)
        recording.outputs = _called(model, inputs)
        wrong = next((path for path, (_, known) in modules.items() if calls[path] != len(known)), None)
        if wrong is not None:
            raise PrunexError(
                f"{wrong} of {type(model).__name__} was called {calls[wrong]} times in one forward, and "
                f"{len(modules[wrong][1])} are known: this model or this version of its library goes another way"
            )
        # The model may run under autocast; sums of what it showed do not.
        stack.enter_context(torch.autocast(_kind(model), enabled=False))
        yield recording


def _called(model: nn.Module, inputs: Callable[[], Mapping[str, Any]]) -> Any:
    """What the model returns; whatever a stranger's forward raises is told in one line."""
    given: Mapping[str, Any] = {}
    try:
        given = inputs()
        return model(**{name: outside_inference(value) for name, value in given.items()})
    except (PrunexError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PrunexError(
            f"{type(model).__name__} raised {type(error).__name__} when called with {brief(dict(given))} ({error})"
        ) from error


def _kind(model: nn.Module) -> str:
    """The kind of device that a model lies on."""
    return next((p.device.type for p in model.parameters()), "cpu")


def _same_draws(model: nn.Module) -> Any:
    """Random numbers go on afterwards as if nothing had been drawn (ViLT draws the order of its patches)."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng([*devices], device_type="cuda")


def outside_inference(value: Any) -> Any:
    """What a graph may hold: tensors made under inference_mode are copied, those of labels in lists and dicts too."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(map(outside_inference, value))
    return {name: outside_inference(part) for name, part in value.items()} if type(value) is dict else value


def _thawed(model: nn.Module) -> Any:
    """Let gradients through a model whose weights are frozen; what is returned freezes them again."""
    # Token numbers start no graph: where no weight does either, there is none to differentiate.
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)

    def freeze() -> None:
        for parameter in frozen:
            parameter.requires_grad_(False)

    return freeze


def _eager(modules: Sequence[nn.Module]) -> Any:
    """Attention that keeps its map, in the place of fused attention; what is returned puts that back."""
    given: list[Any] = [getattr(module, "config", None) for module in modules]
    configs = {id(config): config for config in given if hasattr(config, "_attn_implementation_internal")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation_internal = "eager"  # the setter would go on to configs of parts that have no map

    def back() -> None:
        for config, kind in before:
            config._attn_implementation_internal = kind

    return back


def _asks_for_maps(module: nn.Module) -> Any:
    """A hook that has a module return its map, however its parent calls it."""
    signature = inspect.signature(module.forward)

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if "output_attentions" not in signature.parameters:
            return None
        # Some parents pass the flag by its name, some by its place.
        bound = signature.bind(*args, **kwargs)
        bound.arguments["output_attentions"] = True
        return bound.args, bound.kwargs

    return ask


def _keeps(path: str, roles: Sequence[str], calls: dict[str, int], recording: Recording) -> Any:
    """A hook that keeps the map that a module returned."""

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        number = calls[path]
        calls[path] += 1
        # A call too many is told behind the forward, which knows how many there were.
        if number >= len(roles):
            return
        attention = output[1] if isinstance(output, tuple | list) and len(output) > 1 else None
        if not isinstance(attention, Tensor) or attention.ndim != 4:
            raise PrunexError(
                f"{path}, a {type(module).__name__}, returned no attention map [B, heads, queries, keys] beside its "
                "output: it cannot be explained"
            )
        if not attention.requires_grad:
            raise Unreached(f"{path} lets no gradient through, so that its attention cannot be explained")
        # Whoever shares a map shares its gradient, and relevance would go through it twice.
        twin = next((map_.path for map_ in recording.maps if map_.attention is attention), None)
        if twin is not None:
            raise PrunexError(f"{path} returned the very map that {twin} returned: name one of the two as attention")
        sums = attention.detach().sum(-1)
        if not ((sums - 1).abs() < _ROUNDING).all():
            raise PrunexError(
                f"{path}, a {type(module).__name__}, returned a map whose rows sum to {float(sums.min()):.4g} to "
                f"{float(sums.max()):.4g} and not to 1: it must be what attention is after its softmax"
            )
        recording.maps.append(Attended(roles[number], attention, None, f"{path}#{number}" if len(roles) > 1 else path))

    return keep


def _keeps_size(recording: Recording) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        recording.grid = (int(output.shape[-2]), int(output.shape[-1]))

    return keep
