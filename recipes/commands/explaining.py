"""``prunex explain`` on Lightning's engine: which images are to be done, what is made of them, and what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from prunex.errors import PrunexError
from prunex.files import DRAFT, remove_drafts
from prunex.maps import ABOUT, FOLDER, INDEX, LISTING, Maps, read_listing, shards_of, write_about, write_listing
from prunex.pictures.arrays import Picture
from prunex.recipes.commands.processes import check_terminated, first_says
from prunex.recipes.commands.shards import Shards, write_besides
from prunex.recipes.commands.sheets import Sheets, arrays_of, check_out, sheets_of, writing
from prunex.recipes.data.inputs import Inputs, open_inputs

if TYPE_CHECKING:
    from prunex.recipes.commands.explain import Explainers

Prepare = Callable[[Image.Image], tuple[Picture, Tensor]]


@dataclass
class Plan:
    """What there is to do, as the first process sees it: the same in all of them.

    Attributes:
        inputs: All images that were given.
        labels: The class that is explained of each image; None where it is the same for all, or predicted.
        lines: Of each image its line in the listing, int64 [N].
        listing: Names of all lines, new ones included, and by what their images are known again.
        batches: Images that are to be done, together as they would be in a run that was never stopped.
        sheets: Where sheets go, of the first images.
        about: What is written of the maps that are there; None where there are none.
        value_range: What becomes white of images of 16 bits.
    """

    inputs: Inputs
    labels: list[int] | None
    lines: NDArray[np.int64]
    listing: tuple[list[str], list[str]]
    batches: list[list[int]]
    sheets: list[str]
    about: dict[str, Any] | None
    value_range: int | None

    @property
    def left(self) -> int:
        """Images to do."""
        return sum(map(len, self.batches))


@dataclass(eq=False)
class Images(LightningDataModule):
    """Images of a command, those that were explained already left out.

    Attributes:
        given: What was given as ``--images``.
        out: Where results go; ``outside`` is what of the images does not count.
        facts: What maps depend on, in plain values: a folder has maps of one kind.
        prepare: How an image becomes what the model sees.
        group: Cuts so many images into batches.
        sheets: How many images get a sheet; None: all.
        classes: Labels as class numbers, where each image's own is explained.
    """

    given: str
    out: Path
    outside: Path
    facts: Mapping[str, Any]
    prepare: Prepare
    group: Callable[[int], Iterable[range]]
    sheets: int | None
    value_range: int | None
    workers: int
    again: bool
    classes: Callable[[Sequence[int | str]], list[int]] | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.plan: Any = None  # a Plan, once Lightning has called setup

    def setup(self, stage: str) -> None:
        """Find out what is to be done; in the first process alone, while others may write already."""
        trainer: Any = self.trainer
        self.plan = first_says(trainer, self._plan)

    def _plan(self) -> Plan:
        inputs = open_inputs(self.given, self.outside)
        labels = self._labels(inputs)
        folder = self.out / FOLDER
        ours = (folder / ABOUT).is_file()
        if not ours and shards_of(folder):
            raise PrunexError(f"{folder} holds safetensors files, but no {ABOUT}: give another --out")
        some = sheets_of(inputs.names)[: self.sheets]
        check_out(self.out, Path(self.given), some, inputs.files(), ours or (self.out / f"{FOLDER}.npz").exists())
        maps = Maps(self.out) if ours and not self.again else None
        if maps is not None:
            self._check_alike(maps.about)
        names, stamps = ([], []) if maps is None else read_listing(folder)
        lines = number_lines(inputs, labels, names, stamps)
        done = np.zeros(len(inputs), bool) if maps is None else maps.has(lines)
        # A sheet that is wanted and not there is drawn from what its image is explained by anew.
        for number, sheet in enumerate(some):
            done[number] &= (self.out / sheet).is_file()
        batches = []
        for group in self.group(len(inputs)):
            left = [number for number in group if not done[number]]
            if left:
                batches.append(left)
        about = None if maps is None else maps.about
        numbers = [number for batch in batches for number in batch]
        shown = tqdm(numbers, desc="reading", unit="image", leave=False, delay=1)
        # A range that was chosen for images before these stays, and must hold them, too.
        chosen = self.value_range if about is None or about["value_range"] is None else about["value_range"]
        value_range = inputs.choose_range(shown, len(numbers), chosen)
        return Plan(inputs, labels, lines, (names, stamps), batches, some, about, value_range)

    def _labels(self, inputs: Inputs) -> list[int] | None:
        """Each image's class, where that is what is explained."""
        if self.classes is None:
            return None
        if inputs.labels is None:
            raise PrunexError(
                f"--target label: {self.given} has no labels; give a table with a column label, or tar files "
                "with .cls, or leave it out for the predicted class"
            )
        return self.classes(inputs.labels)

    def _check_alike(self, about: Mapping[str, Any]) -> None:
        differ = [name for name, value in self.facts.items() if about.get(name) != value]
        if not differ:
            return
        unlike = []
        for name in differ:
            # Hashes would tell nobody anything.
            unlike.append("the model" if name == "model" else f"{name} ({about.get(name)}, now {self.facts[name]})")
        raise PrunexError(
            f"{self.out} holds maps that were made otherwise: {'; '.join(unlike)[:600]} differ; give another --out, or "
            "--again to start over"
        )

    def predict_dataloader(self) -> Any:
        """This process's batches: every Nth of N processes, each as one process would have it."""
        trainer: Any = self.trainer
        mine = self.plan.batches[first_of(self.plan) :][trainer.global_rank :: trainer.world_size]
        return _Batches(self.plan, mine, self.prepare, self.workers)

    def first(self) -> dict[str, Any] | None:
        """The very first image, where it is to be done."""
        return Reading(self.plan, self.plan.batches[:1], self.prepare)[0] if first_of(self.plan) else None


