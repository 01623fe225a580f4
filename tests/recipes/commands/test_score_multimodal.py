"""prunex score --protocol: what it writes is what the protocols say of the same questions and images."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import prunex.multimodal
from prunex import PrunexError
from prunex.multimodal.removal import ModelRemover, questions
from prunex.multimodal.vqa import vqa_perturbation
from prunex.recipes.commands import cli
from tests.multimodal.folders import save_detr, save_vilt
from tests.multimodal.models import MAKERS, lxmert, visual_bert

transformers = pytest.importorskip("transformers")


def run(*arguments):
    return cli.run(["score", *map(str, arguments), "--device", "cpu"])


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def save_questions(folder, inputs, answers, name="a.npz"):
    folder.mkdir(exist_ok=True)
    np.savez(folder / name, answers=answers, **{key: value.numpy() for key, value in inputs.items()})
    return folder


@pytest.fixture
def asked(tmp_path):
    """An LXMERT, six questions with padding in two of them, and what is right of each."""
    model, inputs = lxmert(batch=6)
    inputs["attention_mask"][1, 4:] = inputs["attention_mask"][4, 5:] = 0
    model.save_pretrained(tmp_path / "model")
    answers = model(**inputs).question_answering_score.argmax(1)
    answers[2] = (answers[2] + 1) % 7
    save_questions(tmp_path / "data", inputs, answers.numpy())
    return tmp_path, model, inputs, answers


def test_the_curves_are_those_of_the_protocol(asked, capsys):
    root, model, inputs, answers = asked
    out = root / "out"
    more = ["--methods", "generic_attention,raw_attention", "--batch", 4]
    assert run(root / "model", "--protocol", "vqa", "--data", root / "data", "--out", out, *more) == 0
    assert sorted(p.name for p in out.iterdir()) == ["about.json", "curves.csv", "curves.png", "scores.csv"]
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "scores.csv")
    rows, points = table(out / "scores.csv")[1:], table(out / "curves.csv")[1:]
    assert len(rows) == 2 * 2 * 3
    for method in ("generic_attention", "raw_attention"):
        e = prunex.multimodal.explain(model, inputs, method=method)
        measured = vqa_perturbation(ModelRemover(model), questions(model, inputs, e, answers.tolist()))
        for modality in ("image", "text"):
            tested = getattr(measured, modality)
            for order in ("positive", "negative", "random"):
                row = next(r for r in rows if r[:3] == [method, modality, order])
                assert float(row[3]) == pytest.approx(getattr(tested, order).area, rel=1e-3)
            for order in ("positive", "negative"):
                curve = getattr(tested, order)
                drawn = [float(p[4]) for p in points if p[:3] == [method, modality, order]]
                assert drawn == pytest.approx(curve.mean.tolist(), abs=1e-3)
                chance = [float(p[4]) for p in points if p[:3] == ["random", modality, order]]
                assert chance == pytest.approx(tested.random.mean.tolist(), abs=1e-3)
    about = json.loads((out / "about.json").read_text())
    assert (about["protocol"], about["model"], about["questions"]) == ("vqa", "LxmertForQuestionAnswering", 6)


def test_questions_may_lie_in_several_files_and_be_fewer(asked):
    root, model, inputs, answers = asked
    for name, part in (("a.npz", slice(0, 3)), ("b.npz", slice(3, 6))):
        save_questions(root / "two", {k: v[part] for k, v in inputs.items()}, answers[part].numpy(), name)
    more = ["--methods", "rollout", "--protocol", "vqa"]
    run(root / "model", "--data", root / "data", "--out", root / "one", *more)
    run(root / "model", "--data", root / "two", "--out", root / "both", *more)
    assert table(root / "one" / "scores.csv") == table(root / "both" / "scores.csv")
    run(root / "model", "--data", root / "two", "--out", root / "few", *more, "--images", 2)
    assert json.loads((root / "few" / "about.json").read_text())["questions"] == 2


def test_answers_may_be_shares_and_models_others(tmp_path):
    model, inputs = visual_bert(batch=3)
    model.save_pretrained(tmp_path / "model")
    shares = torch.rand(3, 7).numpy()
    data = save_questions(tmp_path / "data", inputs, shares)
    run(tmp_path / "model", "--protocol", "vqa", "--data", data, "--out", tmp_path / "out", "--methods", "grad_cam")
    whole = float(table(tmp_path / "out" / "curves.csv")[1][4])
    logits = model(**inputs).logits
    assert whole == pytest.approx(100 * shares[range(3), logits.argmax(1)].mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("answers"), "and no answers: give"),
        (lambda a: a.update(answers=a["answers"][:2]), "give numbers, one entry for each of the 2 answers"),
        (lambda a: a.update(words=np.array(["a"] * 6)), "words is <U1 .*: give numbers"),
        (lambda a: a.pop("visual_pos"), "is explained from input_ids, visual_feats, visual_pos, and inputs hold"),
        (lambda a: a.update(answers=a["answers"] + 99), "answers"),
    ],
)
def test_what_are_no_questions(asked, change, says):
    root, _, inputs, answers = asked
    arrays = {"answers": answers.numpy(), **{k: v.numpy() for k, v in inputs.items()}}
    change(arrays)
    (root / "odd").mkdir()
    np.savez(root / "odd" / "a.npz", **arrays)
    with pytest.raises(PrunexError, match=says):
        run(root / "model", "--protocol", "vqa", "--data", root / "odd", "--out", root / "out", "--methods", "rollout")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "tokentm"], "unknown explainer of models of text and image 'tokentm'"),
        (["--metrics", "deletion"], "--metrics goes with metrics of ViTs, not with --protocol"),
        (["--target", "label"], "--target goes with metrics of ViTs, not with --protocol"),
        (["--mean", "0.5"], "--mean goes with metrics of ViTs"),
        (["--again"], "--again goes with metrics of ViTs"),
        (["--threshold", "0.5"], "--threshold goes with detectors"),
        (["--mask-rule", "half"], "--mask-rule goes with --protocol masks"),
        (["--images", "0"], "--images 0 is not allowed"),
        (["--data", "nowhere"], "--data nowhere is no folder: give one that holds .npz files"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(asked, arguments, says):
    root = asked[0]
    with pytest.raises(PrunexError, match=says):
        run(root / "model", "--protocol", "vqa", "--data", root / "data", "--out", root / "out", *arguments)
    assert not (root / "out").exists()


def test_a_protocol_goes_with_the_models_it_can_score(asked, tmp_path):
    root = asked[0]
    empty = root / "empty"
    empty.mkdir()
    with pytest.raises(PrunexError, match="holds no .npz files"):
        run(root / "model", "--protocol", "vqa", "--data", empty, "--out", root / "out")
    with pytest.raises(PrunexError, match="What --protocol masks scores: DetrForObjectDetection"):
        run(root / "model", "--protocol", "masks", "--data", empty)
    MAKERS["detr"]()[0].save_pretrained(root / "detr")
    with pytest.raises(PrunexError, match="What --protocol vqa scores: LxmertForQuestionAnswering"):
        run(root / "detr", "--protocol", "vqa", "--data", empty)
    with pytest.raises(PrunexError, match="--protocol goes with a folder of transformers, and .* is none"):
        run(empty, "--protocol", "vqa", "--data", empty)
    with pytest.raises(PrunexError, match="--threshold goes with --protocol"):
        run(empty, "--data", empty, "--threshold", 0.5)


def test_a_vilt_is_scored_on_pixels(tmp_path):
    folder = save_vilt(tmp_path / "vilt")
    _, inputs = MAKERS["vilt"](batch=2)
    data = save_questions(tmp_path / "data", inputs, np.array([0, 1]))
    run(folder, "--protocol", "vqa", "--data", data, "--out", tmp_path / "out", "--methods", "generic_attention")
    assert len(table(tmp_path / "out" / "scores.csv")) == 1 + 6


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A DETR, and three images in COCO's format: two objects, one object that the model calls otherwise, none."""
    root = tmp_path_factory.mktemp("coco")
    save_detr(root / "model")
    rng, sizes = np.random.default_rng(0), [(60, 80), (70, 50), (64, 64)]
    (root / "data" / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (tall, wide) in enumerate(sizes, 1):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((wide, tall)).save(root / "data" / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": tall, "width": wide})
    for number, (image, category, box) in enumerate(
        [(1, 0, (5, 5, 60, 50)), (1, 2, (40, 2, 70, 30)), (2, 0, (3, 9, 40, 60))]
    ):
        x0, y0, x1, y1 = box
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        entry = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
        annotations.append(entry | {"segmentation": [polygon], "area": (x1 - x0) * (y1 - y0), "bbox": [*box]})
    categories = [{"id": number, "name": f"LABEL_{number}"} for number in range(5)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "data" / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("rule", ["reference", "half"])
def test_masks_are_scored_as_the_protocol_scores_them(drawn, tmp_path, rule):
    from prunex.multimodal.coco import CocoFolder
    from prunex.multimodal.mask_scores import Detections, MaskScorer

    out, data = tmp_path / "out", drawn / "data"
    more = ["--threshold", 0.2, "--methods", "generic_attention,rollout", "--mask-rule", rule]
    assert run(drawn / "model", "--protocol", "masks", "--data", data, "--out", out, *more) == 0
    head, *rows = table(out / "scores.csv")
    assert head == ["method", "AP all", "AP medium", "AP large", "IoU all", "IoU medium", "IoU large", "AR all"]
    assert [row[0] for row in rows] == ["generic_attention", "rollout", "random"]
    processor = transformers.DetrImageProcessor.from_pretrained(drawn / "model")
    model = transformers.DetrForObjectDetection.from_pretrained(drawn / "model")
    for row in rows[:2]:
        scorer = MaskScorer()
        for image, objects in CocoFolder(data / "annotations.json", data / "images"):
            inputs = processor(images=[image], return_tensors="pt")
            e = prunex.multimodal.explain(model, inputs, method=row[0], threshold=0.2)
            size = (image.height, image.width)
            maps = torch.stack([q.map for q in e.queries])
            scores, labels = (torch.tensor([getattr(q, n) for q in e.queries]) for n in ("probability", "target"))
            entered = tuple(inputs["pixel_values"].shape[2:])
            scorer.update(Detections.of_maps(maps, scores, labels, entered, size, mask_rule=rule), objects)
        measured = scorer.compute()
        values = [measured.ap.all, measured.iou.all, measured.ar.all]
        assert [float(row[k]) for k in (1, 4, 7)] == pytest.approx(values, abs=1e-4)
    about = json.loads((out / "about.json").read_text())
    assert (about["images"], about["objects"], about["mask_rule"], about["classes"]) == (3, 3, rule, "by name")
    assert about["detections"] == measured.detections
    assert float(rows[0][4]) > 0


def test_classes_go_by_number_where_names_are_not_the_models(drawn, tmp_path):
    content = json.loads((drawn / "data" / "annotations.json").read_text())
    for shift in (0, 3):
        for category in content["categories"]:
            category["name"] = f"thing {category['id']}"
        data = tmp_path / str(shift)
        (data / "images").mkdir(parents=True)
        for file in (drawn / "data" / "images").iterdir():
            (data / "images" / file.name).write_bytes(file.read_bytes())
        moved = {**content, "categories": [c | {"id": c["id"] + shift} for c in content["categories"]]}
        moved["annotations"] = [a | {"category_id": a["category_id"] + shift} for a in content["annotations"]]
        (data / "annotations.json").write_text(json.dumps(moved))
    more = ["--protocol", "masks", "--methods", "rollout", "--threshold", 0.2, "--out", tmp_path / "out"]
    run(drawn / "model", "--data", tmp_path / "0", *more)
    assert json.loads((tmp_path / "out" / "about.json").read_text())["classes"] == "by number"
    with pytest.raises(PrunexError, match="category 'thing 2' is number 5, and the model has 5 classes"):
        run(drawn / "model", "--data", tmp_path / "3", *more)


def test_where_nothing_is_detected_there_is_nothing_to_score(drawn, tmp_path):
    more = ["--protocol", "masks", "--methods", "rollout", "--threshold", 1, "--out", tmp_path / "out"]
    with pytest.raises(PrunexError, match="no object above --threshold 1 in 3 images"):
        run(drawn / "model", "--data", drawn / "data", *more)


def test_a_folder_without_annotations(drawn, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(PrunexError, match=r"annotations.json"):
        run(drawn / "model", "--protocol", "masks", "--data", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
