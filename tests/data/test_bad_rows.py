"""Rows that cannot be read: refused by name, or skipped and counted; and files that are left out."""

from __future__ import annotations

import gzip
import json
import warnings

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from anymamba.base.errors import DataWarning
from anymamba.data.documents import find_files
from anymamba.data.table import build_token_table
from anymamba.data.tokenizer import ByteTokenizer, JsonTokenizer

GOOD = ["first", "second", "third"]
BAD_LINES = {
    "null": '{"text": null}',
    "a number": '{"text": 3}',
    "no field": '{"body": "x"}',
    "no object": '["text"]',
    "no JSON": '{"text": "cut',
    "no UTF-8": '{"text": "\udcff"}',
}


def lines(*rows: str) -> bytes:
    return "\n".join(rows).encode("utf-8", "surrogateescape")


def jsonl(bad: str) -> bytes:
    first, *rest = (json.dumps({"text": text}) for text in GOOD)
    return lines(first, bad, *rest)


@pytest.fixture
def build(tmp_path):
    """Builds the table of a file; the texts, and what was warned of."""

    def call(name: str, data: bytes, tokenizer=None, **options) -> tuple[list[str], list[str]]:
        (tmp_path / name).write_bytes(data)
        tokenizer = tokenizer or ByteTokenizer()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            table = build_token_table(tmp_path / name, tokenizer, cache_dir=tmp_path / "cache", **options)
        texts = [tokenizer.decode(table.read(i, 0, n)) for i, n in enumerate(table.lengths.tolist())]
        return texts, [str(w.message) for w in told if w.category is DataWarning]

    return call


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_of_json(build, tmp_path, bad):
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: .*; correct the row, or leave bad rows out with on_bad_row='skip'"
    ):
        build("a.jsonl", jsonl(bad))
    for _ in range(2):  # also when the table comes from the cache
        texts, told = build("a.jsonl", jsonl(bad), on_bad_row="skip")
        assert texts == GOOD
        assert len(told) == 1 and told[0].startswith(f"skipped 1 bad row, the first: {tmp_path}/a.jsonl:2: ")


def test_compressed_lines(build):
    assert build("a.jsonl.gz", gzip.compress(jsonl("[")), on_bad_row="skip")[0] == GOOD


@pytest.mark.parametrize("bad", ["1,two,3", "1", '1,"two"2'], ids=["more values", "fewer values", "a broken quotation"])
def test_a_row_of_csv(build, bad):
    data = lines("id,text", "0,first", bad, *(f"{i},{text}" for i, text in enumerate(GOOD[1:])))
    with pytest.raises(ValueError, match=r"a\.csv:3: .*on_bad_row='skip'"):
        build("a.csv", data)
    texts, told = build("a.csv", data, on_bad_row="skip")
    assert texts == GOOD and "a.csv:3" in told[0]


def test_a_quotation_without_an_end_is_no_bad_row(build):
    """It would swallow the rest of the file."""
    data = lines("id,text", "0,first", '1,"second', "2,third")
    with pytest.raises(ValueError, match=r"a\.csv.*malformed csv"):
        build("a.csv", data, on_bad_row="skip")


def test_a_row_of_parquet(build, tmp_path):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"text": ["first", None, "second", "third", None]}), sink)
    data = sink.getvalue().to_pybytes()
    with pytest.raises(ValueError, match=r"a\.parquet:2: field 'text' must be a string, got null; .*on_bad_row='skip'"):
        build("a.parquet", data)
    texts, told = build("a.parquet", data, on_bad_row="skip")
    assert texts == GOOD and told[0].startswith("skipped 2 bad rows, the first: ")


def test_a_row_that_the_tokenizer_cannot_read(build, tmp_path):
    """Bytes that are not UTF-8 are bad for a tokenizer.json; the byte tokenizer takes them."""
    theirs = Tokenizer(models.WordLevel({text: i for i, text in enumerate(GOOD)}, unk_token="first"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.save(str(tmp_path / "words.json"))
    words = JsonTokenizer(tmp_path / "words.json")
    data = lines("text", "first", "\udcff", "second", "third")
    with pytest.raises(ValueError, match=r"a\.csv:3: not valid UTF-8 .*on_bad_row='skip'"):
        build("a.csv", data, words)
    assert build("a.csv", data, words, on_bad_row="skip")[0] == GOOD
    assert build("a.csv", data, on_bad_row="skip")[0] == ["first", "\ufffd", "second", "third"]


def test_nothing_but_bad_rows(build):
    with pytest.raises(
        ValueError, match=r"nothing to read in .*2 bad rows were skipped, the first of them .*:1: no field"
    ):
        build("a.jsonl", lines('{"body": "x"}', "[]"), on_bad_row="skip")


def test_a_whole_file_that_is_broken_is_no_bad_row(build):
    with pytest.raises(ValueError, match="damaged or truncated"):
        build("a.jsonl.gz", gzip.compress(jsonl("[]"))[:-10], on_bad_row="skip")


def test_an_unknown_way_is_refused(build):
    with pytest.raises(ValueError, match="on_bad_row must be 'error' or 'skip', got 'warn'"):
        build("a.jsonl", jsonl("[]"), on_bad_row="warn")


# ------------------------------------------------------------------------------------------ files that are left out


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ([], "a.py a.min.py src/b.py src/tests/c.py tests/d.txt"),
        (["*.min.py"], "a.py src/b.py src/tests/c.py tests/d.txt"),
        (["tests"], "a.py a.min.py src/b.py"),
        (["src/*.py"], "a.py a.min.py src/tests/c.py tests/d.txt"),
        (["src/tests", "*.txt"], "a.py a.min.py src/b.py"),
    ],
)
def test_patterns_of_files_to_leave_out(tmp_path, exclude, left):
    """A folder above the data does not count, whatever it is called."""
    root = tmp_path / "tests"
    for name in ["a.py", "a.min.py", "src/b.py", "src/tests/c.py", "tests/d.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert find_files(root, exclude) == sorted(root / name for name in left.split())


def test_files_that_are_named_or_matched_are_left_out_too(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    assert find_files([tmp_path / "a.txt", tmp_path / "b.txt"], ["a.*"]) == [tmp_path / "b.txt"]
    assert find_files(tmp_path / "*.txt", ["a.*"]) == [tmp_path / "b.txt"]


def test_nothing_is_left(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no data files: \*\.txt \(--exclude\) leaves out all 1 of them"):
        find_files(tmp_path, ["*.txt"])
