"""The VQA perturbation test in games whose answers are known by hand: counts, orders, areas, chance and bad input."""

import math

import pytest
import torch

from prunex.errors import PrunexError
from prunex.multimodal.vqa import (
    FRACTIONS,
    FRACTIONS_OF_MANY_BOXES,
    AnswerCurve,
    Question,
    by_length,
    kept_counts,
    vqa_perturbation,
)

# What is left of 1, 2, ..., 40 units at each fraction, counted in whole percents.
USUAL = """
    1 0 0 0 0 0 0 0 0, 2 1 1 0 0 0 0 0 0, 3 2 1 0 0 0 0 0 0, 4 3 2 1 0 0 0 0 0, 5 3 2 1 1 0 0 0 0,
    6 4 3 1 1 0 0 0 0, 7 5 3 1 1 1 0 0 0, 8 6 4 2 1 1 0 0 0, 9 6 4 2 1 1 0 0 0, 10 7 5 2 2 1 1 0 0,
    11 8 5 2 2 1 1 0 0, 12 9 6 3 2 1 1 0 0, 13 9 6 3 2 1 1 0 0, 14 10 7 3 2 2 1 0 0, 15 11 7 3 3 2 1 0 0,
    16 12 8 4 3 2 1 0 0, 17 12 8 4 3 2 1 0 0, 18 13 9 4 3 2 1 0 0, 19 14 9 4 3 2 1 0 0, 20 15 10 5 4 3 2 1 0,
    21 15 10 5 4 3 2 1 0, 22 16 11 5 4 3 2 1 0, 23 17 11 5 4 3 2 1 0, 24 18 12 6 4 3 2 1 0,
    25 18 12 6 5 3 2 1 0, 26 19 13 6 5 3 2 1 0, 27 20 13 6 5 4 2 1 0, 28 21 14 7 5 4 2 1 0,
    29 21 14 7 5 4 2 1 0, 30 22 15 7 6 4 3 1 0, 31 23 15 7 6 4 3 1 0, 32 24 16 8 6 4 3 1 0,
    33 24 16 8 6 4 3 1 0, 34 25 17 8 6 5 3 1 0, 35 26 17 8 7 5 3 1 0, 36 27 18 9 7 5 3 1 0,
    37 27 18 9 7 5 3 1 0, 38 28 19 9 7 5 3 1 0, 39 29 19 9 7 5 3 1 0, 40 30 20 10 8 6 4 2 0,
"""
MANY = """
    1 0 0 0 0 0 0 0 0, 2 1 0 0 0 0 0 0 0, 3 1 0 0 0 0 0 0 0, 4 2 1 0 0 0 0 0 0, 5 2 1 0 0 0 0 0 0,
    6 3 1 0 0 0 0 0 0, 7 3 1 0 0 0 0 0 0, 8 4 2 0 0 0 0 0 0, 9 4 2 0 0 0 0 0 0, 10 5 2 0 0 0 0 0 0,
    11 5 2 0 0 0 0 0 0, 12 6 3 0 0 0 0 0 0, 13 6 3 0 0 0 0 0 0, 14 7 3 0 0 0 0 0 0, 15 7 3 0 0 0 0 0 0,
    16 8 4 0 0 0 0 0 0, 17 8 4 0 0 0 0 0 0, 18 9 4 0 0 0 0 0 0, 19 9 4 0 0 0 0 0 0, 20 10 5 1 0 0 0 0 0,
    21 10 5 1 0 0 0 0 0, 22 11 5 1 0 0 0 0 0, 23 11 5 1 0 0 0 0 0, 24 12 6 1 0 0 0 0 0, 25 12 6 1 1 0 0 0 0,
    26 13 6 1 1 0 0 0 0, 27 13 6 1 1 0 0 0 0, 28 14 7 1 1 0 0 0 0, 29 14 7 1 1 0 0 0 0, 30 15 7 1 1 0 0 0 0,
    31 15 7 1 1 0 0 0 0, 32 16 8 1 1 0 0 0 0, 33 16 8 1 1 0 0 0 0, 34 17 8 1 1 1 0 0 0, 35 17 8 1 1 1 0 0 0,
    36 18 9 1 1 1 0 0 0, 37 18 9 1 1 1 0 0 0, 38 19 9 1 1 1 0 0 0, 39 19 9 1 1 1 0 0 0, 40 20 10 2 1 1 0 0 0,
"""
# Where doubles, rounded down, count one less.
IN_DOUBLES = [
    *((0.8, units) for units in range(5, 41, 5)),
    *((0.9, units) for units in range(10, 41, 10)),
]


