"""DynamicViT: learned per-image token pruning by small predictors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_choice, check_flag, check_number
from prunex.errors import PrunexError
from prunex.pruners.adaptive import Adaptive, AdaptiveOptions, above
from prunex.pruners.base import Forward, floor_share, top
from prunex.pruners.schedules import Schedule
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.aside import as_found
from prunex.vit.decisions import Drop, Keep, Mask
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn


class Predictor(nn.Module):
    """Scores patches by a local half of each token's features and a global half pooled over the tokens still there.

    Input [B, n, D] and a policy [B, n] or None; output log-probabilities [B, n, 2], class 0 = keep (arXiv 2106.02034,
    Eqs. 2-6; the paper numbers the classes the other way round).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor, policy: Tensor | None) -> Tensor:
        """Log-probabilities [B, n, 2] of keep and drop."""
        local, shared = self.embed(x).chunk(2, -1)
        if policy is None:
            pooled = shared.mean(1, keepdim=True)
        else:
            # An image whose patches were all dropped divides by 1, not by 0.
            weight = policy.unsqueeze(-1)
            pooled = ((shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)).to(
                shared.dtype
            )
        return self.score(torch.cat([local, pooled.expand_as(local)], -1)).log_softmax(-1)


@register(
    "pruner", "dynamicvit", "Rao et al., NeurIPS 2021, arXiv 2106.02034", "fine-tuning: its predictors are learned"
)
class DynamicViT(Adaptive):
    r"""Dynamic token sparsification (arXiv 2106.02034).

    Before each stage's block a predictor gives every patch a keep probability. In training, hard straight-through
    Gumbel masks switch patches off as attention keys while all tokens stay in the tensor; at inference the
    floor(P * keep_ratio^(s+1)) best-scored of the P original patches continue and the rest are gone.

    Auxiliary losses, added to the user's own: ``ratio``, mean over stages and images of (kept share - target)^2, weight
    2; ``distill``, KL(teacher || student) of the logits (of a single output the squared error), and ``tokens``, the
    mean squared error of the final patch tokens still kept, weight 0.5 each, both against the frozen dense model.

    With ``count="adaptive"`` an image keeps the patches whose keep probability is above ``threshold``: any number, 0
    included (but one where the head only pools patches). Training is the same, except that the ratio is held on the
    mean over the batch, so that images may differ.

    Departures from the authors' code: dropped keys are left out of the softmax altogether (theirs leak up to 41 % of a
    row when one dominates), an image whose patches are all dropped stays finite, and any number of prefix tokens is
    protected.

    Args:
        keep_ratio: Base rate in (0, 1]; stage s keeps its (s+1)-th power. A sequence gives one factor a stage.
        stages: Blocks before which tokens are dropped.
        teacher: Distil from a frozen copy of the dense model as it was when attached; False turns both terms off.
        ratio_weight: Of the ratio loss (the authors: 2, DeiT-B 5).
        distill_weight: Of the two distillation losses.
        token_loss: "mse" (DeiT) or "kl" (the authors' switch for token distributions).
        batch_ratio: Hold the ratio on the batch mean instead of on every image (always where counts are adaptive).
        **shared: See :class:`~prunex.pruners.adaptive.AdaptiveOptions`: ``threshold`` is of the keep probability, and
            the targets of the ratio loss fall with the rates. By default, as in the paper, they do not.
    """

    name = "dynamicvit"
    trains_masked = True
    lr = 9e-4  # measured on real weights, see docs/pruners.md
    handed_on = {"count": "fixed", "threshold": 0.5, "expected": None, **Schedule().options}

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        teacher: bool = True,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_loss: Literal["mse", "kl"] = "mse",
        batch_ratio: bool = False,
        **shared: Unpack[AdaptiveOptions],
    ) -> None:
        super().__init__(anatomy, keep_ratio, stages, **shared)
        check_choice("token_loss", token_loss, ("mse", "kl"))
        if anatomy.width < 4:
            raise PrunexError(f"the model is {anatomy.width} wide: dynamicvit's predictors need at least 4")
        self.predictors = nn.ModuleList(Predictor(anatomy.width) for _ in self.stages)
        for predictor, target in zip(self.predictors, self.targets, strict=True):
            # One that is never asked must not wait for a gradient: DDP would take it for a mistake.
            predictor.requires_grad_(target < 1)
        self.distills = check_flag("teacher", teacher)
        self.ratio_weight = check_number("ratio_weight", ratio_weight, 0)
        self.distill_weight = check_number("distill_weight", distill_weight, 0)
        self.token_loss = token_loss
        self.batch_ratio = check_flag("batch_ratio", batch_ratio)
        # A tuple hides it from parameters, state dict, optimiser and DDP.
        self._teacher: tuple[ViT, ...] = ()
        self.options |= {
            "teacher": self.distills,
            "ratio_weight": self.ratio_weight,
            "distill_weight": self.distill_weight,
            "token_loss": token_loss,
            "batch_ratio": self.batch_ratio,
        }

    def prepare(self, model: ViT) -> None:
        """Freeze a copy of the dense model as the teacher."""
        if self.distills:
            self._teacher = (copy.deepcopy(model).eval().requires_grad_(False),)

    def plan(self) -> list[Turn]:
        """Before the blocks of the stages that drop anything."""
        return [Turn(block) for block, target in zip(self.stages, self.targets, strict=True) if target < 1]

    def decide(self, turn: Turn, state: TokenState) -> Keep | Mask | Drop | None:
        """Keep the best-scored patches before a stage's block, or mask them while training."""
        s = self.stages.index(turn.block)
        target, drawing = self.target(s), state.training and state.masked
        k = floor_share(target, state.trace.grid[0] * state.trace.grid[1])
        if not drawing and not self.adaptive and k >= state.left:  # nobody leaves, so nobody need be scored
            return None
        # In float32 from here on, under autocast too: noise is drawn and tokens are ranked by it.
        logp = self.predictors[s](state.patches, state.present).float()
        score = logp[..., 0]
        if not drawing and self.adaptive:
            return Drop(above(score.detach().exp(), self.threshold, state.present, self.least), score)
        if not drawing:
            return Keep(top(score, k, state.present), score)
        if target >= 1:  # before the schedule's start: all stay, and DDP still sees the predictor used
            drawn = torch.ones_like(score) + 0 * score
        else:
            drawn = F.gumbel_softmax(logp, tau=1.0, hard=True, dim=-1)[..., 0]
        return Mask(drawn if state.present is None else drawn * state.present, score)

    def target(self, stage: int) -> float:
        """The share of the original patches aimed at after a stage, at the present progress."""
        if self.progress >= self.shrink.start + self.shrink.length:
            return self.targets[stage]
        return math.prod(self.rate(s) for s in range(stage + 1))

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each stage; expected ones where counts are adaptive."""
        return self.likely(patches) or [floor_share(self.target(s), patches) for s in range(len(self.stages))]

    def macs(self, entering: int, inner: int = 0) -> int:
        """One predictor over the entering patches: n (D^2 + D^2/2 + D^2/8 + D/2)."""
        linear = [m for m in self.predictors[0].modules() if isinstance(m, nn.Linear)]
        return entering * sum(m.in_features * m.out_features for m in linear)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """``ratio``, ``distill`` and ``tokens`` of one training forward, weighted."""
        losses: dict[str, Tensor] = {}
        if not forward.masks:
            return losses
        targets = [self.target(s) for s, end in enumerate(self.targets) if end < 1]
        shares = [m.mean(1) for m in forward.masks]
        if self.batch_ratio or self.adaptive:
            shares = [s.mean() for s in shares]
        gaps = [((s - t) ** 2).mean() for s, t in zip(shares, targets, strict=True)]
        losses["ratio"] = self.ratio_weight * torch.stack(gaps).mean()
        if self._teacher and self.distill_weight > 0:
            losses |= {k: self.distill_weight * v for k, v in self._distill(forward).items()}
        return losses

    def _distill(self, forward: Forward) -> dict[str, Tensor]:
        teacher: Any = self._teacher[0]
        prefix = forward.anatomy.prefix
        with torch.no_grad(), as_found(teacher, train=False):
            # No submodule of anything, so that nobody has moved it along with the model.
            teacher.to(forward.images.device, next(self.predictors.parameters()).dtype)
            size = forward.anatomy.image
            if tuple(teacher.patch_embed.img_size) != size:  # the model was given another size since
                teacher.set_input_size(img_size=size)
            features = teacher.forward_features(forward.images)
            wanted = teacher.forward_head(features)
        losses = {}
        if forward.logits is not None:
            if forward.logits.shape != wanted.shape:
                raise PrunexError(
                    f"the model gives logits {list(forward.logits.shape)}, its dense teacher {list(wanted.shape)}: "
                    "change the classifier before attaching, or attach with teacher=False"
                )
            given, wanted = forward.logits.float(), wanted.float()
            if wanted.shape[-1] == 1:  # the softmax of one output is always 1
                losses["distill"] = F.mse_loss(given, wanted)
            else:
                losses["distill"] = F.kl_div(
                    given.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
                )
        student, target = forward.tokens[:, prefix:].float(), features[:, prefix:].float()
        # Tokens that were dropped are no longer meant to say what the teacher's say.
        kept = forward.masks[-1].detach() > 0.5
        if self.token_loss == "mse":
            distance = ((student - target) ** 2).mean(-1)
        else:
            student, target = student.log_softmax(-1), target.log_softmax(-1)
            distance = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        losses["tokens"] = (distance * kept).sum() / kept.sum().clamp(min=1)
        return losses

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictors from the authors' names: ``score_predictor.{s}.in_conv.{0,1}`` and ``.out_conv.{0,2,4}``."""
        names = {"in_conv": "embed", "out_conv": "score"}
        renamed = {}
        for key, value in state.items():
            parts = key.split(".")
            if parts[0] == "score_predictor" and len(parts) == 5 and parts[2] in names:
                renamed[".".join(["predictors", parts[1], names[parts[2]], *parts[3:]])] = value
        return renamed

    def inference_only(self) -> None:
        """Let the teacher go, and keep the targets in force now."""
        super().inference_only()
        self._teacher = ()
        self.distills = False
        self.options["teacher"] = False
