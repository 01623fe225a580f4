"""The explainers that a command was asked for, on an opened folder of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

from torch import Tensor

import prunex.multimodal
from prunex.errors import NothingDetected
from prunex.multimodal import MultimodalExplanation
from prunex.recipes.commands.explain import option_value
from prunex.recipes.commands.multimodal_model import OpenedFolder
from prunex.recipes.commands.multimodal_options import METHODS
from prunex.recipes.commands.options import split_names, split_option


class Explainers:
    """Methods by name, with their options, and what each took.

    Attributes:
        names: In the order in which they were named; "all" stands for all of them.
        options: By method.
        threshold: Probability above which object queries are explained.
        target: The class, or None for the predicted one.
    """

    def __init__(self, args: Any) -> None:
        given = split_names(args.methods)
        self.names = list(dict.fromkeys([*(METHODS if "all" in given else ()), *(n for n in given if n != "all")]))
        self.threshold = 0.5 if args.threshold is None else args.threshold
        self.target = args.target
        self.options: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for text in args.option:
            method, name, value = split_option(text)
            self.options[method][name] = option_value(text, value)
        self._seconds = dict.fromkeys(self.names, 0.0)

    def __call__(
        self, opened: OpenedFolder, inputs: Mapping[str, Tensor], images: int, bar: Any
    ) -> dict[str, MultimodalExplanation]:
        """One explanation a method of a batch of images; none where no object is detected in any of them."""
        explanations = {}
        for name in self.names:
            bar.set_postfix_str(name)
            with suppress(NothingDetected):
                explanations[name] = self.explain(opened, inputs, name)
            bar.update(images)
        return explanations

    def explain(self, opened: OpenedFolder, inputs: Mapping[str, Tensor], name: str) -> MultimodalExplanation:
        """One method's explanation.

        Raises:
            NothingDetected: Of a detector, where no object query of the batch is above the threshold.
        """
        more = {"threshold": self.threshold} if opened.folder.kind.detects else {}
        start = perf_counter()
        try:
            e = prunex.multimodal.explain(
                opened.model, inputs, self.target, name, processor=opened.tokenizer, **more, **self.options[name]
            )
            # Waits for the device, so that its time counts.
            e.image.sum().item()
        finally:
            self._seconds[name] += perf_counter() - start
        opened.name(e)
        return e

    def times(self, images: int) -> list[list[Any]]:
        """Rows of a table: method, seconds an image, images."""
        return [[name, f"{self._seconds[name] / max(1, images):.4g}", images] for name in self.names]
