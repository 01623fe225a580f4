"""Test-time registers: what a few neurons write into background patches is written into an extra token instead.

Trained ViTs may keep notes in patches that say little about themselves: tokens of a large norm, which attract
attention, so that attention maps show them and not the object. "Vision Transformers Don't Need Trained Registers"
(arXiv 2506.08010) finds the MLP neurons that make them and moves what these say to an untrained token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunex.batches import batches_in, parts
from prunex.brief import Brief
from prunex.checks import check_choice, check_number, check_whole
from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, check_images, find, read
from prunex.vit.aside import as_found
from prunex.vit.mount import mounted, mounted_head, mounted_units

Patches = Literal["zero", "mean", "same"]
PATCHES: tuple[Patches, ...] = ("zero", "mean", "same")


@dataclass(frozen=True, eq=False, repr=False)
class RegisterNeurons(Brief):
    """Which neurons make outlying patch tokens, most active first.

    Attributes:
        neurons: (block, hidden channel) pairs; empty where no token lies out.
        outliers: Share of patch tokens that lie out, in 0..1.
        largest: The largest norm of a patch token, over the median of its image.
        images: How many images were looked at.
    """

    neurons: tuple[tuple[int, int], ...]
    outliers: float
    largest: float
    images: int


_REMEMBERED: WeakKeyDictionary[nn.Module, RegisterNeurons] = WeakKeyDictionary()


def find_register_neurons(
    model: nn.Module, images: Tensor | Iterable[Any], *, count: int = 10, threshold: float = 3.0, layer: int = -1
) -> RegisterNeurons:
    """Find the neurons behind outlying tokens (arXiv 2506.08010), once a model; the answer is remembered for it.

    A patch token lies out where its norm, in what block ``layer`` gives, is above ``threshold`` times the median of its
    image. Every neuron of the MLPs up to that block (after the activation) has as its score the mean of its absolute
    value over an image's outlying tokens, averaged over the images that have any; the ``count`` highest are taken.

    Departures from the authors' code: the threshold is relative (theirs is 30, or another number for another model), so
    that it means the same for every model; how many neurons they take is unverified.

    Args:
        model: A dense ViT of timm, or a module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects, or a loader; some hundred, without labels.
        count: How many neurons are taken, at least 1.
        threshold: At least 1.
        layer: The block whose output is looked at; -1 is the last.

    Raises:
        PrunexError: Images the model cannot take, no images, a pruned model, or MLPs without a ``fc2``.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3)
    >>> prunex.find_register_neurons(model, torch.randn(2, 3, 64, 64)).neurons  # of random weights no token lies out
    ()
    """
    check_whole("count", count, 1)
    check_number("threshold", threshold, 1)
    vit, anatomy = _dense(model)
    last = range(anatomy.depth)[check_whole("layer", layer, -anatomy.depth, anatomy.depth - 1)]
    scores = [torch.zeros(width, dtype=torch.float64) for width in anatomy.hidden[: last + 1]]
    seen = tokens = outlying = with_any = 0
    largest = 0.0
    weight = next(vit.parameters())
    with as_found(vit, train=False), torch.no_grad():
        for batch in batches_in(images):
            x = parts(batch).need("images", "find_register_neurons").to(weight.device, weight.dtype)
            check_images(anatomy, x, values=True)
            hidden, out = _watched(vit, x, last)
            norms = out[:, anatomy.prefix :].double().norm(dim=2)
            relative = norms / norms.median(1, keepdim=True).values.clamp(min=torch.finfo(norms.dtype).tiny)
            far = (relative > threshold).double()
            count_far = far.sum(1, keepdim=True)
            # Every image weighs alike, however many of its tokens lie out.
            share = far / count_far.clamp(min=1)
            for total, value in zip(scores, hidden, strict=True):
                active = value[:, anatomy.prefix :].double().abs()
                total += torch.einsum("bn,bnc->c", share, active).cpu()
            seen, tokens, outlying = seen + len(x), tokens + far.numel(), outlying + int(far.sum())
            with_any, largest = with_any + int((count_far > 0).sum()), max(largest, float(relative.max()))
    if not seen:
        raise PrunexError("find_register_neurons got no images: give some hundred, or a loader of them")
    ranked = torch.cat(scores).argsort(descending=True, stable=True)[:count].tolist() if with_any else []
    starts = torch.tensor([0, *anatomy.hidden[: last + 1]]).cumsum(0)
    blocks = [int(torch.searchsorted(starts, place, right=True)) - 1 for place in ranked]
    neurons = tuple((block, place - int(starts[block])) for block, place in zip(blocks, ranked, strict=True))
    answer = RegisterNeurons(neurons, outlying / tokens, largest, seen)
    _REMEMBERED[vit] = answer
    return answer


def with_registers(
    model: nn.Module,
    neurons: RegisterNeurons | None = None,
    *,
    tokens: int = 1,
    patches: Patches = "zero",
    scale: float = 1.0,
) -> Any:
    """A copy of the ViT whose register neurons write into extra tokens, which begin as zeros and have no position.

    In each of the neurons' MLPs an extra token takes ``scale`` times the value of largest size, with its sign, that the
    neuron has over all tokens of the image, and patches have 0 there; prefix tokens keep their own. Extra tokens are
    prefix tokens of timm's kind (``reg_token``): no pruner drops them, no map shows them, no head reads them. What
    prunex does with a ViT it does with this one, pruners and explainers too, except rules of relevance, which go past
    hooks and are refused. Without neurons it is a plain copy.

    Args:
        model: A dense ViT of timm with a ``reg_token`` (VisionTransformer, Eva), or a module that holds exactly one.
        neurons: What :func:`find_register_neurons` found; None: what it found last for this model.
        tokens: Extra tokens, at least 1.
        patches: What the neurons say on patches: "zero", their "mean" over the patches, or the "same" as before.
        scale: 0 leaves the extra tokens silent.

    Raises:
        PrunexError: A pruned model, a family without registers, one that pools prefix tokens, or nothing found before.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    >>> neurons = prunex.find_register_neurons(model, torch.randn(2, 3, 64, 64), threshold=1.0)
    >>> with_them = prunex.with_registers(model, neurons)
    >>> with_them.num_prefix_tokens, prunex.explain("rollout", with_them, torch.randn(1, 3, 64, 64)).maps.shape
    (2, torch.Size([1, 4, 4]))
    """
    check_whole("tokens", tokens, 1)
    check_choice("patches", patches, PATCHES)
    check_number("scale", scale, 0)
    vit, anatomy = _dense(model)
    neurons = _REMEMBERED.get(vit) if neurons is None else neurons
    if not isinstance(neurons, RegisterNeurons):
        came = "nothing was found for this model" if neurons is None else f"neurons are a {type(neurons).__name__}"
        raise PrunexError(f"{came}: call prunex.find_register_neurons(model, images) first")
    bad = [pair for pair in neurons.neurons if not (pair[0] < anatomy.depth and pair[1] < anatomy.hidden[pair[0]])]
    if bad:
        raise PrunexError(f"neuron {bad[0]} is none of this model's: find them for this model")
    # Whoever embeds in another way, as DeiT with its distillation token does, takes no register in.
    embed = getattr(type(vit), "_pos_embed", None)
    if embed not in (VisionTransformer._pos_embed, Eva._pos_embed) or anatomy.pool_prefix:
        what = "averages its prefix tokens" if anatomy.pool_prefix else "takes no register tokens in timm"
        raise PrunexError(f"{type(vit).__name__} {what}: extra tokens go to a VisionTransformer or Eva of timm")
    widened: Any = copy.deepcopy(vit)
    if not neurons.neurons:
        return widened
    _widen(widened, tokens)
    for block in dict.fromkeys(b for b, _ in neurons.neurons):
        channels = [c for b, c in neurons.neurons if b == block]
        move = partial(_moved, channels=channels, prefix=anatomy.prefix, tokens=tokens, patches=patches, scale=scale)
        # ``move`` is bound as a default: a closure would have every block do what the last one does.
        widened.blocks[block].mlp.fc2.register_forward_pre_hook(lambda _, args, move=move: (move(args[0]),))
    return widened


def _dense(model: nn.Module) -> tuple[Any, Anatomy]:
    """The ViT, which nothing may hang on: what a pruner knows of its prefix would be wrong with more tokens."""
    vit = find(model)[1]
    for what, on in (("token pruner", mounted), ("unit pruner", mounted_units), ("head of its own", mounted_head)):
        if on(vit) is not None:
            raise PrunexError(f"this model has a {what}: give the dense one, and attach to what with_registers gives")
    anatomy = read(vit)
    for number, block in enumerate(vit.blocks):
        if not isinstance(getattr(getattr(block, "mlp", None), "fc2", None), nn.Module):
            raise PrunexError(f"block {number} is a {type(block).__name__} without mlp.fc2: its neurons are not known")
    return vit, anatomy


def _watched(vit: Any, images: Tensor, last: int) -> tuple[list[Tensor], Tensor]:
    """What the neurons of blocks up to ``last`` say, [B, N, hidden] each, and what this block gives, [B, N, D]."""
    hidden: list[Tensor] = []
    out: list[Tensor] = []
    watches = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        for block in vit.blocks[: last + 1]
    ]
    watches.append(vit.blocks[last].register_forward_hook(lambda _, args, result: out.append(result)))
    try:
        vit.forward_features(images)
    finally:
        for watch in watches:
            watch.remove()
    return hidden, out[0]


def _widen(vit: Any, tokens: int) -> None:
    """Append register tokens of zeros behind those there are, where positions add nothing to them."""
    prefix, width = vit.num_prefix_tokens, vit.embed_dim
    like = vit.pos_embed if vit.pos_embed is not None else next(vit.parameters())
    extra = like.new_zeros(1, tokens, width)
    registers = extra if vit.reg_token is None else torch.cat([vit.reg_token.detach(), extra], 1)
    vit.reg_token = nn.Parameter(registers, requires_grad=False)
    if vit.pos_embed is not None and not vit.no_embed_class:
        table = vit.pos_embed.detach()
        table = torch.cat([table[:, :prefix], extra, table[:, prefix:]], 1)
        vit.pos_embed = nn.Parameter(table, requires_grad=vit.pos_embed.requires_grad)
    # Rotary attention turns all but so many tokens.
    for module in vit.modules():
        for name in ("num_prefix_tokens", "num_reg_tokens"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) + tokens)


def _moved(x: Tensor, channels: Sequence[int], prefix: int, tokens: int, patches: Patches, scale: float) -> Tensor:
    """Hidden values [B, N, hidden] with those of some channels moved from patches to the extra tokens."""
    values = x[..., channels]
    body = values[:, prefix + tokens :]
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    if patches == "zero":
        body = torch.zeros_like(body)
    elif patches == "mean":
        body = body.mean(1, keepdim=True).expand_as(body)
    extra = (scale * largest).expand(-1, tokens, -1)
    moved = torch.cat([values[:, :prefix], extra, body], 1)
    return x.index_copy(2, torch.tensor(channels, device=x.device), moved)
