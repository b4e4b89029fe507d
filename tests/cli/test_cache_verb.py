"""`anymamba cache`: shows the cached tables and deletes what the flags name."""

from __future__ import annotations

import json
import os
import time

import pytest

from anymamba.base.locks import Lock
from anymamba.data.cache import SOURCES_FILE, cached_tables, default_cache
from anymamba.data.table import TokenTable, build_token_table
from anymamba.data.tokenizer import ByteTokenizer


@pytest.fixture
def made(tmp_path, cache):
    """Makes a table of a new file, and returns its file and its folder."""

    def make(name: str, text: str = "some text", days: float = 0):
        file = tmp_path / name
        file.write_text(text)
        before = set(default_cache().glob("*"))
        build_token_table(file, ByteTokenizer())
        (folder,) = set(default_cache().glob("*")) - before
        then = time.time() - days * 86_400
        os.utime(folder, (then, then))
        return file, folder

    return make


@pytest.fixture
def show(run):
    """Runs `anymamba cache --json` and returns what it prints."""

    def call(*flags: object) -> dict:
        code, out, err = run("cache", "--json", *flags)
        assert code == 0, err
        return json.loads(out)

    return call


def names(shown: dict) -> list[str]:
    return [os.path.basename(table["folder"]) for table in shown["tables"]]


def test_an_empty_cache(show, run, cache):
    assert show() == {"folder": str(cache / "anymamba" / "tokens"), "deleted": False, "tables": []}
    assert show("--clean")["tables"] == []
    assert "0 tables, 0 B" in run("cache")[1]


def test_what_is_shown_of_a_table(show, run, made):
    file, folder = made("a.txt", "x" * 1000, days=2.5)
    (table,) = show()["tables"]
    assert table["folder"] == str(folder) and table["files"] == [str(file)] and table["stale"] is None
    assert (table["n_documents"], table["n_tokens"], table["tokenizer"]) == (1, 1000, "bytes")
    assert table["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    code, out, _ = run("cache")
    assert code == 0 and f"used 2 days ago, 1,000 tokens (bytes), {file}" in out


def test_the_last_used_table_comes_first(show, made):
    (file, first), (_, second) = made("a.txt", days=2), made("b.txt", days=1)
    assert names(show()) == [second.name, first.name]
    build_token_table(file, ByteTokenizer())  # a use counts as one
    assert names(show()) == [first.name, second.name]


def test_only_those_that_were_named_are_deleted(show, made):
    (_, new), (_, old) = made("a.txt"), made("b.txt", days=10)
    assert names(show("--older-than", 5)) == [old.name] and old.exists()
    assert names(show("--older-than", 5, "--clean")) == [old.name]
    assert names(show()) == [new.name] and not old.exists()
    assert names(show("--clean")) == [new.name]
    assert list(new.parent.iterdir()) == []


def test_stale_tables(show, made):
    (changed, first), (gone, second), (_, third), (_, fourth) = (made(f"{i}.txt") for i in range(4))
    assert show("--stale")["tables"] == []
    changed.write_text("another text")
    gone.unlink()
    sources = json.loads((third / SOURCES_FILE).read_text())
    (third / SOURCES_FILE).write_text(json.dumps(sources | {"options": [2, *sources["options"][1:]]}))
    reasons = {os.path.basename(table["folder"]): table["stale"] for table in show("--stale")["tables"]}
    assert reasons == {
        first.name: "a file has changed",
        second.name: f"{gone} no longer exists",
        third.name: "made by another version of anymamba",
    }
    show("--stale", "--clean")
    assert names(show()) == [fourth.name]


@pytest.mark.parametrize("text", ["{", "[]", '{"options": []}'])
def test_damaged_notes_are_stale(show, made, text):
    _, folder = made("a.txt")
    (folder / SOURCES_FILE).write_text(text)
    assert show()["tables"][0]["stale"] == f"{SOURCES_FILE} is damaged"


def test_tables_of_earlier_releases(show, run, made):
    """They have no notes, and may still be used."""
    _, folder = made("a.txt")
    (folder / SOURCES_FILE).unlink()
    (table,) = show()["tables"]
    assert table["stale"] is None and "files" not in table
    assert folder.name[:12] in run("cache")[1]


def test_a_table_that_is_being_built_is_kept(run, made, monkeypatch):
    import threading

    _, folder = made("a.txt")
    lock, taken, done = Lock(folder.with_name(f".{folder.name}.lock")), threading.Event(), threading.Event()

    def hold():
        assert lock.try_acquire()
        taken.set()
        done.wait(60)
        lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    code, out, err = run("cache", "--clean")
    done.set()
    thread.join()
    assert code == 0 and "0 tables" in out and f"kept {folder.name}" in err and folder.exists()


def test_a_table_that_is_deleted_before_it_is_opened_is_built_again(run, made, monkeypatch):
    file, folder = made("a.txt")
    real, cleaned = TokenTable.open, []

    def open_after_cleaning(folder, n_empty):
        if not cleaned:
            cleaned.append(run("cache", "--clean"))
        return real(folder, n_empty)

    monkeypatch.setattr(TokenTable, "open", open_after_cleaning)
    assert build_token_table(file, ByteTokenizer()).n_tokens == len("some text")
    assert cleaned and folder.exists()


def test_other_files_in_the_folder_are_left_alone(show, made):
    _, folder = made("a.txt")
    (folder.parent / "mine").mkdir()
    (folder.parent / "notes.txt").write_text("")
    (folder.parent / ".x.4194305.tmp").write_text("")  # of a killed process
    show("--clean")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine", "notes.txt"]


def test_another_folder(show, refused, tmp_path):
    build_token_table(_text(tmp_path), ByteTokenizer(), cache_dir=tmp_path / "other")
    assert len(show("--folder", tmp_path / "other")["tables"]) == 1
    assert len(cached_tables(tmp_path / "other")) == 1
    assert "no folder" in refused(2, "cache", "--folder", tmp_path / "none")


def _text(folder):
    (folder / "a.txt").write_text("text")
    return folder / "a.txt"


def test_wrong_flags(refused):
    assert "--older-than must be at least 0 days" in refused(2, "cache", "--older-than", -1)
