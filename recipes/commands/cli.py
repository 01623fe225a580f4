"""The ``prunex`` command: Lightning's own subcommands, and room for others beside them."""

import errno
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prunex.callbacks.checkpoints import read_checkpoint
from prunex.errors import PrunexError, unknown
from prunex.recipes.commands.own import COMMANDS
from prunex.recipes.commands.usage import command_usage, usage
from prunex.recipes.runs import instantiate, run_of
from prunex.untrusted import is_there

LIGHTNING = ("fit", "validate", "test", "predict")
DEFAULT_CONFIG = "digits/dynamicvit.yaml"
DEBUG = "PRUNEX_DEBUG"
EVERYTHING = ["--help", "all"]


def packaged_configs() -> dict[str, Traversable]:
    """The ready-made runs by name, as in ``"digits/dense.yaml"``.

    >>> "digits/dense.yaml" in packaged_configs()
    True
    """
    root = files("prunex.configs")
    return {
        f"{folder.name}/{file.name}": file
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    }


def find_config(name: str) -> str:
    """A path to a config file: the user's own where it exists, else the packaged one of that name.

    Args:
        name: A path, or a packaged name with or without the leading ``configs/`` and the ``.yaml``.

    Returns:
        A path that can be opened.

    Raises:
        PrunexError: If there is neither.
    """
    if is_there(Path(name), Path.is_file):
        return name
    known = packaged_configs()
    short = Path(name).as_posix().removeprefix("./").removeprefix("configs/")
    for candidate in (short, f"{short}.yaml"):
        if candidate in known:
            with as_file(known[candidate]) as path:
                return str(path)
    raise unknown("config (no such file either)", name, known)


def resolve_configs(arguments: Sequence[str], default: str | None = None) -> list[str]:
    """Arguments in which every ``--config`` is a path that exists; the default is added where there is none."""
    resolved, given = list(arguments), False
    for place, argument in enumerate(resolved):
        if argument in ("--config", "-c") and place + 1 < len(resolved):
            resolved[place + 1], given = find_config(resolved[place + 1]), True
        elif argument.startswith("--config="):
            resolved[place], given = "--config=" + find_config(argument.removeprefix("--config=")), True
    if (
        default is not None
        and not given
        and not any(a in ("-h", "--help") or a.startswith("--help=") for a in resolved)
    ):
        resolved[:0] = ["--config", find_config(default)]
    return resolved


