"""The command line as such: verbs, help, exit codes, signals."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from anymamba.cli import app, main
from anymamba.models.checkpoints import CheckpointError


@pytest.fixture
def verb(monkeypatch):
    """Lets a test decide what `anymamba info` does."""

    def install(command):
        monkeypatch.setattr(app.importlib, "import_module", lambda name: SimpleNamespace(command=command))

    return install


def raising(error):
    def command(arguments):
        raise error

    return command


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "generate", "eval", "info", "demo"))


def test_no_verb_is_misuse(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("anymamba 0.")


def test_unknown_verb_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'trian'; did you mean 'train'?\n"


@pytest.mark.parametrize("name", sorted(app.VERBS))
def test_every_verb_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"anymamba {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(app.VERBS))
def test_unknown_flags_are_refused(name, capsys):
    needed = {
        "convert": ["a", "b", "--to", "hf"],
        "experiment": ["speed"],
        "reproduce": ["mamba-130m", "--data", "x"],
        "download": ["a/b"],
        "completion": ["bash"],
    }.get(name, [])
    assert main([name, *needed, "--no-such-flag-here"]) == 2
    assert "no-such-flag-here" in capsys.readouterr().err


def test_unknown_flag_names_the_nearest(capsys):
    assert main(["train", "--stepps", "3"]) == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad value"), 2),
        (TypeError("bad type"), 2),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2),
        (FileExistsError("runs/x is there"), 2),
        (IsADirectoryError(21, "Is a directory", "x"), 2),
        (RuntimeError("diverged"), 1),
        (OSError(28, "No space left on device", "x"), 1),
        (CheckpointError("truncated"), 1),
        (ImportError("install anymamba[train]"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_become_one_line_and_a_code(verb, capsys, error, code):
    verb(raising(error))
    assert main(["info"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_message_of_several_lines_becomes_one(verb, capsys):
    verb(raising(RuntimeError("first\n  second")))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "error: first second\n"


def test_debug_shows_the_traceback(verb, capsys, monkeypatch):
    monkeypatch.setenv("ANYMAMBA_DEBUG", "1")
    verb(raising(ValueError("bad value")))
    assert main(["info"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_misuse(verb):
    verb(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_interrupt_is_130_and_says_what_the_verb_adds(verb, capsys):
    verb(raising(KeyboardInterrupt("resume with ...")))
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted; resume with ...\n"


def test_a_caller_from_python_keeps_its_signals(verb):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during = []
    verb(lambda arguments: during.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)))
    assert main(["info"]) == 0
    assert during == before


def test_a_library_that_exits_with_a_message(verb, capsys):
    verb(raising(SystemExit("no such task")))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "error: no such task\n"


def test_a_name_that_is_not_utf_8_is_named(verb, capsys):
    verb(lambda arguments: "a\udcff.txt".encode())
    assert main(["info"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: the name 'a\\udcff.txt' is not valid UTF-8") and "rename it" in line


def test_a_reader_that_goes_away_is_no_noise():
    script = "import sys; from anymamba.cli import app; from types import SimpleNamespace as N\n"
    script += (
        "app.importlib = N(import_module=lambda n: N(command=lambda a: [print('x' * 100) for _ in range(100000)]))\n"
    )
    script += "sys.exit(app.main(['info']))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert errors == b""


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "anymamba", "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown verb")


WEIGHTS = "'bfloat16', 'float32', 'int4', 'int8'"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train --stepps 3", "unknown: --stepps, 3; did you mean --steps?"),
        ("generate --topk 3 --model x", "unknown: --topk, 3; did you mean --top-k or --stop?"),
        ("eval --modell x", "--model PATH must be given; unknown: --modell x;"),
        ("convert a --to hf", "OUT must be given;"),
        ("experiment", "NAME must be given;"),
        ("info x", "unknown: x;"),
        ("generate --model x --top-k", "--top-k needs a value;"),
        ("train --optimizer.betas 0.9", "--optimizer.betas needs 2 values;"),
        ("generate --model x --temperature warm", "--temperature must be a number, got 'warm';"),
        ("train --steps 3.5", "--steps must be an integer, got '3.5';"),
        ("convert a b --to gg", "--to must be one of 'hf', 'state-spaces', 'gguf', 'anymamba', got 'gg';"),
        ("generate --model x --weights int7", f"--weights must be one of {WEIGHTS}, got 'int7';"),
        ("generate --model x --speculate 1.5", "--speculate must be an integer, got '1.5';"),
        ("generate --model x --top-p most", "--top-p must be a number, got 'most';"),
        ("train --model.d-model 0", "d_model must be at least 1, got 0;"),
        ("demo --minutes 0", "--minutes must be above 0, got 0.0;"),
        ("generate --model x --seed " + "y" * 150, f"--seed must be an integer, got '{'y' * 150}';"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_in_the_flags_is_one_line(monkeypatch, capsys, arguments, line, encoding):
    """Where the terminal has characters for boxes, and where it has none."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(arguments.split()) == 2
    verb = arguments.split()[0]
    assert capsys.readouterr().err == f"error: {line} anymamba {verb} --help lists the flags\n"
