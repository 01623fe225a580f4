"""``prunex score``: explainers by metrics on validation images, dense beside slim, with intervals and costs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

import prunex
from prunex.errors import PrunexError, unknown
from prunex.files import is_there, write_whole
from prunex.metrics.scoring import (
    MEASURES,
    by_chance,
    interval,
    measures,
    removed_by,
    without_pruning,
)
from prunex.recipes.commands.bench import contestants
from prunex.recipes.commands.explain import Explainers, check_outputs, check_target, own_explainer, read_options
from prunex.recipes.commands.options import RANDOM, split_names
from prunex.recipes.commands.processes import fabric_of, in_turn, quiet
from prunex.recipes.commands.score_data import from_folder, from_run
from prunex.recipes.commands.score_record import digest
from prunex.recipes.commands.score_row import Model, Refused, Row, Setting
from prunex.recipes.commands.sheets import writing
from prunex.recipes.report.page import write_report
from prunex.recipes.report.score_table import LEFT, Score, by_removal, table, write_scores
from prunex.recipes.runs import open_data, open_model_or_name, read_run, renormalise, run_of, to_device, token_pruning
from prunex.recipes.timing import chip
from prunex.registry import lookup
from prunex.targets import parse
from prunex.vit.anatomy import find, read
from prunex.vit.embedding import embed
from prunex.vit.widths import WidthSpec, widths_of

PAIRS = 2  # antithetic pairs of orders of shap, where all methods are asked for


def score(args: Any) -> int:
    """Do what ``prunex score`` was asked for, and give back the exit code."""
    run = run_of(Path(args.run))
    out = Path(args.out or ("score" if run is None else run / "score"))
    scoring = Scoring(args, out, run)
    first = scoring.fabric.is_global_zero
    try:
        with writing(out):
            with quiet():
                scoring.begin()
            with tqdm(total=scoring.steps(), desc="scoring", unit="image", disable=not first) as bar:
                scoring.work(bar)
            if not first:
                return 0
            cells = scoring.table()
            write_scores(out, cells)
            write_whole(out / "about.json", (json.dumps(scoring.about(), indent=2, allow_nan=False) + "\n").encode())
    except KeyboardInterrupt:
        if first:
            said = f"what is done lies in {out}; the same command continues there"
            print(f"\nprunex: interrupted: {said}", file=sys.stderr)
        return 130
    print(table(cells, shutil.get_terminal_size((120, 24)).columns))
    # What the signs in the table mean.
    print("\n± half of the 95 % interval (bootstrap over images); ↓ less is better")
    print("* best explainer of the model, where its interval meets no other's")
    for removal, names in by_removal(cells).items():
        print(f"{LEFT[removal]}: {', '.join(names)}")
    if any(cell.judge for cell in cells):
        print("agreement: kept patches against the dense model's map of the same explainer; it judges the pruner")
    if scoring.left_out:
        print(f"not among --metrics all, by name only: {', '.join(scoring.left_out)}")
    for name, share in scoring.accuracy().items():
        print(f"accuracy on these {len(scoring.setting.scenes)} images, {name}: {share:.1%}")
    for note in scoring.notes:
        print(note)
    print(out / "scores.csv")
    if run is not None and out == run / "score":
        print(write_report(run))
    return 0


def open_models(args: Any) -> tuple[list[Model], list[str]]:
    """The models asked for, dense first, and what is to be said about them."""
    where = Path(args.run)
    notes: list[str] = []
    # A run has both models; a slim folder knows its dense one only where tokens alone are pruned.
    if is_there(where / "config.yaml", Path.is_file) and not (where / "config.json").is_file():
        contest, notes = contestants(where, read_run(where))
        first, pruned = contest[0], contest[1:]
        dense = first.model if first.evaluable else None
        models = [] if dense is None else [Model("dense", dense)]
        models += [Model("slim", c.model, dense) for c in pruned]
    else:
        vit = find(open_model_or_name(args.run, args.weights, args.img_size, args.pretrained))[1].eval()
        if prunex.attached(vit) is not None:
            dense = without_pruning(vit)
            models = [Model("dense", dense), Model("slim", vit, dense)]
        else:
            models = [Model("slim" if widths_of(vit) != WidthSpec() else "dense", vit)]
    for m in models:
        m.model = find(m.model)[1].requires_grad_(False)
        renormalise(m.model, args.mean, args.std)
    if args.models:
        wanted, names = split_names(args.models), [m.name for m in models]
        for name in wanted:
            if name not in names:
                raise unknown("model (of those that are here)", name, names)
        models = [m for m in models if m.name in wanted]
    if not models:
        raise PrunexError(f"--models {args.models!r} names no model: give dense, slim, or both with a comma")
    return models, notes


class Scoring:
    """Everything that one call scores, and what of it is there already."""

    def __init__(self, args: Any, out: Path, run: Path | None) -> None:
        self.args = args
        self.fabric = fabric_of(args)
        self.models, self.notes = open_models(args)
        named = [name for name in split_names(args.methods) if name != RANDOM]  # that row is always there
        options = own_explainer(Path(args.run), args.methods, read_options(args.option))
        self.methods = [*(Explainers(named, options).names if named else []), RANDOM]
        everything = "all" in split_names(args.metrics)
        metrics = measures(args.metrics)
        taken = {measure.name for measure in metrics}
        self.left_out = [name for name in MEASURES if name not in taken] if everything else []
        if args.data:
            masks = Path(args.masks) if args.masks else None
            scenes = from_folder(Path(args.data), masks, self.models[-1].model, args.images, args.range)
        elif run is not None:
            scenes = from_run(open_data(run), args.images)
        else:
            raise PrunexError(f"{args.run} brings no data: give --data DIR, a folder of images")
        if args.target == "label" and scenes[:1].labels is None:
            raise PrunexError("--target label: these images have no labels; leave it out for the predicted class")
        target = None if args.target == "predicted" else args.target
        self.setting = Setting(
            scenes, metrics, options, args.removal, args.batch, self.fabric.device, out, self.fabric, target, args.again
        )
        self.notes += scenes.notes
        self._named, self._everything = named, everything

    def begin(self) -> None:
        """Start the other processes, look at all images, and find out what is to be done."""
        self.fabric.launch()
        # Known only now: each of several processes has a device of its own.
        self.setting.device = self.fabric.device
        judges = [m.judge for m in self.models if m.judge is not None]
        to_device(str(self.fabric.device), [*(m.model for m in self.models), *judges])
        self._look()
        for m in self.models:
            self._take(m)
        if self.setting.target is not None:
            what = "the class of each image's label" if self.setting.target == "label" else self.setting.target
            self.notes.append(f"explained and scored is {what}")
        self._leave_out()
        named = self._named
        if "all" in named:
            self._cheapen(named)
        # Who is named, or given options, must work as it is.
        required = {*named, *read_options(self.args.option)} if "all" in named else set(self.methods)

        # The first process moves files when it makes its rows, and others read what lies at their names then.
        for first in (True, False):
            if first == self.fabric.is_global_zero:
                pairs = [(m, method) for m in self.models for method in self.methods]
                self.rows = [Row(self.setting, m, method, method not in required) for m, method in pairs]
            self.fabric.barrier()

    def _look(self) -> None:
        """What models make of all images, their labels, hashes, and what their masks are: ``seen``, rows by name."""
        setting = self.setting
        places = [x.name for x in setting.metrics if x.group == "localisation"]
        for m in self.models:
            # Not every grid is what the anatomy says: images of another size are resampled.
            m.grid = embed(cast(Any, m.model), setting.images(slice(0, 1)))[1]

        @torch.no_grad()
        def look(part: Tensor) -> dict[str, Tensor]:
            scene = setting.scenes[part]
            rows = {"stamps": scene.stamps()}
            if scene.labels is not None:
                rows["labels"] = scene.labels
            if scene.masks is not None:
                rows["objects"] = scene.masks.flatten(1).any(1)
                chance = by_chance(places, scene.masks) if places else {}
                rows |= {f"chance {name}": level for name, level in chance.items()}
            for m in self.models:
                handle = token_pruning(m.model)
                logits = m.model(scene.images.to(setting.device))
                check_outputs(logits)
                rows[f"predicted {m.name}"] = logits.argmax(1).cpu()
                trace = None if handle is None else handle.trace
                if trace is not None and trace.stages and not trace.pooled and not trace.merges():
                    rows[f"kept {m.name}"] = trace.kept().cpu()
            return rows

        self.seen = in_turn(self.fabric, setting.parts(), look)
        setting.scenes.stamps = self.seen["stamps"]

    def _take(self, m: Model) -> None:
        """Predictions and kept patches of a model; labels and a target that do not fit are refused."""
        vit, labels = m.model, self.seen.get("labels")
        classes = read(vit).classes
        if classes > 0:
            m.predicted = self.seen[f"predicted {m.name}"]
        kept = self.seen.get(f"kept {m.name}")
        if m.judge is not None:
            m.kept = kept
        if token_pruning(vit) is not None and kept is None:
            self.notes.append(f"{m.name}: no patch is kept as itself, so explainers have nothing to agree with")
        m.digest, m.judge_digest = digest(vit), "" if m.judge is None else digest(m.judge)
        if classes > 0 and labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise PrunexError(f"labels from {int(labels.min())} to {int(labels.max())} do not fit {classes} classes")
        m.target = m.predicted
        if self.args.target not in ("predicted", "label"):
            goal = parse(self.args.target)
            check_target(vit, goal)
            m.function = goal if callable(goal) else None
            m.target = torch.full((len(self.setting.scenes),), goal) if isinstance(goal, int) else None
        if self.args.target == "label" and labels is not None and m.predicted is not None:
            m.target = labels.long()

    def _leave_out(self) -> None:
        """Leave out metrics that nothing can be said of here; one that was named is refused instead."""
        classes = {0 if m.predicted is None else read(m.model).classes for m in self.models}
        metrics, everything = self.setting.metrics, self._everything
        reasons = {}
        if "objects" not in self.seen:
            reasons["localisation"] = "there are no object masks"
        elif not self.seen["objects"].any():
            reasons["localisation"] = "no mask holds an object: object pixels are those above 0"
        if all(m.kept is None for m in self.models):
            reasons["agreement"] = "there is no pruned model that keeps patches beside a dense one"
        if 0 in classes:
            reasons["faithfulness"] = "this model has no classifier"
        for measure in list(metrics):
            reason = reasons.get(measure.group)
            if measure.kind in ("positive", "negative") and 1 in classes:
                reason = "this model has one output"
            if reason is not None and not everything:
                raise PrunexError(f"{measure.name} cannot be measured: {reason}")
            if reason is not None:
                metrics.remove(measure)
        if not metrics:
            raise PrunexError(f"no metric can be measured: {'; '.join(reasons.values())}")
        if everything:
            # That a dense model has nothing to agree with needs no word.
            said = [group for group in reasons if group != "agreement"]
            self.notes += [f"{group} is left out: {reasons[group]}" for group in said]

    def _cheapen(self, named: list[str]) -> None:
        """Of all methods leave out the slow and shorten shap, and say so; who is named is taken as is."""
        options = self.setting.options
        for name in [n for n in self.methods if n != RANDOM and n not in options and n not in named]:
            needs = lookup("explainer", name).needs
            if "slow" in needs:
                self.methods.remove(name)
                self._write(f"skipped {name}: it is slow ({needs}); name it with --methods to score it")
            elif name == "shap":
                patches = self.models[0].grid[0] * self.models[0].grid[1]
                budget = 2 + PAIRS * 2 * max(1, patches - 1)
                options["shap"] = {"budget": budget}
                self.notes.append(
                    f"shap took {budget:,} forwards an image, below its default: set --option shap.budget=N"
                )

    def _write(self, line: str) -> None:
        """Say something once, whatever bar is shown."""
        if self.fabric.is_global_zero:
            tqdm.write(line)

    def steps(self) -> int:
        """Images to go: an image counts once for each thing done with it."""
        return sum(row.rounds() for row in self.rows) * len(self.setting.scenes)

    def work(self, bar: Any) -> None:
        """Compute what is missing; every method's results are written as soon as they are there."""
        dense = {row.method: row for row in self.rows if row.model.name == "dense"}
        for row in self.rows:
            rounds = row.rounds()
            try:
                row.work(bar, dense.get(row.method))
            except Refused as error:
                reasons = [other.refused for other in self.rows if other.method == row.method]
                if str(error) not in reasons:
                    self._write(f"skipped {row.method}: {error}")
                row.refused = str(error)
                bar.total = max(0, bar.total - rounds * len(self.setting.scenes))
        # A table of random maps alone would look like a result.
        tried = [row for row in self.rows if row.method != RANDOM]
        if tried and all(row.refused for row in tried):
            raise PrunexError(f"no explainer can take this model; the last one said: {tried[-1].refused}")

    def table(self) -> list[Score]:
        """A cell a model, method and metric, with the chance level of what has one."""
        cells = []
        order = [measure.name for measure in self.setting.metrics]
        unknown_cost = [float("nan")] * 2
        for method in self.methods:
            for row in (r for r in self.rows if r.method == method and r.refused is None):
                cost = unknown_cost if method == RANDOM else row.record.cost
                cells += self._cells(row.model, method, row.values(), cost)
        for m in self.models:
            cells += self._cells(m, "chance", self._chance(m), unknown_cost)
        return sorted(cells, key=lambda cell: order.index(cell.metric))

    def _cells(self, m: Model, method: str, values: dict[str, Tensor], cost: list[float]) -> list[Score]:
        cells = []
        for measure in (x for x in self.setting.metrics if x.name in values):
            i = interval(measure.name, values[measure.name])
            judge = ""
            if measure.group == "agreement" and method != "chance":
                judge = RANDOM if method == RANDOM else f"dense/{method}"
            about = (m.name, method, measure.name, measure.group, measure.higher)
            removed = removed_by(measure, self.args.removal)
            cells.append(Score(*about, i.mean, i.low, i.high, i.images, cost[0], cost[1], removed, judge))
        return cells

    def _chance(self, m: Model) -> dict[str, Tensor]:
        # Of localisation it was measured where the masks were read.
        levels = {
            x.name: self.seen[f"chance {x.name}"] for x in self.setting.metrics if f"chance {x.name}" in self.seen
        }
        # How many signs agree by chance depends on the judge's own, and random maps have one sign.
        names = [x.name for x in self.setting.metrics if x.group == "agreement" and x.name != "sign_agreement"]
        if m.kept is not None and names:
            # Chance is what a map that says nothing scores, and random maps say nothing.
            levels |= by_chance(names, kept=m.kept, judge=self.setting.noise(m.grid))
        return levels

    def accuracy(self) -> dict[str, float]:
        """Of each model on these images, where their labels are known."""
        labels = self.seen.get("labels")
        if labels is None:
            return {}
        right = {m.name: m.predicted.eq(labels) for m in self.models if m.predicted is not None}
        return {name: float(answers.double().mean()) for name, answers in right.items()}

    def about(self) -> dict[str, Any]:
        """The conditions, in plain values."""
        images, device = len(self.setting.scenes), self.setting.device.type
        seconds = {}
        for row in (r for r in self.rows if r.record.has_maps):
            seconds[f"{row.model.name}/{row.method}"] = {"explain": row.record.cost[0] * images, **row.record.seconds}
        return {
            "images": images,
            "machine": chip(device),
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "removal": self.args.removal,
            "target": self.args.target,
            "accuracy": self.accuracy(),
            "seconds": seconds,
            "skipped": {f"{row.model.name}/{row.method}": row.refused for row in self.rows if row.refused is not None},
            "notes": self.notes,
        }
