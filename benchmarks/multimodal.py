"""Are explanations of models of text and image worth more than chance, and more than attention as it is?

    python benchmarks/multimodal.py --out DIR            trains configs/synthetic, three seeds each, and measures
    python benchmarks/multimodal.py --tasks lxmert       one of the two

Box questions (LXMERT): the answer is decided by one word and one box. Positive and negative perturbation of both
modalities: each question less its own random order, mean and standard error. Drawn shapes (DETR): masks
that Otsu's threshold makes of each map, beside the shapes': mean IoU and AP (0.20 to 0.95) by both rules, and
of maps drawn at random for the same detections. Models that DIR holds already are not trained again. Written:
lxmert.csv, detr.csv.
"""

from __future__ import annotations

import argparse
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
import yaml
from measure import append, read_rows, start
from tqdm import tqdm

import prunex.multimodal
from prunex.errors import NothingDetected
from prunex.multimodal.coco import Objects
from prunex.multimodal.mask_scores import Detections, MaskScorer
from prunex.recipes import BoxQuestions, DrawnShapes, TransformersModel

METHODS = ("generic_attention", "raw_attention", "rollout", "grad_cam")
AREAS = ("image_positive", "image_negative", "text_positive", "text_negative")
LXMERT = ("seed", "method", "accuracy", *(f"{a}{e}" for a in AREAS for e in ("", "_error")))
DETR = ("seed", "method", "mask_rule", "detections", "constant", "iou", "ap")
DATA: dict[str, Any] = {"lxmert": BoxQuestions, "detr": DrawnShapes}


def ready(task: str) -> dict[str, Any]:
    """The ready-made config of a task."""
    text = (files("prunex.configs") / "synthetic" / f"{task}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def trained(task: str, seed: int, out: Path) -> Any:
    """The model of a seed, trained where it is not there."""
    folder, config = out / f"{task}-seed{seed}", ready(task)
    options = config["model"]["init_args"]
    if not (folder / "config.json").is_file():
        lightning.seed_everything(seed, verbose=False)
        module = TransformersModel(**options)
        data = DATA[task](**config["data"]["init_args"], seed=seed)
        trainer = lightning.Trainer(
            max_epochs=config["trainer"]["max_epochs"],
            gradient_clip_val=config["trainer"]["gradient_clip_val"],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            accelerator="cpu",
            default_root_dir=out,
        )
        trainer.fit(module, data)
        module.save(folder)
    return getattr(transformers, options["model"]).from_pretrained(folder, local_files_only=True).eval()


def of_questions(seed: int, out: Path, count: int) -> list[dict[str, Any]]:
    """Rows of LXMERT: every method on the same questions."""
    model = trained("lxmert", seed, out)
    batch = BoxQuestions(val_size=2000, seed=seed).dataset("test").__getitems__(list(range(2000)))
    inputs = {k: v for k, v in batch.items() if k not in ("word", "box", "labels")}
    with torch.no_grad():
        right = (model(**inputs).question_answering_score.argmax(1) == batch["labels"]).float().mean()
    some = {name: value[:count] for name, value in inputs.items()}
    rows = []
    for method in METHODS:
        e = prunex.multimodal.explain(model, some, method=method)
        asked = prunex.multimodal.questions(model, some, e, batch["labels"][:count])
        remover = prunex.multimodal.ModelRemover(model)
        measured = prunex.multimodal.vqa_perturbation(remover, tqdm(asked, total=count, desc=method), draws=4)
        row: dict[str, Any] = {"seed": seed, "method": method, "accuracy": round(float(right), 4)}
        for area in AREAS:
            modality, order = area.split("_")
            margin = getattr(measured, modality).margin(order)
            row |= {area: round(margin.mean, 2), f"{area}_error": round(margin.error, 2)}
        rows.append(row)
    return rows


def of_shapes(seed: int, out: Path, count: int) -> list[dict[str, Any]]:
    """Rows of DETR: every method, and maps drawn at random, by both mask rules."""
    model = trained("detr", seed, out)
    batch = DrawnShapes(val_size=count, seed=seed).dataset("test").__getitems__(list(range(count)))
    generator = torch.Generator().manual_seed(seed)
    names = (*METHODS, "random")
    scorers = {(name, rule): MaskScorer() for name in names for rule in ("half", "reference")}
    for image, labels in tqdm(zip(batch["pixel_values"], batch["labels"], strict=True), total=count, desc="shapes"):
        objects = Objects(labels["masks"], labels["class_labels"])
        for name in names:
            method = "generic_attention" if name == "random" else name
            try:
                e = prunex.multimodal.explain(model, {"pixel_values": image[None]}, method=method)
                found = list(e.queries or [])
            except NothingDetected:
                found = []
            maps = torch.stack([q.map for q in found]) if found else torch.zeros(0, 1, 1)
            if name == "random":
                maps = torch.rand(maps.shape, generator=generator)
            scores = torch.tensor([q.probability for q in found])
            classes = torch.tensor([q.target for q in found], dtype=torch.long)
            for rule in ("half", "reference"):
                size = (image.shape[1], image.shape[2])
                seen = Detections.of_maps(maps, scores, classes, size, mask_rule=rule)  # type: ignore[arg-type]
                scorers[name, rule].update(seen, objects)
    rows = []
    for (name, rule), scorer in scorers.items():
        s = scorer.compute()
        row = {"seed": seed, "method": name, "mask_rule": rule, "detections": s.detections, "constant": s.constant}
        rows.append(row | {"iou": round(s.iou.all, 4), "ap": round(s.ap.all, 4)})
    return rows


def told(rows: list[dict[str, Any]], by: tuple[str, ...], columns: tuple[str, ...]) -> None:
    """Means over seeds, with the least and the most."""
    print(f"| {' | '.join((*by, 'seeds', *columns))} |\n|{'---|' * (len(by) + 1 + len(columns))}")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    for key, group in groups.items():
        cells = []
        for column in columns:
            values = [float(row[column]) for row in group]
            cells.append(f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
        print(f"| {' | '.join(map(str, (*key, len(group), *cells)))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/multimodal"))
    parser.add_argument("--tasks", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.device, args.clock = "cpu", "wall"
    start(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for task, fields in (("lxmert", LXMERT), ("detr", DETR)):
        if task not in args.tasks:
            continue
        table = args.out / f"{task}.csv"
        done = {int(row["seed"]) for row in read_rows(table)}
        for seed in args.seeds:
            if seed not in done:
                measure = of_questions if task == "lxmert" else of_shapes
                for row in measure(seed, args.out, args.questions if task == "lxmert" else args.images):
                    append(table, fields, row)
        rows = read_rows(table)
        if task == "lxmert":
            told(rows, ("method",), ("accuracy", *AREAS))
        else:
            told(rows, ("method", "mask_rule"), ("iou", "ap", "detections", "constant"))


if __name__ == "__main__":
    main()
