"""Vision DiffMask: gates beside a frozen ViT that say which patches its output needs, in one forward."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_flag, check_number
from prunex.errors import PrunexError
from prunex.explainers.base import Relevance, recording
from prunex.pruners.diffmask import (
    KIND,
    MaskGates,
    build_gates,
    check_layer,
    gate_tensors,
    hidden_states,
    log_keep,
    log_votes,
    sample,
)
from prunex.registry import register
from prunex.trained import check_fits, held, load_into, quietly, read_folder, write
from prunex.vit.anatomy import ViT, read
from prunex.vit.embedding import embed_patches, place
from prunex.vit.forward import resume
from prunex.vit.mount import as_found
from prunex.vit.readout import head
from prunex.vit.rebuild import build_like, describe
from prunex.vit.tape import Tape

MOST = 200.0  # of a multiplier


@dataclass(eq=False, repr=False)
class Seen(Brief):
    """One pass over images.

    Attributes:
        patches: [B, P, D], embedded, before positions are added.
        grid: Patch grid.
        logits: [B, classes] of the ViT.
        gates: [B, K, P], logits of the first K gates.
    """

    patches: Tensor
    grid: tuple[int, int]
    logits: Tensor
    gates: Tensor


@dataclass(eq=False, repr=False)
class Terms(Brief):
    """What one training step weighs up.

    Attributes:
        divergence: [B], KL(softmax wanted || softmax told) for one sample of the votes, on the graph.
        log_keep: [B, P], c_k, on the graph.
        wanted: [B, classes], logits of the whole images.
        told: [B, classes], of the masked ones.
    """

    divergence: Tensor
    log_keep: Tensor
    wanted: Tensor
    told: Tensor

    def loss(self, alpha: Tensor, eps: float) -> Tensor:
        """mean_b[alpha (KL - eps)] + mean_{b,p} c_k: gates and placeholder descend on it, alpha ascends."""
        return (alpha * (self.divergence - eps)).mean() + self.log_keep.mean()


class DiffMaskExplainer(nn.Module):
    """Gates, a placeholder and multipliers beside the ViT that they explain, which never changes (arXiv 2304.06391).

    Training minimises, over gates and placeholder, a_k (KL(softmax z || softmax z') - eps) + mean_p c_k(p), with z' the
    output for the input masked by one sample of the votes 0..k; the multipliers a_0 .. a_{L+1} maximise it.

    The ViT is part of the module, frozen and in eval mode, so that a saved explainer explains by itself.

    Args:
        model: A supported ViT with a classifier; copied.
        mul: Half the range of a gate's logits (the authors' command line: 15, their class: 10).
        add: Where they start (8; 5).
        no_placeholder: Masked patches become zeros instead of one learned vector.
        alpha_init: Where the multipliers start, in [0, 200] (20; 1).

    Raises:
        PrunexError: For a model without a classifier, or a pruned one.
    """

    def __init__(
        self,
        model: ViT,
        mul: float = 15.0,
        add: float = 8.0,
        no_placeholder: bool = False,
        alpha_init: float = 20.0,
    ) -> None:
        super().__init__()
        anatomy = read(model)
        if anatomy.classes < 1:
            raise PrunexError("the model has no classifier (num_classes=0): give one that does")
        if hasattr(model, "prunex"):
            raise PrunexError("the model is pruned: detach() it first, the gates read all its patch tokens")
        alpha_init = check_number("alpha_init", alpha_init, 0, MOST)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.anatomy = anatomy
        self.gates = MaskGates(anatomy.width, anatomy.depth, mul, add, no_placeholder)
        # One parameter a layer: a step on one must leave the others' optimiser state alone.
        self.alpha = nn.ParameterList(torch.tensor(alpha_init) for _ in range(anatomy.depth + 2))
        weight = next(model.parameters())
        self.to(device=weight.device, dtype=weight.dtype)

    def train(self, mode: bool = True) -> DiffMaskExplainer:
        """Train or eval mode; the explained ViT stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def layers(self) -> int:
        """Number of hidden states, L + 2."""
        return self.anatomy.depth + 2

    def observe(self, images: Tensor, layer: int = -1) -> Seen:
        """One pass of the explained ViT without gradients, and the logits of the gates 0..layer, on the graph.

        Args:
            images: float [B, C, H, W].
            layer: k in 0..L + 1, or negative from the end.
        """
        layer = check_layer(layer, self.anatomy.depth)
        with torch.no_grad():
            patches, grid = embed_patches(self.model, images)
            x = place(self.model, patches, grid)
            states, last = hidden_states(self.model, x, grid, self.anatomy, self.layers - 1)
            logits = head(self.model, self.model.norm(last), None, self.anatomy)
        return Seen(patches, grid, logits, self.gates(states[: layer + 1]))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities c_k of getting every vote up to a layer: [B, L + 2, P], falling along the layers.

        Args:
            images: float [B, C, H, W].
        """
        return log_votes(self.observe(images).gates)

    def masked(self, seen: Seen, kept: Tensor) -> Tensor:
        """The ViT's output [B, classes] for h'_0 = v h_0 + (1 - v) placeholder; positions are added after.

        Args:
            seen: What :meth:`observe` gave for the images.
            kept: [B, P], v in 0..1 (or bool).
        """
        v = kept.to(seen.patches.dtype).unsqueeze(-1)
        mixed = v * seen.patches + (1 - v) * self.gates.placeholder.to(seen.patches.dtype)
        return resume(self.model, place(self.model, mixed, seen.grid), seen.grid)

    def terms(self, images: Tensor, layer: int, generator: torch.Generator | None = None) -> Terms:
        """What the loss is made of, for the votes 0..layer.

        Args:
            images: float [B, C, H, W].
            layer: k in 0..L + 1.
            generator: Of the sampled votes; None: torch's own.
        """
        seen = self.observe(images, layer)
        told = self.masked(seen, sample(seen.gates, generator).prod(1))
        return Terms(divergence(seen.logits, told), log_keep(seen.gates).sum(1), seen.logits, told)

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json``, which :func:`load_explainer` reads.

        Args:
            folder: Made if missing; the two files are replaced.

        Raises:
            PrunexError: For a folder that cannot be written, or a model that plain values cannot describe.
        """
        return write(folder, KIND, {"model": describe(self.model), "gates": self.gates.settings}, self)


def divergence(wanted: Tensor, told: Tensor) -> Tensor:
    """KL(wanted || told) of class distributions from logits [B, C], in at least float32; of two outcomes for one logit.

    Returns:
        [B].
    """
    if wanted.shape[1] == 1:
        wanted, told = (torch.cat([x, torch.zeros_like(x)], 1) for x in (wanted, told))
    wide = torch.promote_types(told.dtype, torch.float32)
    told, wanted = told.to(wide).log_softmax(1), wanted.to(wide).log_softmax(1)
    return F.kl_div(told, wanted, reduction="none", log_target=True).sum(1)


def load_explainer(path: str | Path) -> DiffMaskExplainer:
    """A saved explainer again, in eval mode.

    Args:
        path: The folder given to :meth:`DiffMaskExplainer.save`, or the ``model.safetensors`` in it.

    Raises:
        PrunexError: For a missing, damaged or foreign folder, or one of a later version.
    """
    spec, tensors, folder = read_folder(path, KIND, "model")
    gates = build_gates(spec.get("gates"), folder, gate_tensors(tensors))
    with quietly():
        explainer = DiffMaskExplainer(build_like(spec["model"], tensors, "model."))
    explainer.gates = gates
    return load_into(explainer, tensors, folder)


@register(
    "explainer",
    "diffmask",
    "Nalmpantis et al., CVPRW 2023, arXiv 2304.06391",
    "a trained explainer; one forward of its model",
)
def diffmask(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    explainer: nn.Module | str | Path | None = None,
    layer: int = -1,
    aggregated: bool = True,
) -> Relevance:
    """How likely each patch is needed, by gates trained to keep as few patches as the output allows (arXiv 2304.06391).

    Explained is the explainer's **own copy** of the dense model it was trained beside, not ``model`` itself, which may
    be pruned or fine-tuned since: ``model`` gives the logits, the target and the trace. The maps know no class.

    Training kept the whole distribution of classes while patches were replaced by a learned placeholder; patches that
    say the same may be dropped until one is left. It tells what may go better than what matters most (the authors' own
    curves), and pixels replaced by noise are another removal.

    Departures from the authors' code: the multipliers ascend (theirs descend under their Lightning, by our reading, not
    run), and only patches are gated and counted (theirs count the class token, too).

    Args:
        model: A supported ViT, pruned or dense.
        images: float [B, C, H, W].
        target: Only passed on; None: the class that ``model`` predicts.
        explainer: A :class:`DiffMaskExplainer`, a module that holds one, or the folder it was saved in (``explainer/``
            of the recipe's run).
        layer: The hidden state whose map is shown: 0 (patch embeddings) to L + 1, or negative from the end.
        aggregated: Whether a patch needs every vote up to the layer, exp(c_k) = prod_{i <= k} P(v_i != 0); False: the
            vote of the layer alone, P(v_k != 0).

    Returns:
        ``maps`` in 0..1, of one layer; ``raw`` [B, L + 2, P], of all of them.

    Raises:
        PrunexError: Without an explainer, for a folder that holds none, one for another grid or other classes, or a
            layer that does not exist.

    >>> import prunex, timm, torch
    >>> from prunex.explainers.diffmask import DiffMaskExplainer
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> # untrained here; the recipe trains one
    >>> prunex.explain("diffmask", model, torch.randn(2, 3, 64, 64), explainer=DiffMaskExplainer(model)).maps.shape
    torch.Size([2, 4, 4])
    """
    found = held(explainer, DiffMaskExplainer, KIND, "rollout") or load_explainer(str(explainer))
    check_fits(found.anatomy, read(model), KIND)
    layer, aggregated = check_layer(layer, found.anatomy.depth), check_flag("aggregated", aggregated)
    weight = next(found.parameters())
    with (
        recording(model, images, target, Tape()) as recorded,
        as_found(found, train=False),
        torch.no_grad(),
    ):
        votes = log_keep(found.observe(images.to(weight.device, weight.dtype)).gates)
        raw = (votes.cumsum(1) if aggregated else votes).exp().to(images.device)
        row = F.pad(raw[:, layer], (recorded.anatomy.prefix, 0))
        return recorded.answer(row, raw=raw)
