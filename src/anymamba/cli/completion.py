"""`anymamba completion SHELL`: prints a script with which the shell completes verbs, flags and their values."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from anymamba.cli.app import MODULES, VERBS
from anymamba.console.flags import read_flags
from anymamba.console.help import Flag, flags_in, help_text
from anymamba.models.presets import PRESETS

FULL_HELP = {"train": "--help-all", "dna": "--help-all"}
"""The flag that prints all options of a verb, where it is not --help."""
VALUES = {("train", "--preset"): list(PRESETS)}
"""Values that the help does not list."""
WITHOUT_FLAGS = ("completion", "lm-eval")
OTHERS = ["--help", "--version"]
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that makes a shell complete verbs, flags, their values and file names. To install it:

    bash: anymamba completion bash > ~/.local/share/bash-completion/completions/anymamba
    zsh: anymamba completion zsh > ~/.anymamba.zsh; echo 'source ~/.anymamba.zsh' >> ~/.zshrc
    fish: anymamba completion fish > ~/.config/fish/completions/anymamba.fish
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba completion`."""
    options = read_flags(CompletionOptions, "completion", arguments)
    flags = {verb: verb_flags(verb) for verb in VERBS}
    print(fish(flags) if options.shell == "fish" else bash(flags, options.shell == "zsh"))


def verb_flags(verb: str) -> list[Flag]:
    """The flags of a verb; none for one without any, or with those of another program."""
    if verb in WITHOUT_FLAGS:
        return []
    return flags_in(help_text(importlib.import_module(MODULES[verb]).command, FULL_HELP.get(verb, "--help")))


def values_of(verb: str, flag: Flag) -> list[str]:
    """The values that a flag takes; empty for file names and numbers."""
    return VALUES.get((verb, flag.names[0]), flag.choices)


def bash(flags: dict[str, list[Flag]], zsh: bool) -> str:
    """The script for bash, and for zsh, which has functions that run it."""
    words, values = [], []
    for verb, found in flags.items():
        names = SHELLS if verb == "completion" else [name for flag in found for name in flag.names]
        words.append(f"    {verb}) words={shlex.quote(' '.join(names))} ;;")
        for flag in found:
            if choices := values_of(verb, flag):
                values.append(f"    '{verb} {flag.names[0]}') values={shlex.quote(' '.join(choices))} ;;")
    head = ["#compdef anymamba", "autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    return "\n".join(
        [
            *head,
            "_anymamba() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" verb="${COMP_WORDS[1]}" words="" values=""',
            '  if [ "$COMP_CWORD" -eq 1 ]; then',
            f'    COMPREPLY=($(compgen -W {shlex.quote(" ".join([*flags, *OTHERS]))} -- "$current"))',
            "    return",
            "  fi",
            '  case "$verb" in',
            *words,
            "  esac",
            '  case "$verb ${COMP_WORDS[COMP_CWORD-1]}" in',
            *values,
            "  esac",
            '  if [ -n "$values" ]; then',
            '    COMPREPLY=($(compgen -W "$values" -- "$current"))',
            '  elif [ "${current#-}" != "$current" ] || [ "$verb" = completion ]; then',
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "  else",
            '    COMPREPLY=($(compgen -f -- "$current"))',
            "  fi",
            "}",
            "complete -o filenames -F _anymamba anymamba",
        ]
    )


def fish(flags: dict[str, list[Flag]]) -> str:
    """The script for fish."""
    lines = []
    for verb in flags:
        summary = VERBS[verb]
        lines.append(f"complete -c anymamba -n __fish_use_subcommand -f -a {verb} -d {shlex.quote(summary)}")
        condition = f"-n '__fish_seen_subcommand_from {verb}'"
        if verb == "completion":
            lines.append(f"complete -c anymamba {condition} -f -a {shlex.quote(' '.join(SHELLS))}")
        for flag in flags[verb]:
            words = shlex.quote(re.sub(r" \(default: .*\)$", "", flag.help))
            choices = values_of(verb, flag)
            value = f" -x -a {shlex.quote(' '.join(choices))}" if choices else " -r" if flag.value else ""
            lines += [f"complete -c anymamba {condition} -l {name[2:]}{value} -d {words}" for name in flag.names]
    return "\n".join(lines)
