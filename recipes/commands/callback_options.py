"""Options of callbacks on the command line, as in ``--pruning.keep_ratio 0.5``, and near names of wrong ones.

Lightning's command line reaches a callback in a list by replacing the whole list. Here the config's list is taken, the
options are put into it, and it is given as a further config: interpolations and ``--print_config`` see them as if the
file had said so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import yaml
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

import prunex.callbacks
import prunex.recipes
from prunex.errors import PrunexError, unknown
from prunex.files import is_there
from prunex.recipes.commands.options import typed
from prunex.registry import lookup

SHORT = {
    "pruning": "TokenPruning",
    "masks": "MaskPruning",
    "guidance": "RelevancyGuidance",
    "slim": "SlimExport",
    "head": "ExplainableHead",
    "evidence": "HeadMonitor",
    "kept": "KeptTokenMonitor",
    "relevancy": "RelevancyMonitor",
    "units": "UnitMonitor",
    "faithfulness": "FaithfulnessMonitor",
    "report": "RunReport",
    "checkpoint": "ModelCheckpoint",
}
_METHODS_OF = {"TokenPruning": "pruner", "MaskPruning": "pruner", "ExplainableHead": "head"}
_LISTED = "trainer.callbacks"
_TOP = ("config", "print_config", "seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only", "help")
_ROOMS = (prunex.callbacks, prunex.recipes, lightning.pytorch.callbacks)
# Two ways to say one thing: what is typed takes the place of what the config says.
_INSTEAD = {"budget": "keep_ratio", "keep_ratio": "budget"}


def put_in_config(arguments: Sequence[str], folder: str | Path) -> list[str]:
    """Arguments in which options of callbacks have become a config of their own, written into a folder."""
    callbacks, rest, last = _callbacks(arguments), list(arguments), 0
    spelt_out = any(a.partition("=")[0].rstrip("+") == f"--{_LISTED}" for a in arguments)  # jsonargparse's own spelling
    given: list[tuple[str, str, str]] = []
    place = 0
    while place < len(rest):
        name, equals, value = rest[place].partition("=")
        # Whoever writes the list by jsonargparse's own spelling means that.
        meant = None if spelt_out and name.startswith(f"--{_LISTED}") else _meant(name, callbacks)
        length = 1 if equals else 2
        if name in ("--config", "-c"):
            last = place + length
        if meant is None:
            place += 1
            continue
        if place + length > len(rest):
            raise PrunexError(f"{name} needs a value, as in {name}=VALUE")
        given.append((*meant, value if equals else rest[place + 1]))
        del rest[place : place + length]
    if not given:
        return rest
    for kind in dict.fromkeys(kind for kind, _, _ in given):
        _set(_one(kind, callbacks), kind, {option: value for k, option, value in given if k == kind})
    path = Path(folder) / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    # After the other configs, whose callbacks it replaces, and before options of other kinds.
    return [*rest[:last], "--config", str(path), *rest[last:]]


def _callbacks(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The callbacks of the last config that has any, as dicts with a class_path and unresolved interpolations."""
    callbacks: list[dict[str, Any]] = []
    for name, path in _configs(arguments):
        listed = _tree(path, name).get("trainer")
        listed = listed.get("callbacks") if isinstance(listed, dict) else None
        entries: list[Any] = listed if isinstance(listed, list) else [listed]
        entries = [{"class_path": e} if isinstance(e, str) else e for e in entries]
        if all(isinstance(e, dict) and isinstance(e.get("class_path"), str) for e in entries):
            callbacks = entries
    return callbacks


def _configs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Names of the option and paths of the configs that are there."""
    configs = [(name, path or "") for _, name, path in typed(arguments, "--config", "-c")]
    return [(name, path) for name, path in configs if is_there(Path(path), Path.is_file)]


def _tree(path: str, name: str) -> dict[str, Any]:
    try:
        # Unresolved: interpolations are the parser's to follow, when all configs are merged.
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # of YAML and of OmegaConf, about whatever the file holds
        raise PrunexError(f"{name} {path} is no config: {' '.join(str(error).split())[:200]}") from error
    return tree if isinstance(tree, dict) else {}  # type: ignore[return-value]


def _kind(entry: dict[str, Any]) -> str:
    return entry["class_path"].rpartition(".")[2]


def _meant(name: str, callbacks: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """Class and option that an argument means; None where it is no callback's."""
    if not name.startswith("--"):
        return None
    kinds = [_kind(entry) for entry in callbacks]
    head, dot, option = name.removeprefix("--").partition(".")
    if dot and head in (*SHORT, *SHORT.values(), *kinds):
        return SHORT.get(head, head), option.removeprefix("init_args.")
    listed = name.startswith(f"--{_LISTED}.")
    if not listed and (dot or head in _TOP):
        return None
    # A path through the list reaches nothing, and a bare name may be of several: the right spelling is told.
    bare = name.removeprefix("--").rpartition(".")[2]
    known = {kind: options_of(kind, callbacks) or [] for kind in kinds}
    right = [f"--{spelling(kind)}.{bare}" for kind in known if bare in known[kind]]
    if right:
        raise PrunexError(f"{name} is an option of a callback in the config: give {' or '.join(right)}")
    if listed:
        spellings = [f"{spelling(kind)}.{name}" for kind in known for name in known[kind]]
        raise unknown("option of the config's callbacks", bare, spellings)
    return None


