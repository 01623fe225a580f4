"""Folders of transformers models: what they are and what goes with them, as far as it can be judged without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunex.errors import PrunexError, unknown
from prunex.files import is_there
from prunex.sources.classes import CLASSES, WRAPPERS

METHODS = ("generic_attention", "raw_attention", "rollout", "grad_cam")
RULES = ("literal", "normalise", "self_terms", "accumulate")  # options of generic_attention
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_CONFIG_BYTES = 2**26
# What a timm ViT is told, and a processor knows.
_OF_VITS = ("weights", "pretrained", "img_size", "mean", "std")
_OF_PROCESSES = ("again", "devices", "num_nodes", "accelerator")
_OF_MANY = (*_OF_PROCESSES, "sheets", "workers")
_OF_SCORES = (*_OF_PROCESSES, "metrics", "masks", "models", "removal", "target")
_DEFAULTS = {"metrics": "all", "target": "predicted"}


@dataclass(frozen=True)
class Kind:
    """What a family of models is given beside an image.

    Attributes:
        texts: How many texts: "none", "one" question, or "some" that are compared.
        shared: Whether all images of a batch have the same texts, not each its own.
        detects: Whether object queries are explained, each with its box.
    """

    texts: str = "none"
    shared: bool = False
    detects: bool = False


_DETECTOR, _ANSWERING = Kind(detects=True), Kind("one")
KINDS = {
    **dict.fromkeys(
        (
            "DetrForObjectDetection",
            "ConditionalDetrForObjectDetection",
            "DabDetrForObjectDetection",
            "TableTransformerForObjectDetection",
        ),
        _DETECTOR,
    ),
    **dict.fromkeys(("ViltForQuestionAnswering", "ViltForImageAndTextRetrieval"), _ANSWERING),
    "CLIPModel": Kind("some", shared=True),
    "OwlViTForObjectDetection": Kind("some", detects=True),
}
# What each protocol can score: by masks what names its objects' classes, by questions what parts can be removed from.
PROTOCOLS = {
    "masks": tuple(name for name, kind in KINDS.items() if kind == _DETECTOR),
    "vqa": ("LxmertForQuestionAnswering", "VisualBertForQuestionAnswering", "ViltForQuestionAnswering"),
}


@dataclass(frozen=True)
class Folder:
    """A folder that ``save_pretrained`` wrote, by the name of its model's class."""

    path: Path
    architecture: str

    @property
    def kind(self) -> Kind:
        """What its model is given."""
        return KINDS[self.architecture]

    def check(self, args: Any) -> None:
        """Refuse what the folder lacks, and options that do not go with its model."""
        self._check_files(True, self.kind.texts != "none")
        self._refuse(args, (*_OF_VITS, *_OF_MANY), "goes with a timm ViT")
        self._check_texts(args.text)
        self._check_threshold(args.threshold, self.kind.detects)

    def check_score(self, args: Any) -> None:
        """The same of ``prunex score``, which reads annotations or questions instead of texts."""
        by_masks = args.protocol == "masks"
        self._check_files(by_masks, False)
        self._refuse(args, (*_OF_VITS, *_OF_SCORES, "range"), "goes with metrics of ViTs, not with --protocol")
        self._check_threshold(args.threshold, by_masks)
        if args.mask_rule is not None and not by_masks:
            raise PrunexError("--mask-rule goes with --protocol masks: leave it out")
        if not args.data or not is_there(Path(args.data), Path.is_dir):
            holds = "annotations.json in COCO's format and images/" if by_masks else ".npz files of inputs and answers"
            raise PrunexError(f"--data {args.data} is no folder: give one that holds {holds}")

    def _refuse(self, args: Any, names: Iterable[str], why: str) -> None:
        """Options that were given and mean nothing here."""
        for name in names:
            # What argparse fills in was not given.
            if getattr(args, name) not in (None, False, _DEFAULTS.get(name)):
                flag = name.replace("_", "-")
                raise PrunexError(f"--{flag} {why}, and {self.path} holds a {self.architecture}: leave it out")

    def _check_threshold(self, threshold: float | None, allowed: bool) -> None:
        if threshold is not None and not allowed:
            raise PrunexError(
                f"--threshold goes with detectors, and {self.path} holds a {self.architecture}: leave it out"
            )
        if threshold is not None and not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise PrunexError(f"--threshold {threshold} is not allowed: give a probability in [0, 1]")

    def _check_files(self, images: bool, texts: bool) -> None:
        needed: dict[str, tuple[str, ...]] = {"weights in safetensors": _WEIGHTS}
        if images:
            needed["image processor"] = _IMAGE_PROCESSOR
        if texts:
            needed["tokenizer"] = _TOKENIZER
        for what, names in needed.items():
            if not any(is_there(self.path / name, Path.is_file) for name in names):
                raise PrunexError(
                    f"{self.path} holds no {what} ({' or '.join(names)}): "
                    "save the model and its processor there with save_pretrained; nothing is downloaded or unpickled"
                )
        if find_spec("transformers") is None:
            raise PrunexError(
                f"{self.path} holds a model of transformers, which is not installed: "
                "pip install 'prunex-vit[multimodal]'"
            )

    def _check_texts(self, texts: list[str]) -> None:
        wanted, count = self.kind.texts, len(texts)
        if wanted == "none" and count:
            raise PrunexError(f"--text: a {self.architecture} reads no text: leave it out")
        if wanted == "one" and count != 1:
            raise PrunexError(f"a {self.architecture} answers one question about each image: give --text once")
        if wanted == "some" and not count:
            raise PrunexError(
                f"a {self.architecture} compares images with texts: give --text, as often as there are texts"
            )
        if any(not text.strip() for text in texts):
            raise PrunexError("--text is empty: give some words")


def folder_at(
    where: str, known: Collection[str] = tuple(KINDS), what: str = "can be explained from image files"
) -> Folder | None:
    """The transformers model that lies somewhere; None where there is none.

    Raises:
        PrunexError: One that is not among those known, which are told as what can be done.
    """
    names = _architectures(Path(where) / "config.json")
    if not names:
        return None
    name = next((each for each in names if each in known), None)
    if name is None and names[0] in (*CLASSES, *WRAPPERS) and names[0] not in KINDS:
        return None  # a ViT, which is opened as its timm twin
    if name is None:
        raise PrunexError(
            f"{where} holds a {names[0][:80]} of transformers. What {what}: {', '.join(known)}; "
            "prunex.multimodal.explain takes others, prunex.from_transformers ViTs"
        )
    return Folder(Path(where), name)


def check_methods(methods: list[str], options: list[tuple[str, str]]) -> None:
    """Refuse methods that these models do not have, and options that their methods do not take."""
    for name in (*methods, *(method for method, _ in options)):
        if name not in (*METHODS, "all"):
            raise unknown("explainer of models of text and image", name, METHODS)
    for method, name in options:
        known = RULES if method == "generic_attention" else ()
        if name not in known:
            raise unknown(f"option of {method} on models of text and image", name, known)


def _architectures(config: Path) -> list[str]:
    """Names of the classes that a transformers config says it is of; none for any other file."""
    try:
        if not config.is_file() or config.stat().st_size > _CONFIG_BYTES:
            return []
        read = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []  # whoever opens it says what is wrong
    # A config of ours is of no model of transformers, whatever else it says.
    names = read.get("architectures") if isinstance(read, dict) and "prunex" not in read else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
