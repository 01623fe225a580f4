"""``prunex fit``, ``validate``, ``test`` and ``predict``: Lightning's command line, made safe and told in one line."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

import prunex.recipes
from prunex.callbacks import ExactResume
from prunex.callbacks.checkpoints import read_checkpoint
from prunex.errors import PrunexError
from prunex.files import is_there
from prunex.recipes.commands.callback_options import near_name, put_in_config
from prunex.recipes.commands.mistakes import DEBUG, find_mistake, parse_mistake
from prunex.recipes.commands.predictions import FILE, PredictionTable
from prunex.recipes.commands.resuming import SaveConfig, go_on
from prunex.recipes.given import check_checkpoint_path
from prunex.recipes.modules.training import Restored, without_files
from prunex.recipes.runs import deny_imports, instantiate, run_of


def run_cli(command: str, arguments: Sequence[str], out: str | None = None) -> int:
    """Run fit, validate, test or predict with what was typed after it; ``out`` is the file of predict's table."""
    for name in prunex.recipes.__all__:
        getattr(prunex.recipes, name)  # configs may use short class names, which are those of classes that exist
    deny_imports()
    # Without this an override such as --model.init_args.x would not reach a callback's ${model.init_args.x}.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    # Options of callbacks become a config, and what a run that is looked at logs is thrown away.
    with TemporaryDirectory(prefix="prunex-") as scratch:
        CommandLine(command, put_in_config(arguments, scratch), out, scratch)
    return 0


class CommandLine(LightningCLI):
    """LightningCLI that finds the last run, trusts its configs but no checkpoint, and tells mistakes in one line."""

    def __init__(self, command: str, typed: list[str], out: str | None, scratch: str) -> None:
        self.command, self.typed, self.out, self.scratch = command, typed, out, scratch
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "plugins": {"class_path": "prunex.callbacks.SafeCheckpointIO"},
                "callbacks": ExactResume(),
            },
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "prog": "prunex",
                # jsonargparse would print its usage over many lines and leave by itself.
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in ("fit", "validate", "test", "predict")},
            },
            args=[command, *typed],
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Lightning's, with mistakes told in one line and the checkpoint looked at."""
        with mistakes(self.typed):
            super().parse_arguments(parser, args)
        config = self.config[self.command]
        if config.get("ckpt_path") and config.get("weights_only") is None:
            # Lightning would unpickle it, and does so with --weights_only false.
            check_checkpoint_path(str(config.ckpt_path))
            if is_there(Path(config.ckpt_path), Path.is_file):
                read_checkpoint(str(config.ckpt_path))
            if "weights_only" in config:  # Lightning's own, from 2.6 on
                config["weights_only"] = True

    def _parse_ckpt_path(self) -> None:
        """Take plain hyperparameters of a checkpoint; Lightning's own would build any class that the file names."""
        # A training that goes on is asked for with the options that it had, or refused: it would quietly get
        # others, and a teacher without its pretrained weights.
        if self.command == "fit":
            return
        config = self.config[self.command]
        model, path = config.get("model"), config.get("ckpt_path")
        if model is None or not path or config.get("weights_only") is False:
            return
        saved = plain_hyperparameters(str(path))
        if str(model.get("class_path")).startswith("prunex."):
            # The config says which model; whatever the file says, no other weights are looked for.
            saved = {k: v for k, v in saved.items() if k not in ("architecture", "model_args", "num_classes")}
            saved = without_files(saved)
        if saved:
            options = {"model": {"class_path": model.class_path, "dict_kwargs": saved}}
            with mistakes():
                self.config = self.parser.parse_object({self.command: options}, self.config)

    def before_instantiate_classes(self) -> None:
        """Find the last run, and have a run that is only looked at stay as it is."""
        config, training = self.config[self.command], self.command == "fit"
        # The first logger numbers the runs, of which the last is meant.
        if config.get("ckpt_path") == "last":
            self.save_config_kwargs["resumed"] = go_on(config, training)
        if not training:
            # A run that is only looked at stays as it is: what loggers and callbacks write goes nowhere.
            config.trainer["logger"] = False
            config.trainer["default_root_dir"] = self.scratch
            if not config.get("ckpt_path"):
                print("prunex: without --ckpt_path the model is what the config starts from", file=sys.stderr)
        if self.command == "predict":
            config["return_predictions"] = False  # the table is what is wanted
            run = run_of(Path(config["ckpt_path"])) if config.get("ckpt_path") else None
            table = PredictionTable(self.out or (run or Path()) / FILE)
            self.trainer_defaults["callbacks"] = [ExactResume(), table]

    def instantiate_classes(self) -> None:
        """Build the parts, the model with the data's number of classes and size of images."""
        config = self.config[self.command]
        arguments = config.model.get("init_args") or {}
        with mistakes():
            if "num_classes" in arguments and arguments["num_classes"] is None and config.get("data") is not None:
                data = instantiate(LightningDataModule, config.data.as_dict())
                arguments["num_classes"] = getattr(data, "num_classes", None)
            # The command line gives one size, and the config has two.
            follow_size(config, self.typed)
            super().instantiate_classes()
            if isinstance(self.model, Restored):  # now, before the run has a folder
                self.model.check_size(self.datamodule)
                if self.command == "fit" and not config.get("ckpt_path"):
                    self.model.check_start()


def follow_size(config: Any, arguments: Sequence[str]) -> None:
    """Where the command line gives one of two sizes, that of the data's images or the model's, the other follows."""
    data, model = ((config.get(part) or {}).get("init_args") or {} for part in ("data", "model"))
    if "image_size" not in data or "model_args" not in model:
        return
    typed = [argument.partition("=")[0] for argument in arguments]
    by_data = any(name.startswith("--data.") and name.endswith(".image_size") for name in typed)
    by_model = any(name.startswith("--model.") and name.endswith(".img_size") for name in typed)
    sizes = dict(model["model_args"] or {})
    if by_data and not by_model:
        model["model_args"] = {**sizes, "img_size": data["image_size"]}
    elif by_model and not by_data and isinstance(sizes.get("img_size"), int):
        data["image_size"] = sizes["img_size"]


@contextmanager
def mistakes(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Whatever parsing a config and building its parts raise, as one line; an option that nobody knows goes first."""
    try:
        yield
    except Exception as error:
        mistake = find_mistake(error) or near_name(arguments) or parse_mistake(error)
        raise mistake or PrunexError(
            f"the config cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]}): "
            f"correct it, or set {DEBUG}=1 to see where"
        ) from error


def plain_hyperparameters(path: str) -> dict[str, Any]:
    """A checkpoint's hyperparameters but those that name classes; one that does so further down is refused."""
    if not is_there(Path(path), Path.is_file):
        return {}
    checkpoint = read_checkpoint(path)
    saved = (checkpoint.get("hyper_parameters") or {}) if isinstance(checkpoint, dict) else None
    if not isinstance(saved, dict):
        raise PrunexError(f"{path} is no checkpoint of Lightning's: it has no dict of hyper_parameters")
    plain = {k: v for k, v in saved.items() if isinstance(k, str) and not k.startswith("_")}
    if _names_a_class(plain):
        raise PrunexError(f"{path} names classes to build in its hyper_parameters: give them in the config instead")
    return plain


def _names_a_class(value: Any) -> bool:
    if isinstance(value, dict):
        return "class_path" in value or any(_names_a_class(v) for v in value.values())
    return isinstance(value, list | tuple) and any(_names_a_class(v) for v in value)
