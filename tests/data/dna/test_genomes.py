"""Genomes in files: every format gives the same letters, and what is wrong with a file is said."""

from __future__ import annotations

import gzip
import os
import random
import struct
import tracemalloc
import warnings
from pathlib import Path

import pytest
from genome_files import BGZIP_END, fasta_text, two_bit_bytes, write_all, write_bgzip, write_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymamba.base.errors import DataWarning
from anymamba.data.cache import cached_tables
from anymamba.data.dna import Genome, packed, reverse_complement, whole_sequences
from anymamba.data.dna.letters import LETTERS

NAMES = st.text("abcXYZ0189._|-", min_size=1, max_size=12)
FEW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def sequences(draw, alphabet: str) -> str:
    """Runs of letters, as genomes have them."""
    runs = st.lists(st.tuples(st.sampled_from(alphabet), st.integers(1, 9)), min_size=1, max_size=40)
    letters = "".join(letter * n for letter, n in draw(runs))
    return (
        letters if sum(c.upper() in "ACGTUN" for c in letters) * 2 >= len(letters) else "ACGT" * len(letters) + letters
    )


def records(alphabet: str) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(NAMES, sequences(alphabet), min_size=1, max_size=4)


def assert_reads(genome: Genome, wanted: dict[str, str], seed: int = 0) -> None:
    draw = random.Random(seed)
    assert genome.lengths == {name: len(letters) for name, letters in wanted.items()}
    for name, letters in wanted.items():
        assert genome.fetch(name, 0, len(letters)) == letters
        for _ in range(8):
            start, end = sorted(draw.choices(range(len(letters) + 1), k=2))
            assert genome.fetch(name, start, end) == letters[start:end]
            assert genome.fetch(name, start, end, strand="-") == reverse_complement(letters[start:end])


@FEW
@given(records("ACGTNacgtn"), st.integers(1, 70))
def test_all_formats_give_the_same_letters(tmp_path_factory, wanted, width):
    for path in write_all(tmp_path_factory.mktemp("genome"), wanted, width).values():
        with Genome.open(path, cache_dir=path.parent / "cache") as genome:
            assert_reads(genome, wanted)


@FEW
@given(records(LETTERS.decode()), st.integers(1, 70))
def test_ambiguity_codes_and_U_are_kept(tmp_path_factory, wanted, width):
    for path in write_all(tmp_path_factory.mktemp("genome"), wanted, width).values():
        with Genome.open(path, cache_dir=path.parent / "cache") as genome:
            assert_reads(genome, wanted)


def test_pieces_of_a_long_file_are_joined(tmp_path, monkeypatch):
    """Blocks end inside headers, lines, runs and groups of four."""
    draw = random.Random(1)
    wanted = {f"s{i}": "".join(draw.choices("ACGTNacgtnR", k=draw.randrange(1, 400))) for i in range(20)}
    wanted = {name: "ACGT" * 100 + letters for name, letters in wanted.items()}
    path = tmp_path / "a.fa"
    path.write_bytes(fasta_text(wanted, 50))
    monkeypatch.setattr(packed, "_AT_ONCE", 64)
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr("anymamba.data.dna.fasta._BLOCK", block)
        with Genome.open(path, cache_dir=tmp_path / f"cache{block}") as genome:
            assert_reads(genome, wanted)


def test_a_run_over_several_pieces_is_one(tmp_path, monkeypatch):
    path = tmp_path / "a.fa"
    path.write_text(">a\nACG" + "n" * 1000 + "ACGT\n")
    monkeypatch.setattr(packed, "_AT_ONCE", 64)
    monkeypatch.setattr("anymamba.data.dna.fasta._BLOCK", 64)
    with Genome.open(path, cache_dir=tmp_path / "cache") as genome:
        assert genome._reader._odd.tolist() == [[3, 1003, ord("N")]]
        assert genome._reader._lower[:, :2].tolist() == [[3, 1003]]


