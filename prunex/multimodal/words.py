"""Tokens as words, and classes by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from prunex.errors import PrunexError

_MARK = re.compile(r"(?!\[UNK\]|<unk>)(\[[A-Z]+\d*\]|<[^<>\s]+>)")  # [CLS], [SEP], <s>, <|endoftext|>
_BEGINS = ("Ġ", "▁")  # of a word, in the vocabularies of GPT and SentencePiece
_ENDS = "</w>"  # of a word, in CLIP's
_GOES_ON = "##"  # a word, in BERT's


class Piece(NamedTuple):
    """A token as it reads, whether it is a mark of the text and no word, and whether it goes on the one before."""

    text: str
    mark: bool
    joined: bool


def pieces(tokens: Sequence[str]) -> list[Piece]:
    """Tokens without what their vocabularies write for the spaces between words.

    >>> [piece.text + "+" * piece.joined for piece in pieces(["[CLS]", "pag", "##oda", "[SEP]"])]
    ['[CLS]', 'pag', 'oda+', '[SEP]']
    >>> [piece.text + "+" * piece.joined for piece in pieces(["<|startoftext|>", "pag", "oda</w>", "red</w>"])]
    ['<|startoftext|>', 'pag', 'oda+', 'red']
    """
    ends = any(token.endswith(_ENDS) for token in tokens)
    begins = any(token.startswith(_BEGINS) for token in tokens)
    answer: list[Piece] = []
    for place, token in enumerate(tokens):
        if _MARK.fullmatch(token):
            answer.append(Piece(token, True, False))
            continue
        # What follows a mark begins a word, whatever its vocabulary would write for one that goes on.
        after_word = place > 0 and not answer[-1].mark
        joined = token.startswith(_GOES_ON)
        joined |= ends and not tokens[place - 1].endswith(_ENDS)
        joined |= begins and not token.startswith(_BEGINS)
        text = token.removeprefix(_GOES_ON).removesuffix(_ENDS).lstrip("".join(_BEGINS))
        answer.append(Piece(text or token, False, joined and after_word))
    return answer


def words_of(processor: Any, inputs: Mapping[str, Any]) -> list[list[str]] | None:
    """The tokens of each text as words; None without a processor or a text."""
    ids = inputs.get("input_ids")
    if processor is None or not isinstance(ids, Tensor):
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
        raise PrunexError(
            f"processor is a {type(processor).__name__}: give the model's processor or tokenizer, or None"
        )
    return [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]


def sentence(tokens: Sequence[str]) -> str:
    """Tokens as one text, without marks.

    >>> sentence(["<|startoftext|>", "a</w>", "pag", "oda</w>", "<|endoftext|>"])
    'a pagoda'
    """
    text = ""
    for piece in pieces(tokens):
        if not piece.mark:
            text += piece.text if piece.joined or not text else f" {piece.text}"
    return text
