"""Mistakes in flags in one line: tyro reports them as boxes of several."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = "╭╮╰╯─│ "
_REWORDED = (
    (r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 must be an integer, got \2"),
    (r"Error parsing (--\S+): could not convert string to float: (.*)", r"\1 must be a number, got \2"),
    (r"Error parsing (--\S+): no type matching \{None\}\|INT .* \['(.*)'\]\.?", r"\1 must be an integer, got '\2'"),
    (r"Error parsing (--\S+): no type matching \{None\}\|FLOAT .* \['(.*)'\]\.?", r"\1 must be a number, got '\2'"),
    (r"Error parsing (--\S+): (.*)", r"\1: \2"),
    (r"Error parsing [\w.]+: (.*)", r"\1"),  # a check of a dataclass, which names its field
    (r"Missing value for argument '(.*?)'\. Expected 1 values\.", r"\1 needs a value"),
    (r"Missing value for argument '(.*?)'\. Expected (\d+) values\.", r"\1 needs \2 values"),
    (r"Unrecognized options: (.*)", r"unknown: \1"),
)
"""What tyro says, and what is said here."""
_CHOICE = re.compile(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)\.")
"""If `None` is among the choices, they are in no order; it stands for a flag that is left out."""


def in_one_line(box: str, command: str) -> str:
    """What a box of tyro says, in one line.

    Args:
        box: as it is printed: a title, and sections between horizontal lines.
        command: the command whose help lists the flags.
    """
    first, *rest = list(_sections(box)) or [[]]
    said, meant = [_reworded(first).removesuffix(".")], []
    for head, *lines in rest:
        if head.startswith("Unrecognized options"):
            said.append(f"unknown: {' '.join(line.strip() for line in lines)}")
        elif head.startswith(("Perhaps you meant", "Arguments similar to")):
            meant += [flag.split()[0] for flag in _flags(lines)]
    if meant:
        said.append(f"did you mean {' or '.join(dict.fromkeys(meant))}?")
    return "; ".join([*said, f"{command} --help lists the flags"]).replace("?;", "?")


def _sections(box: str) -> Iterator[list[str]]:
    """The lines of each section of a box, indented as they are."""
    section: list[str] = []
    for row in _ESCAPE.sub("", box).splitlines()[1:]:
        if row.strip(_FRAME + "-"):
            section.append(row.rstrip(_FRAME)[2:])  # "│ ", or two spaces where the terminal has no such characters
        elif section:
            yield section
            section = []
    if section:
        yield section


def _reworded(lines: list[str]) -> str:
    """The first section, which says what is wrong."""
    if lines and lines[0].startswith("Missing from"):
        return f"{', '.join(_flags(lines))} must be given"
    text = " ".join(line.strip() for line in lines)
    if found := _CHOICE.fullmatch(text):
        choices = re.findall(r"'[^']*'", found[3])
        if "'None'" in choices:
            choices = sorted(set(choices) - {"'None'"})
        return f"{found[2]} must be one of {', '.join(choices)}, got '{found[1]}'"
    for pattern, words in _REWORDED:
        if found := re.fullmatch(pattern, text):
            return found.expand(words)
    return text


def _flags(lines: list[str]) -> list[str]:
    """The flags that a section lists, indented by four; their help is indented by eight."""
    found = [line.strip() for line in lines if line.startswith("    ") and not line.startswith("     ")]
    return list(dict.fromkeys(re.sub(r"^-\w, ", "", flag) for flag in found))
