"""``prunex score``: explainers by metrics on validation images, dense beside slim, with intervals and costs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import prunex
from prunex.errors import PrunexError, unknown
from prunex.files import write_whole
from prunex.metrics.scoring import (
    MEASURES,
    Measure,
    by_chance,
    interval,
    measures,
    random_maps,
    removed_by,
    scores,
    without_pruning,
)
from prunex.recipes.commands.arguments import Parser
from prunex.recipes.commands.bench import contestants
from prunex.recipes.commands.explain import MANY, Explainers, batches, check_outputs, own_explainer, read_options
from prunex.recipes.commands.score_data import Scenes, from_folder, from_run
from prunex.recipes.commands.score_record import Record, digest
from prunex.recipes.report.page import write_report
from prunex.recipes.report.score_table import LEFT, Score, by_removal, table, write_scores
from prunex.recipes.runs import (
    add_normalisation,
    add_range,
    open_data,
    open_model_or_name,
    read_run,
    renormalise,
    run_of,
    token_pruning,
)
from prunex.recipes.timing import chip
from prunex.registry import lookup
from prunex.removal.game import ROUTES
from prunex.untrusted import is_there
from prunex.vit.anatomy import find, read
from prunex.vit.embedding import embed
from prunex.vit.widths import WidthSpec, widths_of

LAYOUT = 2  # of the npz files; another number and everything is computed anew
RANDOM = "random"
PAIRS = 2  # antithetic pairs of orders of shap, where all methods are asked for


def score(arguments: Sequence[str]) -> int:
    """``prunex score RUN``: a table of explainers by metrics, scores.csv, and a section of the report."""
    args = _parse(arguments)
    run = run_of(Path(args.run))
    out = Path(args.out) if args.out else (run / "score" if run else Path("score"))
    scoring = Scoring(args, out, *_models(args))
    scoring.show(run)
    try:
        with tqdm(total=scoring.steps(), desc="scoring", unit="image") as bar:
            scoring.work(bar)
        found = scoring.table()
        write_scores(out, found)
        write_whole(out / "about.json", (json.dumps(scoring.about(), indent=2, allow_nan=False) + "\n").encode())
    except KeyboardInterrupt:
        print(f"\nprunex: interrupted: what is done lies in {out}; the same command continues there", file=sys.stderr)
        return 130
    except OSError as error:
        raise PrunexError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
    print(table(found, shutil.get_terminal_size((120, 24)).columns))
    print("\n± half of the 95 % interval (bootstrap over images); ↓ less is better")
    print("* best explainer of the model, where its interval meets no other's")
    for removal, names in by_removal(found).items():
        print(f"{LEFT[removal]}: {', '.join(names)}")
    if any(s.judge for s in found):
        print("agreement: kept patches against the dense model's map of the same explainer; it judges the pruner")
    if scoring.left_out:
        print(f"not among --metrics all, by name only: {', '.join(scoring.left_out)}")
    for name, share in scoring.accuracy().items():
        print(f"accuracy on these {len(scoring.scenes.images)} images, {name}: {share:.1%}")
    for note in scoring.notes:
        print(note)
    print(out / "scores.csv")
    if run is not None and out == run / "score":
        print(write_report(run))
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    parser = Parser(
        "prunex score",
        description="Score explainers by faithfulness, localisation and agreement, dense and slim beside each other. "
        "What is done is kept: an interrupted start is continued by the same command.",
    )
    parser.add_argument("run", help="run folder, slim folder, checkpoint, or a timm model name (with --weights)")
    parser.add_argument(
        "--methods", default="all", help="names with commas between, or all that the model can take (default)"
    )
    parser.add_argument("--metrics", default="all", help="names with commas between, or all usual ones (default)")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="validation images; default 100")
    parser.add_argument(
        "--data", metavar="DIR", help="folder of images instead: val/<class>/, <class>/ or images alone"
    )
    parser.add_argument("--masks", metavar="DIR", help="their masks, <class>/<image's stem>.png; default DIR/masks")
    parser.add_argument("--models", help="dense, slim, or both with a comma; default what there is")
    parser.add_argument(
        "--removal", choices=ROUTES, help="how patches leave; default black for perturbation, drop for curves"
    )
    parser.add_argument(
        "--target",
        choices=("predicted", "label"),
        default="predicted",
        help="class that is explained and scored: the model's own (default) or the image's",
    )
    parser.add_argument("--option", action="append", default=[], metavar="METHOD.NAME=VALUE", help="as prunex explain")
    parser.add_argument("--out", help="folder to write to; default RUN/score, or score")
    parser.add_argument("--again", action="store_true", help="compute anew what is there already")
    parser.add_argument("--batch", type=int, default=25, help="images explained at once; default 25")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", help="safetensors file for a timm model name")
    source.add_argument("--pretrained", action="store_true", help="download timm's weights for a timm model name")
    parser.add_argument("--img-size", type=int, help="side of the images in pixels, for a timm model name")
    add_normalisation(parser)
    add_range(parser)
    args = parser.parse_args(arguments)
    for flag, value in (("--images", args.images), ("--batch", args.batch), ("--img-size", args.img_size)):
        if value is not None and value < 1:
            raise PrunexError(f"{flag} {value} is not allowed: give a whole number of at least 1")
    if args.masks and not args.data:
        raise PrunexError("--masks goes with --data: a run's own data bring their masks")
    if (args.mean or args.std) and not args.data:
        raise PrunexError("--mean and --std go with --data: a run's own data say how they are normalised")
    if args.range is not None and not args.data:
        raise PrunexError("--range goes with --data: a run's own data say what their pixels are")
    return args


@dataclass
class Model:
    """One of the models beside each other, and what it makes of the images.

    Attributes:
        name: "dense" or "slim".
        model: The ViT in eval mode.
        judge: The dense ViT that judges which patches it keeps; None for a dense model, or where there is none.
        predicted: int64 [N], or None without a classifier.
        target: The class that is explained, likewise.
        kept: bool [N, gh, gw], or None where there is no set of kept patches.
        grid: Patch grid.
        digest: A hash of its weights and options.
        judge_digest: That of its judge.
    """

    name: str
    model: nn.Module
    judge: nn.Module | None = None
    predicted: Tensor | None = None
    target: Tensor | None = None
    kept: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    digest: str = ""
    judge_digest: str = ""


def _models(args: Any) -> tuple[list[Model], list[str]]:
    """The models asked for, and what is to be said about them."""
    where = Path(args.run)
    notes: list[str] = []
    if is_there(where / "config.yaml", Path.is_file) and not (where / "config.json").is_file():
        open_model_or_name(args.run, args.weights, args.img_size, args.pretrained)  # refuses options of a timm model
        found, notes = contestants(where, read_run(where))
        dense, slim = found[0], found[1:]
        models = [Model("dense", dense.model)] if dense.known else []
        models += [Model("slim", c.model, dense.model if dense.known else None) for c in slim]
    else:
        vit = find(open_model_or_name(args.run, args.weights, args.img_size, args.pretrained))[1].eval()
        if prunex.attached(vit) is not None:
            whole = without_pruning(vit)
            models = [Model("dense", whole), Model("slim", vit, whole)]
        else:
            models = [Model("slim" if widths_of(vit) != WidthSpec() else "dense", vit)]
    for m in models:
        m.model = find(m.model)[1].requires_grad_(False)
        renormalise(m.model, args.mean, args.std)
    if args.models:
        wanted = [n.strip() for n in args.models.split(",") if n.strip()]
        for name in wanted:
            if name not in [m.name for m in models]:
                raise unknown("model (of those that are here)", name, [m.name for m in models])
        models = [m for m in models if m.name in wanted]
    if not models:
        raise PrunexError(f"--models {args.models!r} names no model: give dense, slim, or both with a comma")
    return models, notes


class Scoring:
    """Everything that one call scores, and what of it is there already.

    Args:
        args: Of the command line.
        out: Where results lie.
        models: Dense first.
        notes: What was said of them.
    """

    def __init__(self, args: Any, out: Path, models: list[Model], notes: list[str]) -> None:
        self.args, self.out, self.models, self.notes = args, out, models, list(notes)
        self.options = own_explainer(Path(args.run), args.methods, read_options(args.option))
        named = [n for n in args.methods.split(",") if n.strip() != RANDOM]  # that row is always there
        self.methods = [*(Explainers(",".join(named), self.options).names if named else []), RANDOM]
        self.all_methods = "all" in [n.strip() for n in named]
        self.named = {n.strip() for n in named}  # these must work, as they are
        self.metrics = measures(args.metrics)
        everything = "all" in [n.strip() for n in args.metrics.split(",")]
        self.left_out = [n for n in MEASURES if n not in {m.name for m in self.metrics}] if everything else []
        self.skipped: dict[tuple[str, str], str] = {}
        self.scenes = Scenes(torch.zeros(0))
        self.records: dict[tuple[str, str], Record] = {}
        self.place = torch.device("cpu")

    def show(self, run: Path | None) -> None:
        """Open the images, have every model look at them, and find what is there already.

        Raises:
            PrunexError: For images, metrics or methods that do not fit the models.
        """
        args = self.args
        try:
            self.place = torch.device(args.device)
            for m in self.models:
                m.model.to(self.place).float()  # images are float32; weights may be of several types
                if m.judge is not None:
                    m.judge.to(self.place).float()
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
            raise PrunexError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
        if args.data:
            masks = Path(args.masks) if args.masks else None
            self.scenes = from_folder(Path(args.data), masks, self.models[-1].model, args.images, args.range)
        elif run is not None:
            self.scenes = from_run(open_data(run), args.images)
        else:
            raise PrunexError(f"{args.run} brings no data: give --data DIR, a folder of images")
        self.notes += self.scenes.notes
        for m in self.models:
            self._look(m)
        if args.target == "label":
            self.notes.append("explained and scored is the class of each image's label")
        self._leave_out()
        self._cheapen()
        for m in self.models:
            for method in self.methods:
                path = self.out / "values" / m.name / f"{method}.npz"
                self.records[m.name, method] = Record(
                    path, self._key(m, method), args.again, len(self.scenes.images), m.grid
                )

    def _look(self, m: Model) -> None:
        """Predictions and kept patches of all images.

        Raises:
            PrunexError: For outputs that are not finite, or labels that the model does not have.
        """
        vit: Any = m.model
        handle, predicted, kept = token_pruning(vit), [], []
        with torch.no_grad():
            m.grid = embed(vit, self._images(slice(0, 1)))[1]
            for part in self._parts():
                logits = vit(self._images(part))
                check_outputs(logits)
                predicted.append(logits.argmax(1).cpu())
                trace = None if handle is None else handle.trace
                if trace is not None and trace.stages and not trace.pooled and not trace.merges():
                    kept.append(trace.kept().cpu())
        if read(vit).classes > 0:
            m.predicted = torch.cat(predicted)
        if kept and m.judge is not None:
            m.kept = torch.cat(kept)
        if handle is not None and not kept:
            self.notes.append(
                f"{m.name}: no patch is kept as itself, so there is nothing that an explainer agrees with"
            )
        m.digest, m.judge_digest = digest(vit), "" if m.judge is None else digest(m.judge)
        labels, classes = self.scenes.labels, read(vit).classes
        if classes > 0 and labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise PrunexError(f"labels from {int(labels.min())} to {int(labels.max())} do not fit {classes} classes")
        m.target = m.predicted
        if self.args.target == "label" and m.predicted is not None:
            if labels is None:
                raise PrunexError("--target label: these images have no labels; leave it out for the predicted class")
            m.target = labels.long()

    def _leave_out(self) -> None:
        """Leave out metrics that nothing can be said of here; one that was named is refused instead."""
        strict = "all" not in [n.strip() for n in self.args.metrics.split(",")]
        classes = {0 if m.predicted is None else read(m.model).classes for m in self.models}
        reasons = {}
        if self.scenes.masks is None:
            reasons["localisation"] = "there are no object masks"
        elif not self.scenes.masks.any():
            reasons["localisation"] = "no mask holds an object: object pixels are those above 0"
        if all(m.kept is None for m in self.models):
            reasons["agreement"] = "there is no pruned model that keeps patches beside a dense one"
        if 0 in classes:
            reasons["faithfulness"] = "this model has no classifier"
        for m in list(self.metrics):
            reason = reasons.get(m.group)
            if m.group == "faithfulness" and m.kind in ("positive", "negative") and 1 in classes:
                reason = "this model has one output"
            if reason is None:
                continue
            if strict:
                raise PrunexError(f"{m.name} cannot be measured: {reason}")
            self.metrics.remove(m)
        if not self.metrics:
            raise PrunexError(f"no metric can be measured: {'; '.join(reasons.values())}")
        if not strict:
            self.notes += [
                f"{group} is left out: {reason}" for group, reason in reasons.items() if group != "agreement"
            ]

    def _cheapen(self) -> None:
        """With all methods asked for, leave out the slow and shorten shap, and say so; who is named is taken as is."""
        if not self.all_methods:
            return
        for name in [n for n in self.methods if n != RANDOM and n not in self.options and n not in self.named]:
            needs = lookup("explainer", name).needs
            if "slow" in needs:
                self.methods.remove(name)
                tqdm.write(f"skipped {name}: it is slow ({needs}); name it with --methods to score it")
        if "shap" in self.methods and "shap" not in self.options and "shap" not in self.named:
            patches = self.models[0].grid[0] * self.models[0].grid[1]
            budget = 2 + PAIRS * 2 * max(1, patches - 1)
            self.options["shap"] = {"budget": budget}
            self.notes.append(f"shap took {budget:,} forwards an image, below its default: set --option shap.budget=N")

    def _parts(self) -> list[slice]:
        """The first image alone, which shows what a method takes; then batches."""
        return [slice(part.start, part.stop) for part in batches(len(self.scenes.images), self.args.batch)]

    def _images(self, part: slice | Tensor) -> Tensor:
        return self.scenes.images[part].to(self.place)

    def _key(self, m: Model, method: str) -> str:
        told: list[Any] = [LAYOUT, m.digest, self.scenes.digest(), method, sorted(self.options.get(method, {}).items())]
        if self.args.target != "predicted":
            told.append(self.args.target)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def _keys(self, m: Model) -> dict[str, str]:
        return {x.name: self._metric_key(m, x) for x in self.metrics}

    def _metric_key(self, m: Model, measure: Measure) -> str:
        """What a metric's values depend on beyond the maps."""
        if measure.group == "agreement":
            return m.judge_digest
        return str(self.args.removal) if measure.group == "faithfulness" else ""

    def _missing(self, m: Model, method: str) -> list[Measure]:
        """Metrics to be computed; none of those that do not apply to this model or row."""
        record = self.records[m.name, method]
        return [
            x
            for x in self.metrics
            if not record.knows(x.name, self._metric_key(m, x))
            and not (x.group == "agreement" and m.kept is None)
            and not (x.group == "robustness" and method == RANDOM)
        ]

    def _explains(self, m: Model, method: str, missing: Sequence[Measure]) -> bool:
        """Whether maps must be made: there are none, or only coarse ones of a method that is finer."""
        record = self.records[m.name, method]
        return not record.there or (record.fine and any(x.group == "localisation" for x in missing))

    def _rounds(self, m: Model, method: str) -> int:
        missing = self._missing(m, method)
        kinds = {x.kind for x in missing if x.group != "localisation" or not self._explains(m, method, missing)}
        return len(kinds) + self._explains(m, method, missing)

    def steps(self) -> int:
        """Images to go: an image counts once for each thing done with it."""
        return sum(self._rounds(m, method) for m in self.models for method in self.methods) * len(self.scenes.images)

    def work(self, bar: Any) -> None:
        """Compute what is missing; every method's results are written as soon as they are there."""
        for m in self.models:
            for method in self.methods:
                rounds = self._rounds(m, method)
                try:
                    self._one(m, method, bar)
                except _Refused as error:
                    if str(error) not in [self.skipped.get((other.name, method)) for other in self.models]:
                        bar.write(f"skipped {method}: {error}")
                    self.skipped[m.name, method] = str(error)
                    bar.total = max(0, bar.total - rounds * len(self.scenes.images))
        tried = [(m.name, method) for m in self.models for method in self.methods if method != RANDOM]
        if tried and all(one in self.skipped for one in tried):
            raise PrunexError(f"no explainer can take this model; the last one said: {[*self.skipped.values()][-1]}")

    def _one(self, m: Model, method: str, bar: Any) -> None:
        record, missing = self.records[m.name, method], self._missing(m, method)
        if self._explains(m, method, missing):
            bar.set_postfix_str(f"{m.name}, {method}")
            places = [x for x in missing if x.group == "localisation"]
            self._explain(m, method, places, bar)
            record.add({}, {x.name: self._metric_key(m, x) for x in places})
            missing = [x for x in missing if x not in places]
        for kind in dict.fromkeys(x.kind for x in missing):
            bar.set_postfix_str(f"{m.name}, {method}, {kind}")
            names = [x.name for x in missing if x.kind == kind]
            found = self._measure(m, method, names, bar)
            record.add(found, {x.name: self._metric_key(m, x) for x in missing if x.name in found})

    def _explain(self, m: Model, method: str, places: Sequence[Measure], bar: Any) -> None:
        """Maps of all images, and where they lie (on the finest map, which is not kept)."""
        record, names = self.records[m.name, method], [x.name for x in places]
        maps, found, fine = [], {}, False  # type: ignore[var-annotated]
        for part, some, pixels in self._explained(m.model, method, m.target, m.grid, bar, record):
            maps.append(some)
            fine = fine or pixels is not None
            if names:
                masks = self.scenes.masks[part].to(some.device)  # type: ignore[index]
                told = scores(names, m.model, self._images(part), some, masks=masks, pixels=pixels)
                for name, values in told.items():
                    found.setdefault(name, []).append(values)
        record.maps(torch.cat(maps), m.target, fine, {k: torch.cat(v) for k, v in found.items()})

    def _explained(
        self,
        model: nn.Module,
        method: str,
        target: Tensor | None,
        grid: tuple[int, int],
        bar: Any,
        record: Record | None = None,
        which: Tensor | None = None,
    ) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Place, maps and finer maps batch by batch; who refuses the model is left out unless it was named.

        Args:
            model: The ViT.
            method: Or "random".
            target: Class of every image.
            grid: Patch grid.
            bar: Counts images, unless some are chosen.
            record: Takes the cost.
            which: Some images instead of all.
        """
        if method == RANDOM:
            noise = random_maps(self.scenes.images, grid)
            for part in self._parts():
                yield part, noise[part], None
                bar.update(part.stop - part.start)
            return
        explainers = Explainers([method], {method: self.options[method]} if method in self.options else None)
        parts: list[Any] = self._parts() if which is None else [p for p in which.split(self.args.batch) if len(p)]
        for part in parts:
            asked = None if target is None else target[part].to(self.place)
            try:
                e = explainers(model, self._images(part), asked)[method]
            except PrunexError as error:
                lenient = self.all_methods and method not in self.named
                if explainers.images == 0 and lenient and method not in read_options(self.args.option):
                    raise _Refused(str(error).removeprefix(f"{method}: ")) from error
                raise
            if record is not None:
                record.cost = [explainers.seconds(method), explainers.forwards(method)]
            yield part, e.maps, None if e.fine is None else e.fine.float().cpu()
            if which is None:
                if part.start == 0 and explainers.forwards(method) > MANY:
                    bar.write(explainers.announcements(len(self.scenes.images) - 1)[0])
                bar.update(part.stop - part.start)

    def _measure(self, m: Model, method: str, names: list[str], bar: Any) -> dict[str, Tensor]:
        """Values of all images of metrics that share what they compute."""
        record, kind = self.records[m.name, method], measures(names)[0].group
        maps, judge = record.tensor("maps"), None
        if kind == "agreement":
            judge = self._judged(m, method, bar)
            if judge is None:
                bar.update(len(self.scenes.images))
                return {}
        found: dict[str, list[Tensor]] = {}
        start = perf_counter()

        def some(values: Tensor | None, part: slice) -> Tensor | None:
            return None if values is None else values[part].to(self.place)

        for begin in range(0, len(maps), self.args.batch):
            part = slice(begin, min(begin + self.args.batch, len(maps)))
            told = scores(
                names,
                m.model,
                self._images(part),
                maps[part].to(self.place),
                some(m.target, part),
                labels=some(self.scenes.labels, part),
                masks=some(self.scenes.masks, part),
                kept=some(m.kept, part),
                judge=some(judge, part),
                explainer=method,
                options=self.options.get(method),
                removal=self.args.removal,
                mean=self.scenes.mean,
                std=self.scenes.std,
            )
            for name, values in told.items():
                found.setdefault(name, []).append(values)
            bar.update(part.stop - part.start)
        record.seconds |= dict.fromkeys(names, perf_counter() - start)
        return {name: torch.cat(values) for name, values in found.items()}

    def _judged(self, m: Model, method: str, bar: Any) -> Tensor | None:
        """The dense model's maps for the classes that this model predicts; None where the method refuses it."""
        if m.judge is None:
            return None
        if method == RANDOM:
            return random_maps(self.scenes.images, m.grid)
        known = self.records.get(("dense", method)) if self.models[0].name == "dense" else None
        if known is None or not known.there:
            if ("dense", method) in self.skipped:
                return None
            which, maps = torch.arange(len(self.scenes.images)), torch.zeros(0)
        else:
            maps = known.tensor("maps").clone()
            same = m.target is None or known.tensor("target") == m.target
            which = torch.zeros(0, dtype=torch.int64) if same is True else (~same).nonzero()[:, 0]
        for part, some, _ in self._explained(m.judge, method, m.target, m.grid, bar, which=which):
            if not len(maps):
                maps = torch.zeros(len(self.scenes.images), *some.shape[1:])
            maps[part] = some
        return maps

    def table(self) -> list[Score]:
        """A cell a model, method and metric, with the chance level of what has one."""
        found = []
        names = {x.name: x for x in self.metrics}
        for method in [*self.methods, "chance"]:
            for m in self.models:
                if (m.name, method) in self.skipped:
                    continue
                record = self.records.get((m.name, method))
                values = self._chance(m) if record is None else record.values(self._keys(m))
                cost = [float("nan")] * 2 if record is None or method == RANDOM else record.cost
                for name in (n for n in names if n in values):
                    i = interval(name, values[name])
                    measure = names[name]
                    about = (m.name, method, name, measure.group, measure.higher)
                    told = (i.mean, i.low, i.high, i.images)
                    how = (removed_by(measure, self.args.removal), self._judge_of(method, measure))
                    found.append(Score(*about, *told, cost[0], cost[1], *how))
        order = list(names)
        return sorted(found, key=lambda s: order.index(s.metric))

    def _judge_of(self, method: str, measure: Measure) -> str:
        """Whose map kept patches are held against."""
        if measure.group != "agreement" or method == "chance":
            return ""
        return RANDOM if method == RANDOM else f"dense/{method}"

    def _chance(self, m: Model) -> dict[str, Tensor]:
        judge = None if m.kept is None else random_maps(self.scenes.images, m.grid)
        # How many signs agree by chance depends on the judge's own, and random maps have one sign.
        return by_chance([x.name for x in self.metrics if x.name != "sign_agreement"], self.scenes.masks, m.kept, judge)

    def accuracy(self) -> dict[str, float]:
        """Of each model on these images, where their labels are known."""
        labels = self.scenes.labels
        return {
            m.name: float((m.predicted == labels).double().mean())
            for m in self.models
            if m.predicted is not None and labels is not None
        }

    def about(self) -> dict[str, Any]:
        """The conditions, in plain values."""
        return {
            "images": len(self.scenes.images),
            "machine": chip(self.place.type),
            "threads": torch.get_num_threads() if self.place.type == "cpu" else None,
            "removal": self.args.removal,
            "target": self.args.target,
            "accuracy": self.accuracy(),
            "seconds": {
                f"{name}/{method}": {"explain": r.cost[0] * len(self.scenes.images), **r.seconds}
                for (name, method), r in self.records.items()
                if r.there
            },
            "skipped": {f"{name}/{method}": reason for (name, method), reason in self.skipped.items()},
            "notes": self.notes,
        }


class _Refused(Exception):
    """A method of "all" that cannot take this model."""
