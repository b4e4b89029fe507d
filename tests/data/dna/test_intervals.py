"""BED files, and which genome each belongs to."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymamba.base.errors import DataWarning
from anymamba.data.dna import Genome, Interval, are_genomes, find_genomes, read_bed, whole_sequences

GENOME = Genome.open({"chr1": "ACGT" * 100, "chr2": "GG" * 50, "scaffold": "A"})


def bed(folder: Path, text: str | bytes, name: str = "a.bed") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_columns(tmp_path):
    text = "chr1\t0\t10\nchr2\t5\t7\tgene\t960\t-\nchr1\t3\t400\tx\t0\t.\t1\t2\t0\t1\t5,\t0,\n"
    intervals, skipped = read_bed(bed(tmp_path, text), GENOME)
    assert intervals == [
        Interval("chr1", 0, 10, "+", ""),
        Interval("chr2", 5, 7, "-", "gene"),
        Interval("chr1", 3, 400, "+", "x"),
    ]
    assert skipped == {}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_line_ends_spaces_and_compression(tmp_path, pack):
    text = b"\xef\xbb\xbfchr1 0 10 a\r\n\r\nchr2\t5\t7\tlong label\t0\t+\r\n"
    path = bed(tmp_path, pack(text), "a.bed" if pack is bytes else "a.bed.gz")
    assert read_bed(path, GENOME)[0] == [Interval("chr1", 0, 10, "+", "a"), Interval("chr2", 5, 7, "+", "long label")]


def test_what_is_skipped_is_counted(tmp_path):
    text = (
        "browser position chr1:1-2\ntrack name=x\n#chrom\tstart\tend\nchrom\tstart\tend\nchr1\t0\t10\n"
        "chr9\t0\t10\nchr9\t0\t11\nchr1\t0\t401\nchr2\t7\t7\n"
    )
    intervals, skipped = read_bed(bed(tmp_path, text), GENOME)
    assert intervals == [Interval("chr1", 0, 10)]
    assert skipped == {
        "header and comment lines": 4,
        "intervals of sequences that the genome does not have": 2,
        "intervals beyond the end of their sequence": 1,
        "intervals without a base": 1,
    }


BAD = {
    "chr1\t0": "it has fewer than three columns",
    "chr1\t-1\t5": "start and end must be whole numbers, got '-1' and '5'",
    "chr1\t1.5\t5": "must be whole numbers",
    "chr1\t1\t\u0665": "must be whole numbers",
    "chr1\t9\t5": "the end 5 is before the start 9",
    "chr1\t1\t5\tx\t0\tforward": "the strand must be +, - or ., got 'forward'",
    "chrom\tstart\tend": "must be whole numbers",
}


@pytest.mark.parametrize(("line", "words"), BAD.items())
def test_a_bad_line_is_an_error_or_is_counted(tmp_path, line, words):
    path = bed(tmp_path, f"chr1\t0\t10\n{line}\n")
    with pytest.raises(ValueError) as error:
        read_bed(path, GENOME)
    assert f"{path}, line 2 is no interval of a BED file: " in str(error.value) and words in str(error.value)
    assert read_bed(path, GENOME, on_bad_line="skip") == ([Interval("chr1", 0, 10)], {"lines that are no intervals": 1})


@pytest.mark.parametrize(
    "line",
    ["chrom\tchromStart\tchromEnd", "seq start end name", "Sequence\t_from\t_to", "contig\tStart (bp)\tEnd (bp)"],
)
def test_names_of_columns_are_a_header(tmp_path, line):
    path = bed(tmp_path, f"track x\n{line}\nchr1\t0\t10\n")
    assert read_bed(path, GENOME) == ([Interval("chr1", 0, 10)], {"header and comment lines": 2})


@pytest.mark.parametrize(
    "line",
    [
        "chr1\t1,000\t2,000",
        "chr1\t1_000\t2_000",
        "chr1\t1e3\t2e3",
        "chr1\t1.0\t2.0",
        "chr1\t+1\t+2",
        "chr1\t.\t.",
        "chr1\t\t",
        "chr1\tNA\tNA",
        "1\tstart\tend",
        "chrom\t1,000\tend",
        "chr9\t1 000\t2 000",
        "unknown\tabc\tdef",
    ],
)
def test_a_first_line_with_wrong_positions_is_no_header(tmp_path, line):
    path = bed(tmp_path, f"#x\n{line}\nchr1\t0\t10\n")
    with pytest.raises(ValueError, match=r"line 2 is no interval of a BED file: start and end must be whole numbers"):
        read_bed(path, GENOME)
    assert read_bed(path, GENOME, on_bad_line="skip")[1]["lines that are no intervals"] == 1


def test_only_one_line_may_have_names_of_columns(tmp_path):
    with pytest.raises(ValueError, match="line 2 is no interval"):
        read_bed(bed(tmp_path, "chrom\tstart\tend\nseq\tfrom\tto\nchr1\t0\t10\n"), GENOME)


def test_line_ends_of_an_old_mac(tmp_path):
    for text in ("chr1\t0\t10\rchr1\t20\t30\r", "chrom\tstart\tend\rchr1\t20\t30\r"):
        with pytest.raises(ValueError, match="its lines end with CR alone, as on an old Mac; turn CR into LF"):
            read_bed(bed(tmp_path, text), GENOME, on_bad_line="skip")


def test_names_with_and_without_chr(tmp_path):
    with pytest.warns(DataWarning, match="with and without chr are taken as the same") as told:
        intervals, skipped = read_bed(
            bed(tmp_path, "1\t0\t10\n2\t0\t5\n"), Genome.open({"chr1": "A" * 10, "chr2": "A" * 9})
        )
    assert [i.name for i in intervals] == ["chr1", "chr2"] and not skipped and len(told) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        (
            "chr7\t0\t10\n",
            "intervals of sequences that the genome does not have: 1; the first is chr7:0-10, and the genome ",
        ),
        ("chr1\t500\t600\n", "beyond the end of their sequence: 1; the first is chr1:500-600"),
        ("chr1\t5\t5\n", "skipped intervals without a base: 1"),
    ],
)
def test_a_file_without_an_interval_of_the_genome(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        read_bed(bed(tmp_path, text), GENOME)
    assert ("is it another assembly?" in str(error.value)) == ("the first is" in words)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from([*BAD, "chr1\t0\t9", "chr1\t3\t8\ta\t0\t-"]))))
def test_any_text_gives_intervals_inside_the_genome_or_a_ValueError(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("bed") / "a.bed"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    for rule in ("error", "skip"):
        try:
            intervals, skipped = read_bed(path, GENOME, on_bad_line=rule)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        assert all(0 <= i.start < i.end <= GENOME.lengths[i.name] for i in intervals)
        n_lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        assert len(intervals) + sum(skipped.values()) <= n_lines + path.read_bytes().count(b"\r")


def test_whole_sequences():
    assert whole_sequences(GENOME) == [Interval("chr1", 0, 400), Interval("chr2", 0, 100), Interval("scaffold", 0, 1)]


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.fa", "b.2bit", "a.bed", "b.bed.gz", "x.txt", "sub/c.fna.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("?")
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "genomic"),
    [
        (["a.fa"], True),
        (["b.2bit", "a.bed"], True),
        (["sub"], True),
        (["*.fa"], True),
        (["not-there.fasta.gz"], True),
        (["x.txt"], False),
        (["."], False),
        (["*"], False),
        (["not-there"], False),
        ([], False),
    ],
)
def test_names_tell_genomes_from_text(folder, paths, genomic):
    assert are_genomes([str(folder / path) for path in paths]) is genomic


def test_genomes_and_text_together_are_an_error(folder):
    with pytest.raises(ValueError, match=r"a\.fa is DNA and .*x\.txt is text; train on one of them"):
        are_genomes([str(folder / "x.txt"), str(folder / "a.fa")])


def test_a_bed_file_belongs_to_the_genome_before_it_or_to_the_only_one(folder):
    def found(*names: str) -> dict[str, list[str]]:
        files = find_genomes([str(folder / name) for name in names])
        return {file.genome.name: [bed.name for bed in file.beds] for file in files}

    assert found("a.bed", "a.fa", "b.bed.gz") == {"a.fa": ["a.bed", "b.bed.gz"]}
    assert found("a.fa", "a.bed", "b.2bit", "b.bed.gz") == {"a.fa": ["a.bed"], "b.2bit": ["b.bed.gz"]}
    assert found("a.fa", "sub", "b.2bit") == {"a.fa": [], "c.fna.gz": [], "b.2bit": []}
    assert found("a.fa", "a.fa") == {"a.fa": []}
    with pytest.raises(ValueError, match=r"no genome is named before .*a\.bed; name the one"):
        found("a.bed", "a.fa", "b.2bit")
    with pytest.raises(ValueError, match=r"3 genomes are named before .*a\.bed"):
        found(".", "a.bed")
    with pytest.raises(ValueError, match="no genome is named"):
        found("a.bed")
    assert find_genomes([str(folder / "a.bed")], only=folder / "z.fa") == [(folder / "z.fa", (folder / "a.bed",))]


def test_excluded_genomes(folder):
    (file,) = find_genomes([str(folder)], exclude=["*.2bit", "sub", "*.bed*"])
    assert file.genome.name == "a.fa"


def test_no_warnings_for_own_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_bed(bed(tmp_path, "chr1\t0\t10\nchr7\t0\t10\n"), GENOME)