def number_lines(
    inputs: Inputs, labels: Sequence[int] | None, names: list[str], stamps: list[str]
) -> NDArray[np.int64]:
    """Each image's line in a listing, to which those are added that are new or have changed."""
    known = {name: line for line, name in enumerate(names)}
    lines = np.empty(len(inputs), np.int64)
    for number, (name, stamp) in enumerate(zip(inputs.names, inputs.stamps(), strict=True)):
        stamp = stamp if labels is None else f"{stamp}-{labels[number]}"
        line = known.get(name, -1)
        if line < 0 or stamps[line] != stamp:
            # An image that has changed gets another line: maps of the old one are not of it.
            line = len(names)
            names.append(name)
            stamps.append(stamp)
        lines[number] = line
    return lines


def first_of(plan: Plan) -> int:
    """How many batches the first process does before others begin: the first image's, which shows what methods take."""
    return int(bool(plan.batches) and plan.about is None)


class Reading(Dataset):
    """Batches that are read and prepared whole, so that workers may do it."""

    def __init__(self, plan: Plan, batches: list[list[int]], prepare: Prepare) -> None:
        self.inputs, self.batches, self.prepare = plan.inputs, batches, prepare
        self.value_range, self.drawn, self.labels = plan.value_range, len(plan.sheets), plan.labels

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = self.batches[index]
        opened = [self.prepare(self.inputs.read(number, self.value_range)) for number in numbers]
        pictures = [shown if number < self.drawn else None for number, (shown, _) in zip(numbers, opened, strict=True)]
        images = torch.stack([image for _, image in opened])
        labels = None if self.labels is None else torch.tensor([self.labels[number] for number in numbers])
        return {"numbers": numbers, "pictures": pictures, "images": images, "labels": labels}