def test_comments_blank_lines_and_a_mark_at_the_start(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(b"\xef\xbb\xbf;made by hand\n> a first\n\nAC GT\n;more\nNN\n\n>b\nGG")
    with Genome.open(path) as genome:
        assert_reads(genome, {"a": "ACGTNN", "b": "GG"})
        assert genome.notes == ("2 N", "skipped 2 comment lines")


def test_other_letters_are_counted_as_they_are_read_in_place(tmp_path):
    """The notes of a packed file already have its counts. Lower case is not counted."""
    wanted = {"a": "ACGTNnacgt" * 10 + "RrYU" + "ACGT" * 20, "b": "NNACGTB"}
    files = write_all(tmp_path, wanted, 60)
    counted = "{} N; letters other than A, C, G, T and N: {}; U is read as T, the others as N, which makes {}"
    n_in_place = 0
    for path in files.values():
        with Genome.open(path, cache_dir=tmp_path / "cache") as genome:
            assert genome.reading_notes() == ()
            genome.fetch("a", 0, 103, strand="-")
            if any("letters" in note for note in genome.notes):
                assert genome.notes == (counted.format(22, "1 B, 2 R, 1 U, 1 Y", 26),)
                assert genome.reading_notes() == ()
            else:
                n_in_place += 1
                told = counted.format(20, "2 R, 1 Y", 23)
                assert genome.reading_notes() == (f"read (counted at each reading) {told}",)
    assert n_in_place
    with Genome.open(wanted) as genome:
        genome.fetch("b", 2, 6)
        assert genome.reading_notes() == ()
        genome.fetch("b", 1, 7)
        assert genome.others_read == {"B": 1, "N": 1}


def test_the_runs_of_N_and_ambiguity_codes_are_those_of_the_letters(tmp_path):
    """In every format; U is no unknown letter."""
    wanted = {"a": "nNACGTUNRYuNNA", "b": "ACGT", "c": "NNNN", "d": "AN"}
    runs = {"a": [[0, 2], [7, 10], [11, 13]], "b": [], "c": [[0, 4]], "d": [[1, 2]]}
    two_bit = {name: letters.translate(str.maketrans("URYu", "TNNt")) for name, letters in wanted.items()}
    made = [*write_all(tmp_path, wanted).values(), *write_all(tmp_path / "2", two_bit).values(), wanted]
    for source in made:
        with Genome.open(source) as genome:
            for name in wanted:
                found = genome.unknown_runs(name)
                assert found.shape == (len(found), 2)
                covered = [i for start, end in found.tolist() for i in range(start, end)]
                assert covered == [i for start, end in runs[name] for i in range(start, end)]
            assert genome.reading_notes() == ()


def test_the_N_of_two_bit_are_counted_at_the_start(tmp_path):
    """Also where its stretches overlap."""
    (tmp_path / "a.2bit").write_bytes(two_bit_bytes({"a": "ANNCn", "b": "", "c": "NA"}))
    with Genome.open(tmp_path / "a.2bit") as genome:
        assert genome.notes == ("4 N", "skipped 1 empty record, the first 'b'")
        genome.fetch("a", 0, 5)
        assert genome.reading_notes() == ()
    record = struct.pack("<8I", 20, 3, 0, 5, 5, 10, 10, 10) + struct.pack("<2I", 0, 0) + bytes(5)
    (tmp_path / "o.2bit").write_bytes(two_bit_bytes({"a": ""})[:16] + b"\1a" + struct.pack("<I", 22) + record)
    with Genome.open(tmp_path / "o.2bit") as genome:
        assert genome.notes == ("15 N",)
        assert genome.fetch("a", 0, 20) == "N" * 15 + "T" * 5


# ------------------------------------------------------------------------------------------ other libraries


@pytest.fixture(scope="module")
def random_records() -> dict[str, str]:
    draw = random.Random(2)
    return {
        name: "".join(draw.choices("ACGTacgtN", [9, 9, 9, 9, 5, 5, 5, 5, 2], k=777)) for name in ("chr1", "chr2", "x")
    }


def test_pyfaidx_gives_the_same_and_its_objects_are_read(tmp_path, random_records):
    pyfaidx = pytest.importorskip("pyfaidx", reason="needs pyfaidx: pip install 'anymamba[test]'")
    path = tmp_path / "a.fa"
    path.write_bytes(fasta_text(random_records))
    with pyfaidx.Fasta(str(path)) as fasta, Genome.open(fasta) as wrapped:
        assert_reads(wrapped, random_records)
        with Genome.open(path) as genome:  # pyfaidx has written an index
            assert type(genome._reader).__name__ == "IndexedReader"
            assert_reads(genome, random_records)
        assert fasta["chr1"][:3].seq == random_records["chr1"][:3], "the object stays open"


@pytest.mark.parametrize("order", "<>")
def test_twobitreader_and_py2bit_give_the_same(tmp_path, random_records, order):
    twobitreader = pytest.importorskip("twobitreader", reason="needs twobitreader: pip install 'anymamba[test]'")
    py2bit = pytest.importorskip("py2bit", reason="needs py2bit: pip install 'anymamba[test]'")
    path = tmp_path / "a.2bit"
    path.write_bytes(two_bit_bytes(random_records, order))
    with Genome.open(path) as genome:
        other_file = twobitreader.TwoBitFile(str(path))
        others = [lambda name, a, b: str(other_file[name][a:b])]
        if order == "<":  # py2bit does not read the other order
            others.append(lambda name, a, b: py2bit.open(str(path), True).sequence(name, a, b))
        for name in genome.names:
            for a, b in ((0, 777), (1, 6), (400, 777), (775, 777)):
                assert {other(name, a, b) for other in others} == {genome.fetch(name, a, b)}


def test_any_mapping_is_read():
    with Genome.open({"a": "ACGTN", "b": "gg"}) as genome:
        assert_reads(genome, {"a": "ACGTN", "b": "gg"})


# ------------------------------------------------------------------------------------------ names and ranges


@pytest.mark.parametrize(
    ("own", "asked"), [("chr1", "1"), ("1", "chr1"), ("chrM", "MT"), ("MT", "chrM"), ("chrX", "X"), ("M", "chrM")]
)
def test_names_with_and_without_chr_are_one_and_it_is_said_once(own, asked):
    genome = Genome.open({own: "ACGT", "scaffold": "AA"})
    with pytest.warns(DataWarning, match=f"calls '{asked}' '{own}'"):
        assert genome.fetch(asked, 0, 4) == "ACGT"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert genome.fetch(asked, 1, 2) == "C" and genome.fetch(own, 1, 2) == "C"


def test_a_genome_with_both_names_keeps_them_apart():
    genome = Genome.open({"chr1": "A", "1": "C"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (genome.fetch("chr1", 0, 1), genome.fetch("1", 0, 1)) == ("A", "C")
    with pytest.raises(ValueError, match="no sequence 'MT'"):
        Genome.open({"chrM": "A", "M": "C"}).fetch("MT", 0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chr3", 0, 1), r"no sequence 'chr3'; did you mean 'chr2'\?"),
        (("zzz", 0, 1), "it has chr1, chr2, x; is it another assembly"),
        (("chr1", 0, 778), r"chr1:0-778 is not a range of chr1 in .*a.fa, which has 777 bases"),
        (("chr1", -1, 3), "is not a range"),
        (("chr1", 5, 4), "is not a range"),
    ],
)
def test_wrong_names_and_ranges(tmp_path, random_records, arguments, words):
    (tmp_path / "a.fa").write_bytes(fasta_text(random_records))
    with Genome.open(tmp_path / "a.fa") as genome, pytest.raises(ValueError, match=words):
        genome.fetch(*arguments)


def test_a_wrong_strand():
    with pytest.raises(ValueError, match=r"strand must be '\+' or '-', got '.'"):
        Genome.open({"a": "A"}).fetch("a", 0, 1, strand=".")


# ------------------------------------------------------------------------------------------ bad files


BAD_FASTA = {
    "nothing": (b"", "is not FASTA: it has no line that begins with >"),
    "text": (b"ACGT\n>a\nACGT\n", "is not FASTA: it begins with 'ACGT'"),
    "FASTQ": (b"@r1\nACGT\n+\nIIII\n", "is FASTQ"),
    "gzip without .gz": (gzip.compress(b">a\nAC\n"), "is compressed with gzip; let its name end with .gz"),
    "a protein": (b">p\nMVLSPADKTN\n", "record 'p' has 'L' at base 3.*is it a protein"),
    "a protein of ambiguity codes": (b">p\n" + b"MKVDHRSYWG" * 3, "more than half of record 'p' are ambiguity codes"),
    "gaps": (b">a\nAC\nG--T\n", "record 'a' has '-' at base 4, which is a gap"),
    "digits": (b">a\n1 ACGT\n", "record 'a' has '1' at base 1; a sequence has letters only"),
    "two of one name": (b">a x\nAC\n>b\nGG\n>a y\nGT\n", "two records named 'a', in lines 1 and 5"),
    "no name": (b">a\nAC\n>\nGT\n", "line 3: a record has no name"),
    "only empty records": (b">a\n>b\n\n", "all of its 2 records are empty"),
    "line ends of an old Mac": (b">a\rACGT\r>b\rACGT\r", "its lines end with CR alone, as on an old Mac; turn CR into"),
    "many line ends of an old Mac": (b">a" + b"\rACGT" * 600_000, "its lines end with CR alone"),
    "a header that does not end": (b">a" + b"x" * 3_000_000, "a header of more than a million characters"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("data", "words"), BAD_FASTA.values(), ids=BAD_FASTA)
def test_bad_fasta(tmp_path, data, words, pack):
    path = tmp_path / ("a.fa" if pack is bytes else "a.fa.gz")
    path.write_bytes(pack(data))
    with pytest.raises(ValueError, match=f"^{path}.*{words}") as error:
        Genome.open(path, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not cached_tables(tmp_path / "cache"), "nothing half done is left"


def test_empty_records_are_skipped_and_counted(tmp_path):
    wanted = {"a": "ACGT", "b": "", "c": "GG", "d": ""}
    for path in write_all(tmp_path / "genome", wanted).values():
        with Genome.open(path) as genome:
            assert genome.names == ("a", "c")
            assert genome.notes == ("skipped 2 empty records, the first 'b'",)
            with pytest.raises(ValueError, match="no sequence 'b'"):
                genome.fetch("b", 0, 0)


def test_other_letters_are_counted(tmp_path):
    (tmp_path / "a.fa").write_text(">a\nACGTNRRyU\n>b\nACGTun\n")
    others = "letters other than A, C, G, T and N: 2 R, 2 U, 1 Y; U is read as T, the others as N"
    with Genome.open(tmp_path / "a.fa") as genome:
        assert genome.notes == (f"2 N; {others}, which makes 5",)
    (tmp_path / "b.fa").write_text(">a\nACGTRRyUu\n")
    with Genome.open(tmp_path / "b.fa") as genome:
        assert genome.notes == (others,)
    (tmp_path / "c.fa").write_text(">a\nACGTacgt\n")
    with Genome.open(tmp_path / "c.fa") as genome:
        assert genome.notes == ()


PROTEINS = {
    "a protein": ("MVLSPADKTNVKAAWGKVGA" * 5, "record 'p' has 'L' at base 3, which is no base .*; is it a protein"),
    "a protein of ambiguity codes": ("MKVDHRSYWG" * 9, "more than half of record 'p' are ambiguity codes"),
    "a gap": ("ACGTACGT" * 9 + "AC-GT", "record 'p' has '-' at base 75, which is a gap"),
    "a stop": ("ACGT" * 17 + "*", r"record 'p' has '\*' at base 69, which is a gap of an alignment or a stop"),
}


@pytest.mark.parametrize(("letters", "words"), PROTEINS.values(), ids=PROTEINS)
def test_an_index_does_not_hide_a_protein(tmp_path, letters, words):
    """The errors are those of the reader without an index, for each format, mapping and part that is read first."""
    records = {"d": "ACGT" * 9, "p": letters}
    made = write_all(tmp_path, records)
    for path in (made["plain.fa"], made["zip.fa.gz"]):
        with pytest.raises(ValueError, match=f"^{path}: {words}"):
            Genome.open(path, cache_dir=tmp_path / "cache")
    for source in (made["in_place.fa"], made["blocks.fa.gz"], records):
        for start, end in ((0, len(letters)), (0, 2), (len(letters) - 2, len(letters))):
            with Genome.open(source) as genome:
                assert genome.fetch("d", 0, 36) == records["d"]
                with pytest.raises(ValueError, match=f"^{genome.source}: {words}") as error:
                    genome.fetch("p", start, end)
                assert "does not fit" not in str(error.value)


def test_pyfaidx_makes_an_index_of_a_protein(tmp_path):
    pyfaidx = pytest.importorskip("pyfaidx", reason="needs pyfaidx: pip install 'anymamba[test]'")
    path = tmp_path / "p.fa"
    path.write_text(">p\n" + "MKVDHRSYWG" * 9 + "\n")
    with pyfaidx.Fasta(str(path)) as fasta, pytest.raises(ValueError, match=r"^Fasta: more than half of record 'p'"):
        Genome.open(fasta).fetch("p", 0, 10)
    with Genome.open(path) as genome, pytest.raises(ValueError, match=f"^{path}: more than half of record 'p'"):
        genome.fetch("p", 0, 10)


@pytest.mark.parametrize("n_bases", [99_999, 100_001])
def test_a_long_record_is_no_protein_because_of_its_start(tmp_path, n_bases):
    """100,000 ambiguity codes and then bases: as without an index, the whole record decides."""
    records = {"a": "RY" * 50_000 + "A" * n_bases}
    made = write_all(tmp_path, records)
    for source in (made["in_place.fa"], made["blocks.fa.gz"], records):
        with Genome.open(source) as genome:
            if n_bases > 100_000:
                assert genome.fetch("a", 99_998, 100_002) == "RYAA"
            else:
                with pytest.raises(ValueError, match="more than half of record 'a' are ambiguity codes"):
                    genome.fetch("a", 150_000, 150_001)


@pytest.mark.parametrize(
    "text",
    [
        b">a\nACGTACGTAC\nACGTAC\n>b x\nGGGG\n",  # a shorter record: the next header is among the letters
        b">a\nACGTACGTAC\nACLTA\nGTACGT\n>b\nGGGG\n",  # other line ends
        b">a\nACGTACGTAC\nAC GTACGTAC\n>b\nGGGG\n",  # a space, which the reader without an index skips
        b">a\nACGTACGTAC\n;CGTACGTAC\n>b\nGGGG\n",  # a comment
        b">a\nACGTACGTAC\nACLTACGTACGT\n>b\nGGGG\n",  # a longer last line
    ],
)
def test_an_index_that_misfits_is_told_as_such(tmp_path, text):
    path = tmp_path / "a.fa"
    write_index(tmp_path / "a.fa.fai", b">a\nACGTACGTAC\nACGTACGTAC\n")
    path.write_bytes(text)
    newer(path)
    words = r"a\.fa\.fai does not fit .*a\.fa: .*; delete the index"
    with Genome.open(path) as genome, pytest.raises(ValueError, match=words):
        genome.fetch("a", 0, 20)


def test_letters_that_a_mapping_may_not_have_are_named():
    with pytest.raises(ValueError, match=r"^dict: record 'b' has 'F' at base 70,002, which is no base"):
        Genome.open({"a": "ACGT", "b": "AC" * 35_000 + "AF"}).fetch("b", 70_000, 70_002)
    with pytest.raises(ValueError, match=r"^dict: record 'a' has '1' at base 1; a sequence has letters only"):
        Genome.open({"a": "1ACGT"}).fetch("a", 2, 3)


def test_empty_records_of_a_mapping_are_skipped_and_counted(tmp_path):
    genome = Genome.open({"e1": "", "chr1": "ACGT" * 5, "e2": ""})
    assert genome.lengths == {"chr1": 20} and genome.notes == ("skipped 2 empty records, the first 'e1'",)
    assert [(i.name, i.end) for i in whole_sequences(genome)] == [("chr1", 20)]
    with pytest.raises(ValueError, match="dict has no sequence: all of its 1 records are empty"):
        Genome.open({"e1": ""})
    with pytest.raises(ValueError, match=r"dict has no sequence$"):
        Genome.open({})
    pyfaidx = pytest.importorskip("pyfaidx", reason="needs pyfaidx: pip install 'anymamba[test]'")
    (tmp_path / "a.fa").write_text(">e1\n>chr1\n" + "ACGT" * 5 + "\n")
    with pyfaidx.Fasta(str(tmp_path / "a.fa")) as fasta:
        genome = Genome.open(fasta)
        assert genome.lengths == {"chr1": 20} and genome.notes == ("skipped 1 empty record, the first 'e1'",)


@pytest.mark.parametrize("keep", [10, 100, -1, -9])
def test_a_truncated_gzip(tmp_path, random_records, keep):
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(fasta_text(random_records))[:keep])
    with pytest.raises(ValueError, match=r"a\.fa\.gz: damaged or truncated \.gz data"):
        Genome.open(path)


@pytest.fixture
def blocks(tmp_path, random_records) -> Path:
    """A file of bgzip with its two indices."""
    path, text = tmp_path / "a.fa.gz", fasta_text(random_records)
    write_bgzip(path, text)
    write_index(tmp_path / "a.fa.gz.fai", text)
    return path


def newer(path: Path) -> None:
    """Make a changed file no younger than its indices."""
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_bgzip(blocks, indexed):
    """Also one that is cut between two blocks, which is gzip without an error."""
    data = blocks.read_bytes()
    between = data.index(data[:16], len(data) // 2)
    for size in (len(data) - 1, len(data) - len(BGZIP_END), len(data) // 2, between):
        blocks.write_bytes(data[:size])
        if indexed:
            newer(blocks)
        else:
            Path(f"{blocks}.gzi").unlink(missing_ok=True)
        with pytest.raises(ValueError, match="is truncated: the last block of bgzip is missing"):
            Genome.open(blocks)


def test_an_index_of_a_longer_bgzip(blocks):
    data = blocks.read_bytes()
    second = data.index(data[:16], 1)
    blocks.write_bytes(data[:second] + BGZIP_END)
    newer(blocks)
    with pytest.raises(ValueError, match=r"a\.fa\.gz\.gzi does not fit .*; make it again with bgzip --reindex"):
        Genome.open(blocks)


def test_a_damaged_block_of_bgzip(blocks):
    data = bytearray(blocks.read_bytes())
    data[40] ^= 0x40
    blocks.write_bytes(data)
    newer(blocks)
    with pytest.raises(ValueError, match=r"damaged|truncated|fit"), Genome.open(blocks) as genome:
        for name, length in genome.lengths.items():
            genome.fetch(name, 0, length)


def test_an_index_that_is_older_is_not_used(blocks, random_records):
    os.utime(f"{blocks}.gzi", ns=(0, 0))
    with Genome.open(blocks) as genome:
        assert_reads(genome, random_records)
        assert genome.notes[0] == f"{blocks}.gzi is older than a.fa.gz and is not used"


@pytest.mark.parametrize(
    "change", [lambda t: b">first\nACGT\n" + t, lambda t: t.replace(b"chr2", b"chr9"), lambda t: t[:900]]
)
def test_an_index_of_another_file(tmp_path, random_records, change):
    path, text = tmp_path / "a.fa", fasta_text(random_records)
    write_index(tmp_path / "a.fa.fai", text)
    path.write_bytes(change(text))
    newer(path)
    with Genome.open(path) as genome, pytest.raises(ValueError, match=r"a\.fa\.fai does not fit .*a\.fa"):
        for name, length in genome.lengths.items():
            genome.fetch(name, 0, length)


def index_without(path: Path, text: bytes, hidden: int) -> None:
    """Write an index that lacks one of the lines."""
    index = Path(f"{path}.fai")
    write_index(index, text)
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:hidden] + lines[hidden + 1 :]))


@pytest.mark.parametrize("write", [Path.write_bytes, write_bgzip])
@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_a_record_that_the_index_does_not_list(tmp_path, random_records, write, hidden):
    names = list(random_records)
    wanted = random_records | {names[hidden]: 20 * random_records[names[hidden]]}
    path, text = tmp_path / "a.fa", fasta_text(wanted)
    write(path, text)
    index_without(path, text, hidden)
    with Genome.open(path) as genome:
        assert_reads(genome, {name: wanted[name] for name in names if name != names[hidden]})
        assert genome.notes == (f"skipped records that the index does not list, the first {names[hidden]!r}",)


def test_an_index_of_a_file_with_a_mark_at_the_start(tmp_path):
    path, text = tmp_path / "a.fa", ">chr1 é\nACGT\n>chr2\nGG\n".encode("utf-8-sig")
    path.write_bytes(text)
    (tmp_path / "a.fa.fai").write_text("chr1\t4\t12\t4\t5\nchr2\t2\t23\t2\t3\n")
    with Genome.open(path) as genome:
        assert_reads(genome, {"chr1": "ACGT", "chr2": "GG"})
        assert genome.notes == ()


@pytest.mark.parametrize("write", [Path.write_bytes, write_bgzip])
@pytest.mark.parametrize("second", [b"chr2", b"x"])
def test_an_index_that_lists_one_of_two_records_of_one_name(tmp_path, random_records, write, second):
    """samtools lists the first and warns."""
    path, text = tmp_path / "a.fa", fasta_text(random_records).replace(b">" + second, b">chr1")
    write(path, text)
    index_without(path, text, 1 if second == b"chr2" else 2)
    with pytest.raises(ValueError, match=r"has two records named 'chr1', and a\.fa\.fai lists one; rename the other"):
        Genome.open(path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("a\t5\n", "line 1 is no line of a .fai"),
        ("a\t5\t3\tx\t6\n", "line 1 is no line"),
        ("a\t5\t3\t0\t0\n", "has no letters"),
        ("a\t5\t3\t5\t6\na\t5\t3\t5\t6\n", "two records named 'a'"),
        ("", "lists no sequence"),
    ],
)
def test_a_bad_index(tmp_path, index, words):
    (tmp_path / "a.fa").write_text(">a\nACGTA\n")
    (tmp_path / "a.fa.fai").write_text(index)
    newer(tmp_path / "a.fa")
    with pytest.raises(ValueError, match=rf"a\.fa\.fai.*{words}"):
        Genome.open(tmp_path / "a.fa")


def test_bad_two_bit(tmp_path, random_records):
    path = tmp_path / "a.2bit"
    good = two_bit_bytes(random_records)
    cases = {
        good[:10]: "it ends in its header",
        good[:24]: "it ends in its index of 3 sequences",
        good[:-1]: "it ends in sequence 'x' of 777 bases",
        b"ACGT" + good[4:]: "is not .2bit",
        good[:4] + struct.pack("<I", 2) + good[8:]: "version 2; versions 0 and 1 can be read",
        two_bit_bytes({}): "has no sequence",
        two_bit_bytes({"a": "", "b": ""}): "all of its 2 are empty",
        good.replace(b"chr2", b"chr1"): "two sequences have the name 'chr1'",
    }
    for data, words in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path}.*{words}"):
            Genome.open(path)


