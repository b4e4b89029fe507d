"""The corpus that every machine has: what is in it, and a split that does not depend on the machine."""

from __future__ import annotations

import sys

import pytest

from anymamba.data import stdlib_corpus
from anymamba.data.stdlib_corpus import is_held_out, standard_library, standard_library_files
from anymamba.data.table import build_token_table
from anymamba.data.tokenizer import ByteTokenizer


def test_the_corpus_is_the_base_interpreters_library():
    files = standard_library_files()
    names = [file.relative_to(standard_library()).as_posix() for file in files]
    assert names == sorted(set(names), key=lambda name: tuple(name.split("/")))
    assert {"json/decoder.py", "argparse.py", "pydoc_data/topics.py"} <= set(names)
    assert not any({"site-packages", "__pycache__", "test", "idle_test"} & set(name.split("/")) for name in names)
    assert not standard_library().is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix
    assert sum(file.stat().st_size for file in files) > 5_000_000


def test_what_is_left_out(tmp_path, monkeypatch):
    wanted = ["a.py", "b/c.rst", "b/LICENSE.txt", "d/README.md"]
    other = ["site-packages/e.py", "dist-packages/f.py", "b/__pycache__/g.py", "test/h.py", "b/tests/i.py", "j.so"]
    other += ["_sysconfigdata__linux.py", "config-3.11/k.py", ".l.py", "idlelib/idle_test/m.py"]
    for name in wanted + other:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(stdlib_corpus, "standard_library", lambda: tmp_path)
    assert standard_library_files() == sorted(tmp_path / name for name in wanted)
    monkeypatch.setattr(stdlib_corpus, "standard_library", lambda: tmp_path / "j.so")
    with pytest.raises(FileNotFoundError, match="no source of its standard library"):
        standard_library_files()


def test_the_split_is_the_same_everywhere():
    """Fixed names with fixed answers: a run's held-out files are held out on every other machine too."""
    assert [name for name in ("abc.py", "argparse.py", "fnmatch.py", "json/decoder.py") if is_held_out(name)] == [
        "fnmatch.py"
    ]
    assert is_held_out(standard_library() / "fnmatch.py") and is_held_out(str(standard_library() / "fnmatch.py"))
    assert not is_held_out("/elsewhere/json/decoder.py")
    share = sum(is_held_out(f"folder/file{i}.py") for i in range(10_000)) / 10_000
    assert 0.04 < share < 0.06


def test_the_corpus_builds_and_splits_by_its_files(tmp_path):
    table = build_token_table(standard_library_files(), ByteTokenizer(), cache_dir=tmp_path)
    train, held_out = table.split(is_held_out)
    assert train.n_documents + held_out.n_documents == table.n_documents
    assert 0.02 < held_out.n_bytes / table.n_bytes < 0.10
    assert any(name.endswith("fnmatch.py") for name in held_out.names)
    number = list(train.names).index(str(standard_library() / "argparse.py"))
    source = (standard_library() / "argparse.py").read_bytes()
    assert bytes(train.read(number, 0, len(source))) == source
