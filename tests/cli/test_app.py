"""The command line as such: verbs, help, exit codes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
    needed = {"convert": ["a", "b", "--to", "hf"], "experiment": ["speed"]}.get(name, [])
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


def test_sigterm_is_143(verb, capsys):
    def command(arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    verb(command)
    assert main(["info"]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "terminated\n"


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