@pytest.mark.parametrize(("fractions", "table"), [(FRACTIONS, USUAL), (FRACTIONS_OF_MANY_BOXES, MANY)])
def test_counts(fractions, table):
    rows = [[int(count) for count in row.split()] for row in table.split(",") if row.strip()]
    assert len(rows) == 40
    for units, row in enumerate(rows, 1):
        assert kept_counts(units, fractions) == row
        lost = [(p, units) in IN_DOUBLES for p in fractions]
        assert kept_counts(units, fractions, "float_floor") == [c - less for c, less in zip(row, lost, strict=True)]


def test_counts_of_thirds_and_of_fractions_nobody_lists():
    assert kept_counts(30, [k / 3 for k in range(4)]) == [30, 20, 10, 0]
    assert kept_counts(7, [k / 7 for k in range(8)]) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert kept_counts(1000, [0.123, 0.999]) == [877, 1]


class Hidden:
    """Answers 1 while all of a secret set is there, of boxes and of tokens, else 0; remembers what it was asked."""

    def __init__(self, boxes=(), tokens=()):
        self.boxes, self.tokens, self.calls = list(boxes), list(tokens), []

    def __call__(self, inputs, image, text):
        self.calls.append((inputs, image, text))
        there = image[:, self.boxes].all(1) & text[:, self.tokens].all(1)
        return torch.stack([~there, there], 1).float()


def question(boxes=20, tokens=8, secret=(), image=None, text=None, **options):
    """A question whose relevance is the secret set, the rest falling off with the index."""
    relevance = -torch.arange(float(boxes))
    relevance[list(secret)] += 1000
    given = {"inputs": None, "protected": (0, -1), "answers": 1} | options
    return Question(
        image=relevance if image is None else image,
        text=torch.arange(float(tokens)) if text is None else text,
        **given,
    )


def trapezoid(scores, fractions):
    pairs = zip(fractions, fractions[1:], scores, scores[1:], strict=False)
    return 100 * sum((b - a) * (u + v) / 2 for a, b, u, v in pairs)


def test_a_secret_set_of_boxes():
    # Of 20 boxes 20, 15, 10, 5, 4, 3, 2, 1, 0 are left: two of them are all there up to the fraction 0.9.
    measured = vqa_perturbation(Hidden((3, 11)), [question(secret=(3, 11))], modalities=["image"])
    assert measured.text is None
    assert measured.image.negative.mean.tolist() == [100] * 7 + [0] * 2
    assert measured.image.positive.mean.tolist() == [100] + [0] * 8
    assert measured.image.negative.area == pytest.approx(92.5)
    assert measured.image.positive.area == pytest.approx(12.5)
    assert measured.image.constant == 0


def test_a_secret_set_counted_in_doubles():
    # 20, 15, 10, 5, 3, 3, 1, 1, 0 are left: the second of two is gone at 0.9.
    measured = vqa_perturbation(Hidden((3, 11)), [question(secret=(3, 11))], count_rule="float_floor")
    assert measured.image.negative.mean.tolist() == [100] * 6 + [0] * 3
    assert measured.image.negative.area == pytest.approx(87.5)
    assert measured.count_rule == "float_floor"


def test_a_secret_token_among_protected_ones():
    # Ten tokens, eight may leave: 8, 6, 4, 2, 1, 1, 0, 0, 0 are left.
    text = torch.tensor([9.0, 0, 1, 2, 8, 3, 4, 5, 6, 9])
    measured = vqa_perturbation(Hidden(tokens=(0, 4, 9)), [question(tokens=10, text=text)], modalities="text")
    assert measured.image is None
    assert measured.text.negative.mean.tolist() == [100] * 6 + [0] * 3
    assert measured.text.negative.area == pytest.approx(87.5)
    assert measured.text.positive.area == pytest.approx(12.5)


def test_reversed_relevance_swaps_the_tests():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randint(4, (12,), generator=generator).double(), torch.rand(9, generator=generator)
    game = Hidden((1, 5), (3, 4))
    plain = vqa_perturbation(game, [question(image=image, text=text)])
    turned = vqa_perturbation(game, [question(image=-image, text=-text)])
    for kind in ("image", "text"):
        a, b = getattr(plain, kind), getattr(turned, kind)
        assert torch.equal(a.positive.scores, b.negative.scores)
        assert torch.equal(a.negative.scores, b.positive.scores)
        assert torch.equal(a.random.scores, b.random.scores)
        assert not torch.equal(a.positive.scores, a.negative.scores)


def test_random_order_is_hypergeometric():
    draws, boxes, secret = 2000, 12, (2, 7, 8)
    measured = vqa_perturbation(Hidden(secret), [question(boxes, secret=secret)], modalities=["image"], draws=draws)
    counts = kept_counts(boxes, FRACTIONS)
    expected = torch.tensor([math.comb(m, 3) / math.comb(boxes, 3) for m in counts], dtype=torch.float64)
    error = (expected * (1 - expected) / draws).sqrt()
    found = measured.image.random.scores[0]
    assert ((found - expected).abs() <= 3 * error).all()
    assert expected[2] > 0.05
    assert measured.image.random.area == pytest.approx(trapezoid(found.tolist(), FRACTIONS))


