"""Questions about boxes: one word of the question names a box, and the answer is the code which that box carries.

The smallest task on which an explanation of a model of text and image can be right or wrong: one word and one box
decide the answer, all others are distractors. Batches are what ``LxmertForQuestionAnswering`` takes, and say which word
and which box it was.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prunex.checks import check_choice, check_number, check_whole
from prunex.errors import PrunexError
from prunex.recipes.data.draws import SPLITS, DrawnData, DrawnDataset, Split, uniform

Batch = dict[str, Tensor]
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")
FILLERS = (
    "the", "of", "which", "what", "does", "has", "is", "and",
    "here", "please", "now", "tell", "me", "that", "one", "on",
)  # fmt: skip
NAMES = (
    "cup", "dog", "tree", "car", "hat", "lamp", "fish", "boat",
    "shoe", "bird", "key", "bell", "kite", "drum", "leaf", "ring",
)  # fmt: skip
VOCABULARY = (*SPECIAL, *FILLERS, *NAMES)
PAD, CLS, SEP = range(len(SPECIAL))
CODES = 12
HALF = 16  # features that tell a box's name, and as many its code


def prototypes() -> tuple[Tensor, Tensor]:
    """What features are without noise: of names ``[16, 16]`` and of codes ``[12, 16]``, in [-1, 1], of every seed.

    >>> [tuple(part.shape) for part in prototypes()]
    [(16, 16), (12, 16)]
    """
    rows = 2 * uniform((0,), np.arange(len(NAMES) + CODES), HALF) - 1
    return rows[: len(NAMES)], rows[len(NAMES) :]


class BoxQuestionDataset(DrawnDataset):
    """The questions of one split; arguments are those of :class:`BoxQuestions`.

    >>> batch = BoxQuestionDataset("val", size=8).__getitems__([0, 5])
    >>> {name: tuple(part.shape) for name, part in batch.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'input_ids': (2, 12), 'attention_mask': (2, 12), 'visual_feats': (2, 8, 32), 'visual_pos': (2, 8, 4),
     'labels': (2,), 'word': (2,), 'box': (2,)}
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 10_000,
        words: tuple[int, int] = (4, 10),
        boxes: int = 8,
        decoys: int = 1,
        noise: float = 0.3,
        seed: int = 0,
    ) -> None:
        check_choice("split", split, SPLITS)
        self.split, self.size, self.seed = split, size, seed
        self.words, self.boxes, self.decoys, self.noise = words, boxes, decoys, noise
        self.names, self.codes = prototypes()

    def __getitem__(self, index: int) -> Batch:
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch of these questions, see :class:`BoxQuestions`."""
        count, most, boxes = len(indices), self.words[1], self.boxes
        sizes = [len(NAMES), CODES, 2, most, most, 4 * boxes, 2 * HALF * boxes]
        draws = uniform((self.seed, SPLITS[self.split]), np.asarray(indices, dtype=np.int64), sum(sizes))
        by_name, by_code, single, by_place, by_filler, corners, noise = draws.split(sizes, 1)
        # No two boxes share a name or a code, and decoys are names that no box has.
        names, codes = by_name.argsort(1), by_code.argsort(1)[:, :boxes]
        box = (single[:, 0] * boxes).long()
        asked = names[:, :boxes].gather(1, box[:, None])
        ids, word = self._question(asked, names[:, boxes : boxes + self.decoys], single[:, 1], by_place, by_filler)
        features = torch.cat([self.names[names[:, :boxes]], self.codes[codes]], 2)
        low, high = corners.view(count, boxes, 2, 2).sort(2).values.unbind(2)
        return {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            "visual_feats": features + self.noise * (2 * noise.view_as(features) - 1),
            "visual_pos": torch.cat([low, high], 2),
            "labels": codes.gather(1, box[:, None])[:, 0],
            "word": word,
            "box": box,
        }

    def _question(
        self, asked: Tensor, decoys: Tensor, length: Tensor, by_place: Tensor, by_filler: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Word numbers ``[B, T]`` of questions that hold the names asked ``[B, 1]`` and decoys, and where it stands."""
        least, most = self.words
        lengths = least + (length * (most - least + 1)).long()
        places = torch.arange(most)
        # A name and its decoys stand anywhere inside the question.
        # Draws are below 1, so that places behind the question sort last.
        chosen = by_place.masked_fill(places >= lengths[:, None], 2.0).argsort(1)[:, : 1 + self.decoys]
        body = len(SPECIAL) + (by_filler * len(FILLERS)).long()
        first_name = len(SPECIAL) + len(FILLERS)
        body = body.scatter(1, chosen, first_name + torch.cat([asked, decoys], 1))
        body = body.masked_fill(places >= lengths[:, None], PAD)
        ids = torch.nn.functional.pad(body, (1, 1), value=PAD)
        ids[:, 0] = CLS
        return ids.scatter(1, lengths[:, None] + 1, SEP), chosen[:, 0] + 1


