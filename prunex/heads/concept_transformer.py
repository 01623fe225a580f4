"""Concept Transformer: class scores as a linear function of attention from tokens to named concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.checks import check_choice, check_flag, check_number, check_whole
from prunex.errors import PrunexError, unknown
from prunex.heads.base import Evidence, Reading, TokenHead, on_grid, squared_distance
from prunex.heads.concepts import STREAMS, ConceptAttention, names_of, plain_names
from prunex.heads.final_tokens import FinalTokens
from prunex.later import refuse
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.trace import TokenTrace

# The authors' spelling.
_OFFICIAL = {
    "global": ("concepts", "concept_tranformer"),
    "spatial": ("spatial_concepts", "spatial_concept_tranformer"),
    "unsupervised": ("unsup_concepts", "unsup_concept_tranformer"),
}


@dataclass(eq=False, repr=False)
class ConceptReading(Reading):
    """What a Concept Transformer makes of final tokens.

    Attributes:
        attention: By stream ("global", "spatial", "unsupervised"), float [B, heads, m, C]: each query's attention to
            the concepts, rows summing to 1 (dropout left out). Global and unsupervised streams have one query, m = 1,
            the spatial one a query a patch token.
        dropped: The same after dropout, as the scores were computed from it; in eval mode equal.
    """

    in_repr = ("logits", "attention")

    attention: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class ConceptEvidence(Evidence):
    """What a Concept Transformer's scores are made of: they are sums, exactly.

    Attributes:
        names: Of the concepts, global ones first, then spatial, then unsupervised.
        contributions: float [B, C, classes]; summed over concepts, plus ``bias``, these are the logits.
        bias: float [classes].
        spatial: float [B, C_s, gh, gw], what each spatial concept contributes to the target at each patch.
        attention: float [B, C_s, gh, gw], the attention to each spatial concept, mean over heads; NaN at patches that
            are no token of their own any more.
    """

    in_repr = ("target", "logits", "names", "contributions")

    names: tuple[str, ...]
    contributions: Tensor
    bias: Tensor
    spatial: Tensor
    attention: Tensor

    def info(self) -> dict[str, Tensor]:
        """``contributions`` [B, C, classes], ``concept_maps`` [B, C_s, gh, gw], ``attention`` [B, C_s, gh, gw]."""
        return {"contributions": self.contributions, "concept_maps": self.spatial, "attention": self.attention}


@register(
    "head",
    "concept_transformer",
    "Rigotti et al., ICLR 2022",
    "training; which concepts images have, for those where that is known",
)
class ConceptTransformer(TokenHead):
    """A head of cross-attention from tokens to named concepts; scores are linear in that attention.

    With A_h the attention of head h and the constant table G_h = (E W_V)_h (W_O)_h, in eval mode
    score_k = b_k + sum_h sum_c A_h[c] G_h[c, k], so a concept's contribution is exactly sum_h A_h[c] G_h[c, k] (the
    paper's faithfulness by design). It is exact head by head: attention averaged over heads is a picture of it, and
    with several heads no proof. The class token asks the global concepts and the unsupervised ones, every patch token
    that is left the spatial ones, with a mean over patches; the streams' scores are summed. Where tokens were merged,
    each counts as often as it has patches.

    Losses: ``explanation_weight`` times the mean over annotated rows of |A - t / sum(t)|^2, A the mean over heads and
    t which concepts are present (per stream); ``sparsity_weight`` times the mean over entries of -A log(A + 1e-8), of
    global and spatial concepts.
    Both go by attention before dropout; the authors' take it after, which then does not sum to 1 (``parity``).

    Defaults are those of the authors' CUB script, whose numbers for digits are explanation_weight 2, sparsity_weight 0.
    Published accuracies are unverified: quote none. Unlike the authors' code, unsupervised concepts have an attention
    of their own, and ``heads`` is used.

    Args:
        anatomy: Of the model.
        concepts: Global concepts, by name or as a number.
        spatial: Concepts that have a place, by name or as a number.
        unsupervised: How many concepts without annotation.
        heads: Of the attention; they divide the model's width.
        query: Who asks global concepts: the "class" token, or tokens "pooled" by learned weights (softmax over patch
            tokens of a linear map to one number), for models without a class token.
        none: Add a spatial concept "none" for patches that are annotated with nothing (ours, not the paper's): a
            softmax over concepts must put its mass somewhere.
        dropout: On attention and on scores, in training.
        explanation_weight: Of the explanation loss.
        sparsity_weight: Of the entropy.
        parity: Compute the losses from attention after dropout, as the authors do.

    Raises:
        PrunexError: For no concept at all, names that are used twice, heads that do not divide the width, or a model
            without a class token under ``query="class"``.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=2).eval()
    >>> head = prunex.attach(model, "concept_transformer", concepts=["loop", "bar"], spatial=["ink"])
    >>> evidence = head.evidence(torch.randn(3, 3, 64, 64))
    >>> evidence.names, evidence.contributions.shape
    (('loop', 'bar', 'ink'), torch.Size([3, 3, 2]))
    >>> whole = evidence.contributions.sum(1) + evidence.bias
    >>> torch.allclose(whole, evidence.logits, atol=1e-5)
    True
    """

    name = "concept_transformer"

    def __init__(
        self,
        anatomy: Anatomy,
        concepts: Sequence[str] | int = 0,
        spatial: Sequence[str] | int = 0,
        unsupervised: int = 0,
        heads: int = 2,
        query: Literal["class", "pooled"] = "class",
        none: bool = False,
        dropout: float = 0.1,
        explanation_weight: float = 1.0,
        sparsity_weight: float = 0.5,
        parity: bool = False,
    ) -> None:
        super().__init__(anatomy)
        self.none = check_flag("none", none)
        self.names = names_of(concepts, spatial, unsupervised, self.none)
        self.all_names = tuple(name for stream in STREAMS for name in self.names[stream])
        check_whole("heads", heads, 1)
        if self.width % heads:
            raise PrunexError(f"heads={heads} does not divide the model's width {self.width}: give a divisor of it")
        self.query = check_choice("query", query, ("class", "pooled"))
        self.parity = check_flag("parity", parity)
        self.explanation_weight = check_number("explanation_weight", explanation_weight, 0)
        self.sparsity_weight = check_number("sparsity_weight", sparsity_weight, 0)
        check_number("dropout", dropout, 0, 1)
        attentions = {}
        for stream in STREAMS:
            if self.names[stream]:
                count = len(self.names[stream])
                attentions[_module(stream)] = ConceptAttention(count, self.width, self.classes, heads, dropout)
        self.attentions = nn.ModuleDict(attentions)
        asks_all = bool({"global", "unsupervised"} & set(self.streams))
        self.pool = nn.Linear(self.width, 1) if asks_all and query == "pooled" else None
        self.reads_class = asks_all and self.pool is None
        self.reads_patches = "spatial" in self.streams or self.pool is not None
        self.options = {
            "concepts": plain_names(concepts),
            "spatial": plain_names(spatial),
            "unsupervised": unsupervised,
            "heads": heads,
            "query": query,
            "none": none,
            "dropout": float(dropout),
            "explanation_weight": self.explanation_weight,
            "sparsity_weight": self.sparsity_weight,
            "parity": parity,
        }
        self.check(anatomy)

    @property
    def streams(self) -> dict[str, ConceptAttention]:
        """The attention of each stream that has concepts, by the stream's name."""
        return {stream: getattr(self.attentions, _module(stream)) for stream in STREAMS if self.names[stream]}

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a forward that gives no class token where one is asked for."""
        if self.reads_class and not anatomy.rankers:
            raise PrunexError(
                "global concepts are asked by the class token, and this model's head reads none (global_pool="
                f"{anatomy.pool!r}, {anatomy.prefix} prefix tokens): give query='pooled', or spatial concepts alone"
            )

    def forward(self, tokens: FinalTokens, classifier: Tensor | None = None) -> ConceptReading:
        """Scores, and the attention they are made of."""
        attention, dropped, logits = {}, {}, []
        for stream, module in self.streams.items():
            queries = tokens.patches if stream == "spatial" else self._query(tokens)
            attention[stream] = self._intervened(stream, module.attend(queries))
            dropped[stream] = module.attn_drop(attention[stream])
            scores = module.scores(dropped[stream])
            logits.append(tokens.mean(scores) if stream == "spatial" else scores[:, 0])
        # One after the other, as the authors add them.
        total = logits[0]
        for more in logits[1:]:
            total = total + more
        return ConceptReading(total, tokens, attention, dropped)

    def _query(self, tokens: FinalTokens) -> Tensor:
        """Who asks global concepts, [B, 1, D]."""
        if self.pool is None:
            return tokens.prefix[:, :1]
        weights = tokens.softmax(self.pool(tokens.patches))
        return weights.transpose(1, 2) @ tokens.patches

    def _intervened(self, stream: str, attention: Tensor) -> Tensor:
        for name, value in self.forced.items():
            if name in self.names[stream]:
                # By a mask, not in place: attention is part of the graph that losses are taken from.
                at = torch.arange(attention.shape[-1], device=attention.device) == self.names[stream].index(name)
                attention = torch.where(at, value, attention)
        return attention

    def losses(
        self, reading: Any, labels: Tensor | None = None, concepts: Tensor | None = None, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``explanation`` of what is annotated, ``sparsity`` of all attention, both weighted."""
        used = reading.dropped if self.parity else reading.attention
        means = {stream: attention.mean(1) for stream, attention in used.items()}
        losses = {}
        if self.explanation_weight > 0 and (concepts is not None or spatial is not None):
            parts = []
            if concepts is not None:
                parts.append(self._explanation("global", means, concepts, reading.tokens))
            if spatial is not None:
                parts.append(self._explanation("spatial", means, spatial, reading.tokens))
            losses["explanation"] = self.explanation_weight * torch.stack(parts).sum()
        if self.sparsity_weight > 0:
            # As the authors have it, unsupervised concepts are not asked to be few.
            named = [stream for stream in means if stream != "unsupervised"]
            if named:
                entropies = [self._entropy(means[stream], reading.tokens, stream) for stream in named]
                losses["sparsity"] = self.sparsity_weight * torch.stack(entropies).sum()
        return losses

    def _explanation(self, stream: str, means: Mapping[str, Tensor], target: Tensor, tokens: FinalTokens) -> Tensor:
        """Distance of attention from what is present, over annotated rows: a scalar."""
        if stream not in means:
            raise PrunexError(
                f"there are {stream} concept labels, and this head has no {stream} concepts: leave them out"
            )
        rows = means[stream]
        present = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if stream == "spatial":
            rows, present = tokens.on_patches(rows)
        target = self.fitting(stream, target, rows.shape[0], rows.shape[1], tokens.grid).to(rows)
        # Where nothing is annotated the mass is that of "none"; the sum of an unknown row is NaN, and stays out.
        if stream == "spatial" and self.none:
            target = torch.cat([target, (target.sum(-1, keepdim=True) == 0).to(target)], -1)
        total = target.sum(-1, keepdim=True)
        # NaN: nobody annotated it. All 0 is annotated, but has no distribution to compare with.
        valid = present & (total.squeeze(-1) > 0)
        return squared_distance(rows, target / total, valid)

    def fitting(self, stream: str, target: Any, batch: int, rows: int, grid: tuple[int, int] | None = None) -> Tensor:
        """Concept labels of any real dtype as [B, rows, C], 0, 1 or NaN (unknown) each; one alone needs no C.

        ``grid`` is that of the patches, where it is known: labels [B, gh, gw, C] must have it.

        Raises:
            PrunexError: For another shape, or other numbers.
        """
        # Nobody annotates "none": it follows from the other columns.
        count = len(self.names[stream]) - (stream == "spatial" and self.none)
        wanted = [batch, count] if stream == "global" else [batch, rows, count]
        if not isinstance(target, Tensor) or target.is_complex():
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise PrunexError(f"{stream} concept labels are {came}: give a tensor {wanted} of 0, 1 and NaN (unknown)")
        shaped = target.unsqueeze(-1) if count == 1 and list(target.shape) == wanted[:-1] else target
        if stream == "spatial" and shaped.ndim == 4 and grid in (None, tuple(shaped.shape[1:3])):
            shaped = shaped.flatten(1, 2)
        if list(shaped.shape) != wanted:
            names = self.names[stream][:count]
            cells = "" if stream == "global" or grid is None else f" or {[batch, *grid, count]}"
            raise PrunexError(
                f"{stream} concept labels have shape {list(target.shape)}: give {wanted}{cells}, one column for each "
                f"of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        refuse(
            ((shaped != 0) & (shaped != 1) & ~shaped.isnan()).any(),
            lambda: f"{stream} concept labels hold other numbers than 0, 1 and NaN (unknown): give these",
        )
        return shaped.unsqueeze(1) if stream == "global" else shaped

    def _entropy(self, mean: Tensor, tokens: FinalTokens, stream: str) -> Tensor:
        """-a log(a + 1e-8), mean over all entries: a scalar; slots of dropped tokens have no part in it."""
        entropy = -mean * (mean + 1e-8).log()
        if stream != "spatial" or tokens.counts is None:
            return entropy.mean()
        here = (tokens.counts > 0).to(entropy)
        return (entropy.mean(2) * here).sum() / here.sum().clamp(min=1)

    def effects(self) -> Tensor:
        """What each concept adds to each score where all attention is on it, [C, classes], global ones first."""
        return torch.cat([module.table().sum(0) for module in self.streams.values()])

    def contributions(self, reading: Any) -> Tensor:
        """What each concept adds to each score, [B, C, classes], global ones first."""
        parts = []
        for stream, module in self.streams.items():
            attention = reading.dropped[stream].transpose(1, 2)  # [B, m, H, C]
            mean = reading.tokens.mean(attention) if stream == "spatial" else attention[:, 0]
            parts.append(torch.einsum("bhc,hck->bck", mean, module.table()))
        return torch.cat(parts, 1)

    def evidence(self, reading: Any, target: Tensor, trace: TokenTrace) -> ConceptEvidence:
        """Contributions concept by concept, and patch by patch for those that have a place."""
        tokens, batch = reading.tokens, len(target)
        row = reading.logits.new_zeros(batch, self.prefix + tokens.patches.shape[1])
        spatial = attention = reading.logits.new_zeros(batch, 0, *trace.grid)
        bias = torch.stack([m.proj.bias for m in self.streams.values()]).sum(0)
        for stream, module in self.streams.items():
            table = module.table()[:, :, target]  # [H, C, B]
            parts = torch.einsum("bhnc,hcb->bnc", reading.dropped[stream], table)
            if stream == "spatial":
                # The scores are a mean over patches, of which each token has its share.
                parts = parts * tokens.shares.unsqueeze(2)
                row[:, self.prefix :] += parts.sum(2)
                spatial = on_grid(parts.transpose(1, 2), trace)
                mean, present = tokens.on_patches(reading.attention[stream].mean(1))
                mean = mean.masked_fill(~present.unsqueeze(2), float("nan"))
                attention = mean.transpose(1, 2).unflatten(2, trace.grid)
            elif self.pool is None:
                row[:, 0] += parts.sum((1, 2))
            else:  # pooled by weights: each token has its share of what the pooled one says
                weights = tokens.softmax(self.pool(tokens.patches))[:, :, 0]
                row[:, self.prefix :] += weights * parts.sum((1, 2)).unsqueeze(1)
        contributions = self.contributions(reading)
        return ConceptEvidence(
            target, reading.logits, trace.lift(row), trace, self.all_names, contributions, bias, spatial, attention
        )

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' parameter names; a stream that they have and this head has not must be empty."""
        plain = {}
        for stream, (concepts, attention) in _OFFICIAL.items():
            if stream not in self.streams:
                continue
            if stream == "unsupervised" and f"{_OFFICIAL['global'][1]}.q.weight" in state:
                attention = _OFFICIAL["global"][1]  # their unsupervised concepts ask the global ones' attention
            prefix = f"attentions.{_module(stream)}."
            # The authors' concepts have a batch dimension of one.
            if concepts in state:
                plain[f"{prefix}concepts"] = state[concepts].squeeze(0)
            for name in ("q.weight", "kv.weight", "proj.weight", "proj.bias"):
                if f"{attention}.{name}" in state:
                    plain[prefix + name] = state[f"{attention}.{name}"]
        for name in ("weight", "bias"):
            if self.pool is not None and f"token_attention_pool.{name}" in state:
                plain[f"pool.{name}"] = state[f"token_attention_pool.{name}"]
        return plain

    def outputs(self, reading: Any) -> dict[str, Tensor]:
        """``concepts``: float [B, C, classes], the contributions."""
        return {"concepts": self.contributions(reading)}

    def macs(self, patches: int) -> int:
        """Queries of all streams."""
        pooling = 0 if self.pool is None else 2 * patches * self.width
        return pooling + sum(m.macs(patches if stream == "spatial" else 1) for stream, m in self.streams.items())

    def force(self, values: Mapping[str, float]) -> None:
        """Set the attention to some concepts from now on, in all heads and rows, without normalising again.

        Raises:
            PrunexError: For a name that is no concept, or a value that is no share.
        """
        # All are checked before any is in force.
        for name, value in values.items():
            if name not in self.all_names:
                raise unknown("concept", name, self.all_names)
            check_number(f"intervene: {name}", value, 0, 1)
        self.forced = {name: float(value) for name, value in values.items()}


def _module(stream: str) -> str:
    """A stream's attention as a module; "global" itself is a word of Python's, which exported graphs stumble over."""
    return f"{stream}_concepts"