def test_nothing_gone_is_the_whole_question_in_all_tests():
    game = Hidden((0,), (2,))
    measured = vqa_perturbation(game, [question(answers=0), question(answers=1)], draws=3)
    for kind in (measured.image, measured.text):
        for curve in (kind.positive, kind.negative, kind.random):
            assert curve.scores[:, 0].tolist() == [0, 1]
    (_, image, text), *_ = game.calls
    assert (image.all(1) & text.all(1)).sum() == 1  # asked once for both modalities and all orders


def test_what_the_remover_is_asked():
    game = Hidden()
    measured = vqa_perturbation(game, [question(7, 6, protected=(0, 3, -1), inputs="given")], draws=2)
    ((inputs, image, text),) = game.calls
    assert inputs == "given"
    assert measured.rows == len(image)
    assert text[:, [0, 3, 5]].all()
    # One modality leaves at a time.
    assert (image.all(1) | text.all(1)).all()
    assert len({tuple(row.tolist()) for row in torch.cat([image, text], 1)}) == len(image)
    assert sorted(set(image.sum(1).tolist())) == sorted(set(kept_counts(7, FRACTIONS)))
    assert sorted(set(text.sum(1).tolist())) == sorted({3 + c for c in kept_counts(3, FRACTIONS)})


def test_ties_leave_by_index():
    game = Hidden()
    relevance = torch.tensor([1.0, 0.0, 1.0, 0.0])
    measured = vqa_perturbation(
        game, [question(image=relevance)], modalities=["image"], image_fractions=(0, 0.25, 0.75, 1)
    )
    asked = {tuple(row) for row in game.calls[0][1].int().tolist()}
    assert {(0, 1, 1, 1), (0, 0, 0, 1)} <= asked  # positive: 0, 2, 1, 3 leave
    assert {(1, 0, 1, 1), (0, 0, 1, 0)} <= asked  # negative: 1, 3, 0, 2 leave
    assert measured.image.constant == 0


def test_constant_relevance_is_counted():
    constant = torch.full((5,), 0.3)
    measured = vqa_perturbation(Hidden(), [question(image=constant), question(text=torch.zeros(4)), question()])
    assert measured.image.constant == 1
    assert measured.text.constant == 1
    # Protected tokens do not count: what may leave is constant here, too.
    text = torch.tensor([5.0, 1.0, 1.0, 7.0])
    assert vqa_perturbation(Hidden(), [question(text=text)], modalities=["text"]).text.constant == 1


def test_a_question_is_the_same_beside_others():
    questions = [question(9, 7, secret=(i,), text=torch.rand(7)) for i in range(3)]
    game = Hidden((1,), (2,))
    both = vqa_perturbation(game, questions, draws=4, seed=3)
    image = vqa_perturbation(game, questions, modalities=["image"], draws=4, seed=3)
    assert torch.equal(both.image.random.scores, image.image.random.scores)
    first = vqa_perturbation(game, questions[:1], draws=4, seed=3)
    for kind in ("image", "text"):
        for order in ("positive", "negative", "random"):
            some, all_of_them = (getattr(getattr(m, kind), order).scores for m in (first, both))
            assert torch.equal(some[0], all_of_them[0])
    other = vqa_perturbation(game, questions, draws=4, seed=4)
    assert not torch.equal(both.image.random.scores, other.image.random.scores)


def test_soft_scores_are_earned():
    def by_count(inputs, image, text):
        return torch.nn.functional.one_hot(image.sum(1), 5).float()

    soft = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])
    asked = question(image=torch.rand(4), answers=soft)
    measured = vqa_perturbation(by_count, [asked], modalities=["image"], image_fractions=[0, 0.25, 0.5, 0.75, 1])
    for curve in (measured.image.positive, measured.image.negative, measured.image.random):
        assert curve.mean.tolist() == pytest.approx([100, 90, 60, 30, 0])
        assert curve.area == pytest.approx(57.5)


def test_errors_and_margins():
    scores = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    curve = AnswerCurve((0.0, 0.5, 1.0), scores.double())
    assert curve.mean.tolist() == [75, 50, 0]
    assert curve.error[0].item() == pytest.approx(100 * scores[:, 0].std().item() / 2)
    assert curve.areas.tolist() == [75, 25, 75, 0]
    assert curve.area == pytest.approx(43.75)
    assert curve.area_error == pytest.approx(torch.tensor([75.0, 25, 75, 0]).std().item() / 2)
    secrets = [(i, i + 4) for i in range(8)]
    questions = [question(secret=s, inputs=s, protected=()) for s in secrets]

    def answer(inputs, image, text):
        return Hidden(inputs)(inputs, image, text)

    measured = vqa_perturbation(answer, questions, modalities=["image"], draws=20).image
    for order in ("positive", "negative"):
        margin = measured.margin(order)
        assert margin.mean > 3 * margin.error > 0
        plain = abs(getattr(measured, order).area - measured.random.area)
        assert margin.mean == pytest.approx(plain)
    alone = vqa_perturbation(answer, questions[:1], modalities=["image"]).image
    assert math.isnan(alone.margin("negative").error)
    assert math.isnan(alone.negative.area_error)


