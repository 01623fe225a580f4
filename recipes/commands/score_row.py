"""One explainer on one model in ``prunex score``: its maps, its values by metric, and what of them is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.metrics.scoring import MEASURES, Measure, random_maps, scores
from prunex.recipes.commands.explain import MANY, Explainers, batches
from prunex.recipes.commands.options import RANDOM
from prunex.recipes.commands.processes import first_says
from prunex.recipes.commands.score_data import Scenes
from prunex.recipes.commands.score_record import Record, Rows
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
    fabric: Fabric  # the processes that share the work
    target: str | None = None  # what else than the predicted class is explained
    again: bool = False  # whether what lies in the folder is computed anew

    def parts(self) -> list[Tensor]:
        """Places of the first image alone, which shows what a method takes; then of batches."""
        return [torch.arange(part.start, part.stop) for part in batches(len(self.scenes), self.batch)]

    def images(self, part: slice | Tensor) -> Tensor:
        """Some of the images, where the models are."""
        return self.scenes[part].images.to(self.device)

    def noise(self, grid: tuple[int, int]) -> Tensor:
        """A random map of each image."""
        return random_maps(torch.empty(len(self.scenes), 0), grid)


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
        writes = setting.fabric.is_global_zero
        self.record = Record(path, key, setting.again, len(setting.scenes), model.grid, writes=writes)

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
            self._explain(places, bar)
            missing = [x for x in missing if x not in places]
        # Metrics of one kind share their forwards.
        for kind in dict.fromkeys(x.kind for x in missing):
            bar.set_postfix_str(f"{name}, {self.method}, {kind}")
            self._measure([x for x in missing if x.kind == kind], bar, dense)

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

    def _explain(self, measures: Sequence[Measure], bar: Any) -> None:
        """Maps of all images, and where they lie (on the finest map, which is not kept)."""
        setting, vit, names = self.setting, self.model.model, [x.name for x in measures]
        explainers = self._explainers()

        def explained(part: Tensor) -> dict[str, Tensor]:
            scene = setting.scenes[part]
            images = scene.images.to(setting.device)
            maps, fine = self._maps(explainers, self.model, part, images)
            seconds, forwards, count = (0.0, 0.0, 1) if explainers is None else explainers.last[self.method]
            # Images of a batch are explained together, and share what that took.
            cost = torch.tensor([[seconds / count, forwards / count]], dtype=torch.float64).expand(len(part), 2)
            rows = {"maps": maps, "fine": torch.full((len(part),), fine is not None), "cost": cost}
            if names and scene.masks is not None:
                rows |= scores(names, vit, images, maps, masks=scene.masks.to(maps.device), pixels=fine)
            return rows

        with self._passed(["maps", *names], explained, bar, explainers) as (rows, _):
            self.record.cost = rows.pop("cost").mean(0).tolist()
            fine = bool(rows.pop("fine").any())
            self.record.maps(rows.pop("maps"), self.model.target, fine, rows)
            self.record.add({}, {x.name: self.key(x) for x in measures})

    def _measure(self, measures: Sequence[Measure], bar: Any, dense: Row | None) -> None:
        """Values of all images of metrics that share what they compute."""
        setting, m, names = self.setting, self.model, [x.name for x in measures]
        agreement = measures[0].group == "agreement"
        # Where the method refuses the dense model nobody can judge.
        if agreement and (m.judge is None or (dense is not None and dense.refused is not None)):
            bar.update(len(setting.scenes))
            return
        explainers, maps = self._explainers() if agreement else None, self.record.tensor("maps")

        def measured(part: Tensor) -> dict[str, Tensor]:
            scene = setting.scenes[part].each(lambda tensor: tensor.to(setting.device))
            judge = self._judge(explainers, dense, part, scene.images) if agreement else None
            return scores(
                names,
                m.model,
                scene.images,
                maps[part].to(setting.device),
                m.asked(part, setting.device),
                labels=scene.labels,
                masks=scene.masks,
                kept=None if m.kept is None else m.kept[part].to(setting.device),
                judge=judge,
                explainer=self.method,
                options=setting.options.get(self.method),
                removal=setting.removal,
                mean=setting.scenes.mean,
                std=setting.scenes.std,
            )

        with self._passed(names, measured, bar, explainers) as (rows, seconds):
            self.record.seconds |= dict.fromkeys(names, seconds)
            self.record.add(rows, {x.name: self.key(x) for x in measures})

    @contextmanager
    def _passed(
        self, names: Sequence[str], make: Callable[[Tensor], dict[str, Tensor]], bar: Any, explainers: Explainers | None
    ) -> Iterator[tuple[dict[str, Tensor], float]]:
        """All images' rows of one pass and the seconds they took, in a folder until the caller has written them.

        Images that were done before a stop are left out, and processes take the batches of the others in turn. Where
        there are explainers, the first image is made by the first process alone, and others see what came of it.
        """
        fabric, scenes = self.setting.fabric, self.setting.scenes
        facts = [self.record.key, *names, *(self.key(MEASURES[name]) for name in names if name in MEASURES)]
        stamp = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        rows = Rows(self.record.path.with_name(f"{self.method}-{stamp}"), len(scenes))
        if self.setting.again and fabric.is_global_zero:
            rows.remove()
        done = first_says(fabric, rows.done)
        left = int((~done).sum())
        parts = [part[~done[part]] for part in self.setting.parts()]
        parts = [part for part in parts if len(part)]
        bar.update(len(scenes) - left)

        def work(part: Tensor, processes: int) -> None:
            nonlocal left
            start = perf_counter()
            made = make(part)
            rows.add(part, {**made, "seconds": torch.full((len(part),), (perf_counter() - start) / len(part))})
            # Others have done as many meanwhile.
            count = min(left, len(part) * processes)
            left -= count
            bar.update(count)

        if explainers is not None and not done.any():
            refused = first_says(fabric, lambda: self._try(lambda: work(parts[0], 1)))
            if refused:
                raise Refused(refused)
            if explainers.forwards(self.method) > MANY:
                bar.write(explainers.announcements(len(scenes) - 1)[0])
            parts = parts[1:]
        for part in parts[fabric.global_rank :: fabric.world_size]:
            work(part, fabric.world_size)
        bar.update(left)
        rows.join()
        # All have written before any reads, and all have read before the files go.
        fabric.barrier()
        whole = rows.whole()
        yield whole, float(whole.pop("seconds").sum())
        fabric.barrier()
        if fabric.is_global_zero:
            rows.remove()

    def _try(self, work: Callable[[], None]) -> str:
        """Why a method of "all" cannot take this model; "" where it can."""
        try:
            work()
        except PrunexError as error:
            if not self.lenient:
                raise
            return str(error).removeprefix(f"{self.method}: ")
        return ""

    def _explainers(self) -> Explainers | None:
        if self.method == RANDOM:
            return None
        options = {self.method: self.setting.options[self.method]} if self.method in self.setting.options else None
        return Explainers([self.method], options)

    def _judge(self, explainers: Explainers | None, dense: Row | None, part: Tensor, images: Tensor) -> Tensor:
        """The dense model's maps of some images, for the classes that this model predicts."""
        m = self.model
        judge = replace(m, model=cast(nn.Module, m.judge))
        if explainers is None or dense is None or not dense.record.has_maps:
            return self._maps(explainers, judge, part, images)[0].to(images.device)
        maps = dense.record.tensor("maps")[part].to(images.device)
        if m.target is not None:
            # Of the dense model's own row only those are explained anew whose classes differ.
            differs = (dense.record.tensor("target")[part] != m.target[part]).nonzero()[:, 0]
            if len(differs):
                maps[differs] = self._maps(explainers, judge, part[differs], images[differs])[0].to(images.device)
        return maps

    @cached_property
    def _noise(self) -> Tensor:
        """Random maps of all images, which are drawn together: drawn anew for each batch they would be quadratic."""
        return self.setting.noise(self.model.grid)

    def _maps(
        self, explainers: Explainers | None, model: Model, part: Tensor, images: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Maps of some images, and finer ones where the method makes them."""
        if explainers is None:
            return self._noise[part], None
        e = explainers(model.model, images, model.asked(part, self.setting.device))[self.method]
        return e.maps, None if e.fine is None else e.fine.float().cpu()