class BoxQuestions(DrawnData):
    """Batches of questions about boxes, for ``LxmertForQuestionAnswering``; nothing is read or downloaded.

    A batch is a dict: ``input_ids`` int64 [B, T] and ``attention_mask`` [B, T], a question of ``[CLS] words [SEP]``,
    padded to T = max_words + 2; ``visual_feats`` float32 [B, boxes, 32], of which 16 tell a box's name and 16 its code,
    each plus noise; ``visual_pos`` [B, boxes, 4], x1, y1, x2, y2 in [0, 1], which say nothing; ``labels`` int64 [B] in
    0..11, the code of the box that the question names. And what decided it: ``word`` [B], its place in ``input_ids``,
    and ``box`` [B]. Other words of the question are fillers and names that no box has; no two boxes share a name or a
    code.

    Args:
        batch_size: Questions per batch (per process).
        train_size: Questions per training epoch.
        val_size: Questions for validation, and for test.
        min_words: Fewest words of a question, at least 1 + decoys.
        max_words: Most words of a question.
        boxes: Boxes of each question, 2 to 12.
        decoys: Names in a question that no box has; with the boxes at most 16.
        noise: Features are moved by up to so much, evenly; names and codes are numbers in [-1, 1].
        seed: Another seed gives other questions, about the same names and codes.
        num_workers: Processes that draw ahead; 0 draws in the training process.

    Raises:
        PrunexError: If an argument is outside its range.

    >>> data = BoxQuestions(batch_size=4, train_size=8, val_size=8)
    >>> batch = next(iter(data.val_dataloader()))
    >>> [VOCABULARY[i] for i in batch["input_ids"][0]][:1], batch["visual_feats"].shape
    (['[CLS]'], torch.Size([4, 8, 32]))
    """

    num_classes = CODES

    def __init__(
        self,
        batch_size: int = 128,
        train_size: int = 10_000,
        val_size: int = 2_000,
        min_words: int = 4,
        max_words: int = 10,
        boxes: int = 8,
        decoys: int = 1,
        noise: float = 0.3,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, train_size, val_size, seed, num_workers)
        self.boxes = check_whole("boxes", boxes, 2, CODES)
        self.decoys = check_whole("decoys", decoys, 0, len(NAMES) - boxes)
        self.noise = check_number("noise", noise, 0)
        check_whole("min_words", min_words, 1)
        check_whole("max_words", max_words, 1)
        if not 1 + decoys <= min_words <= max_words:
            raise PrunexError(
                f"min_words={min_words}, max_words={max_words} is not allowed: give 1 + decoys <= min_words <= "
                f"max_words, with decoys={decoys}"
            )
        self.words = (min_words, max_words)
        self.save_hyperparameters()

    def dataset(self, split: Split) -> BoxQuestionDataset:
        """The questions of one split as a map-style dataset."""
        return BoxQuestionDataset(
            split, self.size_of(split), self.words, self.boxes, self.decoys, self.noise, self.seed
        )
