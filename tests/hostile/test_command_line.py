"""Command lines and configs that make no sense end in one line and exit code 2; checkpoints never name code to run."""

import pickle
import sys
from functools import wraps
from inspect import signature

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

import prunex
from prunex import PrunexError
from prunex.recipes.commands import cli
from prunex.recipes.commands.explain import read_options
from prunex.recipes.runs import open_model, read_run
from tests.hostile.kinds import _NoTraining
from tests.hostile.room import Canary


def line(room, *arguments):
    """The one line that a command line ends in."""
    with _NoTraining(), pytest.raises(PrunexError) as caught:
        room.command(list(map(str, arguments)))
    return str(caught.value)


@pytest.mark.parametrize("command", ["explain", "score", "bench", "export", "report"])
@pytest.mark.parametrize("name", ["a" * 5000, "x\x00y", "né\ud800", "nowhere", "", "/dev/null"])
def test_names_of_any_length_and_letters(room, command, name):
    more = ["--images", room.good / "photos"] if command == "explain" else []
    assert line(room, command, name, *more).startswith("prunex: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "a" * 5000],
        ["fit", "--trainer.accelerator", "bogus"],
        ["fit", "--trainer.devices", "-7"],
        ["fit", "--trainer.precision", "3"],
        ["fit", "--trainer.callbacks", "os.system"],
        ["fit", "--model", "os.system"],
        ["fit", "--data", "[" * 2000],
        ["fit", "--trainer.logger", "{class_path: os.system}"],
        ["fit", "--\ud800", "x"],
        ["fit", "--data.batch_size", "${oc.env:NOT_THERE}"],
        ["fit", "--config", "digits/dense", "--config", "/dev/null", "--model.num_classes", "0"],
    ],
)
def test_options_of_fit_that_make_no_sense(room, arguments):
    assert len(line(room, *arguments)) < 3200


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000, "\t", "model: !!python/object/apply:os.mkdir [CANARY]", "model: !!python/name:os.system",
        "seed_everything: 2001-99-99", "seed_everything: 0b_", "model: ${model}", "model: 3", "- 1", "\xff\x00",
        "trainer: {max_epochs: [1]}", "data: {class_path: os.system}",
        "model: {class_path: tests.hostile.nothing.Here}",
    ],
)  # fmt: skip
def test_configs_that_are_none(room, text):
    path = room.work / "config.yaml"
    path.write_bytes(text.replace("CANARY", str(room.canary)).encode("latin-1"))
    said = line(room, "fit", "--config", path)
    assert said.startswith("prunex: error: ")
    assert len(said) < 3200


def test_the_traceback_is_there_for_whoever_wants_it(room, monkeypatch):
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(PrunexError, match="invalid accelerator name"):
        cli.main(["fit", "--trainer.accelerator", "bogus"])


@pytest.mark.parametrize(
    "text",
    ["[" * 2000, "model: 2001-99-99", "model: 0b_", "model: 3\ndata: 4", "model: {}\ndata: {}", b"\xff\xfe\x00",
     "model: !!python/object/apply:os.mkdir [CANARY]", ""],
)  # fmt: skip
def test_run_folders_whose_config_is_none(room, text):
    text = text.replace("CANARY", str(room.canary)).encode() if isinstance(text, str) else text
    (room.work / "config.yaml").write_bytes(text)
    with pytest.raises(PrunexError, match="is damaged|has no model and data"):
        read_run(room.work)


@pytest.mark.parametrize("value", ["2001-99-99", "0b_", "[" * 2000, "!!python/name:os.system", "&a [*a", "\x00"])
def test_options_that_yaml_cannot_read(value):
    with pytest.raises(PrunexError, match="no YAML value"):
        read_options([f"rollout.start_layer={value}"])


def test_a_number_that_torch_cannot_hold(room):
    maps = [prunex.explain("integrated_gradients", room.model, room.images, baseline=b).maps for b in (10**20, 1e20)]
    assert torch.equal(torch.nan_to_num(maps[0]), torch.nan_to_num(maps[1]))


# --- checkpoints


