"""Relevancy as a target: token scores are pulled towards what the dense model's prediction rests on."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.attach import attached
from prunex.checks import check_choice, check_number, check_options, check_share, check_whole
from prunex.errors import PrunexError
from prunex.explain import explain
from prunex.pruners.base import Forward
from prunex.registry import lookup
from prunex.units.relevance import Relevance
from prunex.units.xpruner import XPruner
from prunex.vit.anatomy import find, head_classes, pixels_of, read
from prunex.vit.aside import as_found
from prunex.vit.surroundings import check_own_classes

JUDGES = ("dense", "self")
LOSSES = ("pearson", "kl")


class Guidance:
    r"""A loss that asks a token pruner's scores to follow a relevancy map of the same image.

    At every stage s whose pruner ranked tokens by scores u (DynamicViT: the predictor's keep probability; EViT, Top-K:
    the class token's attention, or the shift), and over the patches that still entered it as tokens of their own::

        pearson:  L_s = mean over images of 1 - corr(u, r)
        kl:       L_s = mean over images of KL(softmax(r / t) || softmax(u / t)), r and u standardised per image

    with r the explainer's map, negative values cut to 0, held constant. The loss is ``weight`` times the mean over
    stages; images whose map or scores are constant are left out. Its gradient goes into u alone, and from there to
    predictors and what they read, or the queries and keys of the class token's attention.

    ``judge="dense"`` explains a frozen dense copy of the model as it was when this was made (in fine-tuning: what the
    trained model looks at); ``judge="self"`` the pruned model as it is now, whose map is 0 on removed patches by
    construction, so that it can only sharpen what the pruner does anyway. Explained is the image's label where labels
    are known, else the judge's own prediction. Correlation of two explanations as a training objective is PEAR's
    (arXiv 2303.13299); using it for token selection is ours.

    Args:
        model: A ViT with a token pruner attached, or a module that holds exactly one.
        method: An explainer's name, with ``options``.
        weight: Of the loss.
        judge: "dense" or "self".
        loss: "pearson" or "kl", with ``temperature`` t.
        share: Share of each batch's images that are explained, in (0, 1].
        every: Training forwards (steps, where each runs the model once) between explanations.
        cache: Maps kept for images that come again bit for bit (no augmentation) with their class; 0 keeps none.
        path: Dotted path to the ViT when ``model`` holds several.
        teacher: The dense model that judges, where it is not to be a copy of the model as it is now.

    Raises:
        PrunexError: For an unknown explainer, numbers out of range, or a model whose tokens nobody prunes.

    >>> import prunex, timm, torch
    >>> from prunex.guidance import Guidance
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=4)
    >>> pruning = prunex.attach(model, "dynamicvit", stages=(1, 2), teacher=False)
    >>> pruning.also(Guidance(model, "generic_attention", weight=0.5))
    >>> _ = model.train()(torch.randn(2, 3, 32, 32))
    >>> sorted(pruning.losses())
    ['guidance', 'ratio']
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "tokentm",
        weight: float = 1.0,
        judge: Literal["dense", "self"] = "dense",
        loss: Literal["pearson", "kl"] = "pearson",
        temperature: float = 1.0,
        share: float = 1.0,
        every: int = 1,
        cache: int = 0,
        options: dict[str, Any] | None = None,
        path: str | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        check_guidance(method, weight, judge, loss, temperature, share, every, cache)
        vit = find(model, path)[1]
        if attached(vit) is None:
            raise PrunexError("guidance needs a token pruner, whose scores it guides: attach one first")
        if model is not vit:
            check_own_classes(model, vit, "guidance")
        self.method, self.options = method, check_options(options)
        self.weight, self.judge, self.loss, self.temperature = float(weight), judge, loss, float(temperature)
        self.share, self.every, self.cache = float(share), every, cache
        self.teacher: nn.Module | None = None
        if judge == "dense":
            self.teacher = dense_copy(vit) if teacher is None else teacher
        self.explained = 0  # images, for whoever counts what it costs
        self.step = 0  # training steps seen
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()  # maps [gh, gw], the least recently used first

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        """The loss of one training forward; empty where nothing was ranked, or it is no step's turn."""
        self.step += 1
        trace = forward.trace
        if trace is None or trace.pooled or (self.step - 1) % self.every:
            return {}
        # Scores without a gradient, such as a frozen attention's, cannot be moved by a loss.
        stages = [i for i, s in enumerate(trace.stages) if s.score is not None and s.score.requires_grad]
        count = max(1, round(self.share * len(forward.images)))
        if not stages:
            return {}
        maps = self.maps(forward, count).flatten(1).clamp(min=0)
        distances = []
        for stage in stages:
            scores, ranked = trace.scores(stage)
            distances.append(self._distance(scores[:count], maps, ranked[:count]))
        return {"guidance": self.weight * torch.stack(distances).mean()}

    def maps(self, forward: Forward, count: int) -> Tensor:
        """Relevancy of the first images of a batch, float32 [count, gh, gw], from the cache where they are known."""
        images = _numbers(forward.images[:count])
        labels = None if forward.labels is None else forward.labels[:count]
        judge = self._judge(forward, labels is not None)
        # The pruned model's own maps change with every step.
        if not self.cache or self.judge != "dense":
            return self._explained(judge, images, labels)
        keys = _keys(images, labels)
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            at = torch.tensor(new, device=images.device)
            fresh = self._explained(judge, images[at], None if labels is None else labels[at])
            self._known.update(zip([keys[i] for i in new], fresh.cpu(), strict=True))
        maps = torch.stack([self._known[key] for key in keys]).to(images.device)
        # The batch's own maps last, so that what goes are the longest unused.
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > self.cache:
            self._known.popitem(last=False)
        return maps

    def _explained(self, judge: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        one_output = read(find(judge)[1]).classes == 1  # which has no class
        self.explained += len(images)
        # Off autocast: a relevancy map in half precision is no target.
        with torch.autocast(images.device.type, enabled=False):
            e = explain(self.method, judge, images.float(), None if one_output else labels, **self.options)
        return e.maps.detach().float()

    def _judge(self, forward: Forward, labelled: bool) -> nn.Module:
        """Who is asked; the dense one at the size of images that the model takes now."""
        model: Any = forward.model
        if self.teacher is None:
            return model
        teacher, vit = self.teacher.to(forward.images.device), find(self.teacher)[1]
        if labelled and head_classes(model) != head_classes(vit):
            raise PrunexError(
                f"the model has {head_classes(model)} classes, and the dense judge of guidance {head_classes(vit)}: "
                "give the model its head (reset_classifier) before guidance is made, or judge='self'"
            )
        wanted, has = ((tuple(m.patch_embed.img_size), pixels_of(m.patch_embed)) for m in (model, vit))
        # Positions are resampled as for the trained model, whose size may have changed since the copy was made.
        if wanted != has and not vit.dynamic_img_size:
            vit.set_input_size(img_size=wanted[0], patch_size=wanted[1])
        return teacher

    def _distance(self, scores: Tensor, maps: Tensor, ranked: Tensor) -> Tensor:
        """Mean over images of the distance between scores and maps [B, P] among the patches that were ranked."""
        u, r = _standardised(scores.float(), ranked), _standardised(maps.float(), ranked)
        if self.loss == "pearson":
            distances = 1 - (u * r).sum(1) / ranked.sum(1).clamp(min=1)
        else:
            log_u, log_r = (self._log_softmax(x, ranked) for x in (u, r))
            distances = (log_r.exp() * (log_r - log_u) * ranked).sum(1)
        return _mean_where_both_vary(distances, u, r)

    def _log_softmax(self, x: Tensor, ranked: Tensor) -> Tensor:
        logits = (x / self.temperature).masked_fill(~ranked, float("-inf"))
        return logits.log_softmax(1).masked_fill(~ranked, 0)


class UnitGuidance:
    r"""The same for X-Pruner's masks: the rows of an image's class follow the relevance of units for that image.

    For each branch (the heads of a block, or its MLP channels) with m the label's mask of each unit (a head's is the
    mean over its channels) and r the absolute LRP relevance of each unit, summed over tokens (z+ rules, see the
    ``relevance`` criterion)::

        L = weight * mean over branches and images of 1 - corr(m, r)

    Rows that are constant, as a mask is at the start, are left out. The model's weights stand still while masks are
    learned, so it is its own dense judge: no teacher is kept. Ours.

    Arguments are :class:`Guidance`'s. Refused are numbers out of range, another unit pruner than ``xpruner`` or none,
    and a model that relevance cannot be led through.
    """

    def __init__(
        self, model: nn.Module, weight: float = 1.0, share: float = 1.0, every: int = 1, path: str | None = None
    ) -> None:
        check_guidance("lrp", weight, "dense", "pearson", 1.0, share, every, 0)
        handle = attached(model, path, units=True)
        if handle is None or not isinstance(handle.pruner, XPruner):
            raise PrunexError("guidance of units needs xpruner, whose masks it guides: attach it first")
        if model is not handle.model:
            check_own_classes(model, handle.model, "guidance")
        self.model, self.pruner = handle.model, handle.pruner
        self.weight, self.share, self.every, self.step = float(weight), float(share), every, 0
        self.judge = Relevance(self.pruner.branches, self.pruner.classes)
        self.judge.prepare(self.model)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of one step on images [B, C, H, W] of classes [B]; empty outside the first stage and its turns."""
        self.step += 1
        if self.pruner.stage != "masks" or (self.step - 1) % self.every:
            return {}
        count = max(1, round(self.share * len(images)))
        images, labels = _numbers(images[:count]), labels[:count].clamp(0, self.pruner.classes - 1)
        with as_found(self.model, train=False), torch.autocast(images.device.type, enabled=False):
            relevance = self.judge.relevance(self.model, images.float(), labels)
        distances = []
        for b in self.pruner.branches:
            # Units that speak against the class matter to it as well.
            r = relevance[b.key].abs().sum(1)
            m = self.pruner.mask(b)[self.pruner.groups[labels]].unflatten(1, (b.units, b.width)).mean(2)
            every_unit = torch.ones_like(m, dtype=torch.bool)
            u, r = _standardised(m, every_unit), _standardised(r.to(m), every_unit)
            distances.append(_mean_where_both_vary(1 - (u * r).mean(1), u, r))
        return {"unit_guidance": self.weight * torch.stack(distances).mean()}


def check_guidance(
    method: str, weight: Any, judge: Any, loss: Any, temperature: Any, share: Any, every: Any, cache: Any
) -> None:
    """Refuse options of :class:`Guidance` that are none."""
    lookup("explainer", method)
    check_choice("judge", judge, JUDGES)
    check_choice("loss", loss, LOSSES)
    check_number("weight", weight, 0)
    check_number("temperature", temperature, 1e-6)
    check_share("share", share)
    check_whole("every", every, 1)
    check_whole("cache", cache, 0)


def dense_copy(vit: nn.Module) -> nn.Module:
    """A frozen copy of a ViT without what is attached to it, in eval mode."""
    copied = copy.deepcopy(vit)
    for units in (False, True):
        handle: Any = attached(copied, units=units)
        if handle is not None:
            handle.detach()
    return copied.eval().requires_grad_(False)


def _standardised(x: Tensor, ranked: Tensor) -> Tensor:
    """Mean 0 and mean square 1 among what is ranked, 0 elsewhere and where nothing varies; [B, P]."""
    count = ranked.sum(1, keepdim=True).clamp(min=1)
    x = x.masked_fill(~ranked, 0)
    centred = (x - x.sum(1, keepdim=True) / count).masked_fill(~ranked, 0)
    scale = centred.detach().abs().amax(1, keepdim=True)  # squares of small attentions would be lost
    # Where nothing varies the mean's rounding is left; scaled up it would be a gradient of any size.
    varies = scale > 32 * torch.finfo(x.dtype).eps * x.detach().abs().amax(1, keepdim=True)
    centred = centred / scale.where(varies, 1)
    deviation = (centred.square().sum(1, keepdim=True) / count).clamp(min=1e-12).sqrt()
    return torch.where(varies, centred / deviation, 0 * centred)


def _mean_where_both_vary(values: Tensor, u: Tensor, r: Tensor) -> Tensor:
    """Mean of values [B] over the images where neither of two standardised rows [B, P] is constant."""
    varies = (u.detach().abs().amax(1) > 0) & (r.detach().abs().amax(1) > 0)
    return torch.where(varies, values, 0).sum() / varies.sum().clamp(min=1)


def _numbers(images: Tensor) -> Tensor:
    """Images off the graph, 0 for what is no number: the task's own loss is not finite then either, and says more."""
    return images.detach().nan_to_num(0, 0, 0)


def _keys(images: Tensor, labels: Tensor | None) -> list[bytes]:
    """What tells images apart, bit for bit, and the classes that are explained."""
    flat = images.float().cpu().contiguous().numpy()
    classes = [b""] * len(flat) if labels is None else [str(int(c)).encode() for c in labels]
    return [hashlib.blake2b(i.tobytes() + c, digest_size=16).digest() for i, c in zip(flat, classes, strict=True)]
