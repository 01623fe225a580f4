"""The report: everything a run holds is on the page, and nothing from outside is needed to read it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.pictures import save_png
from prunex.recipes.report.curves import curves_of
from prunex.recipes.report.page import write_report

SUMMARY = {
    "machine": "2 CPU cores",
    "rows": [
        {"model": "dense", "accuracy": 0.935, "gmacs": 0.05, "params_m": 0.71, "images_per_s": 2100},
        {"model": "dynamicvit", "accuracy": 0.931, "gmacs": 0.029, "params_m": 0.72, "images_per_s": 3400,
         "kept_digit_cover": 0.954},
        {"model": "topk (untrained)", "accuracy": 0.88, "gmacs": 0.028, "params_m": 0.71, "images_per_s": 3500},
    ],
}  # fmt: skip


def draw_scenes(count=8, side=64, seed=0):
    """Noise with a bright disc, and the disc."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 140, (count, side, side, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:side, :side]
    masks = np.stack([np.hypot(rows - y, columns - x) < side / 6 for y, x in rng.uniform(0.2, 0.8, (count, 2)) * side])
    images[masks] = (230, 120, 40)
    return images, masks


def write_run(run: Path, images, masks, epochs=3, grid=8, names=None):
    """A run folder as training leaves it, with numbers made up."""
    rng = np.random.default_rng(0)
    count, side = images.shape[:2]
    logger = CSVLogger(run.parent, name="", version=run.name)
    for step in range(40 * epochs):
        logger.log_metrics({"train_loss_step": 2 / (1 + step / 30) + rng.random() * 0.2, "lr": 1e-3}, step)
        if step % 40 == 39:
            logger.log_metrics({"train_loss_epoch": 1.0, "train_accuracy": 0.95 - 1 / (3 + step)}, step)
            logger.log_metrics({"val_loss": 1.8 / (1 + step / 30), "val_accuracy": 0.92 - 1 / (3 + step)}, step)
            logger.log_metrics({f"keep_ratio/stage_{s}": 0.7**s + rng.random() * 0.02 for s in (1, 2, 3)}, step)
            logger.log_metrics({"prunex/ratio_loss": 1 / step, "prunex/distillation_loss": 2 / step}, step)
    logger.save()
    (run / "config.yaml").write_text("model:\n  name: vit <small> & co\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "maps").mkdir()
    on_grid = masks.reshape(count, grid, side // grid, grid, side // grid).mean((2, 4))
    labels = np.arange(count) % 3
    for epoch in range(epochs):
        score = on_grid * (epoch + 1) / epochs + rng.random(on_grid.shape) * 0.3
        ranks = (-score).reshape(count, -1).argsort(1).argsort(1).reshape(score.shape)
        kept = np.stack([ranks < int(grid * grid * 0.7**stage) for stage in (1, 2, 3)])
        predicted = np.where((np.arange(count) == 1), 0, labels)
        np.savez(
            run / "maps" / f"epoch={epoch:03d}.npz",
            images=images, masks=masks, labels=labels, predicted=predicted, kept=kept,
            share=kept[-1].astype(np.float32),
            **{"relevance/tokentm": score**2 * kept[-1], "target/tokentm": predicted,
               "relevance/rollout": score + 0.2, "target/rollout": predicted},
        )  # fmt: skip
    (run / "slim").mkdir()
    (run / "slim" / "model.safetensors").write_bytes(bytes(300_000))
    config = {"architecture": "vit_small_patch14", "label_names": names} if names else {"architecture": "vit_tiny"}
    (run / "slim" / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "version_0", *draw_scenes(), names=["<script>alert(1)</script>", "dog & co", "$cat$"])


@pytest.fixture
def small_run(tmp_path):
    return write_run(tmp_path / "version_1", *draw_scenes(count=2), epochs=2)


class Page(HTMLParser):
    """The words of a page, its tags with attributes, and whether every tag was closed."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.words.append(" ".join(data.split()))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(run):
    path = write_report(run)
    assert path == Path(run) / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page, " | ".join(page.words)


def test_the_whole_run_is_on_the_page(run):
    page, words = read(run)
    for wanted in (
        "version_0", "vit_small_patch14", "2 CPU cores",
        "93.1%", "−0.4 points to dense", "0.58×", "1.62×", "95.4%", "topk (untrained)",
        "epoch 0", "epoch 2", "stage 3", "tokentm", "rollout", "for the predicted class",
        "training", "validation", "keep ratio, stage 3", "ratio loss", "Learning rate | 0.001",
        "prunex.load(", "model.safetensors (0.3 MB)", "vit <small> & co", "dog & co", "$cat$",
        "2 more images are in maps/.",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert "train_loss" not in words
    assert f"by prunex {prunex.__version__}" in words
    assert "could not be read" not in words
    # 6 images: input, 3 epochs, 2 methods; and 4 of them: input, 3 stages
    assert len(page.all("img")) == 6 * (1 + 3 + 2) + 4 * (1 + 3)
    assert len(page.all("svg")) == 4  # a learning rate that never changed is a number


def test_nothing_comes_from_outside_and_names_are_escaped(run):
    page, words = read(run)
    assert "<script>alert(1)</script>" in words  # as words, not as a tag
    assert not page.all("script")
    assert not page.all("link")
    assert all(re.match(r"data:image/(png|jpeg);base64,", img["src"]) and img["alt"] for img in page.all("img"))
    text = (run / "report.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses
    assert "@import" not in text
    assert "@font-face" not in text


def test_photos_stay_small(tmp_path):
    images, masks = draw_scenes(count=6, side=224)
    path = write_report(write_run(tmp_path / "run", images, masks, grid=16))
    assert path.stat().st_size < 6e6


def test_epochs_are_spread(tmp_path):
    _, words = read(write_run(tmp_path / "run", *draw_scenes(count=1), epochs=12))
    assert [int(e) for e in re.findall(r"epoch (\d+) \|", words)] == [0, 4, 7, 11]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("summary.json", "There is no summary.json"),
        ("maps", "There are no maps"),
        ("metrics.csv", "There is no metrics.csv"),
        ("slim", "There is no slim/"),
        ("config.yaml", "There is no config.yaml"),
    ],
)
def test_missing_pieces_are_named(small_run, missing, sentence):
    (small_run / missing).rename(small_run / "elsewhere")
    assert sentence in read(small_run)[1]


def test_nearly_empty_run(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    words = read(tmp_path)[1]
    assert words.count("There is no") + words.count("There are no") == 4


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("summary.json", b"{", "summary.json could not be read"),
        ("summary.json", b"[1]", "summary.json is not a JSON object"),
        ("summary.json", b'{"rows": [3]}', "summary.json holds no rows"),
        ("slim/config.json", b"\xff\xfe", "config.json could not be read"),
        ("maps/epoch=001.npz", b"PK broken", "maps/epoch=001.npz could not be read"),
        ("metrics.csv", b"epoch,step\n0,1\n", "metrics.csv holds no numbers"),
    ],
)
def test_damaged_pieces_are_named(small_run, file, content, sentence):
    (small_run / file).write_bytes(content)
    assert sentence in read(small_run)[1]


def test_maps_that_do_not_fit_are_named(small_run):
    images, _ = draw_scenes(count=2, seed=1)
    (small_run / "maps" / "epoch=001.npz").rename(small_run / "maps" / "epoch=002.npz")
    np.savez(small_run / "maps" / "epoch=000.npz", images=images, kept=np.ones((3, 2, 8, 8), dtype=bool))
    np.savez(small_run / "maps" / "epoch=001.npz", images=images, kept=np.ones((3, 5, 8, 8), dtype=bool))
    np.savez(small_run / "maps" / "epoch=003.npz", images=np.array([{"a": 1}], dtype=object))
    words = read(small_run)[1]
    assert "maps/epoch=000.npz shows other images than the last epoch" in words
    assert "kept of shape (3, 5, 8, 8) does not fit 2 images" in words
    assert "maps/epoch=003.npz could not be read (Object arrays cannot be loaded" in words


def test_one_monitor_only(small_run):
    for path in (small_run / "maps").iterdir():
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        keep = [key for key in arrays if key not in ("kept", "share", "masks", "labels", "predicted")]
        np.savez(path, **{key: arrays[key] for key in keep})
    words = read(small_run)[1]
    assert "No kept patches were recorded" in words
    assert "What the prediction rests on" in words
    assert "dropped ones pale" not in words
    assert "image 0" in words
    assert "Stage by stage" not in words
    for path in (small_run / "maps").iterdir():
        np.savez(path, images=arrays["images"], kept=arrays["kept"])
    assert "No relevancy was recorded" in read(small_run)[1]


def test_rows_with_missing_and_odd_values(small_run):
    rows = [{"model": "evit", "accuracy": None, "gmacs": "many"}, {"images_per_s": float("nan")}, {"accuracy": 0.5}]
    (small_run / "summary.json").write_text(json.dumps({"rows": rows}))
    words = read(small_run)[1]
    assert "evit" in words
    assert "50.0%" in words
    assert "GMACs / image" not in words


def test_refused(tmp_path, run):
    with pytest.raises(PrunexError, match="is not a folder: give the folder that a training run wrote"):
        write_report(tmp_path / "no")
    with pytest.raises(PrunexError, match="is not a run folder .it has neither metrics.csv nor config.yaml"):
        write_report(tmp_path)
    with pytest.raises(PrunexError, match="is not a folder"):
        write_report(run / "config.yaml")
    assert not (tmp_path / "report.html").exists()


def test_images_of_several_classes_are_shown(tmp_path):
    run = write_run(tmp_path / "run", *draw_scenes(count=8), names=["ant", "bee", "cat"])
    for path in (run / "maps").iterdir():
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        arrays["labels"] = np.array([0, 0, 0, 0, 0, 0, 1, 2])  # a folder's first files are of its first class
        arrays["target/rollout"] = np.full(8, -1)
        np.savez(path, **arrays)
    words = read(run)[1]
    stages = words[words.index("Stage by stage") : words.index("Curves")]
    assert [name for name in stages.split(" | ") if name in ("ant", "bee", "cat")] == ["ant", "ant", "bee", "cat"]
    assert "rollout | of no class" in words


def test_one_unit_of_multiply_adds(small_run):
    rows = [{"model": "dense", "gmacs": 0.0492}, {"model": "evit", "gmacs": 0.0327}]
    (small_run / "summary.json").write_text(json.dumps({"rows": rows}))
    metrics = ["step,prunex/gmacs,prunex/gmacs_budget", "1,0.0327,0.033", "2,0.0327,0.033"]
    (small_run / "metrics.csv").write_text("\n".join(metrics))
    words = read(small_run)[1]
    assert "MMACs / image" in words
    assert "49.2 → 32.7 MMACs an image" in words
    assert "Compute (MMACs an image) | 32.7 | as it is | 33 | allowed" in words
    assert "GMACs" not in words


def test_what_never_changes_is_a_number():
    steps = [1.0, 2.0, 3.0]
    metrics = {
        "val_accuracy": (steps, [0.968, 0.9681, 0.968]),
        "prunex/keep_ratio_stage1": (steps, [0.7, 0.7, 0.7]),
        "prunex/val_keep_ratio_stage1": ([3.0], [0.71]),
        "prunex/relevancy_kept/grad_cam": (steps, [0.5, 0.6, 0.7]),
        "val_my_own": (steps, [3.0, 4.0, 5.0]),
        "train_loss_step": (steps, [3.0, 2.0, 1.0]),
        "train_loss_epoch": (steps, [2.0, 2.0, 2.0]),
        "prunex/loss_distill": (steps, [0.0, 0.0, 0.0]),
    }
    found = curves_of(metrics, (1.0, "GMACs"))
    assert found.numbers == [
        ("Accuracy", [("validation", "96.8%")]),
        ("Patches kept", [("stage 1, training", "70.0%"), ("stage 1, validation", "71.0%")]),
        ("Parts of the loss", [("distill", "0")]),
    ]
    words = " ".join(found.charts)
    assert len(found.charts) == 3
    assert all(word in words for word in ("Relevance on kept patches", "grad cam", "My own", "validation", "Loss"))


# ---------------------------------------------------------------------------------------------------- bench and units

BENCH = {
    "machine": "2 <cores>",
    "threads": 1,
    "dtype": "float32",
    "versions": {"torch": "2.9"},
    "rows": [
        {"model": "dense (evit taken off)", "accuracy": 0.95, "gmacs": 4.6, "params_m": 22.0, "file_mb": 88.0},
        {"model": "slim: evit", "accuracy": 0.94, "gmacs": 3.0, "params_m": 22.0, "file_mb": 44.0},
    ],
    "speed": [
        {"runtime": runtime, "batch": batch, "rounds": 9, "models": [
            {"model": "dense (evit taken off)", "images_per_s": 10.0 * batch, "low": 9.0, "high": 11.0, "ratio": 1.0,
             "ratio_low": 1.0, "ratio_high": 1.0},
            {"model": "slim: evit", "images_per_s": 123.4, "low": 120.0, "high": 130.0, "ratio": 1.52,
             "ratio_low": 1.4, "ratio_high": 1.61},
        ]}
        for runtime in ("torch", "onnxruntime") for batch in (1, 8)
    ],
    "notes": ["a <note> of its own"],
}  # fmt: skip


def test_training_stands_before_validation_in_every_chart(monkeypatch):
    drawn = []
    monkeypatch.setattr("prunex.recipes.report.curves.curves_svg", lambda lines, **_: drawn.append(list(lines)) or "")
    curve = ([0.0, 1.0], [0.1, 0.9])
    curves_of(dict.fromkeys(["val_accuracy", "train_accuracy", "train_loss", "val_loss"], curve), (1.0, "GMACs"))
    assert drawn == [["training", "validation"]] * 2


def test_what_bench_measured_is_on_the_page(run):
    (run / "bench.json").write_text(json.dumps(BENCH))
    page, words = read(run)
    for wanted in (
        "Measured by prunex bench", "slim: evit", "44", "0.50×", "PyTorch, batch 8", "ONNX Runtime, batch 1",
        "10.0", "9.0 to 11.0", "123", "120 to 130", "1.52×", "1.40× to 1.61×", "to dense (evit taken off)",
        "on 2 <cores>, 1 thread, float32, torch 2.9", "a <note> of its own", "93.1%",
    ):  # fmt: skip
        assert wanted in words, wanted


def test_bench_alone_gives_the_headline_too(small_run):
    (small_run / "summary.json").unlink()
    (small_run / "bench.json").write_text(json.dumps(BENCH))
    words = read(small_run)[1]
    assert "There is no summary.json" not in words
    assert "94.0% | accuracy | −1.0 points to dense" in words
    assert "0.65× | compute | 4.6 → 3 GMACs an image" in words


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "bench.json could not be read"),
        ("[]", "bench.json is not a JSON object"),
        ('{"rows": [1], "speed": 3, "notes": 4}', ""),
        ('{"rows": [{"model": "a", "gmacs": "x"}], "speed": [{"models": [{"model": "a", "images_per_s": null}]}]}', ""),
        ('{"rows": [{}], "speed": [{"models": [{"images_per_s": 3}]}, {}], "versions": 4}', ""),
    ],
)
def test_a_damaged_bench_file(small_run, content, sentence):
    (small_run / "bench.json").write_text(content)
    words = read(small_run)[1]
    assert sentence in words
    assert "93.5%" in words


def write_units(run, classes=3, blocks=2, heads=2):
    for name in ("units-widths", "units-classes-epoch=009", "units-classes-epoch=010", "units-heads-epoch=002"):
        shade = 10 if name.endswith("010") else 200
        save_png(run / "maps" / f"{name}.png", np.full((30, 40, 3), shade, dtype=np.uint8))
    lines = ["epoch,class,block,head,relevance,kept,updates"]
    for epoch in (1, 10):
        for c in range(classes):
            for b in range(blocks):
                for h in range(heads):
                    value = 1 + (0.3 if epoch == 10 and (b, h) == (1, c % 2) else 0)
                    lines.append(f"{epoch},{c},{b},{h},{value},{(b, h) != (1, 1)},{100 * c + 7}")
    (run / "units.csv").write_text("\n".join(lines))


def test_units_are_on_the_page(run):
    write_units(run)
    page, words = read(run)
    assert "Kept of each block | bars: share of the dense block" in words
    assert "Which heads serve which class | epoch 10, red" in words
    assert "Where these heads look | epoch 2" in words
    shown = [img["src"] for img in page.all("img") if "serve" in img["alt"]]
    pixels = Image.open(io.BytesIO(base64.b64decode(shown[0].split(",")[1])))
    assert pixels.getpixel((0, 0)) == (10, 10, 10)
    # classes 0 and 2 lean on 1.0 (mean 1.2), class 1 on 1.1, which was removed
    assert "<script>alert(1)</script> | 7 | 1.0 | +0.100" in words
    assert "dog & co | 107 | 0.0 | +0.000" in words
    assert "$cat$ | 207 | 1.0 | +0.100" in words
    assert "1.0 | <script>alert(1)</script> | +0.100 | $cat$ | +0.100 | dog & co | −0.200" in words
    assert "1.1" not in words.split("top heads")[1].split("Curves")[0]
    assert not page.all("script")


def test_many_classes_and_heads_are_cut_short(small_run):
    write_units(small_run, classes=60, blocks=12, heads=3)
    words = read(small_run)[1]
    assert "40 more classes in units.csv." in words
    assert "15 more heads in units.csv." in words


def test_class_names_in_the_table_itself(small_run):
    rows = [
        "epoch,class,block,head,relevance,kept,updates",
        "0,<b>ant</b>,0,0,1,True,3",
        "0,bee,0,0,2,1,",
        "0,bee,0,x,,,",
    ]
    (small_run / "units.csv").write_text("\n".join(rows))
    words = read(small_run)[1]
    assert "<b>ant</b> | 3 | 0.0 | −0.500" in words
    assert "bee | – | 0.0 | +0.500" in words


def test_damaged_units_are_named(small_run):
    (small_run / "maps" / "units-widths.png").write_bytes(b"PNG?")
    (small_run / "units.csv").write_text("epoch,class\n1,2\n")
    words = read(small_run)[1]
    assert "maps/units-widths.png could not be read" in words
    assert "units.csv holds no relevance" in words
    (small_run / "units.csv").write_bytes(b"\xff\xfe\x00")
    assert "units.csv could not be read" in read(small_run)[1]


def test_without_units_nothing_is_said_of_them(small_run):
    words = read(small_run)[1]
    assert "Units:" not in words
    assert "units.csv" not in words
    assert "Measured by prunex bench" not in words


# ------------------------------------------------------------------------------------------------------------- heads


def write_head(run, epochs, **shares):
    for epoch in epochs:
        picture = np.zeros((20, 30, 3), dtype=np.uint8)
        picture[:, : epoch + 1] = 255
        save_png(run / "maps" / f"head-epoch={epoch:03d}.png", picture)
    logger = CSVLogger(run.parent, name="", version="other")
    for step in (1, 2):
        logger.log_metrics({name.replace("__", "/"): value * step / 2 for name, value in shares.items()}, step)
    logger.save()
    (run / "metrics.csv").write_text((run.parent / "other" / "metrics.csv").read_text())


def test_a_heads_last_picture_and_earlier_ones_are_on_the_page(small_run):
    tree = {"soft": 0.96, "hard": 0.94, "classifier": 0.95, "tree": 0.12, "shuffled": 0.955}
    write_head(small_run, range(9), **{f"prunex__val_tree_{name}": share for name, share in tree.items()})
    page, words = read(small_run)
    assert "The head: what its answers are made of" in words
    pictures = [img["src"] for img in page.all("img") if img["alt"].startswith("Head, epoch")]
    assert len(pictures) == 4
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))))
    assert (first[0, :, 0] > 128).sum() == 9  # the last epoch's
    epochs = re.findall(r"epoch (\d+)(?= \|)", words[words.index("The head:") :])
    assert epochs[:4] == ["8", "5", "3", "0"]
    assert "timm's classifier alone, without the tree | 95.0%" in words
    assert "tree with the routing of other images | 95.5%" in words
    assert "decorates what the classifier answers" in words
    assert "Tree and its controls" in words
    assert "most attention" not in words


def test_what_concepts_were_measured_to_be_is_on_the_page(small_run):
    write_head(small_run, [0], prunex__val_top_concept=0.31)
    page, words = read(small_run)
    assert "the concept with most attention is present | 31.0%" in words
    assert "read the names as numbers" in words
    assert "classifier alone" not in words
    assert "Earlier epochs" not in words


def test_damaged_pictures_of_a_head_are_named_and_without_a_head_nothing_is_said(small_run):
    assert "The head:" not in read(small_run)[1]
    (small_run / "maps" / "head-epoch=003.png").write_bytes(b"PNG?")
    assert "maps/head-epoch=003.png could not be read" in read(small_run)[1]


def test_arrays_of_a_head_do_not_disturb_the_maps(small_run):
    path = small_run / "maps" / "epoch=001.npz"
    with np.load(path) as held:
        arrays = dict(held)
    np.savez(path, **arrays, **{"head/concepts": np.array(["a", "b"]), "head/contributions": np.zeros((2, 2, 3))})
    words = read(small_run)[1]
    assert "could not be read" not in words
    assert "epoch 1" in words