def saved(room, **more):
    """A checkpoint of a dense run, with other hyperparameters."""
    checkpoint = torch.load(room.good / "dense.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= more
    path = room.work / "x.ckpt"
    torch.save(checkpoint, path)
    return path


EVIL = {"_class_path": "tests.hostile.evil.Evil", "_instantiator": "lightning.pytorch.cli.instantiate_module"}


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_runs_code_is_refused(room, command):
    path = room.work / "x.ckpt"
    for content in (Canary(room.canary), {"state_dict": {}, "hyper_parameters": Canary(room.canary)}):
        for save in (torch.save, lambda held, to: to.write_bytes(pickle.dumps(held))):
            if command != "fit" and save is not torch.save:  # what they share is tried once
                continue
            save(content, path)
            assert "no checkpoint that loads safely" in line(
                room, command, "--config", config(room), "--ckpt_path", path
            )


def config(room):
    """That of a run of the tiny model."""
    return room.good / "run" / "version_0" / "config.yaml"


reads_options = pytest.mark.skipif(
    not hasattr(LightningCLI, "_parse_ckpt_path"), reason="this Lightning's CLI reads no options from a checkpoint"
)


@reads_options
def test_a_checkpoint_does_not_choose_the_class(room, monkeypatch):
    seen = []
    validate = wraps(Trainer.validate)(lambda self, model, *args, **kwargs: seen.append((model, kwargs)))
    monkeypatch.setattr(Trainer, "validate", validate)
    far = {"pretrained": True, "weights": "nowhere", "architecture": "hf-hub:no/thing", "model_args": {"depth": 10**9}}
    path = saved(room, **EVIL, **far, num_classes=10**12, learning_rate=0.25)
    room.command(["validate", "--config", str(config(room)), "--ckpt_path", str(path)])
    ((model, options),) = seen
    assert type(model).__name__ == "ImageClassifier"
    assert model.hparams["learning_rate"] == 0.25  # what is plain is taken as ever
    assert options.get("weights_only", True) is True
    assert "tests.hostile.evil" not in sys.modules


@reads_options
@pytest.mark.parametrize(
    "more",
    [{"class_path": "tests.hostile.evil.Evil"}, {"model_args": {"x": [{"class_path": "tests.hostile.evil.Evil"}]}}],
)
def test_a_checkpoint_names_no_classes_further_down(room, more):
    path = saved(room, **more)
    assert "names classes to build" in line(room, "validate", "--config", config(room), "--ckpt_path", path)


def test_an_address_is_not_downloaded_and_unpickled(room):
    for address in ("http://localhost:1/x.ckpt", "https://localhost:1/x.ckpt", "s3://bucket/x.ckpt"):
        assert "is an address" in line(room, "validate", "--config", config(room), "--ckpt_path", address)


@pytest.mark.skipif(
    "weights_only" not in signature(Trainer.validate).parameters, reason="this Lightning has no --weights_only"
)
def test_weights_only_false_is_the_users_own_word(room, monkeypatch):
    seen = []
    validate = wraps(Trainer.validate)(lambda self, model, *args, **kwargs: seen.append(kwargs))
    monkeypatch.setattr(Trainer, "validate", validate)
    path = room.work / "x.ckpt"
    torch.save({"state_dict": {}, "anything": torch.nn.Linear(1, 1)}, path)
    more = ["--config", str(config(room)), "--ckpt_path", str(path), "--weights_only", "false"]
    room.command(["validate", *more])
    assert seen[0]["weights_only"] is False


def run_of(room, checkpoint):
    """A run folder without slim/, around a checkpoint."""
    run = room.work / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config(room).read_text())
    checkpoint.rename(run / "checkpoints" / "x.ckpt")
    return run


@pytest.mark.parametrize(
    "more",
    [
        EVIL,
        {"_instantiator": "os.mkdir"},
        {"pretrained": True, "weights": "nowhere.safetensors", "architecture": "hf-hub:nobody/nothing"},
    ],
)
def test_a_runs_checkpoint_builds_the_configs_model_and_looks_for_no_other_weights(room, monkeypatch, more):
    import timm

    real = timm.create_model

    def create(name, pretrained=False, **args):
        assert not pretrained
        assert ":" not in name
        return real(name, pretrained=pretrained, **args)

    monkeypatch.setattr(timm, "create_model", create)
    model = open_model(run_of(room, saved(room, **more)))
    assert model.num_classes == 5


def test_a_runs_checkpoint_reads_no_other_file(room):
    (room.work / "evil.ckpt").write_bytes(pickle.dumps(Canary(room.canary)))
    path = saved(room, model_args={"img_size": 32, "checkpoint_path": str(room.work / "evil.ckpt")})
    with pytest.raises(PrunexError, match="model_args=checkpoint_path is not allowed"):
        open_model(run_of(room, path))


def test_a_slim_folder_is_opened_without_reading_any_config_yaml(room):
    """Whatever a config.yaml beside it says."""
    run = room.copy("run") / "version_0"
    evil = {"class_path": "tests.hostile.evil.Evil"}
    for folder in (run, run / "slim"):
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": evil, "data": evil}))
    for where in (run, run / "slim"):
        assert open_model(where).num_classes == 5
    photos = room.good / "photos" / "val"
    more = ["--methods", "rollout", "--device", "cpu", "--out", "out"]
    room.command(["explain", str(run), "--images", str(photos), *more])
    assert "tests.hostile.evil" not in sys.modules
