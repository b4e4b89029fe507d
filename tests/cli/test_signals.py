"""Ctrl-C and SIGTERM from a command's first moment to its last: an exit code, at most one line, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

VERB = """
import os, signal, sys, time
from types import SimpleNamespace
from anymamba.cli import app, main

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)

def command(arguments):
    {body}

app.importlib = SimpleNamespace(import_module=lambda name: SimpleNamespace(command=command))
sys.argv[1:] = ["info"]
sys.exit(main())
"""


@pytest.fixture
def ended(interruptible):
    """Runs a command whose verb is this body; its exit code, stdout and stderr."""

    def call(body: str) -> tuple[int, str, str]:
        code = VERB.format(body=body.replace("\n", "\n    "))
        with interruptible():
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return call


def test_once(ended):
    assert ended("interrupt()") == (130, "", "interrupted\n")


def test_sigterm(ended):
    body = "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)\nfinally: print('cleaned up')"
    assert ended(body) == (143, "cleaned up\n", "terminated\n")


def test_the_verb_adds_how_to_go_on(ended):
    body = "try: interrupt()\nexcept KeyboardInterrupt as end: raise type(end)('resume with ...') from None"
    assert ended(body) == (130, "", "interrupted; resume with ...\n")


def test_a_second_one_does_not_wait_for_the_cleaning_up(ended):
    start = time.monotonic()
    assert ended("try: interrupt()\nfinally: interrupt()") == (130, "", "interrupted\n")
    assert time.monotonic() - start < 15


def test_one_that_a_library_swallows_is_followed_by_a_second(ended):
    assert ended("try: interrupt()\nexcept BaseException: interrupt()") == (130, "", "interrupted\n")


def test_in_an_import_that_would_swallow_it(ended, tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(20)\nexcept BaseException: raise ImportError('no')\n"
    )
    assert ended(f"sys.path.insert(0, {str(tmp_path)!r})\nimport swallows") == (130, "", "interrupted\n")


def test_after_the_verb_while_the_process_ends(ended):
    assert ended("import atexit\natexit.register(interrupt)\nprint('done')") == (130, "done\n", "interrupted\n")


def test_while_the_interpreter_is_torn_down(ended):
    """The command is done, and its exit code stays."""
    body = (
        "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2); kill(pid, 15)\n"
        "sys.late = Late()\nprint('done')"
    )
    assert ended(body) == (0, "done\n", "")


def test_ignored_as_in_the_background_it_stays_ignored(tmp_path):
    """A shell without job control starts `command &` so."""
    body = "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\nprint('went on')"
    command = [sys.executable, "-c", VERB.format(body=body.replace("\n", "\n    "))]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.communicate(timeout=60) == ("went on\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_forked_workers_that_are_stopped_print_nothing(ended, number):
    """As lm-eval's, which its pool ends by SIGTERM."""
    body = (
        "import multiprocessing\n"
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "worker.start(); time.sleep(0.2)\n"
        f"os.kill(worker.pid, signal.{number}); worker.join()\nprint(signal.Signals(-worker.exitcode).name)"
    )
    assert ended(body) == (0, f"{number}\n", "")


def test_little_is_imported_before_signals_are_handled():
    code = "import sys; before = {*sys.modules}; import anymamba.cli; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) < 40, done.stdout
    assert not {"torch", "numpy", "tyro", "difflib", "traceback", "anymamba.cli.app"} & set(done.stdout.split())


def handles_sigterm(process: subprocess.Popen) -> bool:
    """Whether the process handles SIGTERM, which Python by itself does not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A model without an id that ends its text."""
    from anymamba import LanguageModel, ModelConfig

    folder = tmp_path_factory.mktemp("endless") / "model"
    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=256)).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to see which signals are handled")
@pytest.mark.parametrize("delay", [0, 0.05, 0.3, 0.8, 1.5])
def test_at_any_moment_of_the_start(interruptible, endless, delay):
    """Also while torch is imported and while the model is loaded."""
    arguments = ["generate", "--model", str(endless), "--prompt", "a", "--max-new-tokens", "100000000"]
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "anymamba", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    while not handles_sigterm(process):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
