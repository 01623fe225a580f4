"""One explainer on one model in ``prunex score``: its maps, its values by metric, and what of them is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.metrics.scoring import Measure, measures, random_maps, scores
from prunex.recipes.commands.explain import MANY, Explainers, batches
from prunex.recipes.commands.options import RANDOM
from prunex.recipes.commands.score_data import Scenes
from prunex.recipes.commands.score_record import Record
from prunex.targets import Function, Target

LAYOUT = 2  # of the npz files; another number and everything is computed anew


@dataclass
class Model:
    """One of the models beside each other, and what it makes of the images."""

    name: str  # "dense" or "slim"
    model: nn.Module  # the ViT in eval mode
    judge: nn.Module | None = None  # the dense ViT that judges which patches it keeps
    predicted: Tensor | None = None  # int64 [N]; None without a classifier
    target: Tensor | None = None  # the class that is explained, likewise
    function: Function | None = None  # or the number of each image that is
    kept: Tensor | None = None  # bool [N, gh, gw], where patches are kept as themselves
    grid: tuple[int, int] = (0, 0)
    digest: str = ""  # a hash of its weights and options
    judge_digest: str = ""

    def asked(self, part: Any, device: torch.device) -> Target:
        """What is explained of some images."""
        return self.function if self.target is None else self.target[part].to(device)


@dataclass
class Setting:
    """What all rows of a table share."""

    scenes: Scenes
    metrics: list[Measure]
    options: dict[str, dict[str, Any]]  # by method
    removal: Any  # how patches are taken away
    batch: int
    device: torch.device
    folder: Path  # where results lie
    target: str | None = None  # what else than the predicted class is explained
    again: bool = False  # whether what lies in the folder is computed anew

    def parts(self) -> list[slice]:
        """The first image alone, which shows what a method takes; then batches."""
        return [slice(part.start, part.stop) for part in batches(len(self.scenes.images), self.batch)]

    def images(self, part: slice | Tensor) -> Tensor:
        """Some of the images, where the models are."""
        return self.scenes.images[part].to(self.device)


class Refused(Exception):
    """A method of "all" that cannot take this model."""


class Row:
    """One explainer (or random maps) on one model; a lenient one is left out where it refuses the first image."""

    def __init__(self, setting: Setting, model: Model, method: str, lenient: bool) -> None:
        self.setting, self.model, self.method, self.lenient = setting, model, method, lenient
        self.refused: str | None = None
        options = sorted(setting.options.get(method, {}).items())
        # Whatever maps depend on: with another of these they are computed anew.
        facts: list[Any] = [LAYOUT, model.digest, setting.scenes.digest(), method, options]
        if setting.target is not None:
            facts.append(setting.target)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()
        path = setting.folder / "values" / model.name / f"{method}.npz"
        self.record = Record(path, key, setting.again, len(setting.scenes.images), model.grid)

    def key(self, measure: Measure) -> str:
        """What a metric's values depend on beyond the maps."""
        if measure.group == "agreement":
            return self.model.judge_digest
        return str(self.setting.removal) if measure.group == "faithfulness" else ""

    def values(self) -> dict[str, Tensor]:
        """What is there, by metric."""
        return self.record.values({measure.name: self.key(measure) for measure in self.setting.metrics})

    def rounds(self) -> int:
        """How often the images are gone through for what is missing."""
        missing, explains = self._missing(), self._explains()
        kinds = {x.kind for x in missing if x.group != "localisation" or not explains}
        return len(kinds) + explains

    def work(self, bar: Any, dense: Row | None) -> None:
        """Compute and write what is missing; ``dense`` is the same method on the dense model, the judge."""
        missing, name = self._missing(), self.model.name
        if self._explains():
            bar.set_postfix_str(f"{name}, {self.method}")
            # On the finest map, which is not kept: these are measured while it is there.
            places = [x for x in missing if x.group == "localisation"]
            self._explain([x.name for x in places], bar)
            self.record.add({}, {x.name: self.key(x) for x in places})
            missing = [x for x in missing if x not in places]
        # Metrics of one kind share their forwards.
        for kind in dict.fromkeys(x.kind for x in missing):
            bar.set_postfix_str(f"{name}, {self.method}, {kind}")
            alike = [x for x in missing if x.kind == kind]
            values = self._measure([x.name for x in alike], bar, dense)
            self.record.add(values, {x.name: self.key(x) for x in alike if x.name in values})

    def _missing(self) -> list[Measure]:
        """Metrics to be computed; none of those that do not apply to this model or row."""
        missing = []
        for measure in self.setting.metrics:
            applies = not (measure.group == "agreement" and self.model.kept is None)
            applies = applies and not (measure.group == "robustness" and self.method == RANDOM)
            if applies and not self.record.knows(measure.name, self.key(measure)):
                missing.append(measure)
        return missing

    def _explains(self) -> bool:
        """Whether maps must be made: there are none, or only coarse ones of a method that is finer."""
        places = any(x.group == "localisation" for x in self._missing())
        return not self.record.has_maps or (self.record.fine and places)

    def _explain(self, places: Sequence[str], bar: Any) -> None:
        """Maps of all images, and where they lie (on the finest map, which is not kept)."""
        maps: list[Tensor] = []
        values: dict[str, list[Tensor]] = {}
        fine = False
        for part, some, pixels in self._explained(self.model.model, bar, record=self.record):
            maps.append(some)
            fine = fine or pixels is not None
            masks = self.setting.scenes.masks
            if places and masks is not None:
                images = self.setting.images(part)
                held = scores(places, self.model.model, images, some, masks=masks[part].to(some.device), pixels=pixels)
                _gather(values, held)
        self.record.maps(torch.cat(maps), self.model.target, fine, {k: torch.cat(v) for k, v in values.items()})

    def _explained(
        self, model: nn.Module, bar: Any, record: Record | None = None, which: Tensor | None = None
    ) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Place, maps and finer maps batch by batch; ``which`` are some images, which the bar does not count."""
        setting = self.setting
        if self.method == RANDOM:
            maps = random_maps(setting.scenes.images, self.model.grid)
            for part in setting.parts():
                yield part, maps[part], None
                bar.update(part.stop - part.start)
            return
        options = {self.method: setting.options[self.method]} if self.method in setting.options else None
        explainers = Explainers([self.method], options)
        parts: list[Any] = setting.parts()
        if which is not None:
            parts = [part for part in which.split(setting.batch) if len(part)]
        for part in parts:
            try:
                e = explainers(model, setting.images(part), self.model.asked(part, setting.device))[self.method]
            except PrunexError as error:
                if explainers.images == 0 and self.lenient:
                    raise Refused(str(error).removeprefix(f"{self.method}: ")) from error
                raise
            if record is not None:
                record.cost = [explainers.seconds(self.method), explainers.forwards(self.method)]
            yield part, e.maps, None if e.fine is None else e.fine.float().cpu()
            if which is None:
                if part.start == 0 and explainers.forwards(self.method) > MANY:
                    bar.write(explainers.announcements(len(setting.scenes.images) - 1)[0])
                bar.update(part.stop - part.start)

    def _measure(self, names: list[str], bar: Any, dense: Row | None) -> dict[str, Tensor]:
        """Values of all images of metrics that share what they compute."""
        setting, m = self.setting, self.model
        maps, judge = self.record.tensor("maps"), None
        if measures(names)[0].group == "agreement":
            judge = self._judge(bar, dense)
            if judge is None:
                bar.update(len(maps))
                return {}
        values: dict[str, list[Tensor]] = {}
        start = perf_counter()

        def some(tensor: Tensor | None, part: slice) -> Tensor | None:
            return None if tensor is None else tensor[part].to(setting.device)

        for begin in range(0, len(maps), setting.batch):
            part = slice(begin, min(begin + setting.batch, len(maps)))
            held = scores(
                names,
                m.model,
                setting.images(part),
                maps[part].to(setting.device),
                m.asked(part, setting.device),
                labels=some(setting.scenes.labels, part),
                masks=some(setting.scenes.masks, part),
                kept=some(m.kept, part),
                judge=some(judge, part),
                explainer=self.method,
                options=setting.options.get(self.method),
                removal=setting.removal,
                mean=setting.scenes.mean,
                std=setting.scenes.std,
            )
            _gather(values, held)
            # An image counts once for each thing done with it.
            bar.update(part.stop - part.start)
        self.record.seconds |= dict.fromkeys(names, perf_counter() - start)
        return {name: torch.cat(parts) for name, parts in values.items()}

    def _judge(self, bar: Any, dense: Row | None) -> Tensor | None:
        """The dense model's maps for the classes that this model predicts; None where the method refuses it."""
        m, count = self.model, len(self.setting.scenes.images)
        if m.judge is None or (dense is not None and dense.refused is not None and not dense.record.has_maps):
            return None
        if self.method == RANDOM:
            return random_maps(self.setting.scenes.images, m.grid)
        which, maps = torch.arange(count), torch.zeros(0)
        if dense is not None and dense.record.has_maps:
            # Of the dense model's own row only those images are explained anew whose classes differ.
            maps = dense.record.tensor("maps").clone()
            differs = torch.zeros(count, dtype=torch.bool)
            if m.target is not None:
                differs = dense.record.tensor("target") != m.target
            which = differs.nonzero()[:, 0]
        for part, some, _ in self._explained(m.judge, bar, which=which):
            if not len(maps):
                maps = torch.zeros(count, *some.shape[1:])
            maps[part] = some
        return maps


def _gather(lists: dict[str, list[Tensor]], values: dict[str, Tensor]) -> None:
    for name, tensor in values.items():
        lists.setdefault(name, []).append(tensor)