def run_lightning(arguments: Sequence[str]) -> int:
    """``fit``, ``validate``, ``test`` or ``predict`` with a config, see ``prunex fit --help``."""
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    from prunex.callbacks import ExactResume
    from prunex.recipes.commands.callback_options import put_in_config
    from prunex.recipes.commands.predictions import FILE, PredictionTable
    from prunex.recipes.commands.resuming import SaveConfig, go_on
    from prunex.recipes.modules.backbone import Restored

    if arguments[1:] == EVERYTHING:
        arguments = [arguments[0], "--help"]
    subcommand, rest = arguments[0], resolve_configs(arguments[1:], DEFAULT_CONFIG)
    out = take_out(rest) if subcommand == "predict" else None

    class CLI(LightningCLI):
        """LightningCLI that finds the last run, trusts its configs but no checkpoint, and tells mistakes in one line.

        A model without a number of classes gets the data's.
        """

        def parse_arguments(self, parser: Any, args: Any) -> None:
            with mistakes(rest):
                super().parse_arguments(parser, args)
            config = self.config[self.config.subcommand]
            if config.get("ckpt_path") and config.get("weights_only") is None:
                check_checkpoint(str(config.ckpt_path))
                if "weights_only" in config:  # Lightning's own, from 2.6 on
                    config["weights_only"] = True

        def _parse_ckpt_path(self) -> None:
            # A training that goes on is asked for with the options that it had, or refused: it would quietly get
            # others, and a teacher without its pretrained weights. Lightning's would also build any class a file names.
            if subcommand == "fit":
                return
            config = self.config[self.config.subcommand]
            model, path = config.get("model"), config.get("ckpt_path")
            trusted = config.get("weights_only") is False
            saved = {} if model is None or not path or trusted else plain_hyperparameters(str(path))
            if model is not None and str(model.get("class_path")).startswith("prunex."):
                # The config says which model; whatever the file says, no other weights are looked for.
                saved = {k: v for k, v in saved.items() if k not in ("architecture", "model_args", "num_classes")}
                saved |= {k: v for k, v in (("weights", None), ("pretrained", False)) if k in saved}
            if saved:
                told = {"model": {"class_path": model.class_path, "dict_kwargs": saved}}
                with mistakes():
                    self.config = self.parser.parse_object({self.config.subcommand: told}, self.config)

        def before_instantiate_classes(self) -> None:
            config, training = self.config[subcommand], subcommand == "fit"
            if config.get("ckpt_path") == "last":
                self.save_config_kwargs["resumed"] = go_on(config, training)
            if not training:
                keep_out(config, scratch)
            if subcommand == "predict":
                config["return_predictions"] = False  # the table is what is wanted
                run = run_of(Path(config["ckpt_path"])) if config.get("ckpt_path") else None
                self.trainer_defaults["callbacks"] = [ExactResume(), PredictionTable(out or (run or Path()) / FILE)]

        def instantiate_classes(self) -> None:
            config = self.config[self.subcommand] if self.subcommand else self.config
            arguments = config.model.get("init_args") or {}
            with mistakes():
                if "num_classes" in arguments and arguments["num_classes"] is None and config.get("data") is not None:
                    data = instantiate(LightningDataModule, config.data.as_dict())
                    arguments["num_classes"] = getattr(data, "num_classes", None)
                follow_size(config, rest)
                super().instantiate_classes()
                if isinstance(self.model, Restored):  # now, before the run has a folder
                    self.model.check_size(self.datamodule)
                    if subcommand == "fit" and not config.get("ckpt_path"):
                        self.model.check_start()

    import prunex.callbacks
    import prunex.recipes  # noqa: F401  (imported so that configs may use short class names)

    deny_imports()
    # Without this an override such as --model.init_args.x would not reach a callback's ${model.init_args.x}.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    with TemporaryDirectory(prefix="prunex-") as scratch:
        rest = put_in_config(rest, scratch)
        CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig if subcommand == "fit" else None,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "plugins": {"class_path": "prunex.callbacks.SafeCheckpointIO"},
                "callbacks": ExactResume(),
            },
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "prog": "prunex",
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in LIGHTNING},
            },
            args=[subcommand, *rest],
        )
    return 0


def follow_size(config: Any, arguments: Sequence[str]) -> None:
    """Where the command line gives one of two sizes, that of the data's images or the model's, the other follows.

    Args:
        config: Of one subcommand, changed in place.
        arguments: What was typed.
    """
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


def take_out(arguments: list[str]) -> str | None:
    """Take ``--out FILE`` from the arguments of predict, which Lightning does not know.

    >>> arguments = ["--out", "x.csv", "--data.root", "photos"]
    >>> take_out(arguments), arguments
    ('x.csv', ['--data.root', 'photos'])
    """
    found = None
    for place in reversed([i for i, a in enumerate(arguments) if a == "--out" or a.startswith("--out=")]):
        name, equals, value = arguments[place].partition("=")
        if not equals and place + 1 == len(arguments):
            raise PrunexError("--out needs the name of a file, such as predictions.csv")
        found = value if equals else arguments[place + 1]
        del arguments[place : place + (1 if equals else 2)]
    return found


def keep_out(config: Any, scratch: str) -> None:
    """Have a run that is only looked at stay as it is: what loggers and callbacks write goes nowhere.

    Args:
        config: Of validate, test or predict, changed in place.
        scratch: A folder that is removed afterwards.
    """
    config.trainer["logger"] = False
    config.trainer["default_root_dir"] = scratch
    if not config.get("ckpt_path"):
        print("prunex: without --ckpt_path the model is what the config starts from", file=sys.stderr)


