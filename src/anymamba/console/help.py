"""What the help of a verb says, as a list of its flags: for a shorter help, and for the completion of shells."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from typing import NamedTuple

from anymamba.console.flags import variables

_TITLE = re.compile(r"╭─ (?:(?P<group>\S+) )?options ─+╮")
_COLUMNS = "100"  # a wider help has several columns


class Flag(NamedTuple):
    """A flag of a verb."""

    names: tuple[str, ...]
    """--steps, or --verify and --no-verify."""
    value: str
    """What follows it, such as INT or {float32,bfloat16}; empty for one without a value."""
    help: str
    group: str
    """The first word of its dotted path, such as model; empty for one without."""

    @property
    def choices(self) -> list[str]:
        """The values that it takes, if the help lists them."""
        found = re.search(r"\{([^{}]*)\}", self.value.replace("{None}", ""))
        return [choice for choice in found[1].split(",") if choice != "None"] if found else []


def help_text(command: Callable[[Sequence[str]], object], word: str = "--help") -> str:
    """The help that a verb's command prints.

    Args:
        command: what runs the verb.
        word: the flag that prints it.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")  # boxes are drawn where they can be shown
    with redirect_stdout(out), variables({"COLUMNS": _COLUMNS}), suppress(SystemExit):
        command([word])
    out.seek(0)
    return out.read()


def flags_in(text: str) -> list[Flag]:
    """The flags that a help lists, in its order; positional arguments are left out."""
    return [flag for group, entry in _entries(text) if (flag := _flag(group, entry)) is not None]


def _entries(text: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of each entry of the boxes, with the group that its box names; help is indented."""
    group, entry = "", list[str]()
    for line in text.splitlines():
        if title := _TITLE.fullmatch(line):
            group = (title["group"] or "").partition(".")[0]
            continue
        inside = line.removeprefix("│ ").removesuffix("│").rstrip() if line.startswith("│") else ""
        if entry and (not inside or inside.startswith("-")):
            yield group, entry
            entry = []
        if inside.startswith("-") or entry:
            entry.append(inside)


def _flag(group: str, entry: list[str]) -> Flag | None:
    head, _, beside = entry[0].partition("  ")  # a short flag has the beginning of its help on the same line
    head += "".join(line for line in entry[1:] if not line.startswith("  "))
    words = " ".join([beside.strip(), *(line.strip() for line in entry[1:] if line.startswith("  "))]).strip()
    names = tuple(re.findall(r"--[\w.-]+", re.split(r"[ ,](?=[^-\s])", head)[0]))
    value = "" if "," in head and "{" not in head else head.partition(" ")[2]
    return Flag(names, value, words, group) if names else None
