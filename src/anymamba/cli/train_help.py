"""`anymamba train --help`: the options that matter first, examples, and the names of all others."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

from anymamba.console.help import Flag

FIRST = {
    "--data": "PATH ...",
    "--out": "FOLDER",
    "--preset": "NAME",
    "--steps": "N",
    "--learning-rate": "RATE",
    "--batch-size": "N",
    "--context": "N",
    "--tokenizer": "FILE",
    "--from": "MODEL",
    "--resume": "FOLDER",
}
"""The options that most runs need, and what follows them."""
EXAMPLES = (
    "anymamba train --data texts/ --out runs/x",
    "anymamba train --data texts/ --out runs/x --preset small --steps 5000 --learning-rate 1e-3",
    "anymamba train --data more.jsonl --from state-spaces/mamba-130m-hf --lora 8 --out runs/y",
    "anymamba train --resume runs/x",
    "anymamba train --resume runs/x --steps 8000",
)
SUMMARY = (
    "Train a language model on your files, fine-tune one, or resume a run. A run can be stopped or killed at any "
    "moment; --resume continues it as if nothing had happened."
)
WIDEST = 100


def short_help(flags: Sequence[Flag]) -> str:
    """The help in one screen."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    by_name = {flag.names[0]: flag for flag in flags}
    lines = [
        "usage: anymamba train --data PATH ... --out FOLDER [OPTIONS]",
        "       anymamba train --resume FOLDER [--steps N]",
        "",
        *textwrap.wrap(SUMMARY, width),
        "",
        "the options that matter first:",
        *(line for name, value in FIRST.items() for line in _explained(by_name[name], value, width)),
        "",
        "examples:",
        *(f"  {example}" for example in EXAMPLES),
        "",
        "all other options, which `anymamba train --help-all` explains:",
    ]
    groups: dict[str, list[str]] = {}
    for flag in flags:
        if flag.names[0] not in FIRST and not is_of_one_layer(flag):
            groups.setdefault(flag.group or "run", []).append(changing_name(flag))
    for group, names in groups.items():
        lines += textwrap.wrap(
            f"{group}: {'  '.join(names)}",
            width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    lines += [f"  layers: {sum(map(is_of_one_layer, flags))} of one kind each, such as --model.mamba.d-state"]
    lines += ["", "`anymamba completion bash` (zsh, fish) makes the shell complete them."]
    return "\n".join(lines)


def changing_name(flag: Flag) -> str:
    """The name that changes the default: --no-verify rather than --verify."""
    return flag.names[-1 if flag.help.endswith("(default: True)") else 0]


def is_of_one_layer(flag: Flag) -> bool:
    """Whether only one kind of layer has the option, as --model.mamba.d-state."""
    return flag.names[0].count(".") > 1


def _explained(flag: Flag, value: str, width: int) -> list[str]:
    head = f"  {flag.names[0]} {value}"
    default = re.search(r"\(default: (.*)\)$", flag.help)
    text = flag.help if default and default[1] not in ("None", "") else re.sub(r" ?\(default: .*\)$", "", flag.help)
    body = textwrap.wrap(text, width - 26, break_on_hyphens=False)
    return [f"{head:<26}{body[0]}", *(" " * 26 + line for line in body[1:])]
