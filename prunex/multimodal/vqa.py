"""The VQA perturbation test: answers while image boxes or text tokens leave in the order of their relevance.

Chefer, Gur & Wolf, ICCV 2021, arXiv 2103.15679, section 4, for LXMERT and VisualBERT. Four tests, image or text and
positive or negative, each beside random order, and beside the reversed one, which is the other test of its kind.

Nothing here knows a model. Its adapter is a :class:`Remover`, relevance comes with each :class:`Question`. The protocol
explains the answer that the model predicts for the whole input; whoever explains another one should say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.checks import check_choice, check_choices, check_index, check_whole
from prunex.errors import PrunexError
from prunex.metrics.checks import check_steps
from prunex.metrics.perturbation import ORDERS, perturbation_auc
from prunex.metrics.ranks import ranked

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # LXMERT, and the text of VisualBERT
FRACTIONS_OF_MANY_BOXES = (0.0, 0.5, 0.75, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0)  # the image of VisualBERT
MODALITIES = ("image", "text")
COUNT_RULES = ("exact", "float_floor")


class Remover(Protocol):
    """What a model answers without some of a question's boxes and tokens, several choices at once."""

    def __call__(self, inputs: Any, image: Tensor, text: Tensor) -> Tensor:
        """Answer in eval mode, by rows in whatever batches the model takes them.

        Removal must be exact. Attention masks are, for boxes; tokens behind a removed one must move up, for which
        :func:`by_length` gives the rows that fit into one batch. Rows without any box or token may come.

        Args:
            inputs: The question's, as they were given.
            image: bool [R, I], the boxes that are left in each row.
            text: bool [R, T], the tokens that are left.

        Returns:
            Scores of the answers, float [R, A], the largest being the model's answer.
        """
        ...


@dataclass(eq=False, repr=False)
class Question(Brief):
    """One question about one image, and what an explanation says about it.

    Attributes:
        inputs: What the remover is given of it.
        image: float [I], the relevance of each box or cell.
        text: float [T], of each token.
        protected: Places of tokens that never leave and are not counted, such as [CLS] and [SEP]; negative ones from
            the end. Empty for none.
        answers: float [A] in 0..1, the score that each answer earns (VQA's is min(annotators / 3, 1)); or an int, the
            one right answer.
    """

    inputs: Any
    image: Tensor
    text: Tensor
    protected: Sequence[int]
    answers: Tensor | int


@dataclass(eq=False, repr=False)
class AnswerCurve(Brief):
    """The answers' scores in one order of removal.

    Attributes:
        fractions: The K shares taken away.
        scores: float64 [N, K] in 0..1, of each question.
    """

    in_repr = ("area", "area_error")

    fractions: tuple[float, ...]
    scores: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean score at each fraction in percent, float64 [K]."""
        return 100 * self.scores.mean(0)

    @property
    def error(self) -> Tensor:
        """Standard error of :attr:`mean`, float64 [K]; NaN for a single question."""
        return _error(100 * self.scores)

    @property
    def areas(self) -> Tensor:
        """Each question's area by the trapezoid over the fractions, in 0..100: float64 [N]."""
        return perturbation_auc(self.scores, self.fractions)

    @property
    def area(self) -> float:
        """Area under :attr:`mean`, in 0..100; the authors' code prints none."""
        return self.areas.mean().item()

    @property
    def area_error(self) -> float:
        """Standard error of :attr:`area`; NaN for a single question."""
        return _error(self.areas).item()


class Margin(NamedTuple):
    """How much better than in random order an area is, in points of 0..100, question by question."""

    mean: float
    error: float  # standard error; NaN for a single question


@dataclass(eq=False, repr=False)
class ModalityCurves(Brief):
    """The tests of one modality.

    Attributes:
        positive: The most relevant leave first; a low area is good. It is the reversed order of ``negative``.
        negative: The least relevant leave first; a high area is good. It is the reversed order of ``positive``.
        random: Orders drawn at random, each question's scores averaged over its draws.
        constant: Questions whose units all have the same relevance: their order is that of the index and says nothing.
    """

    positive: AnswerCurve
    negative: AnswerCurve
    random: AnswerCurve
    constant: int

    def margin(self, order: Literal["positive", "negative"]) -> Margin:
        """By how much an order beats the random one: positive numbers speak for the explanation in both tests.

        Raises:
            PrunexError: For another order.
        """
        check_choice("order", order, ORDERS)
        gain = self.negative.areas - self.random.areas
        if order == "positive":
            gain = self.random.areas - self.positive.areas
        return Margin(gain.mean().item(), _error(gain).item())


@dataclass(eq=False, repr=False)
class VQAPerturbation(Brief):
    """What :func:`vqa_perturbation` measured.

    Attributes:
        image: Curves while boxes leave and the whole text stays; None where it was not asked for.
        text: Curves while tokens leave and the whole image stays; likewise.
        questions: N.
        rows: Inputs the remover was asked about; what two tests share is asked once.
        count_rule: How the kept units were counted.
    """

    image: ModalityCurves | None
    text: ModalityCurves | None
    questions: int
    rows: int
    count_rule: str


