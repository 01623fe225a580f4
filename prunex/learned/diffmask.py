"""The explainer of Vision DiffMask: gates that vote on patches beside a frozen ViT, trained, saved and read again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from prunex.brief import Brief
from prunex.checks import check_flag, check_index, check_number, check_whole
from prunex.errors import PrunexError
from prunex.learned.folder import CONFIG, WEIGHTS, Beside, load_into, quietly, read_folder
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.embedding import embed_patches, place, unplace
from prunex.vit.forward import begin, look_ahead, resume
from prunex.vit.handover import Handed
from prunex.vit.late import finished
from prunex.vit.positions import Places
from prunex.vit.readout import head
from prunex.vit.rebuild import build_like
from prunex.vit.state import TokenState

KIND = "diffmask"
TEMPERATURE, LOW, HIGH = 0.2, -0.2, 1.0  # of the hard concrete distribution: stretched to (LOW, HIGH), cut to 0..1


class Gate(nn.Module):
    """A vote on each patch: logits [B, n] from its embedding [B, n, D] and one hidden state [B, n, D].

    mul * tanh(w2 . tanh(W1 [h_0, h_i] + b1) + b2) + add, hidden width D / 4, both layers under weight norm.
    """

    def __init__(self, width: int, mul: float, add: float) -> None:
        super().__init__()
        self.hidden = weight_norm(nn.Linear(2 * width, max(1, width // 4)))
        self.vote = weight_norm(nn.Linear(max(1, width // 4), 1))
        self.add = nn.Parameter(torch.tensor(float(add)))
        self.mul = mul

    def forward(self, first: Tensor, state: Tensor) -> Tensor:
        """Logits [B, n]."""
        vote = self.vote(torch.tanh(self.hidden(torch.cat([first, state], -1))))
        return self.mul * torch.tanh(vote)[..., 0] + self.add


class MaskGates(nn.Module):
    """One gate for every hidden state h_0 .. h_{L+1}, and what stands in the place of a masked patch.

    h_0 are the patch embeddings before positions are added, h_1 .. h_L what enters the L blocks, h_{L+1} what leaves
    the last one before the final norm; see :func:`hidden_states`. Logits start at ``add`` (all is kept) and reach
    ``mul`` to either side; with ``no_placeholder`` masked patches become zeros instead of one learned vector.
    """

    def __init__(
        self, width: int, depth: int, mul: float = 15.0, add: float = 8.0, no_placeholder: bool = False
    ) -> None:
        super().__init__()
        self.mul, self.add = check_number("mul", mul, 0), check_number("add", add, -math.inf)
        self.no_placeholder = check_flag("no_placeholder", no_placeholder)
        self.width, self.depth = width, depth
        self.gates = nn.ModuleList(Gate(width, self.mul, self.add) for _ in range(depth + 2))
        vector = torch.zeros(1, 1, width)
        if self.no_placeholder:
            self.register_buffer("placeholder", vector)
        else:
            self.placeholder = nn.Parameter(nn.init.xavier_normal_(vector))

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that make gates of this kind, in plain values."""
        names = ("width", "depth", "mul", "add", "no_placeholder")
        return {name: getattr(self, name) for name in names}

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Logits of the first K gates, float32 (or 64) [B, K, n], for K hidden states [B, n, D]."""
        # Not strict: of a pass that ends early there are fewer states than gates.
        logits = [gate(states[0], h) for gate, h in zip(self.gates, states, strict=False)]
        return torch.stack([promoted(x) for x in logits], 1)


def log_keep(logits: Tensor) -> Tensor:
    """Log-probability that a hard concrete variable is not 0: -softplus(-(logit - t log(-l / r)))."""
    return F.logsigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


def log_votes(logits: Tensor) -> Tensor:
    """c_k: the log-probability that none of the gates 0..k is 0; [B, K, n] to [B, K, n], falling along K."""
    return log_keep(logits).cumsum(1)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Hard concrete variables in 0..1, differentiable: clamp(s (r - l) + l) of a binary concrete s at temperature t."""
    u = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    # At 0 and at 1 one of the two logarithms is infinite.
    u = u.clamp(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps)
    s = torch.sigmoid((u.log() - torch.log1p(-u) + logits) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def check_layer(layer: Any, depth: int) -> int:
    """The number of a hidden state in 0..depth + 1, counted from the end when negative."""
    what = (
        f"hidden states are 0 (patch embeddings), 1..{depth} (what enters a block) and {depth + 1} (the last block's "
        "output)"
    )
    return check_index("layer", layer, depth + 2, what)


def blocks_before(layer: int) -> int:
    """How many blocks are run to know the hidden states 0..layer."""
    return max(0, layer - 1)


def hidden_states(
    model: ViT, state: TokenState, layer: int, index: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The patches' rows of h_0 .. h_layer for a state entering the first block: layer + 1 of [B, n, D].

    Beside them the stream [B, N, D] where the pass ended. ``index`` int64 [B, n] says which patches of the trace's grid
    these are. A pruner on the model is not asked.
    """
    x, grid, anatomy = state.tokens, state.trace.grid, state.anatomy
    places = None if index is None else Places(index, grid)
    # A state apart: the forward that asks goes on with tokens and trace as they are.
    apart = begin(model, x, grid, anatomy, keys=state.keys, places=places)
    apart.policy = state.policy
    streams = look_ahead(apart, blocks_before(layer))
    states = [unplace(model, x, grid, index), *(h[:, anatomy.prefix :] for h in streams[:layer])]
    return states, streams[-1]


def gate_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the gates among a saved explainer's."""
    return {k.removeprefix("gates."): v for k, v in tensors.items() if k.startswith("gates.")}


def build_gates(settings: Any, folder: Path, tensors: Mapping[str, Tensor]) -> MaskGates:
    """Gates from the description in a folder, with fresh weights, where they are those of the folder's weights."""
    try:
        # Building even without memory takes time by the gate: a depth that the weights do not bear out is not built.
        if check_whole("depth", settings["depth"], 1) > len(tensors):
            raise ValueError("its weights are of fewer gates")
        check_whole("width", settings["width"], 1)
        with quietly():
            with torch.device("meta"):  # nothing is allocated before it fits
                shapes = {k: v.shape for k, v in MaskGates(**settings).state_dict().items()}
            if shapes != {k: v.shape for k, v in tensors.items()}:
                raise PrunexError(f"{folder / WEIGHTS} does not fit {CONFIG} (gates): save the explainer again")
            return MaskGates(**settings)
    except PrunexError:
        raise
    except (TypeError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        # The file may hold anything, and messages are one line.
        shown = str(settings)[:120]
        raise PrunexError(f"{folder / CONFIG} is damaged: gates={shown} ({error}); save the explainer again") from error


MOST = 200.0  # of a multiplier


@dataclass(eq=False, repr=False)
class Seen(Brief):
    """One pass over images: patches before positions are added, and logits of the ViT and of the first gates."""

    # [B, P, D], the patch grid, [B, classes] and [B, K, P]
    patches: Tensor
    grid: tuple[int, int]
    logits: Tensor
    gates: Tensor


@dataclass(eq=False, repr=False)
class Terms(Brief):
    """What one training step weighs up, on the graph.

    KL(softmax wanted || softmax masked) [B] for one sample of the votes, and c_k [B, P]; logits [B, classes] of the
    unmasked images and of the masked ones.
    """

    divergence: Tensor
    log_keep: Tensor
    wanted: Tensor
    masked: Tensor

    def loss(self, alpha: Tensor, eps: float) -> Tensor:
        """mean_b[alpha (KL - eps)] + mean_{b,p} c_k: gates and placeholder descend on it, alpha ascends."""
        return (alpha * (self.divergence - eps)).mean() + self.log_keep.mean()


class DiffMaskExplainer(Beside):
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

    kind, explained = KIND, "model"
    model: ViT

    def __init__(
        self,
        model: ViT,
        mul: float = 15.0,
        add: float = 8.0,
        no_placeholder: bool = False,
        alpha_init: float = 20.0,
    ) -> None:
        super().__init__()
        alpha_init = check_number("alpha_init", alpha_init, 0, MOST)
        self.anatomy = anatomy = self.keep(model)
        self.gates = MaskGates(anatomy.width, anatomy.depth, mul, add, no_placeholder)
        # One parameter a layer: a step on one must leave the others' optimiser state alone.
        self.alpha = nn.ParameterList(torch.tensor(alpha_init) for _ in range(anatomy.depth + 2))
        weight = next(model.parameters())
        self.to(device=weight.device, dtype=weight.dtype)

    @property
    def layers(self) -> int:
        """Number of hidden states, L + 2."""
        return self.anatomy.depth + 2

    def observe(self, images: Tensor, layer: int = -1) -> Seen:
        """One pass of the explained ViT without gradients, and the logits of the gates 0..layer, on the graph."""
        layer = check_layer(layer, self.anatomy.depth)
        # The explained ViT never changes: only the gates behind its states are part of a graph.
        with torch.no_grad():
            patches, grid = embed_patches(self.model, images)
            x = place(self.model, patches, grid)
            state = begin(self.model, x, grid, self.anatomy)
            states, last = hidden_states(self.model, state, self.layers - 1)
            logits = head(self.model, *finished(self.model, last, Handed(self.anatomy)))
        return Seen(patches, grid, logits, self.gates(states[: layer + 1]))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities c_k of getting every vote up to a layer: [B, L + 2, P], falling along the layers."""
        return log_votes(self.observe(images).gates)

    def masked(self, seen: Seen, kept: Tensor) -> Tensor:
        """The ViT's output [B, classes] for h'_0 = v h_0 + (1 - v) placeholder, v [B, P] in 0..1, then placed."""
        v = kept.to(seen.patches.dtype).unsqueeze(-1)
        mixed = v * seen.patches + (1 - v) * self.gates.placeholder.to(seen.patches.dtype)
        return resume(self.model, place(self.model, mixed, seen.grid), seen.grid)

    def terms(self, images: Tensor, layer: int, generator: torch.Generator | None = None) -> Terms:
        """What the loss is made of, for one sample of the votes 0..layer."""
        seen = self.observe(images, layer)
        masked = self.masked(seen, sample(seen.gates, generator).prod(1))
        return Terms(divergence(seen.logits, masked), log_keep(seen.gates).sum(1), seen.logits, masked)

    def described(self) -> dict[str, Any]:
        """The gates."""
        return {"gates": self.gates.settings}


def divergence(wanted: Tensor, masked: Tensor) -> Tensor:
    """KL(wanted || masked) [B] of classes from logits [B, C], in at least float32; of two outcomes for one logit."""
    if wanted.shape[1] == 1:
        wanted, masked = (torch.cat([x, torch.zeros_like(x)], 1) for x in (wanted, masked))
    masked, wanted = promoted(masked).log_softmax(1), promoted(wanted).log_softmax(1)
    return F.kl_div(masked, wanted, reduction="none", log_target=True).sum(1)


def load_explainer(path: str | Path) -> DiffMaskExplainer:
    """A saved explainer again, in eval mode, from its folder or the ``model.safetensors`` in it; or refused."""
    spec, tensors, folder = read_folder(path, KIND, "model")
    gates = build_gates(spec.get("gates"), folder, gate_tensors(tensors))
    with quietly():
        explainer = DiffMaskExplainer(build_like(spec["model"], tensors, "model."))
    explainer.gates = gates
    return load_into(explainer, tensors, folder)
