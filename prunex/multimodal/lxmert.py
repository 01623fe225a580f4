"""LXMERT: two streams with attention between them (arXiv 1908.07490)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunex.multimodal.adapter import Adapter, Targets, known
from prunex.multimodal.recorder import Recording, attention_modules
from prunex.multimodal.rules import Attended, Relevance, Rules, between, last, rollout

_CROSSING = r"encoder\.x_layers\.\d+\.visual_attention\.att"


@known
class Lxmert(Adapter):
    """Text tokens and boxes; the answer reads the first text token.

    A cross layer's module is called twice, for text that asks the image and the other way round.
    """

    models = ("LxmertForQuestionAnswering",)
    roles = {
        r"encoder\.layer\.\d+\.attention\.self": ("tt",),
        r"encoder\.r_layers\.\d+\.attention\.self": ("ii",),
        _CROSSING: ("ti", "it"),
        r"encoder\.x_layers\.\d+\.lang_self_att\.self": ("tt",),
        r"encoder\.x_layers\.\d+\.visn_self_att\.self": ("ii",),
    }
    crossed = ("ti", "it")
    reads = ("tt", "ti")
    needs = ("input_ids", "visual_feats", "visual_pos")
    scores = "question_answering_score"
    unread = (-3, -1)  # of the last layer, what the image's stream asks
    image_parts = ("visual_attention_mask", "visual_feats", "visual_pos")

    def count(self) -> int:
        # In a cross layer either stream asks the other, then itself.
        return self.config.l_layers + self.config.r_layers + 4 * self.config.x_layers

    def groups(self, maps: Sequence[Attended]) -> list[list[Attended]]:
        """Both directions of a cross layer act at once; of the last layer the answer reads the text's side alone."""
        cut = len(maps) - 4
        alone = [[map_] for map_ in maps]
        groups = alone[: self.config.l_layers + self.config.r_layers]
        for start in range(len(groups), cut, 4):
            groups += [list(maps[start : start + 2]), *alone[start + 2 : start + 4]]
        return [*groups, *([map_] for map_ in maps[cut:] if map_.role in ("ti", "tt"))]

    def relevance(self, maps: Sequence[Attended], rules: Rules) -> Relevance:
        relevance = super().relevance(maps, rules)
        # The first token answers: what it owes to itself says nothing.
        relevance.extra["tt"][:, 0, 0] = -relevance.identity["t"]
        return relevance

    def raw_attention(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        return _without_itself(super().raw_attention(maps))

    def grad_cam(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        return _without_itself(super().grad_cam(maps))

    def rollout(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Both streams up to the last cross map, and that between them."""
        text = [map_ for map_ in maps if map_.role == "tt"]
        image = [map_ for map_ in maps if map_.role == "ii"]
        # The last map of a stream to itself acts behind the last cross map.
        boxes = rollout(image[:-1])
        cross = between(rollout(text[:-1]), last(maps, "ti").attention.mean(1), boxes)
        rolled = {"R_tt": torch.as_tensor(rollout(text)), "R_ti": cross}
        return _without_itself(rolled if boxes is None else {**rolled, "R_ii": boxes})

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor, Tensor]:
        return matrices["R_tt"][:, 0], matrices["R_ti"][:, 0]

    def answering(self, targets: Targets, column: Tensor) -> Mapping[str, Tensor]:
        return {"tt": torch.zeros(len(column), 1, dtype=torch.long)}

    def answers_without(self, image: Tensor, places: Tensor) -> Tensor:
        """Rows without any box are exact, too: masking all of them would have attention read them evenly."""
        blind = ~image.any(1)
        with _blind(self.model) if blind.any() else nullcontext():
            answers = super().answers_without(image, places)
        if blind.any() and not blind.all():
            answers[~blind] = super().answers_without(image[~blind], places[~blind])
        return answers

    def boxes(self, recording: Recording) -> Tensor | None:
        return self.inputs["visual_pos"]


@contextmanager
def _blind(model: nn.Module) -> Iterator[None]:
    """Text that asks the image gets nothing, as it would from an image without boxes."""
    calls: Counter[nn.Module] = Counter()

    def nothing(module: nn.Module, _args: Any, output: Any) -> Any:
        calls[module] += 1
        # A cross layer calls its module for the text first; what boxes ask is left as it is.
        return (torch.zeros_like(output[0]), *output[1:]) if calls[module] == 1 else output

    crossing = attention_modules(model, {_CROSSING: ()}).values()
    hooks = [module.register_forward_hook(nothing) for module, _ in crossing]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_itself(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    matrices["R_tt"][:, 0, 0] = 0
    return matrices
