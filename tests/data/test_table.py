"""The token table: what is stored, how it is cached, what happens when building fails, and how much memory it takes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.base import manifest
from anymamba.data.table import TokenTable, build_token_table
from anymamba.data.table import build as build_module
from anymamba.data.table import encoding as encoding_module
from anymamba.data.table.encoding import last_cut
from anymamba.data.tokenizer import ByteTokenizer, JsonTokenizer

WORDS = (
    "the state of a selective model fades, or holds; naïve 日本語 12,345 (x + y)\n\n\tdef f(x):\n    return 'it''s'\n"
)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory) -> JsonTokenizer:
    """A byte-level BPE of 600 tokens, like GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS * 20, Path(__file__).read_text()], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return JsonTokenizer(path)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def build(tmp_path, data):
    def build(tokenizer=None, paths=data, **options) -> TokenTable:
        return build_token_table(paths, tokenizer or ByteTokenizer(), cache_dir=tmp_path / "cache", **options)

    return build


def text_of(table: TokenTable, document: int, tokenizer=None) -> bytes:
    ids = table.read(document, 0, int(table.lengths[document]))
    return bytes(ids) if tokenizer is None else tokenizer.decode_bytes(ids.tolist())


def test_documents_of_all_kinds_in_one_table(build, data):
    raw = b"\xef\xbb\xbfa\r\nb\xff no newline"
    (data / "a.txt").write_bytes(raw)
    (data / "b.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    (data / "c.md").write_bytes(b"")
    (data / "d.py").write_bytes(b"x" * 200_001)
    table = build()
    assert list(table.names) == [str(data / n) for n in ("a.txt", "b.jsonl:1", "b.jsonl:3", "d.py")]
    assert [text_of(table, i) for i in range(4)] == [raw, b"one", b"three", b"x" * 200_001]
    assert table.byte_lengths.tolist() == table.lengths.tolist() == [len(raw), 3, 5, 200_001]
    assert (table.n_documents, table.n_tokens, table.n_bytes) == (4, len(raw) + 200_009, len(raw) + 200_009)
    assert table.n_empty == 2
    assert list(table.names[1:3]) == [str(data / "b.jsonl:1"), str(data / "b.jsonl:3")]


def test_the_table_on_disk_is_one_of_the_datasets_library(build, data, tmp_path):
    import datasets

    (data / "a.txt").write_bytes(bytes(range(1, 256)) * 1000)
    (data / "b.txt").write_bytes(b"b")
    build()
    (file,) = (tmp_path / "cache").glob("*/tokens.arrow")
    rows = datasets.Dataset.from_file(str(file))
    assert rows["document"][:] == [0, 0, 0, 0, 1]
    assert rows["offset"][:] == [0, 65_536, 131_072, 196_608, 0]
    assert sum(map(len, rows["tokens"][:4])) == 255_000
    assert rows.features["tokens"].feature.dtype == "uint8"
    assert rows[0]["tokens"][:3] == [1, 2, 3]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_tokens_are_stored_in_the_narrowest_type(build, data, vocab_size, dtype):
    class Fake:
        name, eos_id, fingerprint = "fake", None, f"fake-{vocab_size}"

        def encode_batch(self, texts):
            return [[self.vocab_size - 1, 0] for _ in texts]

    Fake.vocab_size = vocab_size
    (data / "a.txt").write_text("a")
    tokens = build(Fake()).read(0, 0, 2)
    assert tokens.dtype == dtype and tokens.tolist() == [vocab_size - 1, 0]


def test_byte_tokens_are_bytes(build, data):
    (data / "a.txt").write_bytes(b"\xff")
    assert build().read(0, 0, 1).dtype == np.uint8


def test_a_read_is_a_view_of_the_mapped_file(build, data):
    (data / "a.txt").write_bytes(b"x" * 200_000)
    table = build()
    view = table.read(0, 70_000, 199_000)
    assert not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, table.read(0, 100_000, 100_001))


