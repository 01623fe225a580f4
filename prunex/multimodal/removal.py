"""Models without some of their boxes, cells or text tokens, exactly, for the perturbation tests of answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.multimodal.explanation import MultimodalExplanation
from prunex.multimodal.families import adapter_of
from prunex.multimodal.vqa import Question, by_length
from prunex.vit.aside import as_found


class ModelRemover:
    """What a model answers without some boxes and tokens, as ``vqa_perturbation`` asks for it.

    Boxes and cells leave by the attention mask, which is exact; tokens leave for good, and those behind them move up.

    Args:
        model: LXMERT, VisualBERT or ViLT for question answering.
        batch: Rows at once.

    Raises:
        PrunexError: A model whose parts cannot be removed exactly.
    """

    def __init__(self, model: nn.Module, batch: int = 64) -> None:
        self.model, self.batch = model, batch

    def __call__(self, inputs: Mapping[str, Any], image: Tensor, text: Tensor) -> Tensor:
        """Scores [R, A] of one question's inputs (a batch of one) without what is false in bool [R, I] and [R, T]."""
        if not text.any(1).all():
            raise PrunexError("a question without any token has no answer: protect at least one place of its text")
        adapter = adapter_of(self.model, inputs)
        scores: dict[int, Tensor] = {}
        with torch.no_grad(), as_found(self.model, train=False):
            for rows, places in by_length(text):
                for some, at in zip(rows.split(self.batch), places.split(self.batch), strict=True):
                    answers = adapter.answers_without(image[some], at)
                    scores.update(zip(some.tolist(), answers, strict=True))
        # Rows were asked by length: here they are in their order again.
        return torch.stack([scores[row] for row in range(len(image))])


def questions(
    model: nn.Module,
    inputs: Mapping[str, Any],
    explanation: MultimodalExplanation,
    answers: Tensor | Sequence[int],
) -> Iterator[Question]:
    """The questions of a batch with their relevance, padding cut off.

    Args:
        model: The model that was explained.
        inputs: What it was explained on, [B, ...].
        explanation: Of one target a sample; the protocol's is the predicted answer (``target=None``).
        answers: float [B, A], the score of each answer, or B right answers.

    Raises:
        PrunexError: A model without a text or without exact removal; an explanation of another batch.
    """
    adapter = adapter_of(model, inputs)
    if explanation.text is None or explanation.text.ndim != 2 or len(explanation.text) != len(answers):
        raise PrunexError(
            f"the explanation is of {len(explanation.image)} samples and there are answers for {len(answers)}: give an "
            "explanation of text and image, of one target a sample, and one answer for each"
        )
    for sample, answer in enumerate(answers):
        # Padding has no relevance, and would be counted among what leaves.
        length = int(torch.as_tensor(explanation.text_valid)[sample].sum())
        valid = explanation.image_valid[sample]
        yield Question(
            adapter.sample(sample, length, valid),
            explanation.image[sample][valid],
            explanation.text[sample, :length],
            adapter.protected(length),
            answer if isinstance(answer, Tensor) and answer.ndim else int(answer),
        )
