"""``prunex completion``: a script with which a shell completes commands, options, configs and methods."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

from prunex.recipes.commands.cli import LIGHTNING, packaged_configs, run
from prunex.recipes.commands.listing import declared
from prunex.recipes.commands.own import COMMANDS

# Options as help texts name them, but for patterns such as --masks.*.
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z][\w-]*)*(?![\w.*-])")
# What follows these options is one of a kind's methods.
_METHODS = {"--methods": "explainer", "--relevancy.methods": "explainer", "--pruning.method": "pruner"}

_BASH = """\
# prunex: completion; in ~/.bashrc: source <(prunex completion bash)
_prunex() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then words="%(commands)s"
  else case "$before" in
%(values)s    *) case "$word" in -*) case "${COMP_WORDS[1]}" in
%(options)s      esac ;; esac ;;
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _prunex prunex
"""
_ZSH = """\
#compdef prunex
# prunex: completion; in ~/.zshrc: source <(prunex completion zsh)
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def completion(args: Any) -> int:
    """Do what ``prunex completion`` was asked for, and give back the exit code."""
    print(script(args.shell), end="")
    return 0


def script(shell: str) -> str:
    """The script of a shell: tables of what there is, so that nothing is started at a key."""
    options = {command: _options(command) for command in (*LIGHTNING, *COMMANDS)}
    methods: dict[str, list[str]] = {}
    for entry in declared():
        methods.setdefault(entry.kind, []).append(entry.name)
    values = {option: methods[kind] for option, kind in _METHODS.items()}
    configs = sorted(name.removesuffix(".yaml") for name in packaged_configs())
    values |= {"--config": configs, "-c": configs}
    if shell == "fish":
        return "".join(_fish(options, values))
    named: dict[str, Any] = {"commands": " ".join(options)}
    for name, table, indent in (("values", values, "    "), ("options", options, "      ")):
        named[name] = "".join(f'{indent}{key}) words="{" ".join(words)}" ;;\n' for key, words in table.items())
    return (_ZSH if shell == "zsh" else "") + _BASH % named


def _options(command: str) -> list[str]:
    help_text = io.StringIO()
    with redirect_stdout(help_text), suppress(SystemExit):  # argparse leaves when it has helped
        run([command, "--help"])
    return sorted({*_OPTION.findall(help_text.getvalue()), "--help"})


def _fish(options: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> Iterable[str]:
    yield "# prunex: completion; in ~/.config/fish/config.fish: prunex completion fish | source\n"
    yield f"complete -c prunex -n __fish_use_subcommand -a '{' '.join(options)}'\n"
    for command, names in options.items():
        for name in names:
            rest = f" -x -a '{' '.join(values[name])}'" if name in values else ""
            yield f"complete -c prunex -n '__fish_seen_subcommand_from {command}' -l {name[2:]}{rest}\n"
