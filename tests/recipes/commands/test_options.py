"""What can be said without a model is said before anything heavy is imported, and is what the heavy parts say."""

import json
import subprocess
import sys

import pytest

import prunex
from prunex.metrics.scoring import MEASURES
from prunex.recipes.commands.listing import declared
from prunex.recipes.commands.options import METRICS
from prunex.recipes.given import IMAGE_ENDINGS, check_model
from prunex.recipes.report.score_table import LEFT
from prunex.removal.game import ROUTES

HEAVY = ("torch", "numpy", "lightning", "timm", "matplotlib", "jsonargparse", "torchvision", "PIL", "yaml")
PRINTS = [
    [], ["--help"], ["--version"], ["methods"], ["fit", "--help"], ["validate", "-h"], ["predict", "--help"],
    *[[command, "--help"] for command in ("explain", "score", "export", "bench", "report", "methods")],
]  # fmt: skip
MISTAKES = [
    ["fitt"], ["--nonsense"], ["explain"], ["score"], ["export"], ["bench"], ["report"], ["methods", "EViT"],
    ["fit", "--config", "digits/dens"], ["fit", "--ckpt_path", "nope.ckpt"], ["predict", "--out"],
    ["report", "nowhere"], ["bench", "nowhere"], ["export", "nowhere"], ["export", ".", "--format", "tflite"],
    ["bench", ".", "--batches", "0"], ["bench", ".", "--device", "tpu"], ["bench", ".", "--seconds", "nan"],
    ["explain", ".", "--images", ".", "--target", "contrast:3"], ["explain", ".", "--images", ".", "--target", "x"],
    ["score", ".", "--target", "labels:1,2"], ["score", ".", "--target", "true"],
    ["explain", ".", "--images", "nowhere"], ["explain", "nowhere", "--images", "."],
    ["explain", "vit_tiny_patch16_224", "--images", "."], ["explain", ".", "--images", ".", "--batch", "0"],
    ["explain", ".", "--images", ".", "--methods", "rolout"], ["explain", ".", "--images", ".", "--methods", "evit"],
    ["explain", ".", "--images", ".", "--option", "rollout"], ["explain", ".", "--images", ".", "--std", "0"],
    ["explain", ".", "--images", ".", "--device", "gpu"], ["explain", ".", "--images", ".", "--weights", "digits"],
    ["explain", "vit_tiny_patch16_224", "--images", ".", "--weights", "nowhere"],
    ["explain", ".", "--images", ".", "--text", "a cat"], ["explain", ".", "--images", ".", "--threshold", "0.5"],
    ["score", ".", "--metrics", "deletoin"], ["score", ".", "--metrics", ","], ["score", ".", "--removal", "white"],
    ["score", ".", "--masks", "x"], ["score", ".", "--data", "nowhere"], ["score", ".", "--range", "9", "--data", "."],
]  # fmt: skip


def test_nothing_heavy_is_imported_before_the_arguments_are_known_to_be_good(tmp_path):
    """All in one process: what one of them imported, the next would have too."""
    script = (
        "import contextlib, io, json, sys\n"
        "from prunex.recipes.commands.cli import main\n"
        "found = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try: main(arguments)\n"
        "        except SystemExit as stop: code = stop.code\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    found.append([code, out.getvalue(), err.getvalue(), heavy])\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", script, json.dumps([*PRINTS, *MISTAKES])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for arguments, (code, out, err, heavy) in zip([*PRINTS, *MISTAKES], json.loads(done.stdout), strict=True):
        assert not heavy, arguments
        if arguments in MISTAKES:
            assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
            assert err.startswith("prunex: error: ")
        else:
            assert (code or 0, err) == (0, ""), arguments
            assert out


def test_methods_read_from_the_sources_are_those_that_are_registered():
    methods = [(m.kind, m.name, m.paper, m.needs) for m in prunex.methods() if m.make.__module__.startswith("prunex.")]
    assert [tuple(entry) for entry in declared()] == methods


def test_names_that_are_told_without_torch_are_those_of_the_code():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert tuple(MEASURES) == METRICS
    assert tuple(LEFT) == ROUTES
    assert IMAGE_ENDINGS == IMG_EXTENSIONS


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224.augreg_in1k", "eva02_tiny_patch14_224"])
def test_models_of_timm_are_known_by_its_sources(name):
    with pytest.raises(prunex.PrunexError, match="is a timm model name without weights"):
        check_model(name)