def test_reads_outside_a_document_are_refused():
    table = TokenTable.from_arrays([[1, 2, 3], [4]], names=["a", "b"])
    assert table.read(0, 1, 3).tolist() == [2, 3] and table.read(1, 1, 1).tolist() == []
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(ValueError, match=rf"document 0 \(a\) has 3 tokens, asked for {start} to {stop}"):
            table.read(0, start, stop)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_spans_across_chunks_equal_slices(data):
    """Reading gives the same as one array, for any chunks."""
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=8))
    chunks = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    flat, places = np.full(0, 0), []
    for chunk in chunks:  # other bytes lie between the chunks of a file
        places.append(len(flat) + 2)
        flat = np.concatenate([flat, [-1, -1], chunk])
    store = type(TokenTable.from_arrays([[1]]).store)(flat, np.cumsum([0, *sizes]), np.array(places))
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, sum(sizes)), st.integers(0, sum(sizes))).map(sorted), max_size=6)
    )
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    expected = [i for start, stop in spans for i in range(start, stop)]
    assert store.gather(starts, stops - starts).tolist() == expected
    assert [store.slice(start, stop).tolist() for start, stop in spans] == [list(range(a, b)) for a, b in spans]
    assert pickle.loads(pickle.dumps(store)).gather(starts, stops - starts).tolist() == expected