def spelling(kind: str) -> str:
    """What a callback is called on the command line: its short name, else its class's.

    >>> spelling("TokenPruning"), spelling("EarlyStopping")
    ('pruning', 'EarlyStopping')
    """
    return next((short for short, name in SHORT.items() if name == kind), kind)


def _one(kind: str, callbacks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of the config's one callback of that class."""
    entries = [entry for entry in callbacks if _kind(entry) == kind]
    if not entries:
        held = ", ".join(map(_kind, callbacks)) or "none"
        raise PrunexError(
            f"--{spelling(kind)}.*: the config has no callback {kind} (it has {held}): choose a config that has one, "
            "or write it into yours"
        )
    if len(entries) > 1:
        raise PrunexError(f"--{spelling(kind)}.*: the config has {len(entries)} {kind}: change them in the config")
    if not isinstance(entries[0].get("init_args"), dict):
        entries[0]["init_args"] = {}
    return entries[0]["init_args"]


def _set(options: dict[str, Any], kind: str, given: dict[str, str]) -> None:
    values = {name: _value(name, text) for name, text in given.items()}
    if values.get("method", options.get("method")) != options.get("method"):
        _other_method(options, kind, str(values["method"]))
    for name, value in values.items():
        # An option may be inside another, as in options.NAME.
        first, *deeper = name.split(".")
        known = options_of(kind, (), str(values.get("method", options.get("method"))))
        if known is not None and first not in known and name not in known:
            raise unknown(f"option of {kind} (--{spelling(kind)}.*)", name, known)
        if _INSTEAD.get(first) in options and _INSTEAD[first] not in values and kind == "TokenPruning":
            del options[_INSTEAD[first]]
        place, key = options, first
        for word in deeper:
            place[key] = place[key] if isinstance(place.get(key), dict) else {}
            place, key = place[key], word
        place[key] = value


def _other_method(options: dict[str, Any], kind: str, method: str) -> None:
    """Leave out what the config says for its own method and the one that was typed does not take."""
    try:
        takes = lookup("pruner", method).options
    except PrunexError:  # an interpolation, or a name that the callback will refuse
        return
    odd: list[str] = [name for name in ("keep_ratio", "stages") if name in options and name not in takes]
    odd += ["options"] if any(name not in takes for name in options.get("options") or ()) else []
    for name in odd:
        print(f"prunex: {name}={options[name]!r} of the config is left out: {method} does not take it", file=sys.stderr)
        del options[name]


def _value(name: str, text: str) -> Any:
    """A typed value as YAML reads it, as a config's would be."""
    try:
        # As one entry of a mapping: of a bare number OmegaConf makes no config.
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore
    except Exception as error:  # of YAML's and OmegaConf's many
        raise PrunexError(f"{name}={text[:100]!r} is no YAML value: put text into quotes") from error


def options_of(kind: str, callbacks: Iterable[dict[str, Any]] = (), method: str | None = None) -> list[str] | None:
    """Names of a callback's options, those of its pruning method as ``options.NAME``; None where they are not known.

    ``kind`` is a class's name, which may have a longer path among the config's callbacks.

    >>> options_of("SlimExport")
    ['folder', 'monitor', 'mode', 'formats', 'model', 'mean', 'std']
    """
    # A class of the user's own is known by its path alone.
    paths = [entry["class_path"] for entry in callbacks if _kind(entry) == kind] or [kind]
    names = parameters(paths[0])
    if names is not None and method and kind in _METHODS_OF:
        with suppress(PrunexError):  # the callback will refuse the method
            names = names + [f"options.{name}" for name in lookup(_METHODS_OF[kind], method).options]
    return names


def parameters(path: str) -> list[str] | None:
    """Names that a class takes, by its path or, of Lightning's and ours, its name; None where that is not known."""
    room, _, name = path.rpartition(".")
    rooms: Sequence[Any] = _ROOMS
    if room:  # nothing is imported for this
        rooms = [sys.modules[room]] if room in sys.modules else []
    made = next((getattr(r, name) for r in rooms if inspect.isclass(getattr(r, name, None))), None)
    if made is None:
        return None
    signature = inspect.signature(made).parameters
    if made is prunex.callbacks.ExplainableHead:  # what it takes beside is the head's own, for scripts alone
        return [name for name, p in signature.items() if p.kind is not p.VAR_KEYWORD]
    return None if any(p.kind is p.VAR_KEYWORD for p in signature.values()) else list(signature)


def near_name(arguments: Sequence[str]) -> PrunexError | None:
    """The first option that nobody knows, with near names; None where all are known, or nothing can be said."""
    trees = [_tree(path, name) for name, path in _configs(arguments)]
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        name = argument.removeprefix("--").partition("=")[0].rstrip("+")
        head, dot, option = name.partition(".")
        if head not in _TOP and head not in SHORT:
            spellings = [*_TOP, *(f"{short}.*" for short in SHORT)]
            return unknown("option", f"--{head}", [f"--{spelt}" for spelt in spellings])
        # The class that the last config names says which options there are.
        paths = [str(tree[head].get("class_path")) for tree in trees if isinstance(tree.get(head), dict)]
        known = list(inspect.signature(Trainer).parameters) if head == "trainer" else None
        known = parameters(paths[-1]) if known is None and paths and head in ("model", "data") else known
        first = option.removeprefix("init_args.").partition(".")[0]
        if dot and known is not None and first not in (*known, "class_path", "init_args", "dict_kwargs"):
            return unknown("option", f"--{head}.{first}", [f"--{head}.{n}" for n in known])
    return None
