"""``prunex score --protocol vqa``: answers while boxes and words leave by their relevance, beside a random order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import prunex.multimodal
from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.multimodal.removal import ModelRemover, questions
from prunex.multimodal.vqa import MODALITIES, Question, VQAPerturbation, vqa_perturbation
from prunex.pictures import curves, save_png
from prunex.pictures.sheet import stacked
from prunex.recipes.commands.multimodal_explainers import Explainers
from prunex.recipes.commands.multimodal_model import opened_model
from prunex.recipes.commands.multimodal_results import prepare, write_results
from prunex.recipes.commands.options import RANDOM
from prunex.recipes.commands.score_data import spaced
from prunex.recipes.commands.sheets import writing
from prunex.recipes.runs import to_device
from prunex.recipes.tables import as_csv
from prunex.untrusted import read_npz

ANSWERS = "answers"  # in the npz files of questions, beside the model's inputs
_ORDERS = {"positive": "most relevant first: low is good", "negative": "least relevant first: high is good"}


def score_vqa(args: Any) -> int:
    """Do what ``prunex score --protocol vqa`` was asked for (arXiv 2103.15679), and give back the exit code."""
    explainers = Explainers(args)
    model = opened_model(args.folder)
    to_device(args.device, [model])
    parts = _questions(Path(args.data), args.images)
    out, measured = prepare(args), {}
    for name in explainers.names:
        bar = tqdm(total=sum(len(part[ANSWERS]) for part in parts), desc=name, unit="question")
        with bar:
            asked = _explained(model, parts, explainers, name, args.batch, bar)
            measured[name] = vqa_perturbation(ModelRemover(model), asked)
    _draw(measured, out)
    first = next(iter(measured.values()))
    conditions = {"questions": first.questions, "count_rule": first.count_rule, "answer": "predicted"}
    write_results(args, _rows(measured), conditions)
    return 0


def _questions(root: Path, most: int) -> list[dict[str, Tensor]]:
    """The inputs and answers in a folder's npz files, at most so many questions, evenly spaced over all."""
    files = sorted(root.glob("*.npz"))
    if not files:
        raise PrunexError(f"--data {root} holds no .npz files: give the model's inputs by name, and {ANSWERS}")
    parts = [_tensors(file) for file in files]
    whole = sum(len(part[ANSWERS]) for part in parts)
    chosen, start = spaced(whole, most), 0
    kept = []
    for part in parts:
        end = start + len(part[ANSWERS])
        # Questions are numbered through all files, and taken from the one that each lies in.
        places = [place - start for place in chosen if start <= place < end]
        if places:
            kept.append({name: value[places] for name, value in part.items()})
        start = end
    return kept


def _tensors(file: Path) -> dict[str, Tensor]:
    """The arrays of one file as tensors, all of as many questions."""
    arrays: dict[str, NDArray[Any]] = read_npz(file)
    if ANSWERS not in arrays:
        raise PrunexError(
            f"{file} holds {', '.join(arrays) or 'nothing'} and no {ANSWERS}: give them too, [N] or [N, A]"
        )
    count = len(np.atleast_1d(arrays[ANSWERS]))
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.ndim == 0 or len(array) != count:
            raise PrunexError(
                f"{file}: {name} is {array.dtype} {list(array.shape)}: give numbers, one entry for each of the {count} "
                f"{ANSWERS}"
            )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # NumPy's usual numbers are float64, and the model's weights float32.
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _explained(
    model: Any, parts: Sequence[dict[str, Tensor]], explainers: Explainers, name: str, batch: int, bar: Any
) -> Iterator[Question]:
    """Every question with its relevance, explained as they are asked for."""
    device = next(model.parameters()).device
    for part in parts:
        for start in range(0, len(part[ANSWERS]), batch):
            some = {key: value[start : start + batch].to(device) for key, value in part.items()}
            answers = some.pop(ANSWERS)
            e = prunex.multimodal.explain(model, some, None, name, **explainers.options[name])
            for question in questions(model, some, e, answers):
                yield question
                bar.update()


def _rows(measured: Mapping[str, VQAPerturbation]) -> list[list[str]]:
    """A row a method, modality and order: the area, its standard error, and by how much it beats the random order."""
    rows = [["method", "modality", "order", "area", "± s.e.", "better than random", "± s.e."]]
    for name, result in measured.items():
        for modality in MODALITIES:
            tested: Any = getattr(result, modality)
            for order in (*_ORDERS, RANDOM):
                curve = getattr(tested, order)
                margin = ["", ""] if order == RANDOM else [f"{value:.4g}" for value in tested.margin(order)]
                rows.append([name, modality, order, f"{curve.area:.4g}", f"{curve.area_error:.2g}", *margin])
    return rows


def _draw(measured: Mapping[str, VQAPerturbation], out: Path) -> None:
    """The four tests as charts, and every point as a row."""
    charts, rows = [], [["method", "modality", "order", "fraction", "score", "standard_error"]]
    for modality in MODALITIES:
        tests: dict[str, Any] = {name: getattr(result, modality) for name, result in measured.items()}
        # The same draws for every method.
        chance = next(iter(tests.values())).random
        for order, says in _ORDERS.items():
            drawn = {name: getattr(test, order) for name, test in tests.items()} | {RANDOM: chance}
            lines = {n: (100 * np.array(curve.fractions), curve.mean.numpy()) for n, curve in drawn.items()}
            charts.append(curves(lines, f"{modality}, {says}", xlabel="% taken away"))
            for name, curve in drawn.items():
                points = zip(curve.fractions, curve.mean.tolist(), curve.error.tolist(), strict=True)
                rows += [[name, modality, order, f"{p:g}", f"{m:.6g}", f"{error:.4g}"] for p, m, error in points]
    with writing(out):
        save_png(out / "curves.png", stacked([np.concatenate(charts[k : k + 2], 1) for k in (0, 2)]))
        write_whole(out / "curves.csv", as_csv(rows))
