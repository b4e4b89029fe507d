"""The prompts of `anymamba generate`, from flags, files and rows of JSONL, in the order of the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STDIN = "-"
NAME_LENGTH = 60
"""Most characters of a text that names a result."""


class Prompt(NamedTuple):
    """A prompt and the name of its results."""

    name: str
    text: str | bytes
    """The prompt; bytes, which need not be UTF-8, if it is a whole file."""
    echo: bool = False
    """Whether it is printed before its continuation."""

    def readable(self) -> str:
        """The prompt as text that can be printed, even if its bytes are not valid UTF-8."""
        data = self.text if isinstance(self.text, bytes) else self.text.encode("utf-8", "surrogateescape")
        return data.decode("utf-8", errors="replace")


def read_prompts(arguments: Sequence[str], values: Mapping[str, Sequence[str]], field: str) -> list[Prompt]:
    """The prompts, in the order in which their flags are given.

    Args:
        arguments: the command line, for the order.
        values: the values of the flags --prompt, --prompt-file and --prompts, by flag.
        field: the field of a row of JSONL that holds the prompt.
    Raises ValueError without any prompt, for a row without one and if stdin is named twice; FileNotFoundError for a
        file that is not there.
    """
    waiting = {flag: iter(given) for flag, given in values.items()}
    flags = [flag for word in arguments if (flag := word.partition("=")[0].replace("_", "-")) in waiting]
    given = [(flag, next(waiting[flag])) for flag in flags]
    if sum(flag != "--prompt" and value == STDIN for flag, value in given) > 1:
        raise ValueError("stdin (-) can be read once; leave the other out")
    prompts = [prompt for flag, value in given for prompt in _prompts_of(flag, value, field)]
    if not prompts:
        raise ValueError(
            "no prompt; give one with --prompt TEXT, --prompt-file PATH or --prompts FILE.jsonl (- for stdin)"
        )
    return prompts


def _prompts_of(flag: str, value: str, field: str) -> Iterable[Prompt]:
    """The prompts of one flag."""
    if flag == "--prompt":
        return [Prompt(_shortened(value), value, echo=True)]
    name = "stdin" if value == STDIN else value
    data = sys.stdin.buffer.read() if value == STDIN else Path(value).read_bytes()
    return [Prompt(name, data)] if flag == "--prompt-file" else _rows(name, data, field)


def _rows(name: str, data: bytes, field: str) -> Iterator[Prompt]:
    """The prompts in rows of JSONL; blank lines are skipped. A row's `name` or `id` names its results."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        row = _row(line, where)
        if field not in row:
            there = ", ".join(map(repr, row)) or "none"
            raise ValueError(
                f"{where}: no field {field!r}; the fields there are {there}; choose one with --prompt-field"
            )
        text = row[field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: the field {field!r} must be a string, got {json.dumps(text)[:NAME_LENGTH]}")
        called = next((row[key] for key in ("name", "id") if isinstance(row.get(key), str | int)), where)
        # a lone surrogate (\ud800) becomes bytes that are not UTF-8; the tokenizer decides whether to accept them
        yield Prompt(str(called), text.encode("utf-8", "surrogatepass"))


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: wanted an object such as {{"prompt": "..."}}, got {line.decode()[:NAME_LENGTH]}')
    return row


def _shortened(text: str) -> str:
    """A text as the name of its results: on one line, and not longer than `NAME_LENGTH`."""
    line = " ".join(text.split())
    return line if len(line) <= NAME_LENGTH else line[: NAME_LENGTH - 3] + "..."
