"""Folders as save_pretrained writes them: tiny models with random weights, and processors that nobody downloaded."""

from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.multimodal.models import clip, detector, owlvit, vilt

WORDS = ["is", "the", "a", "cat", "red", "blue", "square", "photo", "pag", "##oda", "?"]


def _fast(vocabulary, begins, ends, **names):
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", **names}
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    marks = [(mark, vocabulary.index(mark)) for mark in (begins, ends)]
    made.post_processor = processors.TemplateProcessing(single=f"{begins} $A {ends}", special_tokens=marks)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bert_words():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    made = _fast(vocabulary, "[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]")
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def clip_words():
    begins, ends = "<|startoftext|>", "<|endoftext|>"
    vocabulary = ["[PAD]", "[UNK]", *WORDS, *(f"w{i}" for i in range(58 - 2 - len(WORDS))), begins, ends]
    return _fast(vocabulary, begins, ends, bos_token=begins, eos_token=ends)


def save_detr(folder: Path, kind="Detr", **more):
    detector(kind, **more)[0].save_pretrained(folder)
    size = {"shortest_edge": 96, "longest_edge": 160}
    transformers.DetrImageProcessor(size=size).save_pretrained(folder)
    return folder


def save_clip(folder: Path):
    clip()[0].save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, clip_words()).save_pretrained(folder)
    return folder


def save_vilt(folder: Path):
    vilt()[0].save_pretrained(folder)
    images = transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8)
    transformers.ViltProcessor(images, bert_words()).save_pretrained(folder)
    return folder


def save_owlvit(folder: Path):
    owlvit()[0].save_pretrained(folder)
    # The two parts by themselves, as older folders have them.
    transformers.OwlViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_words().save_pretrained(folder)
    return folder
