"""prunex init, doctor and completion: what somebody who begins with a project types."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.commands import cli, init
from prunex.recipes.commands.doctor import devices, environment, examined
from tests.vits import tiny


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of four images each, and the folder above as the place where commands are typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for image in range(4):
                pixels = np.random.default_rng(image).integers(0, 127, (32, 32, 3), dtype=np.uint8) + 128 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    return tmp_path


def written(name="photos.yaml"):
    return yaml.safe_load(Path(name).read_text())


def test_init_takes_what_is_usual_where_nobody_can_be_asked(photos, capsys):
    assert cli.run(["init", "photos"]) == 0
    told = capsys.readouterr()
    assert told.out == "photos.yaml\n"
    assert "prunex fit --config photos.yaml" in told.err
    config = written()
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["architecture"], model["pretrained"]) == ("vit_small_patch14_dinov2", True)
    assert data["root"] == str(photos / "photos")
    (pruning,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("TokenPruning")]
    assert pruning["init_args"] == {"method": "evit", "budget": 0.65}
    with pytest.raises(PrunexError, match="is there already"):
        cli.run(["init", "photos"])


def test_init_asks_what_was_not_typed(photos, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    asked = []
    answers = iter(["", "scratch", "0.5"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    cli.run(["init", "photos", "--method", "tome", "--out", "mine.yaml"])
    assert [text.split()[0] for text in asked] == ["timm", "weights:", "budget:"]
    config = written("mine.yaml")
    assert config["model"]["init_args"]["from_scratch"] is True
    assert config["trainer"]["logger"]["init_args"]["name"] == "mine"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["nowhere"], "nowhere/train holds no class"),
        (["photos", "--method", "evitt"], "did you mean 'evit'"),
        (["photos", "--budget", "1.5"], "budget=1.5 is not allowed"),
        (["photos", "--weights", "gone.safetensors"], "neither a file nor shipped"),
        (["photos", "--img-size", "0"], "--img-size 0 is not allowed"),
    ],
)
def test_init_refuses_what_a_training_would(photos, typed, message):
    with pytest.raises(PrunexError, match=message):
        cli.run(["init", *typed])
    assert not list(photos.glob("*.yaml"))


def test_init_compares_the_classes_of_both_splits(photos):
    shutil.move("photos/val/dog", "photos/val/fox")
    with pytest.raises(PrunexError, match="class 'dog' is in one of train and val alone"):
        cli.run(["init", "photos"])


def test_init_counts_no_folder_that_notebooks_hide(photos):
    Path("photos/train/.ipynb_checkpoints").mkdir()
    assert cli.run(["init", "photos"]) == 0
    assert init.check_images(Path("photos")) == 2


def test_every_pruner_that_init_offers_takes_a_budget():
    for method in init.METHODS:
        pruning = prunex.attach(tiny(), method, budget=0.8)
        assert pruning.meets(0.8)


@pytest.mark.slow
@pytest.mark.parametrize("method", init.METHODS)
def test_what_init_writes_runs_as_it_is(photos, method):
    weights = ["--weights", "scratch", "--model", "vit_tiny_patch16_224", "--img-size", "64", "--budget", "0.8"]
    cli.run(["init", "photos", "--method", method, *weights])
    assert cli.run(["fit", "--config", "photos.yaml", "--trainer.max_epochs", "1"]) == 0
    (slim,) = Path("runs/photos").glob("version_0/slim/config.json")
    assert prunex.load(slim.parent).num_classes == 2


def test_doctor_tells_what_is_installed_and_what_does_not_fit(monkeypatch):
    lines = [line for _, line in [*environment(), *devices()]]
    assert any(line.startswith("torch ") for line in lines)
    assert any(line.startswith("cpu: ") for line in lines)
    assert any(line.startswith("attention is ") for line in lines)
    module = sys.modules["prunex.recipes.commands.doctor"]
    monkeypatch.setattr(module, "requires", lambda _: ["torch<1", "no-such-thing>=2", 'other; extra == "x"'])
    monkeypatch.setattr(module, "installed_beside", lambda _: ["1.0.0"])
    wrong = [line for good, line in environment() if not good]
    assert [line.split()[0] for line in wrong] == ["PyPI's", "torch", "no-such-thing"]
    assert "needs <1" in wrong[1]


def test_doctor_says_which_methods_would_refuse_a_model():
    told = list(examined(tiny(num_classes=0).eval()))
    taken = {line.partition(":")[0]: line for good, line in told if good}
    assert "evit" in taken["attach"]
    assert "rollout" in taken["explain"]
    assert any(line.startswith("attach ") for good, line in told if not good)  # what trains with labels
    pruned = tiny().eval()
    prunex.attach(pruned, "evit")
    assert (False, "attach: it is pruned already") in list(examined(pruned))
    (refused,) = examined(timm.create_model("resnet18"))
    assert not refused[0]


def test_doctor_on_the_command_line(capsys):
    assert cli.run(["doctor"]) in (0, 1)
    assert "prunex-vit " in capsys.readouterr().out
    for typed, message in ((["--img-size", "32"], "go with --model"), (["--model", "no_such_vit"], "timm cannot make")):
        with pytest.raises(PrunexError, match=message):
            cli.run(["doctor", *typed])


def completed(script, *words):
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in words)
    text = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _prunex; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(capsys):
    cli.run(["completion", "bash"])
    script = capsys.readouterr().out
    assert completed(script, "prunex", "ex") == ["explain", "export"]
    assert completed(script, "prunex", "export", "--fo") == ["--format"]
    assert completed(script, "prunex", "fit", "--config", "imagefolder/ev") == ["imagefolder/evit"]
    assert completed(script, "prunex", "fit", "--pruning.method", "dyn") == ["dynamicvit"]
    assert "--pruning.keep_ratio" in completed(script, "prunex", "fit", "--pruning.")
    assert completed(script, "prunex", "explain", "photos/") == []  # then bash offers files


def test_other_shells_are_told_the_same(capsys):
    for shell, parts in (("zsh", ["bashcompinit", "complete -o default"]), ("fish", ["-l format", "digits/evit"])):
        cli.run(["completion", shell])
        script = capsys.readouterr().out
        assert all(part in script for part in parts)


def test_they_start_without_torch(photos):
    script = (
        "import sys; from prunex.recipes.commands import cli\n"
        "for typed in (['init', 'photos'], ['completion', 'bash'], ['doctor', '--help']):\n"
        "    try: cli.run(typed)\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