def test_questions_may_be_made_one_by_one():
    measured = vqa_perturbation(Hidden(), (question(n, n) for n in range(3, 6)))
    assert measured.questions == 3
    assert measured.image.positive.scores.shape == (3, len(FRACTIONS))


def test_no_graph_is_kept():
    weight = torch.ones(4, requires_grad=True)
    seen = []

    def answer(inputs, image, text):
        logits = (image.float() * weight).sum(1, keepdim=True).expand(-1, 2)
        seen.append(logits.requires_grad)
        return logits

    vqa_perturbation(answer, [question(image=torch.rand(4, requires_grad=True))])
    assert seen == [False]


def test_by_length():
    kept = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    kept[5] = False
    groups = by_length(kept)
    assert [places.shape[1] for _, places in groups] == sorted(set(kept.sum(1).tolist()))
    rebuilt = torch.zeros_like(kept)
    for rows, places in groups:
        assert (places.diff(dim=1) > 0).all()
        rebuilt[rows[:, None], places] = True
    assert torch.equal(rebuilt, kept)
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(40))
    assert groups[0][1].shape == (1, 0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"modalities": ["images"]}, "did you mean 'image'"),
        ({"modalities": []}, "each once"),
        ({"modalities": ["text", "text"]}, "each once"),
        ({"image_fractions": (0, 0.5)}, "from 0 to 1"),
        ({"text_fractions": (0.1, 1)}, "from 0 to 1"),
        ({"text_fractions": (0, 0.5, 0.5, 1)}, "rising"),
        ({"count_rule": "floor"}, "unknown count_rule"),
        ({"draws": 0}, "draws=0"),
        ({"seed": -1}, "seed=-1"),
        ({"questions": []}, "questions are empty"),
        ({"questions": [{"image": 1}]}, "question 1 is a dict"),
        ({"questions": [question(), question(image=torch.arange(4))]}, "image relevance of question 2 is torch.int64"),
        ({"questions": [question(text=torch.rand(2, 3))]}, r"text relevance of question 1 is torch.float32 \[2, 3\]"),
        ({"questions": [question(text=[0.1, 0.2])]}, "text relevance of question 1 is list"),
        ({"questions": [question(image=torch.tensor([0.0, torch.nan]))]}, "NaN or infinity"),
        ({"questions": [question(text=torch.tensor([0.0, torch.inf]))]}, "NaN or infinity"),
        ({"questions": [question(protected=(8,))]}, "tokens of question 1 are 0..7"),
        ({"questions": [question(protected=0)]}, "protected=0"),
        ({"questions": [question(tokens=2)]}, "nothing in its text that may leave"),
        ({"questions": [question(image=torch.rand(0))]}, "nothing in its image that may leave"),
        ({"questions": [question(answers=2)]}, r"the model's answers are 0\.\.1"),
        ({"questions": [question(answers=torch.rand(3))]}, "2 answers a score"),
        ({"questions": [question(answers=torch.tensor([0.0, 3.0]))]}, "2 answers a score"),
        ({"questions": [question(answers=torch.tensor([0.0, torch.nan]))]}, "2 answers a score"),
        ({"remover": lambda inputs, image, text: image.float()[:2]}, "the remover answered question 1"),
        ({"remover": lambda inputs, image, text: image.sum(1)}, "the remover answered question 1"),
        ({"remover": lambda inputs, image, text: None}, "a NoneType"),
        ({"remover": lambda inputs, image, text: torch.full((len(image), 2), torch.nan)}, "hold NaN"),
    ],
)
def test_bad_input(options, why):
    given = {"remover": Hidden(), "questions": [question()]} | options
    with pytest.raises(PrunexError, match=why):
        vqa_perturbation(given.pop("remover"), given.pop("questions"), **given)


def test_a_margin_of_no_order():
    with pytest.raises(PrunexError, match="unknown order"):
        vqa_perturbation(Hidden(), [question()]).image.margin("random")


def test_protected_text_alone_is_no_matter_to_the_image():
    measured = vqa_perturbation(Hidden((1,)), [question(tokens=2)], modalities=["image"])
    assert measured.image.positive.scores.shape == (1, len(FRACTIONS))
