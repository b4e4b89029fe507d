"""A small untrained model as a folder, and texts, for the verbs to work on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from anymamba.cli import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A byte-level model with its tokenizer; tests that change files copy it first."""
    from anymamba.data.tokenizer import load_tokenizer
    from anymamba.models.config import ModelConfig
    from anymamba.models.language_model import LanguageModel

    folder = tmp_path_factory.mktemp("models") / "nano"
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257))
    model.save_pretrained(folder, load_tokenizer(None))
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder of three small text files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"line {i} of a text\n" * 60)
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command line and returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """Runs a command line that must end with this code and one line on stderr, which it returns."""

    def call(code: int, *arguments: object) -> str:
        got, out, err = run(*arguments)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert got == code, f"exit code {got}, wanted {code}: {err}"
        assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
        assert out == "" and "Traceback" not in err
        return errors[0]

    return call


@pytest.fixture(autouse=True)
def threads():
    """A verb that sets the number of threads sets it for its own test only."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Token tables are cached in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def big_tokenizer(tmp_path) -> Path:
    """A tokenizer.json with more ids than the model has, used by the word `apple`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"apple": 5000, "other": 0}, unk_token="other"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def interruptible():
    """A context in which processes are started that Ctrl-C ends, also where the tests themselves ignore it.

    A shell without job control ignores SIGINT in what it starts with `&`, and children inherit that.
    """

    @contextmanager
    def default() -> Iterator[None]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    return default