def vqa_perturbation(
    remover: Remover,
    questions: Iterable[Question],
    *,
    modalities: Sequence[str] = MODALITIES,
    image_fractions: Sequence[float] = FRACTIONS,
    text_fractions: Sequence[float] = FRACTIONS,
    count_rule: Literal["exact", "float_floor"] = "exact",
    draws: int = 1,
    seed: int = 0,
) -> VQAPerturbation:
    """Measure by removal whether relevance names what answers rest on (arXiv 2103.15679, perturbation tests).

    At each fraction p the first units of an order are gone and :func:`kept_counts` of them are left; boxes and tokens
    stay in their places. A question scores what the model's answer, the largest of its scores, earns. Units of equal
    relevance leave by index. Deleted words leave text that nobody writes, so a curve alone proves little: read it
    beside ``random``.

    Args:
        remover: The model's adapter; it is called once a question, without gradients.
        questions: One after another, so that they may be explained as they are asked for.
        modalities: "image", "text" or both.
        image_fractions: Rising shares of boxes from 0 to 1; the paper's for VisualBERT is
            :data:`FRACTIONS_OF_MANY_BOXES`.
        text_fractions: Likewise, of the tokens that are not protected.
        count_rule: See :func:`kept_counts`.
        draws: Random orders of each question.
        seed: Of the random orders. They depend on it and on the question's number alone.

    Raises:
        PrunexError: For options, questions or answers of the remover that cannot be used.

    >>> def sees_box_two(inputs, image, text):
    ...     return torch.stack([~image[:, 2], image[:, 2]], 1).float()
    >>> question = Question(None, torch.tensor([0.0, 0.1, 0.9, 0.2]), torch.zeros(3), (0, -1), answers=1)
    >>> measured = vqa_perturbation(sees_box_two, [question], modalities=["image"])
    >>> measured.image.negative.mean.tolist()
    [100.0, 100.0, 100.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    >>> round(measured.image.negative.area, 6), round(measured.image.positive.area, 6)
    (77.5, 12.5)
    """
    kinds = check_choices("modality", "modalities", modalities, MODALITIES)
    steps = {"image": check_fractions(image_fractions), "text": check_fractions(text_fractions)}
    check_choice("count_rule", count_rule, COUNT_RULES)
    check_whole("draws", draws, 1)
    check_whole("seed", seed, 0)
    scores: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    constant = dict.fromkeys(kinds, 0)
    number = asked = 0
    for number, question in enumerate(questions, 1):
        relevance, free = _check_question(question, number, kinds)
        rows = []
        for kind in kinds:
            # A question's draws are its own: they stay as they are whatever else is asked.
            generator = np.random.default_rng([seed, number, MODALITIES.index(kind)])
            units = relevance[free[kind]]
            constant[kind] += int(len(units) > 1 and bool((units == units[0]).all()))
            gone = len(units) - torch.tensor(kept_counts(len(units), steps[kind], count_rule))
            left = _places(units, draws, generator)[:, None] >= gone[:, None]  # [orders, K, n]
            # What may not leave stays: the other modality, and protected tokens.
            rows.append(torch.ones(*left.shape[:2], len(relevance), dtype=torch.bool))
            rows[-1][..., free[kind]] = left
        # What orders and modalities share, such as the whole question, is asked once.
        different, place = torch.cat([part.flatten(0, 1) for part in rows]).unique(dim=0, return_inverse=True)
        asked += len(different)
        earned = _earned(remover, question, number, different)[place]
        for kind, part, table in zip(kinds, rows, earned.split([part[..., 0].numel() for part in rows]), strict=True):
            scores[kind].append(table.view(part.shape[:2]))
    if not number:
        raise PrunexError("questions are empty: give at least one Question(inputs, image, text, protected, answers)")
    curves = {kind: _curves(torch.stack(scores[kind]), steps[kind], constant[kind]) for kind in kinds}
    return VQAPerturbation(curves.get("image"), curves.get("text"), number, asked, count_rule)


def kept_counts(units: int, fractions: Sequence[float], count_rule: str = "exact") -> list[int]:
    """How many of ``units`` are left once each fraction is gone, (1 - p) units rounded down.

    - "exact": of the decimal that p is written as, in whole numbers: 20 % of 10 are 2.
    - "float_floor": in floating point, as the public code of arXiv 2103.15679 counts: 1 - 0.8 is a little less than
      0.2, and 1 of 10 is left.

    >>> kept_counts(10, (0, 0.8, 0.9, 1)), kept_counts(10, (0, 0.8, 0.9, 1), "float_floor")
    ([10, 2, 1, 0], [10, 1, 0, 0])
    """
    check_choice("count_rule", count_rule, COUNT_RULES)
    if count_rule == "float_floor":
        return [int((1 - p) * units) for p in fractions]
    # What a float was written as is the simplest fraction that it may be: thirds as well as hundredths.
    return [int((1 - Fraction(p).limit_denominator(10**6)) * units) for p in fractions]