@pytest.mark.parametrize("order", "<>")
def test_two_bit_by_content_and_compressed(tmp_path, order):
    data = two_bit_bytes({"a": "ACGTNNa"}, order)
    (tmp_path / "a.fa").write_bytes(data)
    with Genome.open(tmp_path / "a.fa") as genome:
        assert_reads(genome, {"a": "ACGTNNa"})
    (tmp_path / "a.2bit.gz").write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=r"is compressed \.2bit, which is not read"):
        Genome.open(tmp_path / "a.2bit.gz")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the genome .*none\.fa does not exist"):
        Genome.open(tmp_path / "none.fa")
    with pytest.raises(FileNotFoundError, match="is a folder; name the file in it"):
        Genome.open(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_letters_or_a_ValueError(tmp_path_factory, data):
    """Whatever bytes a file, or its index, has: an error of one line, or as many letters as were asked for."""
    folder = tmp_path_factory.mktemp("damaged")
    made = write_all(folder, {"a": "ACGTNNacgt" * 7, "b": "GGnnCC"})
    path = made[data.draw(st.sampled_from(sorted(made)))]
    indices = [p for p in (Path(f"{path}.fai"), Path(f"{path}.gzi")) if p.exists()]
    victim = data.draw(st.sampled_from([path, *indices]))
    content = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        if not content:
            break
    victim.write_bytes(content)
    newer(path)
    try:
        with Genome.open(path, cache_dir=folder / "cache") as genome:
            for name, length in genome.lengths.items():
                assert len(genome.fetch(name, max(0, length - 1000), length)) == min(length, 1000)
    except ValueError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------ cost


def test_a_file_is_packed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, cache, read = tmp_path / "a.fa", tmp_path / "cache", []
    path.write_text(">a\nACGT\n")
    for _ in range(2):
        with Genome.open(path, cache_dir=cache, progress=lambda done, total: read.append((done, total))) as genome:
            assert genome.fetch("a", 0, 4) == "ACGT"
    assert read == [(8, 8)]
    (table,) = cached_tables(cache)
    assert table.sources.files == [str(path)] and table.sources.n_tokens == 4 and table.stale is None
    path.write_text(">a\nTTTTT\n")
    with Genome.open(path, cache_dir=cache) as genome:
        assert genome.fetch("a", 0, 5) == "TTTTT"
    assert [table.stale for table in cached_tables(cache)].count("a file has changed") == 1


def test_a_damaged_cache_is_made_again(tmp_path):
    path, cache = tmp_path / "a.fa", tmp_path / "cache"
    path.write_text(">a\nACGT\n")
    Genome.open(path, cache_dir=cache).close()
    (table,) = cached_tables(cache)
    (table.folder / "bases.bin").write_bytes(b"?")
    with Genome.open(path, cache_dir=cache) as genome:
        assert genome.fetch("a", 0, 4) == "ACGT"


def test_a_base_takes_two_bits(tmp_path):
    path, cache = tmp_path / "a.fa", tmp_path / "cache"
    path.write_text(">a\n" + "ACGT" * 100_000 + "N" * 100_000)
    Genome.open(path, cache_dir=cache).close()
    (table,) = cached_tables(cache)
    assert 125_000 <= table.n_bytes < 128_000


def test_a_piece_of_a_large_file_takes_memory_for_the_piece_only(tmp_path):
    path, n = tmp_path / "large.2bit", 2**31 - 5
    with path.open("wb") as file:
        file.write(two_bit_bytes({"a": ""})[:16] + b"\1a" + struct.pack("<5I", 22, n, 0, 0, 0))
        file.truncate(16 + 2 + 4 + 16 + (n + 3) // 4)
    tracemalloc.start()
    with Genome.open(path) as genome:
        assert genome.fetch("a", n - 1000, n) == "T" * 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, f"{peak:,} bytes"


# ------------------------------------------------------------------------------------------ real genomes


def test_real_two_bit(shared_data):
    with Genome.open(shared_data / "genomes" / "arabidopsis_thaliana_chr1.2bit") as genome:
        assert genome.lengths == {"NC_003070.9": 30_427_671}
        letters = genome.letters("NC_003070.9", 0, 30_427_671)
        assert (letters | 0x20 == ord("n")).sum() == 164_359
        start = genome.fetch("NC_003070.9", 0, 40).upper()
        assert start.startswith("CCCTAAACCCTAAACCCTAAACC"), "a telomere"


def test_real_fasta(shared_data, tmp_path):
    with Genome.open(shared_data / "genomes" / "lambda_phage.fa.gz", cache_dir=tmp_path) as genome:
        (name,) = genome.names
        assert genome.lengths[name] == 48_502
        assert genome.fetch(name, 0, 12) == "GGGCGGCGACCT", "the cohesive end"
    with Genome.open(shared_data / "genomes" / "great_apes_mitochondria.fa.gz", cache_dir=tmp_path) as genome:
        assert len(genome.names) == 7 and all(16_300 < length < 16_700 for length in genome.lengths.values())