def test_long_documents_in_small_record_batches(build, data, monkeypatch):
    monkeypatch.setattr(build_module, "_BATCH_TOKENS", 2 * build_module.WINDOW)
    monkeypatch.setattr(build_module, "_BATCH_ROWS", 3)
    text = np.random.default_rng(0).integers(1, 256, 600_001, np.uint8).tobytes()
    (data / "a.txt").write_bytes(text)
    (data / "b.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(10)))
    table = build()
    assert text_of(table, 0) == text
    assert bytes(table.read(0, 131_000, 400_000)) == text[131_000:400_000]
    assert [text_of(table, i) for i in range(1, 11)] == [str(i).encode() for i in range(10)]
    again = pickle.loads(pickle.dumps(table))
    assert text_of(again, 0) == text and list(again.names) == list(table.names)
    assert len(pickle.dumps(table.store)) < 1000, "a worker maps the tokens, it is not sent them"


def test_split_and_keep_select_by_name_without_copying(build, data):
    for name in "abcd":
        (data / f"{name}.txt").write_text(name * 5)
    table = build()
    train, held_out = table.split(lambda name: name.endswith(("b.txt", "d.txt")))
    assert [text_of(train, i) for i in range(2)] == [b"aaaaa", b"ccccc"]
    assert [Path(name).name for name in held_out.names] == ["b.txt", "d.txt"]
    assert (held_out.n_documents, held_out.n_tokens, held_out.n_bytes) == (2, 10, 10)
    assert np.shares_memory(train.read(0, 0, 5), table.read(0, 0, 5))
    kept = build(keep=lambda name: name.endswith("c.txt"))
    assert kept.n_documents == 1 and text_of(kept, 0) == b"ccccc"
    with pytest.raises(ValueError, match=r"none of the 4 documents of .*a.txt and 3 more files is kept"):
        build(keep=lambda name: False)


def test_from_arrays():
    table = TokenTable.from_arrays(
        [[1, 300], [], np.array([5], np.uint8)], byte_lengths=[4, 0, 2], names=["x", "y", "z"]
    )
    assert (table.n_documents, table.n_tokens, table.n_bytes, table.n_empty) == (2, 3, 6, 1)
    assert list(table.names) == ["x", "z"] and table.read(0, 0, 2).tolist() == [1, 300]
    assert list(TokenTable.from_arrays([[1], [], [2]]).names) == ["document 0", "document 2"]
    forms = TokenTable.from_arrays([torch.tensor([1, 300]), range(3), np.array([2], np.uint16)])
    assert [forms.read(i, 0, n).tolist() for i, n in enumerate(forms.lengths)] == [[1, 300], [0, 1, 2], [2]]
    with pytest.raises(TypeError, match=r"document 0 must hold integer token ids, got 1\.5"):
        TokenTable.from_arrays([[1.5]])
    with pytest.raises(ValueError, match="document 0 must be a list of token ids, got a list in it; give one row"):
        TokenTable.from_arrays([[[1]]])
    with pytest.raises(ValueError, match="1 documents, 2 byte_lengths and 1 names"):
        TokenTable.from_arrays([[1]], byte_lengths=[1, 2])


def test_nothing_to_read(build, data, tmp_path):
    (data / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing to read in .*a.txt: no document has any text"):
        build()
    (data / "b.jsonl").write_text('{"text": ""}\n')
    (data / "c.csv").write_text("")
    with pytest.raises(ValueError, match=r"nothing to read in .*a.txt and 2 more files"):
        build()
    assert not list((tmp_path / "cache").glob("[!.]*")), "a failed build leaves no table"


def test_real_files(shared_data, tmp_path):
    text = shared_data / "text"
    paths = [text / "tinyshakespeare.txt", text / "books_valid.jsonl.xz", text / "enwiki_106_articles.xml.bz2"]
    table = build_token_table(paths, ByteTokenizer(), cache_dir=tmp_path)
    assert table.n_documents == 4 and table.n_bytes == 1_115_394 + 6_089_746 + table.byte_lengths[:2].sum()
    assert text_of(table, 3) == (text / "tinyshakespeare.txt").read_bytes()
    assert b"Emma" in text_of(table, 0) + text_of(table, 1)
    promoters = shared_data / "genomic_benchmarks" / "human_nontata_promoters_test.csv.gz"
    table = build_token_table(promoters, ByteTokenizer(), text_field="seq", cache_dir=tmp_path)
    assert table.n_documents == 9034 and set(table.lengths.tolist()) == {251}


# The cache


def test_the_second_time_no_file_is_read(build, data, monkeypatch):
    (data / "a.txt").write_bytes(b"x" * 3_000_000)
    calls: list[tuple[int, int | None]] = []
    first = build(progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (3_000_000, 3_000_000) and calls == sorted(calls) and len(calls) > 1
    calls.clear()
    monkeypatch.setattr(build_module, "iter_documents", lambda *_: pytest.fail("a file was read"))
    second = build(progress=lambda done, total: calls.append((done, total)))
    assert calls == [] and text_of(second, 0) == text_of(first, 0)


def test_the_cache_notices_what_changes(build, data, bpe, tmp_path):
    file = data / "a.jsonl"
    file.write_text('{"text": "one", "body": "two"}')
    assert text_of(build(), 0) == b"one"
    assert text_of(build(text_field="body"), 0) == b"two"
    assert text_of(build(bpe), 0, bpe) == b"one"
    file.write_text('{"text": "1ne", "body": "two"}')
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))  # same size, 1 ns later
    assert text_of(build(), 0) == b"1ne"
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 4


def test_a_damaged_table_is_built_again(build, data, tmp_path):
    (data / "a.txt").write_bytes(b"hello")
    build()
    (file,) = (tmp_path / "cache").glob("*/tokens.arrow")
    os.truncate(file, 100)
    assert text_of(build(), 0) == b"hello"


def test_the_default_cache_is_the_users(data, monkeypatch, tmp_path):
    (data / "a.txt").write_bytes(b"hello")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build_token_table(data, ByteTokenizer())
    assert len(list((tmp_path / "xdg/anymamba/tokens").glob("*/tokens.arrow"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build_module.default_cache() == tmp_path / "home/.cache/anymamba/tokens"


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_killed_build_leaves_no_table_and_the_next_one_cleans_up(build, data, tmp_path):
    (data / "a.txt").write_bytes(b"x" * 30_000_000)
    slow = """
        import sys, time
        from anymamba.data.table import build_token_table
        from anymamba.data.tokenizer import ByteTokenizer
        def progress(done, total):
            if done > 20_000_000:
                print("half", flush=True)
                time.sleep(60)
        build_token_table(sys.argv[1], ByteTokenizer(), cache_dir=sys.argv[2], progress=progress)
    """
    process = python(slow, data, tmp_path / "cache")
    assert process.stdout.readline() == "half\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((tmp_path / "cache").glob(".*/*/tokens.arrow")), "the build had begun"
    assert not list((tmp_path / "cache").glob("[!.]*"))
    assert build().n_tokens == 30_000_000
    assert not list((tmp_path / "cache").glob(".*-*")), "what the killed build left is gone"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_a_table_has_the_permissions_of_the_umask(build, data, tmp_path):
    (data / "a.txt").write_bytes(b"hello")
    build()
    umask = os.umask(0)
    os.umask(umask)
    (table,) = (tmp_path / "cache").iterdir()
    assert table.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in table.iterdir()} == {0o666 & ~umask}


def test_builders_at_the_same_time_agree(data, tmp_path):
    (data / "a.txt").write_bytes(b"x" * 5_000_000)
    code = """
        import sys
        from anymamba.data.table import build_token_table
        from anymamba.data.tokenizer import ByteTokenizer
        calls = []
        progress = lambda *counts: calls.append(counts)
        table = build_token_table(sys.argv[1], ByteTokenizer(), cache_dir=sys.argv[2], progress=progress)
        print(table.n_tokens, bool(calls))
    """
    processes = [python(code, data, tmp_path / "cache") for _ in range(3)]
    outputs = sorted(process.communicate()[0] for process in processes)
    assert outputs == ["5000000 False\n", "5000000 False\n", "5000000 True\n"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes, which Windows has not")
def test_a_full_disk_says_so_and_leaves_nothing(data, tmp_path):
    (data / "a.txt").write_bytes(b"x" * 5_000_000)
    code = """
        import resource, sys
        from anymamba.data.table import build_token_table
        from anymamba.data.tokenizer import ByteTokenizer
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # writing beyond fails, as on a full disk
        try:
            build_token_table(sys.argv[1], ByteTokenizer(), cache_dir=sys.argv[2])
        except OSError as error:
            print(error.errno, error)
    """
    output, errors = python(code, data, tmp_path / "cache").communicate()
    assert f"cannot write the table of tokens in {tmp_path / 'cache'}" in output and "free space there" in output, (
        errors
    )
    assert output.startswith("27 ") and output.count("\n") == 1
    assert not list((tmp_path / "cache").glob("[!.]*")) and not list((tmp_path / "cache").glob(".*-*"))


def test_a_cache_that_cannot_be_made_is_named(data, tmp_path):
    (data / "a.txt").write_text("a")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the table of tokens in .*file.*cache_dir"):
        build_token_table(data, ByteTokenizer(), cache_dir=tmp_path / "file" / "cache")


# Other tokenizers


def test_texts_are_encoded_as_the_tokenizer_does(build, data, bpe):
    texts = [WORDS * n for n in (1, 2, 50)] + ["a", "<|endoftext|>", "日本"]
    (data / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    table = build(bpe)
    for i, text in enumerate(texts):
        assert table.read(i, 0, int(table.lengths[i])).tolist() == bpe.encode(text)
    assert table.byte_lengths.tolist() == [len(text.encode()) for text in texts]


def test_many_short_documents_are_encoded_by_few_calls(build, data, bpe, monkeypatch):
    (data / "a.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(10_000)))
    calls, encode_batch = [], bpe.encode_batch
    monkeypatch.setattr(bpe, "encode_batch", lambda texts: calls.append(len(texts)) or encode_batch(texts))
    table = build(bpe)
    assert sum(calls) == table.n_documents == 10_000 and len(calls) <= 3 and max(calls) <= 4096
    assert text_of(table, 9_999, bpe) == b"document 9999"


@pytest.mark.parametrize("text", [WORDS * 300, "a  b   \n\n " * 2000, "word " * 5000, "x" * 30_000 + " y" * 3000])
def test_a_long_document_is_cut_without_a_trace(build, data, bpe, monkeypatch, text):
    monkeypatch.setattr(encoding_module, "WHOLE", 10_000)
    monkeypatch.setattr(encoding_module, "SEGMENT", 1000)
    pieces, encode_batch = [], bpe.encode_batch
    monkeypatch.setattr(bpe, "encode_batch", lambda texts: pieces.extend(texts) or encode_batch(texts))
    (data / "a.txt").write_text(text, newline="")
    table = build(bpe)
    assert "".join(pieces) == text and len(pieces) >= 3 and max(map(len, pieces)) <= 10_000
    assert text_of(table, 0, bpe) == text.encode()
    if not text.startswith("xxx"):  # text without whitespace has no place to cut
        assert table.read(0, 0, table.n_tokens).tolist() == bpe.encode(text)


@given(st.text("ab1;  \n\t\u3000", max_size=30), st.integers(0, 30))
def test_cuts_are_before_whitespace_that_follows_something_else(text, stop):
    places = [i for i in range(1, min(stop, len(text) - 1) + 1) if text[i].isspace() and not text[i - 1].isspace()]
    best = [i for i in places if text[i] == " " and text[i - 1].isalnum()]
    assert last_cut(text, stop) == max(best or places, default=None)


@pytest.mark.parametrize("at", [0, 5, 1_048_575, 3_500_000])
def test_invalid_utf8_is_named_by_file_and_byte(build, data, bpe, at):
    text = bytearray("héllo wörld ".encode() * 300_000)
    while at and (text[at] & 0x80 or text[at - 1] & 0x80):
        at -= 1  # not inside a character
    text[at] = 0xFF
    (data / "a.txt").write_bytes(text)
    with pytest.raises(ValueError, match=rf"a.txt: not valid UTF-8 at byte {at} .*use byte mode"):
        build(bpe)


def test_a_character_cut_off_at_the_end_is_invalid(build, data, bpe):
    (data / "a.txt").write_bytes(b"abc\xe6\x97")
    with pytest.raises(ValueError, match=r"not valid UTF-8 at byte 3 "):
        build(bpe)
    assert text_of(build(), 0) == b"abc\xe6\x97", "in byte mode it survives"


# Size and speed

MEASURE = """
    import sys
    from pathlib import Path
    import numpy as np
    from anymamba.data.table import build_token_table, encoding
    from anymamba.data.tokenizer import load_tokenizer

    encoding._GROUP_CHARACTERS = 2 * encoding.SEGMENT  # as on two cores, whatever this machine has

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    folder, tokenizer = Path(sys.argv[1]), load_tokenizer(sys.argv[2] if len(sys.argv) > 2 else None)
    (folder / "small.txt").write_text("warm up " * 1000)
    build_token_table(folder / "small.txt", tokenizer, cache_dir=folder / "cache")
    before, anonymous = status("VmHWM"), status("RssAnon")
    table = build_token_table(folder / "big.txt", tokenizer, cache_dir=folder / "cache")
    peak = status("VmHWM") - before
    total = sum(int(table.read(0, i, min(i + 65_536, table.n_tokens))[0]) for i in range(0, table.n_tokens, 65_536))
    print(peak, status("RssAnon") - anonymous, table.n_bytes, total)
"""
linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads peak memory from /proc, which is Linux's"
)


@linux
def test_memory_does_not_grow_with_a_document(data):
    with (data / "big.txt").open("wb") as file:
        for i in range(200):
            file.write(bytes([65 + i % 26]) * 1_000_000)
    output, errors = python(MEASURE, data).communicate()
    assert output, errors
    peak, anonymous, n_bytes, total = map(float, output.split())
    assert n_bytes == 200e6 and total > 0
    print(f"peak {peak:.0f} MiB above a small build, {anonymous:.0f} MiB held while reading")
    assert peak < 60 and anonymous < 60


@linux
def test_memory_does_not_grow_with_a_document_for_bpe(data, bpe):
    text = (WORDS * 100).encode()
    (data / "big.txt").write_bytes(text * (12_000_000 // len(text)))
    # Whole, this document would take 2 GB: see the sizes in table/encoding.py.
    environment = {**os.environ, "RAYON_NUM_THREADS": "2"}
    output, errors = python(MEASURE, data, bpe.path, env=environment).communicate()
    assert output, errors
    peak, anonymous, n_bytes, _ = map(float, output.split())
    assert n_bytes > 11e6
    print(f"peak {peak:.0f} MiB above a small build, {anonymous:.0f} MiB held while reading")
    assert peak < 700


def test_reading_a_span_takes_microseconds(build, data):
    with (data / "a.jsonl").open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": str(i) * 100}) + "\n")
    table = build()
    documents = np.random.default_rng(0).integers(0, table.n_documents, 2000).tolist()

    def seconds_each() -> float:
        start = time.perf_counter()
        for document in documents:
            table.read(document, 0, 100)
        return (time.perf_counter() - start) / len(documents)

    assert min(seconds_each() for _ in range(5)) < 50e-6


def test_a_million_documents_take_arrays_not_objects(build, data):
    file = data / "a.csv"
    file.write_text("text\n" + "ab\n" * 200_000)
    table = build()
    assert table.n_documents == 200_000 and table.names[199_999] == f"{file}:200001"
    held = len(pickle.dumps(table))
    assert held < 45 * table.n_documents, "five 8-byte numbers a document, and no strings"


@pytest.mark.parametrize(
    "name", ["tokens.arrow", "documents.arrow", "files.arrow", "meta.json", "anymamba_manifest.json"]
)
def test_a_table_with_one_changed_bit_is_built_again(build, data, tmp_path, name):
    (data / "a.txt").write_bytes(b"hello")
    build()
    (table,) = (tmp_path / "cache").glob("[!.]*")
    content = bytearray((table / name).read_bytes())
    content[len(content) // 2] ^= 1
    (table / name).write_bytes(content)
    assert text_of(build(), 0) == b"hello"
    assert manifest.check(table) >= {"tokens.arrow", "documents.arrow", "files.arrow", "meta.json"}