class _Batches:
    """A loader without a length: a process that has no batch runs the same hooks as others, which wait for it."""

    def __init__(self, plan: Plan, batches: list[list[int]], prepare: Prepare, workers: int) -> None:
        self._loader = DataLoader(Reading(plan, batches, prepare), batch_size=None, num_workers=workers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


class Explaining(LightningModule):
    """A ViT under several explainers."""

    def __init__(self, vit: nn.Module, explainers: Explainers, target: Any) -> None:
        super().__init__()
        self.vit, self.explainers, self.goal = vit, explainers, target
        self.bar: Any = None

    def predict_step(self, batch: dict[str, Any], *_: Any) -> dict[str, Any]:
        """Maps of a batch by method, and what they took."""
        goal = self.goal if batch["labels"] is None else batch["labels"].to(self.device)
        explanations = self.explainers(self.vit, batch["images"], goal, self.bar)
        return {"explanations": explanations, "spent": self.explainers.last}


class MapWriter(BasePredictionWriter):
    """Writes shards and sheets as they come, shows how far it is, and at the end writes what small runs get besides."""

    def __init__(self, data: Images, sheets: Sheets) -> None:
        super().__init__("batch")
        self.data, self.sheets = data, sheets
        self.shards = Shards(data.out / FOLDER)
        self.bar: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the first image of all, which shows what each method takes; the others wait."""
        plan, module = self.data.plan, cast(Explaining, pl_module)
        shown = trainer.is_global_zero
        # Of several processes it is the first one's images, and as many again of each of the others.
        done = len(plan.inputs) - plan.left
        self.bar = tqdm(
            total=len(plan.inputs), initial=done, desc="explaining", unit="image", disable=not shown, smoothing=0.05
        )
        module.bar = self.bar
        about = first_says(trainer, lambda: self._begin(trainer, module))
        module.explainers.settle(about["methods"], about["skipped"])

    def _begin(self, trainer: Trainer, module: Explaining) -> dict[str, Any]:
        plan = self.data.plan
        folder, first = self.data.out / FOLDER, self.data.first()
        said: list[str] = []
        prediction = None
        if first is not None:
            first["images"] = first["images"].to(module.device)
            prediction = module.predict_step(first)
            said = module.explainers.announcements(len(plan.inputs) - 1)
        about = plan.about
        if about is None:
            explainers = module.explainers
            about = {**self.data.facts, "methods": explainers.names, "skipped": explainers.skipped}
        with writing(self.data.out):
            if plan.batches:
                if plan.about is None:
                    # What says that they are maps goes last.
                    for path in [*shards_of(folder), folder / LISTING, folder / ABOUT]:
                        path.unlink(missing_ok=True)
                self._remove_drafts(plan.sheets)
                # Both before the first map, of which they say what it is of.
                write_listing(folder, *plan.listing)
                write_about(folder, {**about, "value_range": plan.value_range})
        if prediction is not None and first is not None:
            self._write(prediction, first, 1)
        for line in said:
            self.bar.write(line)
        return about

    def _remove_drafts(self, sheets: Iterable[str]) -> None:
        """What a killed process was writing when it was killed."""
        remove_drafts(self.data.out / FOLDER)
        # Not of all that lies below: photos may.
        for folder in {(self.data.out / sheet).parent for sheet in sheets}:
            for draft in folder.glob(f"{DRAFT}*.png"):
                draft.unlink(missing_ok=True)

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        """Write a batch."""
        self._write(prediction, batch, trainer.world_size)
        check_terminated(trainer)

    def _write(self, prediction: dict[str, Any], batch: dict[str, Any], processes: int) -> None:
        plan, explanations = self.data.plan, prediction["explanations"]
        arrays, numbers = arrays_of(explanations), batch["numbers"]
        # Sheets first: whoever has maps has its sheet, wherever a run was stopped.
        for place, picture in enumerate(batch["pictures"]):
            if picture is not None:
                number = numbers[place]
                name, sheet = plan.inputs.names[number], plan.sheets[number]
                self.sheets.draw(place, name, sheet, picture, explanations, arrays)
        with writing(self.data.out):
            self.shards.add({INDEX: plan.lines[numbers], **arrays}, prediction["spent"])
        self.bar.update(min(len(numbers) * processes, self.bar.total - self.bar.n))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what all processes' results make together."""
        with writing(self.data.out):
            self.shards.join()
        trainer.strategy.barrier()
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What is done stays; a disk that is full has been told of already."""
        with suppress(PrunexError):
            with writing(self.data.out):
                self.shards.join()
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.close()
        # A run that was refused before it began has left nothing to finish.
        if not trainer.is_global_zero or not (self.data.out / FOLDER / ABOUT).is_file():
            return
        with writing(self.data.out):
            said = write_besides(self.data.out)
        if said:
            print(said)

    def done(self) -> int:
        """How many of the images have maps."""
        plan = self.data.plan
        if plan is None or not (self.data.out / FOLDER / ABOUT).is_file():
            return 0
        return int(Maps(self.data.out).has(plan.lines).sum())
