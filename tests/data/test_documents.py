"""Files, folders and patterns; every format and compression; and each way in which data can be bad."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from anymamba.data.documents import find_files, iter_documents

TEXTS = [b"first\r\nno final newline", "zwei ½ 日本".encode(), b'three "quoted", with\n a newline\n', b"x" * 300_000]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def bgz(data: bytes) -> bytes:
    """Gzip in several members, as bgzip writes it."""
    return b"".join(gzip.compress(data[i : i + 60_000]) for i in range(0, max(1, len(data)), 60_000))


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bgz": bgz, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def rows_file(path, suffix: str, field: str = "text") -> bytes:
    """TEXTS as rows of a format."""
    texts = [text.decode() for text in TEXTS]
    if suffix == ".jsonl":
        return "\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(texts)).encode()
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerows([["id", field], *enumerate(texts)])
    else:
        pa.parquet.write_table(pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=3)
    return path.read_bytes()


def read(path, text_field=None) -> list[tuple[str, bytes]]:
    return [(d.name, b"".join(d.pieces)) for d in iter_documents(find_files([path]), text_field)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_are_documents(tmp_path, suffix, compression):
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](rows_file(tmp_path / f"plain{suffix}", suffix)))
    assert [text for _, text in read(path)] == TEXTS
    # csv: the third text holds two newlines, and the first one a CR LF
    lines = {".jsonl": [1, 2, 3, 4], ".csv": [2, 4, 5, 8], ".parquet": [1, 2, 3, 4]}[suffix]
    assert [name for name, _ in read(path)] == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".PY", ".log", ""])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, suffix, compression):
    data = b"\xef\xbb\xbfBOM\r\n\xff\xfe invalid \x80\r no final newline" * 60_000  # more than two blocks
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](data))
    assert read(path) == [(str(path), data)]
    assert max(len(piece) for d in iter_documents([path]) for piece in d.pieces) <= 1 << 20


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_field_by_name(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(rows_file(path, suffix, field="body"))
    assert [text for _, text in read(path, "body")] == TEXTS
    for field in (None, "nope"):
        with pytest.raises(
            ValueError, match=rf"no field '{field or 'text'}'.*'id', 'body'; choose one with text_field"
        ):
            read(path, field)


def test_a_field_for_text_files_only_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"text_field='body' needs .jsonl, .csv, .parquet"):
        read(tmp_path, "body")


def test_folders_are_searched_for_known_suffixes_without_hidden_files(tmp_path):
    wanted = ["a.txt", "b/c.md", "b/d/e.py", "f.jsonl.xz", "g.csv.gz", "h.parquet", "i.TXT", "j.txt.zst"]
    other = ["k.png", "l.log", "m", "n.tar.gz", ".hidden.txt", ".git/o.txt", "b/.p/q.md", "r.txt~"]
    for name in wanted + other:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b" / "again").symlink_to(tmp_path)  # a cycle
    assert find_files([tmp_path]) == sorted(tmp_path / name for name in wanted)


def test_patterns_and_paths_together_give_each_file_once(tmp_path, monkeypatch):
    for name in ("a.log", "b.txt", "sub/c.txt", "sub/d.log", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)

    def names(*paths):
        return [file.relative_to(tmp_path).as_posix() for file in find_files(paths)]

    assert names("*.log") == ["a.log"]
    assert names("**/*.log") == ["a.log", "sub/d.log"]
    assert names("s?b") == ["sub/c.txt"], "a folder that a pattern finds is searched like one that is named"
    assert names("[x].txt") == ["[x].txt"], "a file of that name comes before a pattern"
    assert names("sub", "sub/c.txt", tmp_path / "sub" / "..", "*.txt") == ["[x].txt", "b.txt", "sub/c.txt"]
    assert find_files("b.txt") == [tmp_path / "b.txt"], "one path need not be in a list"
    (tmp_path / "link.txt").symlink_to("b.txt")
    assert len(names("b.txt", "link.txt")) == 1


def test_paths_without_files(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_text("x")
    for path, message in {
        tmp_path / "missing.txt": r"no such file or folder: .*missing.txt",
        tmp_path / "*.txt": r"the pattern .*\*\.txt matches no file",
        tmp_path
        / "empty": r"no readable file in .*empty: looked for .txt .md .py .jsonl .csv .parquet.*, found no file",
        tmp_path: r"no readable file in .*, found 1 \.png",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            find_files([path])
    with pytest.raises(FileNotFoundError, match="at least one file"):
        find_files([])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system has not")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        find_files([tmp_path / "pipe"])


def test_a_folder_without_readable_files_tells_the_endings_that_it_has(tmp_path):
    names = ["a.log", "b/c.LOG", "b/d.tar.gz", "e.json", "README", ".hidden.log", "b/.git/x.log"]
    for name in names:
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / name).write_text("x")
    seen = r"looked for .txt .md .py .jsonl .csv .parquet, also with .gz .bgz .bz2 .xz .zst, found "
    seen += r"2 \.log, 1 without an ending, 1 \.json, 1 \.tar\.gz; a text file with another ending is read when"
    with pytest.raises(FileNotFoundError, match=rf"no readable file in .*logs: {seen}"):
        find_files(tmp_path / "logs")
    for pattern in ("l*", "*[gs]"):
        with pytest.raises(FileNotFoundError, match=rf"the pattern .* matches no readable file: {seen}"):
            find_files(tmp_path / pattern)
    for i in range(12):
        (tmp_path / "logs" / f"x.kind{i:02}").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"1 \.kind04, 8 with other endings; a text"):
        find_files(tmp_path / "logs")


FASTA = b">chr1 test\nACGTNNacgt\nTTGA\n>chr2\nGGCC\n"


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".fa", ".fasta", ".fna", ".ffn", ".faa", ".frn", ".FA", ".fastq", ".fq", ".2bit"])
def test_files_of_sequences_are_refused_by_name(tmp_path, suffix, compression):
    path = tmp_path / f"genome{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](FASTA))
    kind = {".fastq": "FASTQ", ".fq": "FASTQ", ".2bit": "2bit"}.get(suffix, "FASTA")
    (tmp_path / "a.txt").write_text("x")
    for paths in ([path], [tmp_path / "*"], [tmp_path / "a.txt", path]):
        with pytest.raises(ValueError, match=rf"genome.* is {kind} by its name and is not read as text"):
            find_files(paths)
    assert find_files(tmp_path) == [tmp_path / "a.txt"], "a folder is searched for text only"
    (tmp_path / "a.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"found 1 \{path.name[6:].lower()}; DNA and proteins \({kind}\) are not text"
    ):
        find_files(tmp_path)


PROTEIN = b">sp|P69905|HBA\nMVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGK\nKVADALTNAVAHVDDMPNALSAL\n"
SEQUENCES = {
    "FASTA": [FASTA, FASTA.replace(b"\n", b"\r\n"), PROTEIN, b">a\n" + b"ACGT" * 1_000_000, b">a\n;note\n\nac-gt*\n"],
    "2bit": [b"\x43\x27\x41\x1a\0\0\0\0", b"\x1a\x41\x27\x43\0\0\0\0"],
}


@pytest.mark.parametrize("compression", ["", ".gz", ".bgz"])
@pytest.mark.parametrize("suffix", [".txt", ".seq", ""])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_files_of_sequences_are_refused_by_content(tmp_path, kind, suffix, compression):
    path = tmp_path / f"genome{suffix}{compression}"
    for data in SEQUENCES[kind]:
        path.write_bytes(COMPRESS[compression](data))
        with pytest.raises(
            ValueError, match=rf"genome.* is {kind} by its content and is not read as text.*rename it to .fa"
        ):
            read(path)


@pytest.mark.parametrize(
    "text",
    [
        "> a quotation\nand an answer\n",
        ">",
        ">\n\n",
        "> a\n> b\n",
        "ACGT\nACGT\n",
        "> a\nTHE END\n",
        " >chr1\nACGT\n",
        "CA",
    ],
)
def test_text_that_begins_like_sequences_is_text(tmp_path, text):
    (tmp_path / "mail.txt").write_text(text)
    assert read(tmp_path / "mail.txt") == [(str(tmp_path / "mail.txt"), text.encode())]


def test_a_binary_file_with_an_unknown_ending_tells_the_endings_that_are_read(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4\0")
    with pytest.raises(ValueError, match=r"a.zip is not text: NUL at byte 4.* the endings that are read are .txt .md"):
        read(tmp_path / "a.zip")
    (tmp_path / "a.txt").write_bytes(b"PK\3\4\0")
    with pytest.raises(ValueError, match=r"a.txt is not text: NUL at byte 4; leave it out, .* to UTF-8$"):
        read(tmp_path / "a.txt")


def test_a_binary_file_as_text(tmp_path):
    for name, data in {"a.txt": b"PK\3\4\0\0", "utf16.txt": "hi".encode("utf-16-le"), "b.bin": b"\x7fELF\0"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is not text: NUL at byte \d.*leave it out, or convert it"):
            read(tmp_path / name)


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_compression(tmp_path, compression, damage):
    blob = COMPRESS[compression](os.urandom(200_000))
    path = tmp_path / f"data.jsonl{compression}"
    path.write_bytes(blob[: len(blob) // 2] if damage == "truncated" else b"this is not compressed at all")
    with pytest.raises(ValueError, match=rf"data.jsonl{compression}: damaged or truncated {compression} data"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data.jsonl:3: not a line of JSON \(.*\)"),
        ("\ud800", r"data.jsonl:3: not a line of JSON"),
        ("[" * 100_000, r"data.jsonl:3: not a line of JSON"),
        ("[1]", r"data.jsonl:3: wanted an object with field 'text', got an array"),
        ('{"body": "a"}', r"data.jsonl:3: no field 'text'; the fields there are 'body'"),
        ('{"text": 3}', r"data.jsonl:3: field 'text' must be a string, got a number"),
        ('{"text": null}', r"data.jsonl:3: field 'text' must be a string, got null"),
        ('{"text": {}}', r"data.jsonl:3: field 'text' must be a string, got an object"),
    ],
)
def test_malformed_json_lines_are_named(tmp_path, line, message):
    good = '{"text": "a"}\n\n'  # a blank line counts but is no document
    (tmp_path / "data.jsonl").write_bytes((good + line + "\n").encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "data.jsonl")


def test_json_escapes_that_are_no_character_become_their_bytes(tmp_path):
    (tmp_path / "data.jsonl").write_text(r'{"text": "a\ud800b"}')
    assert read(tmp_path / "data.jsonl")[0][1] == b"a\xed\xa0\x80b"


def test_csv_keeps_bytes_and_refuses_broken_rows(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbftext,id\n"\xff a\r\nb",1\n\n,2\n')
    assert read(path) == [(f"{path}:2", b"\xff a\r\nb"), (f"{path}:5", b"")]
    for rows, message in {
        b"a,1,2\n": r"data.csv:2: 3 values for the 2 of the header",
        b'"open,1\n': r"data.csv:\d: malformed csv \(unexpected end of data\)",
        b'"a"b,1\n': r"data.csv:2: malformed csv",
    }.items():
        path.write_bytes(b"text,id\n" + rows)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_csv_leaves_the_limit_of_other_readers_alone(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"text\n" + b"x" * 1_000_000)
    csv.field_size_limit(1000)
    assert len(read(tmp_path / "data.csv")[0][1]) == 1_000_000
    assert csv.field_size_limit(131_072) == 1000


def test_parquet_types(tmp_path):
    path = tmp_path / "data.parquet"
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        pa.parquet.write_table(pa.table({"text": pa.array(["a", "½"]).cast(kind)}), path)
        assert [text for _, text in read(path)] == [b"a", "½".encode()]
    pa.parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="field 'text' must hold strings, got int64"):
        read(path)
    pa.parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"data.parquet:2: field 'text' must be a string, got null"):
        read(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"data.parquet: not a readable parquet file"):
        read(path)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".parquet", ".jsonl.bz2"])
def test_reading_is_counted_in_bytes_of_the_disk(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    body = b"x" * 3_000_000 if suffix.startswith(".txt") else rows_file(tmp_path / "plain", "." + suffix.split(".")[1])
    path.write_bytes(COMPRESS["." + suffix.split(".")[2] if suffix.count(".") == 2 else ""](body))
    counts = []
    for document in iter_documents([path], on_read=counts.append):
        for _ in document.pieces:
            pass
    assert min(counts) > 0
    assert sum(counts) == path.stat().st_size or (suffix == ".parquet" and 0 < sum(counts) <= path.stat().st_size)
