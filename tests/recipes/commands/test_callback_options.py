"""Options of callbacks on the command line: those of every callback of a config, and what is said of all others."""

from pathlib import Path

import pytest
import yaml

from prunex import PrunexError
from prunex.recipes.commands import cli
from prunex.recipes.commands.callback_options import SHORT, options_of, put_in_config, spelling
from tests.recipes.interrupted import callback
from tests.recipes.test_reading import config_of

EARLY = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "val_loss", "patience": "${trainer.callbacks.1.init_args.stages.0}"},
}
OWN = {"class_path": "tests.recipes.interrupted.Interrupt"}
CALLBACKS = [
    {"class_path": "prunex.recipes.RunReport"},
    callback("TokenPruning", method="evit", keep_ratio=0.7, stages=[1], backbone_lr_scale=1e-3),
    callback("MaskPruning", method="taylor", budget=0.5),
    callback("KeptTokenMonitor", images=2),
    callback("SlimExport"),
    EARLY,
    OWN,
]


@pytest.fixture
def put(tmp_path):
    """What the config says of a class of callbacks after arguments were put into it."""

    def call(kind, *typed, callbacks=CALLBACKS):
        config = str(config_of(tmp_path, callbacks))
        rest = put_in_config(["--config", config, *typed, "--trainer.max_epochs", "3"], tmp_path)
        assert rest == ["--config", config, "--config", rest[3], "--trainer.max_epochs", "3"]
        listed = yaml.safe_load(Path(rest[3]).read_text())["trainer"]["callbacks"]
        assert [c["class_path"] for c in listed] == [c["class_path"] for c in callbacks]
        return next(c["init_args"] for c in listed if c["class_path"].endswith(kind))

    return call


@pytest.mark.parametrize(
    ("kind", "typed", "wanted"),
    [
        ("TokenPruning", ["--pruning.keep_ratio", "0.5"], {"keep_ratio": 0.5, "backbone_lr_scale": 0.001}),
        ("TokenPruning", ["--pruning.keep_ratio=[0.9, 0.5]"], {"keep_ratio": [0.9, 0.5]}),
        ("TokenPruning", ["--pruning.init_args.stages", "[0, 2]"], {"stages": [0, 2], "keep_ratio": 0.7}),
        ("TokenPruning", ["--pruning.options.fuse", "false"], {"options": {"fuse": False}}),
        ("TokenPruning", ["--pruning.method=topk", "--pruning.backbone_lr_scale=1e-2"], {"backbone_lr_scale": 0.01}),
        ("MaskPruning", ["--masks.budget", "2.4GMACs"], {"budget": "2.4GMACs", "method": "taylor"}),
        ("MaskPruning", ["--masks.correct", "refit"], {"correct": "refit", "method": "taylor"}),
        ("SlimExport", ["--slim.formats=[onnx]", "--slim.folder", "out"], {"formats": ["onnx"], "folder": "out"}),
        ("EarlyStopping", ["--EarlyStopping.min_delta", "1e-4"], {"min_delta": 0.0001, "monitor": "val_loss"}),
        ("Interrupt", ["--Interrupt.anything", "3"], {"anything": 3}),  # nothing is imported to know better
    ],
)
def test_every_callback_of_the_config_can_be_reached(put, kind, typed, wanted):
    found = put(kind, *typed)
    assert {name: found[name] for name in wanted} == wanted


def test_a_budget_takes_the_place_of_the_keep_ratio_and_the_other_way_round(put):
    assert "keep_ratio" not in put("TokenPruning", "--pruning.budget", "0.6")
    budget = [callback("TokenPruning", method="evit", budget=0.6)]
    assert put("TokenPruning", "--pruning.keep_ratio=0.5", callbacks=budget) == {"method": "evit", "keep_ratio": 0.5}


