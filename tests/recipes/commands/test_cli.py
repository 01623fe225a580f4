import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from prunex import PrunexError
from prunex.recipes.commands import cli

QUICK = [
    "--trainer.max_epochs", "1", "--trainer.devices", "1", "--trainer.strategy", "auto",
    "--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0",
    "--data.batch_size", "8", "--data.train_size", "16", "--data.val_size", "8",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_without_a_command_it_tells_what_there_is(capsys):
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("fit", "validate", "predict", "digits/", "dynamicvit"))


def test_ctrl_c_ends_in_one_line_and_code_130(monkeypatch, capsys):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nprunex: interrupted\n"
    monkeypatch.setenv("PRUNEX_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        cli.main(["explain"])


def test_a_checkpoint_that_is_not_there_leaves_no_run(here):
    with pytest.raises(PrunexError, match=r"--ckpt_path nope\.ckpt: there is no such file"):
        cli.run(["fit", "--config", "digits/evit.yaml", "--ckpt_path", "nope.ckpt", *QUICK])
    assert not any(here.iterdir())


def test_version(capsys):
    cli.run(["--version"])
    assert capsys.readouterr().out.startswith("prunex ")


def test_a_mistake_ends_in_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fitt"])
    assert stop.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert "unknown command 'fitt': did you mean 'fit'" in streams.err


def test_further_commands_are_dispatched_by_name(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "bench", ("measure", lambda arguments: seen.append(list(arguments)) or 3))
    assert cli.run(["bench", "RUN", "--fast"]) == 3
    assert seen == [["RUN", "--fast"]]
    assert "bench" in cli.usage([])


@pytest.mark.parametrize(
    "name", ["configs/digits/dense.yaml", "./configs/digits/dense.yaml", "digits/dense.yaml", "digits/dense"]
)
def test_packaged_configs_are_found_by_name(here, name):
    with open(cli.find_config(name)) as file:
        assert "ImageClassifier" in file.read()


def test_a_file_of_ones_own_comes_first(here):
    own = here / "configs" / "digits" / "dense.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("mine: 1\n")
    assert cli.find_config("configs/digits/dense.yaml") == "configs/digits/dense.yaml"


def test_an_unknown_config_offers_near_names(here):
    with pytest.raises(PrunexError, match=r"'digits/dens.yaml'.*did you mean 'digits/dense.yaml'"):
        cli.find_config("digits/dens.yaml")


def test_the_default_config_is_added_only_where_none_is_given(here):
    dense = cli.find_config("digits/dense.yaml")
    assert cli.resolve_configs(["--a", "1"], "digits/dense.yaml") == ["--config", dense, "--a", "1"]
    assert cli.resolve_configs(["--config=digits/dense"], "digits/dense.yaml") == [f"--config={dense}"]
    assert cli.resolve_configs(["--config", "digits/dense"], "digits/dense.yaml") == ["--config", dense]
    assert cli.resolve_configs(["--help"], "digits/dense.yaml") == ["--help"]


def test_fit_leaves_a_run_folder_that_can_be_validated(here, capsys):
    assert cli.run(["fit", "--config", "digits/dense.yaml", *QUICK]) == 0
    (run,) = (here / "runs" / "digits-dense").iterdir()
    assert (run / "config.yaml").is_file()
    assert (run / "metrics.csv").is_file()
    assert (here / "recipes" / "weights" / "digits.safetensors").is_file()
    checkpoint = run / "checkpoints" / "last.ckpt"
    cli.run(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)])
    assert "val_accuracy" in capsys.readouterr().out


def test_an_override_reaches_what_is_interpolated_from_it(here):
    config = yaml.safe_load(Path(cli.find_config("digits/dense.yaml")).read_text())
    config["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val_loss", "patience": "${data.init_args.batch_size}"},
        }
    ]
    (here / "own.yaml").write_text(yaml.safe_dump(config))
    cli.run(["fit", "--config", "own.yaml", *QUICK, "--data.batch_size", "7"])
    (run,) = (here / "runs" / "digits-dense").iterdir()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["patience"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.contrast", "0.9"], "contrast=0.9 is not allowed"),
        (["--model.weights", "nowhere.safetensors"], "weights='nowhere.safetensors' is neither a file nor shipped"),
        (["--model.architecture", "vit_tinny"], "unknown architecture 'vit_tinny'"),
    ],
)
def test_mistakes_in_a_config_end_in_one_line_with_nothing_written(here, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", "digits/dense.yaml", *QUICK, *arguments])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("prunex: error: ")
    assert message in last
    assert list(here.iterdir()) == []


def test_the_command_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from prunex.recipes.commands.cli import main; main()", "evit"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("prunex: error: unknown command 'evit'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "--nonsense", "3"], "nonsense"),
        (["fit", "--trainer.max_epochs", "x"], "Given value: x"),
        (["fit", "--data.train_sizes", "5"], "unknown option '--data.train_sizes': did you mean '--data.train_size'"),
        (["fit", "--confg", "x.yaml"], "unknown option '--confg': did you mean '--config'"),
        (["fit", "--model.weight", "x"], "unknown option '--model.weight': did you mean '--model.weights'"),
        (["fit", "--trainer.max_epoch_s", "3"], "did you mean '--trainer.max_epochs'"),
        (["fit", "--config", "imagefolder/evit", "--data.rot", "x"], "did you mean '--data.root'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len([line for line in told if line.startswith("prunex: error:")]) == 1
    assert says in told[-1]


def test_options_inside_a_dict_are_numbers(here, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["fit", "--config", "digits/dense", "--model.model_args.depth", "2", "--print_config"])
    assert stop.value.code == 0
    told = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["model_args"]
    assert (told["depth"], told["patch_size"]) == (2, 8)


def test_methods_prints_the_options_of_those_named(capsys):
    assert cli.run(["methods", "evit", "rollout"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["keep_ratio", "0.7"] in lines
    assert ["shrink_length", "0.0"] in lines
    assert ["head_fusion", "'mean'"] in lines
    with pytest.raises(PrunexError, match="unknown method 'EViT': did you mean 'evit'"):
        cli.run(["methods", "EViT"])
