"""How verbs print: progress where stderr is and is not a terminal, facts, clocks."""

from __future__ import annotations

import io
import sys

import pytest

from anymamba.console import output


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.4, "0:59"), (60, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (-1, "0:00")]
)
def test_clock(seconds, shown):
    assert output.clock(seconds) == shown


def test_plain_lines_first_and_last_and_not_all_between(capsys):
    with output.progress_bar("reading") as show:
        for i in range(1, 101):
            show(i, 100, f"file {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading 1% file 1", "reading 100% file 100"]


def test_plain_lines_keep_coming(capsys):
    show = output.PlainProgress("reading", interval=0)
    for i in range(3):
        show(i, None, str(i))
    assert capsys.readouterr().err.splitlines() == ["reading 0", "reading 1", "reading 2"]


def test_the_last_plain_line_is_not_repeated(capsys):
    show = output.PlainProgress("scoring", interval=60)
    for done in (1, 3, 3, 3):
        show(done, 3, f"{done} alleles")
    assert capsys.readouterr().err.splitlines() == ["scoring 33% 1 alleles", "scoring 100% 3 alleles"]


def test_bar_on_a_terminal_goes_to_stderr_only(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.progress_bar("training") as show:
        show(3, 10, "2.5 bits per byte")
    text = terminal.getvalue()
    assert "training" in text and "2.5 bits per byte" in text
    assert capsys.readouterr().out == ""


def test_facts_are_aligned(capsys):
    output.print_facts({"a": 1, "long name": 2})
    assert capsys.readouterr().out == "a          1\nlong name  2\n"


def test_json_refuses_what_json_has_not(capsys):
    output.print_json({"a": "é"})
    assert capsys.readouterr().out == '{"a": "é"}\n'
    with pytest.raises(ValueError):
        output.print_json({"a": float("nan")})