@contextmanager
def mistakes(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Whatever parsing a config and building its parts raise, as one line: it is what the config says.

    Args:
        arguments: What was typed; an option among them that nobody knows is named first.
    """
    from prunex.recipes.commands.callback_options import near_name

    try:
        yield
    except Exception as error:
        mistake = find_mistake(error) or near_name(arguments) or parse_mistake(error)
        raise mistake or PrunexError(
            f"the config cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]}): "
            f"correct it, or set {DEBUG}=1 to see where"
        ) from error


def deny_imports() -> None:
    """Have jsonargparse refuse configs that name parts of Python which run commands or touch files, where it can."""
    if "import_path_denylist" in inspect.signature(set_parsing_settings).parameters:
        set_parsing_settings(import_path_denylist=[])  # its own list, which otherwise only warns


def check_checkpoint(path: str) -> None:
    """Refuse what Lightning would unpickle: with ``--weights_only false`` it does so all the same.

    Raises:
        PrunexError: For an address, a file that is not there, or one that is no checkpoint of plain values.
    """
    if "://" in path:
        raise PrunexError(
            f"--ckpt_path {path} is an address, and what is downloaded could run code: download it, and give the file"
        )
    if is_there(Path(path), Path.is_file):
        read_checkpoint(path)
    elif path not in ("last", "best", "hpc", "registry") and not path.startswith("registry:"):
        raise PrunexError(f"--ckpt_path {path[:200]}: there is no such file; give a checkpoint, or last")


def plain_hyperparameters(path: str) -> dict[str, Any]:
    """A checkpoint's hyperparameters but those that name classes.

    Raises:
        PrunexError: For a file that is no checkpoint, or a value that names a class further down.
    """
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


def run(arguments: Sequence[str]) -> int:
    """Dispatch on the first argument.

    Args:
        arguments: As on the command line, without the program's name.

    Returns:
        The exit code.

    Raises:
        PrunexError: If the user made a mistake.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(packaged_configs()))
        return 0
    command = arguments[0]
    if command in LIGHTNING and {"-h", "--help"} & set(arguments) and arguments[1:] != EVERYTHING:
        print(command_usage(command, packaged_configs()))
        return 0
    for argument in arguments:
        _check_argument(argument)
    if command == "--version":
        import prunex

        print(f"prunex {prunex.__version__}")
        return 0
    if command in LIGHTNING:
        return run_lightning(arguments)
    if command in COMMANDS:
        deny_imports()
        return COMMANDS[command][1](arguments[1:])
    raise unknown("command", command, [*LIGHTNING, *COMMANDS])


def _check_argument(argument: str) -> None:
    """Refuse what no operating system hands over, but whoever calls :func:`main` might."""
    try:
        fine = b"\0" not in os.fsencode(argument)
    except UnicodeEncodeError:
        fine = False
    if not fine:
        raise PrunexError(f"the argument {argument[:100]!r} is no text that a command line can hold: leave it out")


def find_mistake(error: BaseException | None) -> PrunexError | None:
    """The user's mistake behind an error; jsonargparse raises its own over whatever a constructor raised."""
    while error is not None and not isinstance(error, PrunexError):
        error = error.__cause__ or error.__context__
    return error


def parse_mistake(error: BaseException) -> PrunexError | None:
    """What jsonargparse found wrong with an option, as one line; None for any other error."""
    if type(error).__name__ not in ("ArgumentError", "ParserError"):
        return None
    lines = [line.strip(" -\t") for line in str(error).splitlines()]
    noise = ("Subtypes:", "Errors:", "Given value", "Expected a <class 'None")
    told = [x for x in lines if x and not x.startswith(noise)]
    given = [x for x in lines if x.startswith("Given value:")][-1:]
    return PrunexError("; ".join([*told[:4], *given])[:400] + "; see prunex fit --help")


def file_mistake(error: BaseException) -> PrunexError | None:
    """What the file system refused, naming the file; None for any other error."""
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    if error.filename is None and not full:
        return None
    advice = "; make room or choose another folder, then go on with the same command and --ckpt_path last"
    return PrunexError(f"{str(error.filename or 'a file')[:200]}: {error.strerror}{advice if full else ''}")


def misconfigured(error: BaseException) -> PrunexError | None:
    """What Lightning says about how it is used, such as data without a loader for this command, as one line."""
    return PrunexError(str(error)[:400]) if type(error).__name__ == "MisconfigurationException" else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake ends in one line on stderr and exit code 2, never in a traceback.

    So do a file system's refusals. With the environment variable ``PRUNEX_DEBUG`` they have their tracebacks.
    """
    try:
        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except Exception as error:
        mistake = find_mistake(error) or parse_mistake(error) or file_mistake(error) or misconfigured(error)
        if mistake is None or os.environ.get(DEBUG):
            raise
        print(f"prunex: error: {mistake}", file=sys.stderr)
        code = 2
    except SIGTERMException:  # a SystemExit of code 0, which a scheduler would take for success
        print("prunex: terminated; the same command with --ckpt_path last goes on", file=sys.stderr)
        code = 143
    except KeyboardInterrupt:
        if os.environ.get(DEBUG):
            raise
        print("\nprunex: interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)
