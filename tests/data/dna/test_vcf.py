"""VCF files: what is read, what is skipped and counted, and what is refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.base.errors import DataWarning
from anymamba.data.dna import Genome
from anymamba.data.dna.vcf import (
    BAD,
    BEYOND,
    LETTERS,
    MISMATCH,
    MISSING,
    SAME,
    SYMBOLIC,
    UNKNOWN,
    Variant,
    Vcf,
)

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture
def genome(tmp_path: Path) -> Iterator[Genome]:
    path = tmp_path / "genome.fa"
    path.write_text(">chr1\nACGTacgtNACGT\n>chr2\nGGGG\n")
    with Genome.open(path, cache_dir=tmp_path / "cache") as opened:
        yield opened


@pytest.fixture
def vcf_of(genome: Genome, tmp_path: Path) -> Callable[..., Vcf]:
    def make(*lines: str, header: str = HEADER, end: str = "\n", **options) -> Vcf:
        path = tmp_path / "variants.vcf"
        path.write_bytes((header + end.join([*lines, ""])).encode())
        return Vcf(path, genome, **options)

    return make


def test_records_and_what_is_skipped(vcf_of):
    vcf = vcf_of(
        "chr1\t1\trs1\tA\tC\t.\tPASS\tX=1",
        "chr1\t2\t.\tCG\tC,CGG,<DEL>,*,CG,CN\t.\t.\t.\tGT\t0/1",
        "chr1\t6\t.\tc\tt",  # lower case
        "chr1\t3\t.\tT\tA",  # the genome has G
        "chr1\t9\t.\tN\tA",
        "chr1\t13\t.\tTA\tT",  # beyond the end
        "chr1\t0\t.\tA\tT",
        "chrX\t3\t.\tT\tA,C",
        "chr1\t1\t.\tA\t.",
        "chr1\t1\t.\tA\tA[chr2:3[",
    )
    records = list(vcf.records())
    assert [r.variant for r in records[:3]] == [
        Variant("chr1", 0, "A", ("C",)),
        Variant("chr1", 1, "CG", ("C", "CGG")),
        Variant("chr1", 5, "C", ("T",)),
    ]
    assert all(record.variant is None for record in records[3:])
    assert records[1].reasons == (None, None, SYMBOLIC, SYMBOLIC, SAME, LETTERS)
    assert records[1].columns[8:] == ("GT", "0/1") and records[1].alts[2] == "<DEL>"
    assert dict(vcf.skipped) == {
        SYMBOLIC: 3, SAME: 1, LETTERS: 2, MISMATCH: 1, BEYOND: 2, UNKNOWN: 2, MISSING: 1
    }  # fmt: skip
    assert vcf.n_alleles == 4 and vcf.header == HEADER.splitlines()
    vcf.require_same_assembly()


def test_names_without_chr_crlf_a_byte_order_mark_and_gzip(vcf_of, genome, tmp_path):
    vcf = vcf_of("1\t1\t.\tA\tC", "2\t1\t.\tG\tC", header="\ufeff" + HEADER.replace("\n", "\r\n"), end="\r\n")
    with pytest.warns(DataWarning, match="names with and without chr are taken as the same"):
        plain = list(vcf.records())
    assert [record.variant.name for record in plain] == ["chr1", "chr2"]
    packed = tmp_path / "variants.vcf.gz"
    packed.write_bytes(gzip.compress(vcf.path.read_bytes()))
    assert list(Vcf(packed, genome).records()) == plain
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"variants\.vcf\.gz: damaged or truncated \.gz data"):
        list(Vcf(packed, genome).records())


def test_u_is_read_as_t_on_both_sides(tmp_path):
    (tmp_path / "rna.fa").write_text(">r\nACGUacgu\n")
    (tmp_path / "v.vcf").write_text(HEADER + "r\t4\t.\tT\tC\nr\t7\t.\tGU\tG,gu,TT\nr\t4\t.\tG\tC\n")
    with Genome.open(tmp_path / "rna.fa", cache_dir=tmp_path / "cache") as genome:
        vcf = Vcf(tmp_path / "v.vcf", genome)
        records = list(vcf.records())
    assert [r.variant for r in records] == [Variant("r", 3, "T", ("C",)), Variant("r", 6, "GT", ("G", "TT")), None]
    assert records[1].columns[3:5] == ("GU", "G,gu,TT") and vcf.skipped == {MISMATCH: 1, SAME: 1}


def test_another_assembly(vcf_of):
    vcf = vcf_of("chr1\t1\t.\tA\tC", "chr1\t2\t.\tG\tA", "chr1\t3\t.\tA\tC")
    with pytest.raises(
        ValueError, match=r"is of another assembly than .*: 2 of 3 alleles .* the first is chr1:2 with G"
    ):
        vcf.require_same_assembly()


def test_no_allele_at_all(vcf_of):
    with pytest.raises(ValueError, match=f"has no allele to score in .*; 1 {UNKNOWN}"):
        vcf_of("chr9\t1\t.\tA\tC").require_same_assembly()
    with pytest.raises(ValueError, match=r"has no allele to score in .*, it is empty"):
        vcf_of().require_same_assembly()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("chr1 1 . A C", "line 3 is no record of a VCF file: it has 1 columns"),
        ("chr1\tone\t.\tA\tC", "the position must be a whole number, got 'one'"),
        ("chr1\t-1\t.\tA\tC", "got '-1'"),
    ],
)
def test_bad_lines(vcf_of, line, words):
    with pytest.raises(ValueError, match=words):
        list(vcf_of(line, "chr1\t1\t.\tA\tC").records())
    vcf = vcf_of(line, "chr1\t1\t.\tA\tC", on_bad_line="skip")
    assert len(list(vcf.records())) == 1 and vcf.skipped == {BAD: 1}


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t"), max_size=6)
LINE = st.one_of(
    st.lists(CELL, max_size=9).map("\t".join),
    st.tuples(
        st.sampled_from(["chr1", "1", "chr2", "x"]), st.integers(0, 15).map(str), CELL,
        st.text("ACGTNacgt", max_size=3), st.text("ACGTN<>[],*.acgt", max_size=8),
    ).map("\t".join),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Genome]:
    folder = tmp_path_factory.mktemp("small")
    (folder / "g.fa").write_text(">chr1\nACGTacgtNACGT\n>chr2\nGGGG\n")
    with Genome.open(folder / "g.fa", cache_dir=folder / "cache") as opened:
        yield opened


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINE, max_size=8))
@pytest.mark.filterwarnings("ignore:.*names with and without chr")
def test_any_text_is_read_or_counted(small, lines):
    """Every allele of every record is in the variant or has a reason, and no other error than ValueError is raised."""
    path = Path(small.source).parent / "v.vcf"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    vcf = Vcf(path, small, on_bad_line="skip")
    records = list(vcf.records())
    for record in records:
        kept = () if record.variant is None else record.variant.alts
        assert len(record.reasons) == len(record.alts) == len(kept) + sum(r is not None for r in record.reasons)
    assert vcf.n_alleles + vcf.skipped.total() - vcf.skipped[BAD] == sum(len(r.alts) for r in records)
    assert vcf.skipped[BAD] + len(records) == sum(bool(line.strip()) and line[:1] != "#" for line in lines)
