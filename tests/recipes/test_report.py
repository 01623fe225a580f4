"""The report: everything a run holds is on the page, and nothing from outside is needed to read it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

from prunex import PrunexError
from prunex.recipes.report import write_report

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
        "train_loss_step", "val_accuracy", "keep_ratio/stage_3", "prunex/ratio_loss", "lr",
        "prunex.load(", "model.safetensors (0.3 MB)", "vit <small> & co", "dog & co", "$cat$",
        "2 more images are in maps/.",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert "train_loss_epoch" not in words  # the steps of the same loss are drawn
    assert "could not be read" not in words
    # 6 images: input, 3 epochs, 2 methods; and 3 of them: input, 3 stages
    assert len(page.all("img")) == 6 * (1 + 3 + 2) + 3 * (1 + 3)
    assert len(page.all("svg")) == 5


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
