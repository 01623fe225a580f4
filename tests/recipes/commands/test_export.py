"""``prunex export``: what it writes and prints, and what it refuses before any work."""

import re

import numpy as np
import pytest
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.commands import cli
from tests.vits import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slim folder, and a folder of images beside it."""
    root = tmp_path_factory.mktemp("export")
    model = tiny(depth=2, embed_dim=24)
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    prunex.save(prunex.slim(model), root / "slim")
    (root / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        pixels = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number:02d}.png")
    return root


def lines(capsys, *arguments):
    assert cli.run(["export", *map(str, arguments)]) == 0
    return capsys.readouterr()


def test_a_graph_is_compared_on_images_of_ones_own_and_timed(folder, tmp_path, capsys):
    options = ["--format", "pt2", "--kept", "--images", folder / "photos", "--limit", 6, "--seconds", 0.01]
    said = lines(capsys, folder / "slim", *options, "--out", tmp_path / "model.pt2")
    path, logits, classes, *times = said.out.splitlines()
    assert path == str(tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").is_file()
    gap = re.fullmatch(r"  logits differ from PyTorch's by at most (\S+) of the largest, on 6 images", logits)
    assert float(gap[1]) < 1e-4
    assert classes == "  the same class in 6 of 6, the same patches kept in 6 of 6"
    assert [time.split(":")[0] for time in times] == ["  batch 1", "  batch 8"]
    assert all(
        re.search(r"\d\.\d\d of PyTorch's time \(.* to .*, \d+ rounds in turn, \d+ threads?\)", t) for t in times
    )


def test_without_images_it_says_that_they_are_random(folder, tmp_path, capsys):
    said = lines(capsys, folder / "slim", "--format", "pt2", "--seconds", 0, "--out", tmp_path / "model.pt2")
    assert "compared on random ones; --images DIR names others" in said.err
    assert len(said.out.splitlines()) == 3
    assert "kept" not in said.out


@pytest.mark.slow
def test_eight_bits_are_calibrated_by_images_that_are_named(folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    photos = folder / "photos"
    given = ["--int8", "--calibrate", photos, "--images", photos, "--seconds", 0, "--out", tmp_path / "m.onnx"]
    said = lines(capsys, folder / "slim", *given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.int8.onnx", "m.onnx"]
    assert "calibrated by 12 images" in said.err
    gaps = [float(text) for text in re.findall(r"at most (\S+) of", said.out)]
    assert gaps[0] < 1e-4 < gaps[1]


@pytest.mark.slow
def test_tensorrt_names_the_line_that_builds_an_engine(folder, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = tmp_path / "model.tensorrt.onnx"
    said = lines(capsys, folder / "slim", "--format", "tensorrt", "--seconds", 0, "--out", out)
    assert f"trtexec --onnx={out} --minShapes=images:1x3x32x32 --optShapes=images:8x3x32x32" in said.err


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--int8"], "needs images to calibrate by, and this is no run that prunex fit wrote: give --calibrate DIR"),
        (["--int8", "--format", "pt2"], "--int8 goes with --format onnx, not pt2"),
        (["--calibrate", "photos"], "--calibrate goes with --int8"),
        (["--images", "nowhere"], "no images in nowhere"),
        (["--limit", "0"], "limit"),
        (["--seconds", "-1"], "--seconds -1.0 is not allowed"),
        (["--seconds", "nan"], "--seconds nan is not allowed"),
        (["--format", "openvino"], r"needs openvino: pip install 'prunex-vit\[onnx,openvino\]'"),
        (["--format", "executorch"], r"needs executorch: pip install 'prunex-vit\[executorch\]'"),
        (["--format", "tflite"], "invalid choice"),
    ],
)
def test_mistakes_are_told_before_any_work(folder, monkeypatch, given, match):
    lacking = ("openvino", "executorch")
    monkeypatch.setattr("prunex.formats.find_spec", lambda name: None if name in lacking else True)
    monkeypatch.setattr("prunex.recipes.runs.open_model", lambda where: pytest.fail("the model was opened"))
    monkeypatch.chdir(folder)
    with pytest.raises(PrunexError, match=match) as caught:
        cli.run(["export", "slim", *given])
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == ["photos", "slim"]