def by_length(kept: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows that keep equally many places, which fit into one batch without padding.

    Args:
        kept: bool [R, T].

    Returns:
        For each number k of kept places, ascending: the rows, int64 [r], and their places in reading order,
        int64 [r, k].

    >>> kept = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    >>> [(rows.tolist(), places.tolist()) for rows, places in by_length(kept)]
    [([0, 2], [[0, 2], [1, 2]]), ([1], [[0, 1, 2]])]
    """
    lengths = kept.sum(1)
    groups = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        # Row by row as nonzero goes, each with equally many places.
        groups.append((rows, kept[rows].nonzero()[:, 1].view(len(rows), length)))
    return groups


def check_fractions(fractions: Any) -> tuple[float, ...]:
    """Rising fractions from 0 to 1, both in: an area lies between them."""
    steps = check_steps(fractions)
    if steps[0] != 0 or steps[-1] != 1:
        raise PrunexError(f"fractions={fractions!r} are not allowed: give rising ones from 0 to 1, both in")
    return steps


def _check_question(question: Any, number: int, kinds: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Its relevance, boxes before tokens, [I + T], and the places there of what may leave.

    On the CPU, so that no device decides what draws of equal numbers mean.
    """
    if not isinstance(question, Question):
        raise PrunexError(
            f"question {number} is a {type(question).__name__}: give Question(inputs, image, text, protected, answers)"
        )
    for kind, values in (("image", question.image), ("text", question.text)):
        if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
            came = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise PrunexError(f"{kind} relevance of question {number} is {came}: give floats, one a unit")
        if not values.isfinite().all():
            raise PrunexError(f"{kind} relevance of question {number} holds NaN or infinity, which have no order")
    boxes, tokens = len(question.image), len(question.text)
    if not isinstance(question.protected, Sequence) or isinstance(question.protected, str):
        raise PrunexError(f"protected={question.protected!r} is not allowed: give a list of places, which may be empty")
    allowed = f"tokens of question {number} are 0..{tokens - 1}"
    stays = {check_index("protected", place, tokens, allowed) for place in question.protected}
    text = [boxes + place for place in range(tokens) if place not in stays]
    free = {"image": torch.arange(boxes), "text": torch.tensor(text, dtype=torch.int64)}
    for kind in kinds:
        if not len(free[kind]):
            raise PrunexError(f"question {number} has nothing in its {kind} that may leave: leave it out")
    return torch.cat([question.image.detach().cpu(), question.text.detach().cpu()]), free


def _places(units: Tensor, draws: int, generator: np.random.Generator) -> Tensor:
    """When each unit leaves in each order, positive, negative and the random ones: int64 [2 + draws, n]."""
    known = [ranked(units[None], order)[0][0].long() for order in ORDERS]
    return torch.stack([*known, *(torch.from_numpy(generator.permutation(len(units))) for _ in range(draws))])


def _earned(remover: Remover, question: Question, number: int, rows: Tensor) -> Tensor:
    """What the model's answers to some rows, bool [R, I + T], earn: float64 [R]."""
    boxes, device = len(question.image), question.image.device
    with torch.no_grad():
        logits = remover(question.inputs, rows[:, :boxes].to(device), rows[:, boxes:].to(device))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(rows) or not logits.shape[1]:
        came = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise PrunexError(f"the remover answered question {number} by {came}: it must give [{len(rows)}, answers]")
    if logits.isnan().any():
        raise PrunexError(f"the remover's answers to question {number} hold NaN: no answer is the largest")
    return _worth(question.answers, number, logits.shape[1])[logits.argmax(1).cpu()]


def _worth(answers: Any, number: int, count: int) -> Tensor:
    """What each of ``count`` answers earns, float64 [A]."""
    if isinstance(answers, Tensor):
        if answers.shape != (count,) or answers.is_complex() or not ((answers >= 0) & (answers <= 1)).all():
            raise PrunexError(
                f"answers of question {number} are {answers.dtype} {list(answers.shape)}: give each of the model's "
                f"{count} answers a score in 0..1, or the number of the right one"
            )
        return answers.detach().cpu().double()
    right = check_index("answers", answers, count, f"the model's answers are 0..{count - 1}")
    return torch.nn.functional.one_hot(torch.tensor(right), count).double()


def _curves(scores: Tensor, fractions: tuple[float, ...], constant: int) -> ModalityCurves:
    """From float64 [N, 2 + draws, K], the orders as :func:`_places` has them."""
    positive, negative = (AnswerCurve(fractions, scores[:, i]) for i in range(2))
    return ModalityCurves(positive, negative, AnswerCurve(fractions, scores[:, 2:].mean(1)), constant)


def _error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension; NaN for a single value."""
    if len(values) < 2:
        return values.new_full(values.shape[1:], torch.nan)
    return values.std(0) / len(values) ** 0.5
