"""What a family of models says of itself: where its attention is, in which order it acts, and which rows answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunex.brief import Brief, brief
from prunex.errors import PrunexError
from prunex.multimodal.recorder import Recording, attention_modules
from prunex.multimodal.rules import Attended, Relevance, Rules, by_role, grad_cam, last, propagate, rollout


@dataclass(eq=False, repr=False)
class Pass(Brief):
    """One backward pass: a score of each sample, summed, since no sample's attention touches another's.

    Attributes:
        score: A number.
        column: int64 [B], which of its targets each sample is explained for; -1 for a sample that waits.
    """

    score: Tensor
    column: Tensor


@dataclass(eq=False, repr=False)
class Targets(Brief):
    """What is explained.

    Attributes:
        classes: int64 [B, K], the class (or text) of each target.
        passes: Backward passes that cover all of them.
        scores: [B, K].
        queries: Of a detector, the K object queries that the targets belong to.
        kept: Of a detector, bool [B, K]: which of them are explained in an image.
        single: Whether K is one because one target was asked, so that answers have no dimension for it.
    """

    classes: Tensor
    passes: list[Pass]
    scores: Tensor
    queries: list[int] = field(default_factory=list)
    kept: Tensor | None = None
    single: bool = False

    def query(self, column: Tensor) -> Tensor:
        """Of a detector, the object query that each sample is explained for in a pass, int64 [B]."""
        return torch.tensor(self.queries, device=column.device)[column]


class Adapter:
    """One family of models; this one is a single stream, text first, whose answer reads one token.

    Attributes:
        models: Names of the classes it knows.
        roles: By pattern of an attention module's path, the roles of its calls in one forward.
        crossed: Cross relevance that is followed.
        reads: The matrices whose rows are the answer; the baselines give these alone.
        needs: Inputs it cannot do without.
        options: Options of its own, with their defaults.
        feature_map: Pattern of the path of the convolution that makes the image's cells, if there is one.
        row_normalised: Whether rollout's factors are normalised.
        scores: The field of the model's output that holds class scores; an output that is a tensor is those.
        unread: Places of maps, from the end, that the answer does not depend on.
        text_parts: Inputs with one entry a text token, [B, T].
        image_parts: Inputs with one entry a box, [B, I, ...], and which of them says which boxes count.
        compares: Whether a class is one of the inputs' texts.
    """

    models: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[Mapping[str, Sequence[str]]] = {}
    crossed: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ("ss",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    feature_map: ClassVar[str | None] = None
    row_normalised: ClassVar[bool] = True
    scores: ClassVar[str] = "logits"
    unread: ClassVar[tuple[int, ...]] = ()
    text_parts: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    image_parts: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[bool] = False

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        missing = [name for name in self.needs if not isinstance(inputs.get(name), Tensor)]
        if missing or not all(isinstance(name, str) for name in inputs):
            raise PrunexError(
                f"{type(model).__name__} is explained from {', '.join(self.needs)}, and inputs hold "
                f"{brief(dict(inputs))}: give its processor's batch as tensors (return_tensors='pt')"
            )
        _check_values({name: inputs[name] for name in self.needs})
        together = [*dict.fromkeys((*self.needs, *self.text_parts, *self.image_parts, "pixel_mask"))]
        batches: list[Sequence[str]] = [together]
        if self.compares:
            # Any number of texts is compared with any number of images.
            batches = [self.text_parts, [n for n in together if n not in self.text_parts]]
        for part in batches:
            _check_batch({name: inputs[name] for name in part if isinstance(inputs.get(name), Tensor)})
        self.model, self.inputs = model, inputs
        self.config: Any = getattr(model, "config", None)

    def prepared(self) -> Mapping[str, Any]:
        """What the model is called with, made inside the recording."""
        return self.inputs

    def count(self) -> int:
        """How many maps a forward must show, from the model's configuration: the alarm for another version."""
        missing = [pattern for pattern in self.roles if not attention_modules(self.model, {pattern: ()})]
        if missing:
            raise PrunexError(
                f"{type(self.model).__name__} has no module whose path ends as {missing[0]!r} says: look at its "
                "named_modules()"
            )
        return sum(len(calls) for _, calls in attention_modules(self.model, self.roles).values())

    def logits(self, outputs: Any) -> Tensor:
        """Class scores, [B, C]; of a detector [B, Q, C]."""
        if isinstance(outputs, Tensor):
            return outputs
        # A plain dict has no attributes, while a ModelOutput has both.
        logits = outputs.get(self.scores) if isinstance(outputs, Mapping) else getattr(outputs, self.scores, None)
        if not isinstance(logits, Tensor):
            raise PrunexError(
                f"{type(self.model).__name__} returned a {type(outputs).__name__} without {self.scores}: is "
                "return_dict=False, or does a forward of its own return something else?"
            )
        return logits

    def targets(self, recording: Recording, target: Any, options: Mapping[str, Any]) -> Targets:
        """One class of each sample, or K."""
        logits = self.logits(recording.outputs)
        # [B, K] asks for K of each sample; whoever asks for one gets answers without a dimension for it.
        single = not (isinstance(target, Tensor) and target.ndim == 2)
        classes = classes_of(target, logits)
        scores = logits.gather(1, classes)
        return Targets(classes, passes_of(scores), scores.detach(), single=single)

    def groups(self, maps: Sequence[Attended]) -> list[list[Attended]]:
        """The maps that act at once, in the order in which they act."""
        return [[map_] for map_ in maps]

    def relevance(self, maps: Sequence[Attended], rules: Rules) -> Relevance:
        """Generic attention."""
        return propagate(self.groups(maps), self.crossed, rules)

    def raw_attention(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Head means of the last maps."""
        return {f"R_{role}": last(maps, role).attention.mean(1) for role in self.reads}

    def grad_cam(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Grad-CAM of the last maps."""
        return {f"R_{role}": grad_cam(last(maps, role)) for role in self.reads}

    def rollout(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Rollout of every stream."""
        streams = {role: rollout(stream, self.row_normalised) for role, stream in by_role(maps).items()}
        return {f"R_{role}": torch.as_tensor(matrix) for role, matrix in streams.items() if matrix is not None}

    def of_pass(self, matrices: dict[str, Tensor], targets: Targets, column: Tensor) -> dict[str, Tensor]:
        """Matrices of the samples of a pass, [B, ...]: of texts that samples share, those that each is about."""
        return matrices

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor | None, Tensor]:
        """Relevance of text tokens [B, T], or None without text, and of image tokens [B, I]."""
        raise NotImplementedError

    def texts(self, classes: Tensor) -> Tensor:
        """Which of the inputs' texts each target is about, int64 like ``classes``, [B, K]."""
        return torch.arange(len(classes), device=classes.device)[:, None].expand_as(classes)

    def answering(self, targets: Targets, column: Tensor) -> Mapping[str, Tensor]:
        """By role, the tokens whose rows of the last map alone can matter to the answer, int64 [B, r].

        The alarm for a forward that reads others; a role that is not named is not looked at.
        """
        return {}

    def check_rows(self, maps: Sequence[Attended], targets: Targets, column: Tensor) -> None:
        """See that the answer reads the tokens that it is known to read, and no others."""
        for role, tokens in self.answering(targets, column).items():
            map_ = last(maps, role)
            # A query to whose row no gradient comes has no part in the answer.
            reached = torch.as_tensor(map_.gradient).abs().amax((1, 3))
            if int(tokens.min()) < 0 or int(tokens.max()) >= reached.shape[1]:
                raise PrunexError(
                    f"the answer of {type(self.model).__name__} is said to read token {int(tokens.max())} of "
                    f"{map_.path}, which has {reached.shape[1]}: register it with another row"
                )
            others = reached.scatter(1, tokens.to(reached.device), 0).nonzero()
            if len(others):
                raise PrunexError(
                    f"the scores of {type(self.model).__name__} rest on token {int(others[0, 1])} of {map_.path}, and "
                    f"its answer is known to read {tokens[others[0, 0]].tolist()} alone: its forward goes another way, "
                    "or it was registered with another row"
                )

    def text_valid(self) -> Tensor | None:
        """Bool [B, T], false for padding; None without text."""
        mask = self.inputs.get("attention_mask")
        ids = self.inputs["input_ids"]
        return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    def image_valid(self, count: int, grid: tuple[int, int] | None) -> Tensor:
        """Bool [B, I], false for padding."""
        mask: Tensor | None = self.inputs.get(self.image_parts[0]) if self.image_parts else None
        if mask is not None:
            return mask.bool()
        # What is needed last is of the image: of models that compare, texts may be of another number.
        of_images = self.inputs[self.needs[-1]]
        return torch.ones(len(of_images), count, dtype=torch.bool, device=of_images.device)

    def grid(self, recording: Recording) -> tuple[int, int] | None:
        """Height and width of the image's cells; None where the image is a list of boxes."""
        return recording.grid

    def sample(self, sample: int, length: int, valid: Tensor) -> dict[str, Any]:
        """The inputs of one sample, a batch of one, without the padding behind its text and among its boxes."""
        alone = {}
        for name, value in self.inputs.items():
            if isinstance(value, Tensor):
                value = value[sample : sample + 1]
                value = value[:, :length] if name in self.text_parts else value
                value = value[:, valid] if name in self.image_parts else value
            alone[name] = value
        return alone

    def protected(self, length: int) -> list[int]:
        """Places of a text that cannot leave: [CLS] and [SEP]."""
        return [0, length - 1]

    def without(self, image: Tensor, places: Tensor) -> dict[str, Any]:
        """Inputs of R rows of the one sample: boxes that are false in bool [R, I] masked, tokens at int64 [R, k] left.

        Tokens move up where others left; what attention leaves out is as good as removed.
        """
        if not self.image_parts:
            raise PrunexError(
                f"nobody knows how to remove parts of what {type(self.model).__name__} sees exactly: give LXMERT, "
                "VisualBERT or ViLT for question answering"
            )
        rows = len(image)
        # Boxes leave by the mask; all else of the image is the same in every row.
        mask, *others = self.image_parts
        reduced = {name: self.inputs[name] for name in others if name in self.inputs}
        reduced = {name: value.expand(rows, *value.shape[1:]) for name, value in reduced.items()}
        text = {name: self.inputs[name][0][places] for name in self.text_parts if name in self.inputs}
        return {**reduced, **text, mask: image.to(torch.float32)}

    def answers_without(self, image: Tensor, places: Tensor) -> Tensor:
        """Scores [R, C] of the one sample's rows."""
        return self.logits(self.model(**self.without(image, places)))

    def boxes(self, recording: Recording) -> Tensor | None:
        """What boxes lie where, [B, n, 4]: those that were given, as they were given, or those that are predicted."""
        return None


def passes_of(scores: Tensor) -> list[Pass]:
    """A pass for each of the targets that scores [B, K] are of, of all samples at once."""
    batch, count = scores.shape
    columns = torch.arange(count, device=scores.device)
    return [Pass(scores[:, k].sum(), columns[k].expand(batch)) for k in range(count)]


def _check_values(needed: Mapping[str, Tensor]) -> None:
    """Tensors that hold something, and no NaN; this waits for the device."""
    for name, value in needed.items():
        if value.is_meta or not value.numel():
            where = (
                "is on the meta device, which holds no values" if value.is_meta else f"is empty, {list(value.shape)}"
            )
            raise PrunexError(f"{name} {where}: give at least one sample")
        if value.is_floating_point() and not value.isfinite().all():
            bad = (~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise PrunexError(f"{name} of samples {bad[:8]} hold NaN or infinite values: clean them first")


def _check_batch(parts: Mapping[str, Tensor]) -> None:
    """Tensors of as many samples: some models spread one sample over all others."""
    if len({len(value) if value.ndim else 0 for value in parts.values()}) > 1:
        raise PrunexError(f"inputs hold {brief(dict(parts))}: give as many samples of each")


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def classes_of(target: Any, logits: Tensor) -> Tensor:
    """Classes to explain, int64 [B, K]: None is the predicted one, a number one for all, [B] one a sample.

    Raises:
        PrunexError: Another shape or kind, or a class that does not exist; scores that are not [B, C].
    """
    if logits.ndim != 2:
        raise PrunexError(f"the model's scores are {list(logits.shape)}: only those [B, classes] can be explained")
    batch, count = logits.shape
    if target is None:
        return logits.argmax(1, keepdim=True)
    # By type, since True is an int and no class.
    if type(target) is int and 0 <= target < count:
        return torch.full((batch, 1), target, device=logits.device)
    whole = isinstance(target, Tensor) and target.dtype in _WHOLE and not target.is_meta
    if type(target) is not int and not (whole and target.ndim in (1, 2) and len(target) == batch and target.numel()):
        raise PrunexError(
            f"target={brief(target)} is not allowed: give None, a class, or a tensor of whole numbers [{batch}] or "
            f"[{batch}, K] (K classes a sample)"
        )
    if not whole or int(target.min()) < 0 or int(target.max()) >= count:
        raise PrunexError(f"target={brief(target)} is not allowed: classes are 0..{count - 1}")
    return target.to(logits.device).long().reshape(batch, -1)


ADAPTERS: dict[str, type[Adapter]] = {}


def known(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: the models of an adapter are known from now on."""
    ADAPTERS.update(dict.fromkeys(adapter.models, adapter))
    return adapter
