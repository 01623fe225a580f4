"""prunex bench: accuracy, cost and measured speed of a run's model, dense beside slim."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor, nn
from tqdm import tqdm

import prunex
from prunex.batches import parts
from prunex.columns import line, macs_column
from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.metrics.scoring import without_pruning
from prunex.recipes.commands.score_data import spread
from prunex.recipes.given import on_hub
from prunex.recipes.modules.backbone import load_weights
from prunex.recipes.modules.training import without_files
from prunex.recipes.report.reading import conditions
from prunex.recipes.runs import (
    config_of,
    evaluate,
    forward,
    home,
    instantiate,
    noise,
    open_data,
    open_model,
    slim_folder,
    token_pruning,
)
from prunex.recipes.tables import SCORES, score_of, score_text, share
from prunex.recipes.timing import chip, side_by_side, speeds
from prunex.slim.files import WEIGHTS
from prunex.vit.anatomy import find, head_classes
from prunex.vit.mount import UNITS
from prunex.vit.units import Backbone
from prunex.vit.widths import WidthSpec, widths_of

BENCH = "bench.json"
LEAST = 5  # rounds of a batch size, however long they take
RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}


@dataclass
class Contestant:
    """One of the models beside each other, in eval mode."""

    name: str
    model: nn.Module
    evaluable: bool
    size: int
    graph: Path | None = None


def bench(args: Any) -> int:
    """Do what ``prunex bench`` was asked for, and give back the exit code."""
    where = home(args.run)
    run = where if on_hub(args.run) is None else args.run
    measured = measure(
        run, args.batches, args.threads, args.seconds, args.device, not args.no_accuracy, args.limit, tell=True
    )
    print(table(measured))
    # NaN is no JSON, and other readers than Python's refuse it.
    print(write_whole(where / BENCH, (json.dumps(measured, indent=2, allow_nan=False) + "\n").encode()))
    return 0


def measure(
    run: str | Path,
    batches: Sequence[int] = (1, 8, 32),
    threads: int | None = None,
    seconds: float = 5.0,
    device: str = "cpu",
    accuracy: bool = True,
    limit: int | None = None,
    tell: bool = False,
) -> dict[str, Any]:
    """Evaluate and time a run's model beside its dense one; arguments are those of ``prunex bench``.

    Where tokens are pruned, the dense model is the run's own with the pruner taken off: the same weights. Where units
    were taken out, the dense weights are gone; the dense model then has the weights that the config starts from, or
    (where it names none) those of chance, and its accuracy is left unknown. A run that pruned nothing has one row.

    Returns:
        ``machine``, the conditions, ``rows`` (model, gmacs, params_m, file_mb, and accuracy or map in 0..1, or mae, as
        labels have it), ``speed`` (runtime, batch, and for each model the quartiles of images a second and of the ratio
        to the first model's) and ``notes``.
    """
    config = config_of(run)
    try:
        # Only using a device shows whether it is here.
        place = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PrunexError(f"--device {device} cannot be used ({reason}): give cpu or cuda") from error
    # The process may be somebody's notebook.
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        models, notes = contestants(run, config)
        rows: list[dict[str, Any]] = []
        for contestant in models:
            contestant.model.to(place).requires_grad_(False)
            cost, size = prunex.cost(contestant.model), contestant.size / 1e6
            about = {"model": contestant.name, "gmacs": cost.gmacs, "params_m": cost.params / 1e6, "file_mb": size}
            rows.append(about)
        data = data_of(run, accuracy, notes) if config else None
        if not config:
            notes.append("prunex fit did not write this run, so its data are not known: timed on random images")
        if accuracy and data is not None:
            _evaluate(models, rows, data, limit, tell, notes)
        images = images_of(models[0].model, data, max(batches), notes)
        speed = _time(models, images, batches, seconds, device, tell, notes)
        return {
            "machine": chip(device),
            "device": device,
            "threads": torch.get_num_threads() if place.type == "cpu" else None,
            "dtype": str(images.dtype).removeprefix("torch."),
            "versions": {"prunex": prunex.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
            "rows": rows,
            "speed": speed,
            "notes": notes,
        }
    finally:
        torch.set_num_threads(before)


def contestants(run: str | Path, config: dict[str, Any]) -> tuple[list[Contestant], list[str]]:
    """The dense model first, then the slim one; and what is to be said about them."""
    notes: list[str] = []
    slim = find(open_model(run), kinds=Backbone)[1].eval()
    pruning, gates = token_pruning(slim), prunex.attached(slim, units=True)
    narrow = widths_of(slim) != WidthSpec()
    rest = (True, *_stored(run, slim, notes))
    if pruning is None and gates is None and not narrow:
        notes.append("this run pruned nothing, so there is no slim model beside the dense one")
        return [Contestant("dense, trained", slim, *rest)], notes
    methods = [handle.method for handle in (pruning, gates) if handle is not None]
    if narrow and gates is None:
        methods.append(_unit_method(config))
    if gates is not None and not gates.removed:
        notes.append(f"units closed by {gates.method} are still in the model: its MACs count them as taken out")
    pruned = Contestant(f"slim: {' + '.join(methods)}", slim, *rest)
    if narrow and not config:
        notes.append("the dense model is not known: its weights are gone with the units that were taken out")
        return [pruned], notes
    # Removed tokens leave the weights as they were, removed units do not.
    dense, evaluable = _dense_shape(config, notes) if narrow else (without_pruning(slim), True)
    name = "dense (start)" if narrow else f"dense ({methods[0]} taken off)"
    return [Contestant(name, dense, evaluable, _bytes(dense)), pruned], notes


def _stored(run: str | Path, slim: nn.Module, notes: list[str]) -> tuple[int, Path | None]:
    """Size of a slim model's weights as a file, and the graph that was exported of them."""
    if on_hub(str(run)) is not None:
        return _bytes(slim), None
    folder = slim_folder(Path(run)) or Path(run, "slim")
    file, graph = folder / WEIGHTS, folder / "model.onnx"
    if not file.is_file():
        notes.append("there is no slim/ in the run folder: its newest checkpoint was taken")
        return _bytes(slim), None
    # A graph that is older than the weights is of another training.
    fresh = graph.is_file() and graph.stat().st_mtime >= file.stat().st_mtime
    return file.stat().st_size, graph if fresh else None


def _unit_method(config: dict[str, Any]) -> str:
    """Which method took units out, as far as the config tells: the model itself knows what is left, not why."""
    options = ((config.get("model") or {}).get("init_args") or {}).get("unit_pruning")
    callbacks = (config.get("trainer") or {}).get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else []:
        if isinstance(callback, dict) and str(callback.get("class_path")).endswith("MaskPruning"):
            options = {"method": "xpruner", **(callback.get("init_args") or {})}
    return str(options["method"]) if isinstance(options, dict) and "method" in options else "narrow"


def _dense_shape(config: dict[str, Any], notes: list[str]) -> tuple[nn.Module, bool]:
    """The backbone as the config builds it, with the weights the run started from; and whether these are all there."""
    spec = copy.deepcopy(config["model"])
    options = spec.get("init_args") or {}
    start = options.get("weights")
    spec["init_args"] = without_files(options)
    dense = without_pruning(instantiate(LightningModule, spec))
    # The dense weights are gone with the units that were taken out: those that the run started from stand in.
    lacks = ""
    if not isinstance(start, str):
        lacks = "the config names no file of the weights that the run started from"
    else:
        try:
            if load_weights(dense, start):
                lacks = f"the weights {start!r} have no classifier for these classes"
        except PrunexError as error:
            lacks = f"the weights that the run started from cannot be read ({error})"
    if lacks:
        notes.append(f"{lacks}: dense accuracy is unknown")
    else:
        notes.append(f"the dense model has the weights {start!r} that the run started from, not fine-tuned ones")
    return dense, not lacks


def _bytes(model: nn.Module) -> int:
    """Size of the weights as a safetensors file; what a unit pruner's gates hold is no part of it."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith(f"{UNITS}.")}
    return len(tensors_as_bytes(state))


def data_of(run: str | Path, needed: bool, notes: list[str]) -> Any:
    """The run's data; None where they are not there any more and only images to time are wanted."""
    try:
        return open_data(run)
    except PrunexError as error:
        if needed:
            raise PrunexError(f"{error} (--no-accuracy times the models without data)") from error
        notes.append(f"timed on random images, since the run's data cannot be opened: {error}")
        return None


def _evaluate(
    models: Sequence[Contestant],
    rows: list[dict[str, Any]],
    data: Any,
    limit: int | None,
    tell: bool,
    notes: list[str],
) -> None:
    """Put accuracies into the rows of models whose weights are known."""
    if not head_classes(models[0].model):
        notes.append("the ViT has no classifier, so it is timed alone: prunex validate scores what is built on it")
        return
    for contestant, row in zip(models, rows, strict=True):
        # Weights of chance would have the accuracy of chance.
        if not contestant.evaluable:
            continue
        loader = data.val_dataloader()
        if limit is not None:
            loader, which = spread(loader, limit)
            if f"accuracy on some {which}" not in notes:
                notes.append(f"accuracy on some {which}")
        total = len(loader) if hasattr(loader, "__len__") else None
        batches = tqdm(_first(loader, limit), f"accuracy, {contestant.name}", total, unit="batch", disable=not tell)
        row |= evaluate(contestant.model, batches)


def _first(batches: Any, limit: int | None) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        named = parts(batch)
        if limit is None or "images" not in named or named.unclear:  # whoever evaluates says what is wrong
            yield batch
            continue
        yield {name: values[: limit - seen] for name, values in named.items()}
        seen += len(named["images"])
        if seen >= limit:
            return


def images_of(model: nn.Module, data: Any, count: int, notes: list[str]) -> Tensor:
    """Validation images to time with, repeated where there are fewer: how many tokens stay may depend on them."""
    if data is None:
        return noise(model, count)
    images: list[Tensor] = []
    for batch in data.val_dataloader():
        images += list(parts(batch).get("images", ()))
        if len(images) >= count:
            break
    if not images:
        notes.append("timed on random images, since the validation data hold none")
        return noise(model, count)
    return torch.stack(list(islice(cycle(images), count))).to(next(model.parameters()))


def _time(
    models: Sequence[Contestant],
    images: Tensor,
    batches: Sequence[int],
    seconds: float,
    device: str,
    tell: bool,
    notes: list[str],
) -> list[dict[str, Any]]:
    speed = []
    kinds = ["torch", *_runtimes(device, notes)]
    with tqdm(total=len(kinds) * len(batches), unit="batch size", disable=not tell) as bar:
        for kind in kinds:
            bar.set_description(RUNTIMES[kind])
            try:
                with _calls(kind, models, torch.get_num_threads(), tell) as calls:
                    for batch in batches:
                        bar.set_postfix_str(f"batch {batch}")
                        timed = [(c.name, partial(call, images[:batch])) for c, call in zip(models, calls, strict=True)]
                        timings = side_by_side(timed, device, 0, seconds, least=LEAST)
                        rates = [{"model": timing.name, **speeds(timing, batch)} for timing in timings]
                        rounds = len(timings[0].own)
                        speed.append({"runtime": kind, "batch": batch, "rounds": rounds, "models": rates})
                        bar.update()
            except PrunexError as error:
                # PyTorch's failure is the model's; another runtime's costs its own rows alone.
                if kind == "torch":
                    raise
                notes.append(f"{RUNTIMES[kind]} is left out: {error}")
    return speed


def _runtimes(device: str, notes: list[str]) -> list[str]:
    """Runtimes beside torch that can be used here."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        notes.append(f"ONNX Runtime is left out: {', '.join(missing)} not installed (pip install 'prunex-vit[onnx]')")
        return []
    if device != "cpu":
        notes.append("ONNX Runtime is left out: it is timed on the processor alone")
        return []
    return ["onnxruntime"]


@contextmanager
def _calls(
    kind: str, models: Sequence[Contestant], threads: int, tell: bool
) -> Iterator[list[Callable[[Tensor], Any]]]:
    if kind == "torch":
        yield [partial(forward, c.model) for c in models]
        return
    # Graphs that are made to be timed are no result of the run.
    with tempfile.TemporaryDirectory() as folder:
        graphs = []
        for number, contestant in enumerate(models):
            if contestant.graph is None and tell:
                tqdm.write(f"making the graph of {contestant.name} ...", file=sys.stderr)
            graphs.append(contestant.graph or prunex.export(contestant.model, Path(folder) / f"{number}.onnx"))
        yield [session(graph, threads) for graph in graphs]


def session(graph: Path, threads: int) -> Callable[[Tensor], Any]:
    """What runs an exported graph on images, on the processor; PrunexError for a graph that cannot be run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # As many as torch has.
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait by spinning would take the processor from the model whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each thing that may be wrong
        raise PrunexError(
            f"{graph} cannot be run ({str(error).splitlines()[0]}): write it anew by prunex export"
        ) from error
    return lambda images: session.run(["logits"], {"images": images.float().numpy()})


def table(measured: dict[str, Any]) -> str:
    """What :func:`measure` returned, as text."""
    rows = measured["rows"]
    first, width = rows[0]["model"], max(len(row["model"]) for row in rows)
    covered = any("kept_digit_cover" in row for row in rows)
    (unit, costs), score = macs_column([row["gmacs"] for row in rows]), score_of(rows)
    widths = [-width, 10, 10, 12, 11, *[13] * covered]
    heading = ["", SCORES[score][0], unit, "params (M)", "file (MB)", *["object kept"] * covered]
    lines = [line(heading, widths)]
    for row, macs in zip(rows, costs, strict=True):
        sizes = [macs, f"{row['params_m']:.3f}", f"{row['file_mb']:.2f}"]
        cells = [row["model"], score_text(score, row.get(score)) or "unknown", *sizes]
        lines.append(line([*cells, *[share(row.get("kept_digit_cover"))] * covered], widths))
    lines += ["", "how many times the first model's speed, round by round, and images/s: medians (quartiles)"]
    for speed in measured["speed"]:
        lines.append(f"{RUNTIMES[speed['runtime']]}, batch {speed['batch']}, {speed['rounds']} rounds")
        for m in speed["models"]:
            ratio = f"x {m['ratio']:.2f} ({m['ratio_low']:.2f} to {m['ratio_high']:.2f})"
            spread = f"({m['low']:,.1f} to {m['high']:,.1f})"
            cells = [m["model"], "" if m["model"] == first else ratio, f"{m['images_per_s']:,.1f}", spread]
            lines.append("  " + line(cells, [-width, -24, 10, 0]))
    notes = [f"note: {note}" for note in measured["notes"]]
    return "\n".join([*lines, "", *notes, f"({conditions(measured)})"])
