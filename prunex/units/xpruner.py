"""X-Pruner: class-wise masks on heads and MLP channels that explain the units, and thresholds that remove them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_choice, check_number
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.units.base import Scores, UnitOptions, UnitPruner, slot
from prunex.vit.units import Branch
from prunex.vit.weights import check_gradients
from prunex.vit.widths import WidthSpec

if TYPE_CHECKING:
    from PIL.Image import Image

Stage = Literal["masks", "thresholds", "done"]
STAGES: tuple[Stage, ...] = ("masks", "thresholds", "done")


@dataclass(frozen=True, eq=False, repr=False)
class UnitRelevance(Brief):
    """Which unit serves which class: what X-Pruner's masks say.

    Attributes:
        heads: By block number, float [classes, heads]: |mask|, mean over the head's channels.
        channels: By block number, float [classes, MLP channels].
        kept: By branch key (``"3.heads"``), bool [units]: those that were not removed.
        updates: int64 [classes], training images seen of each class while the masks were learned. Rows of classes that
            were rarely seen are still near 1, which is no relevance.
    """

    heads: dict[int, Tensor]
    channels: dict[int, Tensor]
    kept: dict[str, Tensor]
    updates: Tensor

    def top_heads(self, label: int, k: int = 5) -> list[tuple[int, int, float]]:
        """The kept heads that matter most for a class beyond their mean over classes: (block, head, excess)."""
        heads = []
        for block, table in self.heads.items():
            excess = table[label] - table.mean(0)
            for head in self.kept[f"{block}.heads"].nonzero().flatten().tolist():
                heads.append((block, head, float(excess[head])))
        return sorted(heads, key=lambda h: -h[2])[:k]

    def top_classes(self, block: int, head: int, k: int = 5) -> list[tuple[int, float]]:
        """The classes a head matters most for: (class, relevance)."""
        values, order = self.heads[block][:, head].sort(descending=True, stable=True)
        return [(int(c), float(v)) for c, v in zip(order[:k], values[:k], strict=True)]

    def rows(self) -> list[dict[str, Any]]:
        """One row a class and head, in plain values: class, block, head, relevance, kept, updates."""
        rows = []
        for block, table in self.heads.items():
            kept = self.kept[f"{block}.heads"].tolist()
            for label, relevances in enumerate(table.tolist()):
                for head, relevance in enumerate(relevances):
                    row = {"class": label, "block": block, "head": head, "relevance": round(relevance, 6)}
                    rows.append(row | {"kept": kept[head], "updates": int(self.updates[label])})
        return rows

    def show(self, class_names: Sequence[str] | None = None, title: str | None = None) -> Image:
        """Which heads matter more for a class than on average, as a PIL image that a notebook shows.

        Args:
            class_names: Names of the classes; None: their numbers.
            title: A line above the table.
        """
        from PIL import Image

        from prunex.pictures import class_heads

        every = torch.cat(list(self.heads.values()), 1)
        # A class that is learned slowly has low rows, a head that serves every class a high column: neither is news.
        values = every - every.mean(0) - every.mean(1, keepdim=True) + every.mean()
        names = [str(number) for number in range(len(every))] if class_names is None else class_names
        heads = [f"{block}.{head}" for block, table in self.heads.items() for head in range(table.shape[1])]
        kept = torch.cat([self.kept[f"{block}.heads"] for block in self.heads])
        return Image.fromarray(class_heads(values, names, heads, kept, title))

    def _repr_html_(self) -> str:
        import numpy as np

        from prunex.pictures.cards import card, picture

        facts: dict[str, Any] = {"classes": len(self.updates)}
        for kind, tables in (("heads", self.heads), ("channels", self.channels)):
            left = sum(int(self.kept[f"{block}.{kind}"].sum()) for block in tables)
            facts[f"{kind} kept"] = f"{left:,} of {sum(t.shape[1] for t in tables.values()):,}"
        facts["images seen of each class"] = f"{int(self.updates.min()):,} to {int(self.updates.max()):,}"
        return card("UnitRelevance", facts, picture(np.asarray(self.show()), "which heads serve which class"))


@register("pruner", "xpruner", "Yu and Xiang, CVPR 2023, arXiv 2303.04935", "training with labels")
class XPruner(UnitPruner):
    r"""Explainability-aware masks on heads and MLP channels ("X-Pruner: eXplainable Pruning for Vision Transformers").

    Three stages, see :attr:`stage`:

    1. ``"masks"``. A mask M with a class axis stands on each head's channels, [classes, heads, d], before the output
       projection, and on each MLP's channels, [classes, hidden], before the second layer. In training an image's units
       are multiplied by its own label's row; the model's weights are to be frozen. Learned are the masks alone, by the
       task's loss plus ``sparse`` times mean(M^2) plus ``smooth`` times mean(abs(second difference along channels)).
       They start at 1, where the model is the dense one. What is validated is never masked: the masks saw the label.
    2. ``"thresholds"``. A unit's score is s = mean over classes of abs(M) (heads: over their channels too), made
       s / mean(s) within its branch. Each branch has a threshold t, from 0; the soft gate is
       g = sigmoid(2 slope (s - t)), the hard one h = [s > t]; the forward uses h with g's gradient. With the removed
       share of the units' multiply-adds R = 1 - sum(cost g) / sum(cost) and its target a the loss gains
       weight * (beta (a - R)^2 + gamma (a - R)); the multiplier **ascends**: gamma += rho (a - R) after each step.
    3. ``"done"``. One shift of all thresholds, found by bisection, makes the hard gates cost what the budget allows;
       units that are closed can be removed for good, and what is left is fine-tuned as usual.

    The paper's body could not be read and its repository holds no code. From its abstract and figures: masks with a
    class axis, smoothness and sparsity terms, learned thresholds a layer, a cost constraint, three stages.
    **Unverified**, after two unfinished reproductions: the attention mask's shape, the tanh gate with slope 10, the
    quadratic with multipliers, 50 / 80 / 30 epochs, the terms' weights. **Ours**: one mask a channel in the MLP instead
    of one a weight; collapsing over classes by the mean; s / mean(s); removing whole heads; R derived from the gates
    instead of a free rate; the fewest units a branch keeps; the final shift; mean-reduced penalties; dropping the
    masks' values once units are chosen. The published accuracy (DeiT-S, 78.93 % at 2.4 GMACs, seen in another paper's
    table) was not reproduced here.

    Args:
        class_groups: For many classes: which group's mask row each class uses, one whole number from 0 a class. Without
            it the masks have classes * units values: as many as DeiT-S has weights, for 1000 classes.
        sparse: Weight of mean(M^2).
        smooth: Weight of the second difference along a head's, or an MLP's, channels.
        slope: n of the soft gate.
        weight: Of the cost constraint.
        beta: Of its square.
        rho: Step of the multiplier.
        **shared: See :class:`~prunex.units.base.UnitOptions`.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32)
    >>> pruning = prunex.attach(model, "xpruner", budget=0.6)
    >>> with pruning.labelled(torch.tensor([1, 3])):
    ...     logits = model(torch.randn(2, 3, 32, 32))
    >>> sorted(pruning.losses()), pruning.relevance_table().heads[0].shape
    (['smooth', 'sparse'], torch.Size([4, 3]))
    """

    name = "xpruner"
    needs = "training"
    trains = True
    thresholds: Tensor
    multiplier: Tensor
    phase: Tensor
    updates: Tensor
    groups: Tensor

    def __init__(
        self,
        branches: Sequence[Branch],
        classes: int,
        class_groups: Sequence[int] | None = None,
        sparse: float = 10.0,
        smooth: float = 0.01,
        slope: float = 10.0,
        weight: float = 10.0,
        beta: float = 1.0,
        rho: float = 0.1,
        **shared: Unpack[UnitOptions],
    ) -> None:
        super().__init__(branches, classes, **shared)
        if classes < 1:
            raise PrunexError("xpruner needs a model with a classifier: its masks are a row a class")
        numbers = {"sparse": sparse, "smooth": smooth, "slope": slope, "weight": weight, "beta": beta, "rho": rho}
        self.terms = {k: check_number(k, v, 0) for k, v in numbers.items()}
        groups = _check_groups(class_groups, classes)
        self.options |= {"class_groups": class_groups if class_groups is None else groups, **self.terms}
        self.register_buffer("phase", torch.zeros((), dtype=torch.long))
        self.stage = "masks"
        rows = max(groups) + 1
        # Buffers that require grad, not parameters: whoever optimises model.parameters() does not know their rates, and
        # weight decay on masks would make classes that are seldom seen look unimportant.
        for b in self.branches:
            self.register_buffer(slot("mask", b.key), torch.ones(rows, b.units * b.width, requires_grad=True))
        self.register_buffer("thresholds", torch.zeros(len(self.branches), requires_grad=True))
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("updates", torch.zeros(classes, dtype=torch.long))
        self.register_buffer("groups", torch.tensor(groups), persistent=False)

    def prepare(self, model: nn.Module) -> None:
        """Refuse by name what gradients do not pass."""
        check_gradients(model, "magnitude")

    @property
    def stage(self) -> Stage:
        """What is learned now: "masks", "thresholds", or nothing ("done")."""
        return self._stage

    @stage.setter
    def stage(self, value: Stage) -> None:
        check_choice("stage", value, STAGES)
        self._stage = value
        self.phase.fill_(STAGES.index(value))

    def refresh(self) -> None:
        """Read the stage that a checkpoint brought, too."""
        super().refresh()
        # The base's constructor reads its buffers before those of this class are made.
        if "phase" in self._buffers:
            self._stage = STAGES[int(self.phase)]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moved to a device or dtype; what is learned stays float32, and a leaf that gathers gradients."""
        super()._apply(fn, recurse)
        for name in [*(slot("mask", b.key) for b in self.branches), "thresholds"]:
            learned = self.get_buffer(name)
            if not learned.is_leaf or learned.dtype != torch.float32:
                self._buffers[name] = learned.detach().float().requires_grad_()
        return self

    def mask(self, branch: Branch) -> Tensor:
        """The branch's masks, [groups, units * width]."""
        return self.get_buffer(slot("mask", branch.key))

    def masks(self) -> list[Tensor]:
        """All masks: what the first stage learns."""
        return [self.mask(b) for b in self.branches]

    def gate(self, key: str, labels: Tensor | None) -> Tensor | None:
        """The label's rows, the thresholds' gates, or what was decided; all open where nothing is to be learned."""
        branch = self.branch(key)
        if self.stage == "masks":
            if labels is None or not self.training:
                return None
            return self.mask(branch)[self.groups[labels]]
        if self.stage == "thresholds":
            shut, hard = self.shut(branch), self.hard(branch)
            # Straight through: the value is the hard gate's, the gradient that of 1 - shut.
            open_ = hard - shut + shut.detach() if self.training else hard
            return open_.repeat_interleave(branch.width)
        return super().gate(key, labels)

    def left(self, key: str) -> tuple[int, ...] | None:
        """Those of the hard gates while thresholds are learned, but not in training: there closed ones count too."""
        if self.stage == "done":
            return super().left(key)
        if self.stage == "masks" or self.training:
            return None
        kept = self.passed()[key]
        return None if bool(kept.all()) else tuple(kept.nonzero().flatten().tolist())

    def passed(self) -> dict[str, Tensor]:
        """The units whose hard gates are open while thresholds are learned, by branch: bool [units]."""
        with torch.no_grad():
            return {b.key: self.hard(b) > 0 for b in self.branches}

    def present(self) -> WidthSpec:
        """As the hard gates have them while thresholds are learned."""
        return self._spec(self.passed()) if self.stage == "thresholds" else super().present()

    def saw(self, labels: Tensor) -> None:
        """Count the classes that a training step of the masks has seen."""
        if self.stage == "masks":
            at = labels.to(self.updates.device).clamp(0, self.classes - 1)
            self.updates.scatter_add_(0, at, torch.ones_like(at, dtype=self.updates.dtype))  # bincount would wait

    def score(self, branch: Branch) -> Tensor:
        """What is held against the threshold: mean abs(M) of each unit over its branch's mean, [units]."""
        mask = self.mask(branch).detach().abs().mean(0)
        # Masks may be driven to 0 altogether, and then their mean divides nothing.
        units = mask.view(branch.units, branch.width).mean(1)
        return units / units.mean().clamp(min=torch.finfo(units.dtype).tiny)

    def closed(self) -> dict[str, int]:
        """As the hard gates have them while thresholds are learned."""
        if self.stage != "thresholds":
            return super().closed()
        return {key: len(kept) - int(kept.sum()) for key, kept in self.passed().items()}

    def _number(self, branch: Branch) -> int:
        return next(i for i, b in enumerate(self.branches) if b.key == branch.key)

    def shut(self, branch: Branch) -> Tensor:
        """How far each unit is closed softly, 1 - g in 0..1, [units], with the threshold's gradient."""
        # Where gates are all but open, 1 - sigmoid(x) and its gradient would be exactly 0: sigmoid(-x) is not.
        gap = self.score(branch) - self.thresholds[self._number(branch)]
        return (-2 * self.terms["slope"] * gap).sigmoid()

    def hard(self, branch: Branch) -> Tensor:
        """The hard gates, [units], 0 or 1; the fewest a branch keeps are open whatever the threshold."""
        score = self.score(branch)
        wanted = score > self.thresholds.detach()[self._number(branch)]
        return self._rounded(branch, wanted, score).to(score)

    def rate(self) -> Tensor:
        """R, the share of the units' multiply-adds that the soft gates remove, with the thresholds' gradient."""
        shut = torch.stack([self.shut(b).sum() * b.macs for b in self.branches]).sum()
        return shut / self.prunable()

    @property
    def target(self) -> float:
        """The share of the units' multiply-adds that has to go."""
        return 1 - self.allowed / self.prunable()

    def losses(self) -> dict[str, Tensor]:
        """The penalties on the masks, or the constraint on the rate."""
        terms = self.terms
        if self.stage == "done":
            return {}
        if self.stage == "thresholds":
            gap = self.target - self.rate()
            return {"rate": terms["weight"] * (terms["beta"] * gap.square() + self.multiplier * gap)}
        losses = {}
        if terms["sparse"] > 0:
            masks = self.masks()
            squares = torch.stack([m.square().sum() for m in masks]).sum()
            losses["sparse"] = terms["sparse"] * squares / sum(m.numel() for m in masks)
        if terms["smooth"] > 0:
            losses["smooth"] = terms["smooth"] * self._roughness()
        return losses

    def _roughness(self) -> Tensor:
        """Mean of abs(M[u-1] - 2 M[u] + M[u+1]) over neighbours in one head, or in one MLP."""
        parts, count = [], 0
        for b in self.branches:
            m = self.mask(b)
            m = m.view(len(m), b.units, b.width) if b.kind == "heads" else m.unsqueeze(1)
            second = m.diff(n=2, dim=2)
            parts.append(second.abs().sum())
            count += second.numel()
        return torch.stack(parts).sum() / max(1, count)

    def ascend(self) -> None:
        """One step of the multiplier, **up** where too little is removed: gamma += rho (a - R)."""
        with torch.no_grad():
            self.multiplier += self.terms["rho"] * (self.target - self.rate())

    def scores(self, model: nn.Module, batches: Any = None) -> Scores:
        """The scores less the thresholds, so that one shift of all of them meets the budget."""
        with torch.no_grad():
            return {b.key: self.score(b) - self.thresholds[i] for i, b in enumerate(self.branches)}

    def level(self, branch: Branch, score: Tensor) -> Tensor:
        """As they are: they were made to compare."""
        return score.detach().double().cpu()

    def conclude(self) -> None:
        """End the search: shift the thresholds until the hard gates meet the budget, and keep what is open."""
        self.decide(self.scores(nn.Identity()))
        self.stage = "done"

    def relevance(self) -> UnitRelevance:
        """What the masks say about units and classes."""
        tables: dict[str, dict[int, Tensor]] = {"heads": {}, "channels": {}}
        for b in self.branches:
            rows = self.mask(b).detach().abs()[self.groups]
            tables[b.kind][b.block] = rows.view(len(rows), b.units, b.width).mean(2).cpu()
        searching = self.stage == "thresholds"
        kept = self.passed() if searching else {b.key: self.open(b.key) for b in self.branches}
        kept = {key: units.cpu() for key, units in kept.items()}
        return UnitRelevance(tables["heads"], tables["channels"], kept, self.updates.cpu())


def _check_groups(given: Any, classes: int) -> list[int]:
    """One group a class, numbered from 0 without gaps."""
    if given is None:
        return list(range(classes))
    groups = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    numbers = all(type(g) is int for g in groups)
    # A gap would be a row of masks that no image ever teaches.
    if not numbers or len(groups) != classes or set(groups) != set(range(max(groups, default=-1) + 1)):
        raise PrunexError(
            f"class_groups={given!r} is not allowed: give a group for each of the {classes} classes, whole numbers "
            "from 0 without gaps"
        )
    return groups
