"""What heads that explain themselves say, as explanations like any others: evidence for a class on the patch grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.walk import propagate, times
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.handover import Handed
from prunex.vit.mount import mounted_head
from prunex.vit.readout import TAIL
from prunex.vit.recording import Recording, recording
from prunex.vit.tape import Attended, Tape


@register(
    "explainer",
    "concept_transformer",
    "Rigotti et al., ICLR 2022",
    "that head on the model; one forward",
)
def concept_transformer(model: ViT, images: Tensor, target: int | Tensor | None = None) -> Explanation:
    """What each patch contributes to the class score through the spatial concepts, exactly.

    The score is b_k + sum over patches and concepts of (1/n) sum_h A_h[p, c] G_h[c, k], plus what global concepts
    contribute through the class token, which has no place and is in ``info`` alone. A head with global concepts only
    has no map of its own: its evidence is then spread from the class token over patches by attention rollout (Abnar &
    Zuidema, arXiv:2005.00928), which is ours and not exact.

    Returns:
        ``maps`` signed; ``raw`` [B, prefix + P], summing to the logit less the bias; ``info``: ``contributions``
        [B, C, classes], ``concept_maps`` and ``attention`` [B, C_s, gh, gw].

    Raises:
        PrunexError: For a model without such a head, or in a module that makes other classes of the head's.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> _ = prunex.attach(model, "concept_transformer", spatial=["ink", "paper"])
    >>> e = prunex.explain("concept_transformer", model, torch.randn(2, 3, 64, 64), target=3)
    >>> e.maps.shape, e.info["contributions"].shape
    (torch.Size([2, 4, 4]), torch.Size([2, 2, 5]))
    """
    return _by_its_head("concept_transformer", model, images, target)


@register(
    "explainer",
    "vit_net",
    "Kim et al., ICML 2022",
    "that head on the model; one forward",
)
def vit_net(model: ViT, images: Tensor, target: int | Tensor | None = None) -> Explanation:
    """Which patches decided the way through the tree, and how much each turn did for the class.

    Returns:
        ``maps`` as :class:`prunex.heads.tree_reading.TreeEvidence` defines them; ``info``: its parts.

    Raises:
        PrunexError: For a model without such a head, or in a module that makes other classes of the head's.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> _ = prunex.attach(model, "vit_net", depth=2)
    >>> prunex.explain("vit_net", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    return _by_its_head("vit_net", model, images, target)


@register(
    "explainer",
    "attributes",
    "ours; inspired by Yu et al., 2022, arXiv 2207.05358",
    "that head on the model; one forward",
)
def attributes(model: ViT, images: Tensor, target: int | Tensor | None = None) -> Explanation:
    """What each patch contributes to the class score through the attributes, exactly.

    Returns:
        ``maps`` signed, summing to the logit less the bias; ``info``: contributions and attention by attribute.

    Raises:
        PrunexError: For a model without such a head, or in a module that makes other classes of the head's.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> _ = prunex.attach(model, "attributes", attributes=4)
    >>> prunex.explain("attributes", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    return _by_its_head("attributes", model, images, target)


@register(
    "explainer",
    "mean_patch",
    "Zhou et al., CVPR 2016, arXiv 1512.04150",
    "that head on the model; one forward",
)
def mean_patch(model: ViT, images: Tensor, target: int | Tensor | None = None) -> Explanation:
    """What each patch adds to the class score through the mean patch: a class activation map, exact for that part.

    Returns:
        ``maps`` signed, summing to what the mean patch adds to the score; ``info``: ``contributions`` [B, 2, classes]
        of timm's classifier and the mean patch, ``patch_maps`` [B, 1, gh, gw].

    Raises:
        PrunexError: For a model without such a head, or in a module that makes other classes of the head's.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> _ = prunex.attach(model, "mean_patch")
    >>> prunex.explain("mean_patch", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    return _by_its_head("mean_patch", model, images, target)


def _by_its_head(name: str, model: ViT, images: Tensor, target: int | Tensor | None) -> Explanation:
    """The evidence of the model's own head, lifted through the trace."""
    headed = mounted_head(model)
    if headed is None or headed.method != name:
        has = "timm's own" if headed is None else headed.method
        raise PrunexError(
            f"{name} explains a model by a head of that name, and this one's is {has}: prunex.attach(model, {name!r}, "
            "...) and train it, or use another method"
        )
    if TAIL in vars(model):
        raise PrunexError(
            f"{name} explains classes of the head itself, and the module round the ViT makes other ones of them: "
            "explain the ViT by what enters it"
        )
    # Evidence of the class token alone has no place: how it got there spreads it over patches.
    located = headed.reads_patches
    tape = Tape() if located else Tape(attention=True, reduce=over_heads, narrow=True)
    with recording(model, images, target, tape, needs_class=True) as recorded, torch.no_grad():
        state = recorded.state
        left = Handed(state.anatomy, state.policy, state.sizes, state.trace)
        evidence: Any = headed.head.evidence(
            headed.read(model, state.tokens, left), recorded.target, recorded.trace.detach()
        )
        row = evidence.row if located else evidence.row[:, :1] * _rollout(recorded)
        return answer(recorded, row, evidence.row, signed=True, info=evidence.info())


def _rollout(recorded: Recording) -> Tensor:
    """How much of each patch has come to the class token by attention rollout, [B, prefix + P], summing to 1."""

    def mix(row: Tensor, step: Attended) -> Tensor:
        return 0.5 * times(row, torch.as_tensor(step.attention), step.queries) + 0.5 * row

    start = torch.zeros_like(recorded.readout())
    start[:, 0] = 1
    return propagate(recorded.tape, start, recorded.anatomy.prefix, mix)
