"""The door to explanations of models of text and image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunex.checks import called_as, check_choice, check_flag
from prunex.errors import NothingDetected, PrunexError, unknown
from prunex.multimodal.adapter import Adapter, Targets
from prunex.multimodal.explanation import MultimodalExplanation, Queries, Query
from prunex.multimodal.families import adapter_of
from prunex.multimodal.recorder import Recording, recorded
from prunex.multimodal.rules import Attended, Rules
from prunex.multimodal.words import sentence, words_of

METHODS = ("generic_attention", "raw_attention", "rollout", "grad_cam")
_RELEVANCE_RULES = ("transformer_attribution", "partial_lrp")
_WITH_GRADIENTS = ("generic_attention", "grad_cam")
_RULES = {"literal": False, "normalise": True, "self_terms": True, "accumulate": True}


@called_as("prunex.multimodal.explain(model, inputs)")
def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: int | Tensor | None = None,
    method: str = "generic_attention",
    *,
    processor: Any = None,
    **options: Any,
) -> MultimodalExplanation:
    """Explain what a model of text and image, or a detector, rests on.

    Generic Attention (Chefer, Gur & Wolf, ICCV 2021, arXiv 2103.15679, eqs. 5-11) follows relevance through attention
    within and between streams; the others are what the paper compares it with, from the last layer's maps
    ("raw_attention", "grad_cam") or from products of all ("rollout", not specific to a target).

    One forward in eval mode and one backward pass for each of K targets; parameters' gradients, train flags, hooks and
    the kind of attention stay as they were. Fused attention keeps no map: eager attention takes its place for the call.

    Args:
        model: A transformers model as it is; :func:`prunex.multimodal.models` lists the classes.
        inputs: Its processor's batch: tensors by name. A sample's map is the same alone and in any batch, with padding
            too; those of "grad_cam" and "rollout" count padded tokens, as the authors' code does.
        target: Class index (CLIP: number of the text), int64 [B], or [B, K] for K of each sample; None for the
            predicted one. Of a detector: for each object query, [B, Q].
        method: "generic_attention", "raw_attention", "rollout" or "grad_cam".
        processor: The model's processor or tokenizer, to tell words from token numbers.
        **options: Of generic_attention: ``literal`` (divide by sums of 0 as the authors' code does), ``normalise``,
            ``self_terms``, ``accumulate`` (the paper's three ablations, when False). Of detectors: ``queries``
            (numbers, "all", or None for those above ``threshold``) and ``threshold`` (0.5).

    Returns:
        The explanation.

    Raises:
        PrunexError: A model that is not known, is compiled, uses gradient checkpointing, or shows another number of
            maps than its configuration says; inputs, a target, a method or an option that it cannot take. Of a
            detector ``prunex.errors.NothingDetected``, where no object query of the batch is above the threshold.

    >>> import prunex.multimodal, torch
    >>> from transformers import VisualBertConfig, VisualBertForQuestionAnswering
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    >>> model = VisualBertForQuestionAnswering(VisualBertConfig(vocab_size=60, visual_embedding_dim=16, **sizes))
    >>> ids = torch.randint(60, (1, 6))
    >>> e = prunex.multimodal.explain(
    ...     model, dict(input_ids=ids, attention_mask=torch.ones_like(ids), visual_embeds=torch.randn(1, 5, 16))
    ... )
    >>> e.text.shape, e.image.shape, list(e.relevance)
    (torch.Size([1, 6]), torch.Size([1, 5]), ['R_ss'])
    """
    if method in _RELEVANCE_RULES:
        raise PrunexError(
            f"{method!r} needs relevance rules for every layer, which stop at timm's: give {', '.join(METHODS)}"
        )
    check_choice("method", method, METHODS)
    adapter = adapter_of(model, inputs)
    rules, chosen = _options(adapter, method, options)
    with recorded(model, adapter.prepared, adapter.roles, adapter.feature_map) as recording:
        # Another version may compute attention elsewhere, and no map would miss it.
        if len(recording.maps) != adapter.count():
            raise PrunexError(
                f"{type(model).__name__} showed {len(recording.maps)} attention maps where {adapter.count()} are "
                "expected from its configuration: this version of its library goes another way"
            )
        targets = adapter.targets(recording, target, chosen)
        answer = _Answer(adapter, targets)
        # Maps alone say the same of every target: one reading serves all passes.
        if method not in _WITH_GRADIENTS:
            matrices: dict[str, Tensor] = getattr(adapter, method)(recording.plain())
        for number, backward in enumerate(targets.passes):
            if method in _WITH_GRADIENTS:
                maps = recording.with_gradients(backward.score, number == len(targets.passes) - 1, adapter.unread)
                adapter.check_rows(maps, targets, backward.column)
                matrices = answer.of_gradients(maps, method, rules)
            answer.add(matrices, backward.column)
        return _explanation(adapter, recording, targets, answer, method, {**vars(rules), **chosen}, processor)


def _options(adapter: Adapter, method: str, options: Mapping[str, Any]) -> tuple[Rules, dict[str, Any]]:
    """The rules, and the adapter's own options."""
    allowed = {**(_RULES if method == "generic_attention" else {}), **adapter.options}
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {method} on {type(adapter.model).__name__}", name, allowed)
    flags = {name: check_flag(name, options.get(name, default)) for name, default in _RULES.items()}
    return Rules(**flags), {name: options.get(name, default) for name, default in adapter.options.items()}


class _Answer:
    """Arrays that passes fill, [B, K, ...]."""

    def __init__(self, adapter: Adapter, targets: Targets) -> None:
        self.adapter, self.targets = adapter, targets
        self.arrays: dict[str, Tensor] = {}
        self._dropped: list[Tensor] = []

    def of_gradients(self, maps: list[Attended], method: str, rules: Rules) -> dict[str, Tensor]:
        """The matrices of one backward pass."""
        if method == "grad_cam":
            return self.adapter.grad_cam(maps)
        relevance = self.adapter.relevance(maps, rules)
        self._dropped = relevance.dropped
        return relevance.matrices()

    def add(self, matrices: dict[str, Tensor], column: Tensor) -> None:
        """What a pass says of the samples it is about."""
        matrices = self.adapter.of_pass(matrices, self.targets, column)
        text, image = self.adapter.rows(matrices, self.targets, column)
        named: dict[str, Tensor] = {**matrices, "image": image}
        if text is not None:
            named["text"] = text
        if self._dropped:
            named["dropped"] = torch.stack(self._dropped, 1)
        # Samples that wait in this pass are answered by another.
        about = (column >= 0).nonzero()[:, 0]
        for name, values in named.items():
            if name not in self.arrays:
                shape = (*self.targets.classes.shape, *values.shape[1:])
                self.arrays[name] = values.new_zeros(shape)
            self.arrays[name][about, column[about]] = values[about]

    def get(self, name: str) -> Tensor | None:
        """An array, without the dimension of targets where one was asked."""
        values = self.arrays.get(name)
        return values[:, 0] if values is not None and self.targets.single else values


def _explanation(
    adapter: Adapter,
    recording: Recording,
    targets: Targets,
    answer: _Answer,
    method: str,
    options: dict[str, Any],
    processor: Any,
) -> MultimodalExplanation:
    """The explanation from its arrays."""
    if not targets.passes:
        raise NothingDetected(
            f"no object query of {type(adapter.model).__name__} is above threshold={options['threshold']}: lower it, "
            "or give queries=[...]"
        )
    grid = adapter.grid(recording)
    image = torch.as_tensor(answer.get("image"))
    single = targets.single
    texts, words = adapter.texts(targets.classes), words_of(processor, adapter.inputs)
    labels = _labels(adapter, targets.classes, texts, words)
    e = MultimodalExplanation(
        text=answer.get("text"),
        image=image,
        relevance={name: torch.as_tensor(answer.get(name)) for name in answer.arrays if name.startswith("R_")},
        target=targets.classes[:, 0] if single else targets.classes,
        scores=targets.scores[:, 0] if single else targets.scores,
        logits=adapter.logits(recording.outputs).detach(),
        grid=grid,
        text_valid=adapter.text_valid(),
        image_valid=adapter.image_valid(image.shape[-1], grid),
        boxes=adapter.boxes(recording),
        dropped=answer.get("dropped"),
        texts=texts[:, 0] if single else texts,
        labels=[names[0] for names in labels] if single else labels,
        words=words,
        pictures=adapter.inputs.get("pixel_values"),
        sizes=_sizes(adapter.inputs),
        method=method,
        options=options if method == "generic_attention" else {n: options[n] for n in adapter.options},
    )
    if targets.kept is not None and grid is not None:
        e.queries = _queries(e, targets, adapter, grid)
    return e


def _labels(adapter: Adapter, classes: Tensor, texts: Tensor, words: list[list[str]] | None) -> list[list[str]]:
    """What each target is called, [B][K]: its class's name, or its text."""
    numbers: Tensor = classes
    names: Mapping[int, Any] = {}
    if adapter.compares and words is not None:
        numbers, names = texts, {text: sentence(tokens) for text, tokens in enumerate(words)}
    elif not adapter.compares:
        names = getattr(adapter.config, "id2label", None) or {}
    labels = []
    for row in numbers.tolist():
        labels.append([str(names.get(number, number)) for number in row])
    return labels


def _sizes(inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Height and width of each image without the padding that its mask tells; None where no pixels are seen."""
    pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_mask")
    if not isinstance(pixels, Tensor):
        return None
    if mask is None:
        return [(int(pixels.shape[2]), int(pixels.shape[3]))] * len(pixels)
    return [(int(inside.any(1).sum()), int(inside.any(0).sum())) for inside in mask]


def _queries(e: MultimodalExplanation, targets: Targets, adapter: Any, grid: tuple[int, int]) -> Queries:
    """Every explained object query."""
    pixels: Any = e.pictures
    probability, sizes, labels = adapter.probability(e.logits), e.sizes or [], e.labels
    entries = []
    for b, k in torch.as_tensor(targets.kept).nonzero().tolist():
        valid = e.image_valid[b].view(grid)
        # Padding lies below and to the right, so that the image's cells are the upper left corner.
        tall, wide = int(valid.any(1).sum()), int(valid.any(0).sum())
        label = int(targets.classes[b, k])
        entries.append(
            Query(
                image=b,
                query=targets.queries[k],
                target=label,
                label=labels[b][k],
                score=float(e.scores[b, k]),
                probability=float(probability[b, targets.queries[k], label]),
                map=e.image[b, k].view(grid)[:tall, :wide],
                box=torch.as_tensor(e.boxes)[b, targets.queries[k]],
                text=None if e.text is None else e.text[b, k],
                text_number=int(e.texts[b, k]),
                size=sizes[b],
                input_size=(int(pixels.shape[2]), int(pixels.shape[3])),
                grid=grid,
            )
        )
    return Queries(entries, len(e.image))