def test_another_method_leaves_what_it_does_not_take(put, capsys):
    assert "keep_ratio" not in put("TokenPruning", "--pruning.method", "tome", "--pruning.options.r", "3")
    assert "keep_ratio=0.7 of the config is left out: tome does not take it" in capsys.readouterr().err
    merges = [callback("TokenPruning", method="tome", options={"r": 6})]
    assert "options" not in put("TokenPruning", "--pruning.method=evit", callbacks=merges)


@pytest.mark.parametrize("typed", ["--TokenPruning.keep_ratio", "--TokenPruning.init_args.keep_ratio"])
def test_a_class_is_as_good_as_its_short_name(put, typed):
    assert put("TokenPruning", typed, "0.5")["keep_ratio"] == 0.5


@pytest.mark.parametrize(
    "guess",
    [
        "--trainer.callbacks.keep_ratio", "--keep_ratio", "--trainer.callbacks.TokenPruning.keep_ratio",
        "--trainer.callbacks.1.init_args.keep_ratio",
    ],
)  # fmt: skip
def test_guesses_are_told_the_right_spelling(put, guess):
    with pytest.raises(PrunexError, match=f"^{guess} is an option of a callback .* give --pruning.keep_ratio$"):
        put("TokenPruning", guess, "0.5")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--pruning.keep_rat", "0.5"], "unknown option of TokenPruning .* did you mean 'keep_ratio'"),
        (["--pruning.fuse", "0.5"], "did you mean 'options.fuse'"),
        (["--slim.formts", "x"], "did you mean 'formats'"),
        (["--EarlyStopping.patiense", "3"], "did you mean 'patience'"),
        (["--relevancy.images", "3"], "has no callback RelevancyMonitor .it has RunReport, TokenPruning"),
        (["--trainer.callbacks.budget", "0.5"], "give --pruning.budget or --masks.budget"),
        (["--trainer.callbacks.keep_rate", "0.5"], "did you mean 'pruning.keep_ratio'"),
        (["--pruning.keep_ratio"], "needs a value"),
        (["--pruning.keep_ratio", "[0.5"], "is no YAML value"),
    ],
)
def test_mistakes_are_one_line(tmp_path, typed, says):
    config = str(config_of(tmp_path, CALLBACKS))
    with pytest.raises(PrunexError, match=says):
        put_in_config(["--config", config, *typed], tmp_path)


def test_a_config_without_callbacks_says_so(tmp_path):
    dense = cli.find_config("imagefolder/dense")
    with pytest.raises(PrunexError, match="has no callback TokenPruning .*choose a config that has one"):
        put_in_config(["--config", dense, "--pruning.keep_ratio", "0.5"], tmp_path)


def test_what_is_no_callbacks_option_stays(tmp_path):
    arguments = ["--config", str(config_of(tmp_path, CALLBACKS)), "--data.batch_size", "3", "--nonsense=3"]
    assert put_in_config(arguments, tmp_path) == arguments
    appended = [*arguments, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    assert put_in_config(appended, tmp_path) == appended  # jsonargparse's own way, of one that is added


def test_they_reach_what_is_interpolated_and_what_is_printed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["fit", "--config", str(config_of(tmp_path, CALLBACKS[:-1])), "--pruning.stages=[2]", "--print_config"])
    assert stop.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callbacks[1]["init_args"]["stages"] == [2]
    assert callbacks[5]["init_args"]["patience"] == 2


def test_every_short_name_is_a_callbacks(capsys):
    assert all(options_of(kind) for kind in SHORT.values())
    assert spelling("LearningRateMonitor") == "LearningRateMonitor"


@pytest.mark.parametrize("command", cli.LIGHTNING)
def test_the_first_page_of_help_is_short_and_says_where_the_rest_is(command, capsys):
    assert cli.run([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 60
    assert f"prunex {command} --help all" in page
    assert all(word in page for word in ("--config", "--data.root", "--ckpt_path last", "imagefolder/"))
    assert ("--pruning.keep_ratio" in page) == (command == "fit")


def test_the_whole_help_is_lightnings(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["fit", "--help", "all"])
    assert stop.value.code == 0
    assert "--trainer.gradient_clip_val" in capsys.readouterr().out
