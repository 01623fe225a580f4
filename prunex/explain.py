"""One door to every explainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_type_hints, overload

import torch
from torch import Tensor, nn

import prunex.explainers  # noqa: F401  (registers the explainers)
from prunex.brief import brief
from prunex.checks import called_as, check_choice, check_kind
from prunex.errors import PrunexError, Unreached, unknown
from prunex.registry import lookup
from prunex.relevance.explanation import Explanation
from prunex.relevance.registers import RegisterNeurons, with_registers
from prunex.targets import Aimed, Function, MultiLabel
from prunex.vit.anatomy import check_images, find, read
from prunex.vit.aside import as_found
from prunex.vit.methods import check_methods
from prunex.vit.recording import one_forward
from prunex.vit.sharded import COPY, check_gathered
from prunex.vit.surroundings import Call, look
from prunex.vit.through import through_call


@overload
def explain(
    method: str,
    model: nn.Module,
    images: Any,
    target: MultiLabel,
    *,
    path: str | None = None,
    through: str | None = None,
    registers: RegisterNeurons | Literal["test"] | None = None,
    **options: Any,
) -> list[Explanation]: ...
@overload
def explain(
    method: str,
    model: nn.Module,
    images: Any,
    target: int | Tensor | Function | None = None,
    *,
    path: str | None = None,
    through: str | None = None,
    registers: RegisterNeurons | Literal["test"] | None = None,
    **options: Any,
) -> Explanation: ...
@called_as('prunex.explain("tokentm", model, images)', method=str, model=nn.Module)
def explain(
    method: str,
    model: nn.Module,
    images: Any,
    target: int | Tensor | Function | MultiLabel | None = None,
    *,
    path: str | None = None,
    through: str | None = None,
    registers: RegisterNeurons | Literal["test"] | None = None,
    **options: Any,
) -> Explanation | list[Explanation]:
    """Explain what a ViT's prediction rests on, dense or pruned.

    Runs in eval mode on its own and leaves the model, its gradients, its train flags and the caller's grad mode as they
    were; it works under ``torch.no_grad`` and ``torch.inference_mode``. Each image's map is the same alone and in a
    batch.

    Args:
        method: An explainer's name; :func:`prunex.methods` lists them.
        model: A supported ViT, or any module that holds exactly one and takes images. It is called once as it is: what
            enters its ViT is explained, and the classes are those that it gives itself, whatever head, softmax or
            dictionary follows the ViT. One without a forward is explained by its ViT alone, with a warning.
        images: float [B, C, H, W], normalised as the model expects; with ``through`` all that the model is called on.
        target: Class index, integer tensor [B], or None for the predicted class; of the model's own output. Or any
            number an image: a function from the model's output to [B], such as those of ``prunex.targets``; methods
            that know no class say the same for all. Or ``MultiLabel``, for a list of explanations.
        path: Dotted path to the ViT when ``model`` holds several.
        through: Dotted path of a ViT in a module of several inputs or several calls, such as ``"encoder_a"`` or
            ``"encoder#1"`` for its second call: that call is explained, for one sample, and all else that the module is
            given is held fixed. ``images`` are then its arguments, [1, ...] each: a tuple, or a dict by name.
        registers: "test", or what :func:`prunex.find_register_neurons` found: the ViT is explained with a test-time
            register (:func:`prunex.with_registers`), where background tokens draw its attention. Logits are then those
            of that copy. "test" takes what was found last for this model.
        **options: The method's own.

    Returns:
        The explanation; of several labels a list of them.

    Raises:
        PrunexError: Unknown method or option, images or target the model cannot take, NaN in the images; a model whose
            own forward gives something else than what would be explained, or cannot be followed (a ViT called several
            times, or not as a whole; several outputs); a method that needs gradients where a layer lets none through;
            a target that gives something else than a number an image, mixes images, or that the method cannot follow.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> e = prunex.explain("rollout", model, torch.randn(2, 3, 224, 224))
    >>> e.maps.shape, e.upsample().shape
    (torch.Size([2, 14, 14]), torch.Size([2, 224, 224]))
    >>> e = prunex.explain("tokentm", model, torch.randn(1, 3, 224, 224), prunex.targets.Contrast(3, 5))
    >>> e.logits.shape, e.target
    (torch.Size([1, 1]), tensor([-1]))
    """
    known = lookup("explainer", method)
    make, defaults = known.make, known.options
    kinds = _kinds(make)
    for name, value in options.items():
        if name not in defaults:
            raise unknown(f"option of {method}", name, defaults)
        check_kind(name, value, kinds.get(name))
    # Registers change the ViT itself, so before it is looked for inside of anything.
    if registers is not None:
        model = _with_registers(model, registers)
    function = target if callable(target) else None
    if through is not None:
        path = through.partition("#")[0]
        model, images = through_call(model, images, through, function)
    elif function is not None:
        model = Aimed(model, function)
    # The wrapper that makes the number holds the model one step deeper, and that number is its only output.
    if isinstance(model, Aimed):
        path = path and f"model.{path}"
    target = target if function is None else 0
    vit = find(model, path)[1]
    anatomy = read(vit)
    check_methods(vit)
    check_gathered(vit, COPY)
    weight = next(vit.parameters())
    if weight.is_meta:
        raise PrunexError("the model is on the meta device, where nothing is computed: load its weights first")
    # In words about the images as they were given; behind a module only what enters its ViT has to fit.
    if model is vit:
        check_images(anatomy, images, values=True)
    with as_found(model, train=False):
        # What enters the ViT and what becomes of its output is only known from a call of the model.
        call = look(model, vit, images, path is not None)
        check_images(anatomy, call.entered, values=True)
        targets = target.which if isinstance(target, MultiLabel) else [target]
        with one_forward() if len(targets) > 1 else nullcontext():
            explanations = []
            for label in targets:  # a comprehension would be a frame of its own, which warnings count
                explanations.append(_by_method(method, make, call, label, options))
    for e in explanations:
        # What a method cannot know of itself: its name, and what was done round its ViT.
        e.method, e.options = method, {**defaults, **options}
        e.entered, e.output = call.prepared, call.field
        e.resized = e.image_size != tuple(images.shape[2:])
        if function is not None:
            e.function, e.target = function, torch.full_like(e.target, -1)
    return explanations if isinstance(target, MultiLabel) else explanations[0]


def _with_registers(model: nn.Module, registers: Any) -> nn.Module:
    vit: nn.Module = find(model)[1]
    if vit is not model:
        raise PrunexError(
            f"registers={brief(registers)} explains a ViT by itself: give the ViT in this {type(model).__name__}"
        )
    if isinstance(registers, str):
        check_choice("registers", registers, ("test",))
    return with_registers(vit, None if isinstance(registers, str) else registers)


def _by_method(method: str, make: Callable[..., Explanation], call: Call, target: Any, options: Any) -> Explanation:
    try:
        explanation = make(call.vit, call.entered, target, **options)
    except Unreached as error:
        raise PrunexError(f"{method} needs gradients: {error}") from error
    call.check(method, explanation.logits, explanation.trace)
    return explanation


@functools.cache
def _kinds(make: Callable[..., Any]) -> dict[str, Any]:
    """What a method's signature says of its options."""
    try:
        return get_type_hints(make)
    except NameError:  # names that a stranger's method imports for its type checker alone
        return {}
