"""Labelled sequences from tables, folders and FASTA: what is read, skipped and refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from anymamba.data.dna.labelled import (
    COMMENTS,
    EMPTY,
    NO_DNA,
    NO_LABEL,
    OTHER_FILES,
    SHORT,
    Labelled,
    Sequence,
    read_labelled,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_tables(tmp_path):
    csv = write(tmp_path / "a.csv", "\ufeffid,Sequence,label,Split\r\n1,ACgt,1,train\r\n2,NNA,0,TEST\r\n3,aa,1,dev\r\n")
    data = read_labelled(csv)
    assert data.sequences == [
        Sequence("row 1", "ACgt", "1", "train"),
        Sequence("row 2", "NNA", "0", "test"),
        Sequence("row 3", "aa", "1", "valid"),
    ]
    assert data.classes == ["0", "1"] and data.skipped == {}
    tsv = tmp_path / "a.tsv.gz"
    tsv.write_bytes(gzip.compress(b"seq\tkind\nAC\tx\nGT\ty\n"))
    assert [one.label for one in read_labelled(tsv, label_field="kind").sequences] == ["x", "y"]
    without = read_labelled(tsv, need_labels=False).sequences
    assert [(one.text, one.label, one.split) for one in without] == [("AC", None, None), ("GT", None, None)]


def test_folders_of_genomic_benchmarks(tmp_path):
    for split, label, name in (
        ("train", "pos", "1"),
        ("train", "neg", "2"),
        ("test", "pos", "3"),
        ("test", "neg", "4"),
    ):
        write(tmp_path / "set" / split / label / f"{name}.txt", "ACGT\n")
    data = read_labelled(tmp_path / "set")
    found = [(one.name, one.label, one.split) for one in data.sequences]
    assert found == [
        ("test/neg/4.txt", "neg", "test"),
        ("test/pos/3.txt", "pos", "test"),
        ("train/neg/2.txt", "neg", "train"),
        ("train/pos/1.txt", "pos", "train"),
    ]
    assert {one.split for one in read_labelled(tmp_path / "set" / "train").sequences} == {None}
    write(tmp_path / "set" / "other" / "x" / "1.txt", "A")
    with pytest.raises(ValueError, match="has folders of splits and others: other; move one kind away"):
        read_labelled(tmp_path / "set")


def test_fasta(tmp_path):
    fasta = write(
        tmp_path / "a.fa", ">a label=x other=1\nAC\nGT\n>b|label=y\nNN\n>c label=x;z=1\nA\n>d sublabel=y\nA\n"
    )
    with pytest.raises(ValueError, match="d: it has no label"):
        read_labelled(fasta)
    data = read_labelled(fasta, on_bad_row="skip")
    assert [(one.name, one.text, one.label) for one in data.sequences[:1]] == [("a", "ACGT", "x")]
    assert data.sequences[-1].label == "x" and data.skipped[NO_LABEL] >= 1
    assert [one.label for one in read_labelled(fasta, label_field="sublabel", on_bad_row="skip").sequences] == ["y"]


def test_what_is_left_out_by_rule_is_counted(tmp_path):
    fasta = write(tmp_path / "a.fa", ";made by hand\n>a label=x\nACRYuu\n;more\n>b label=y\nNNryACGTACGT\n")
    data = read_labelled(fasta)
    assert data.skipped == {COMMENTS: 2} and data.others == {"R": 2, "Y": 2, "U": 2}
    for name in ("train/pos/1.txt", "val/pos/2.TXT", "val/pos/3.text", "train/pos/deep/4.txt", "README.md"):
        write(tmp_path / "set" / name, "ACGT\n")
    data = read_labelled(tmp_path / "set")
    assert [(one.name, one.split) for one in data.sequences] == [
        ("train/pos/1.txt", "train"),
        ("val/pos/2.TXT", "valid"),
    ]
    assert data.skipped == {OTHER_FILES: 3} and not data.others


def test_bad_records(tmp_path):
    csv = write(tmp_path / "a.csv", "seq,label\nACGT,1\n,1\nACEF,0\nAC,\nAC\nGG,0\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 2: it has no sequence; .*--on-bad-row skip"):
        read_labelled(csv)
    data = read_labelled(csv, on_bad_row="skip")
    assert [one.text for one in data.sequences] == ["ACGT", "GG"]
    assert data.skipped == {EMPTY: 1, NO_DNA: 1, NO_LABEL: 1, SHORT: 1}


def test_bad_letters_in_fasta_are_skipped_and_counted(tmp_path):
    protein = "RYKMSWHVDBN" * 3
    text = f">a label=x\nACGT\n>b label=y\nACGT\nAEC\n>c label=y\nA-C\n>d label=y\n{protein}\n>e label=y\nGG\n"
    fasta = write(tmp_path / "a.fa", text)
    with pytest.raises(ValueError, match=r"a\.fa, b: .*got 'E' at position 5; .*--on-bad-row skip"):
        read_labelled(fasta)
    data = read_labelled(fasta, on_bad_row="skip")
    assert [(one.name, one.text, one.label) for one in data.sequences] == [("a", "ACGT", "x"), ("e", "GG", "y")]
    assert data.skipped == {NO_DNA: 3}
    with pytest.raises(ValueError, match=r"d: .*ambiguity codes, as in a protein.*; .*--on-bad-row skip"):
        read_labelled(write(tmp_path / "d.fa", f">d label=y\n{protein}\n"))


def test_a_byte_order_mark_does_not_hide_the_first_label(tmp_path):
    data = read_labelled(write(tmp_path / "a.fa", "\ufeff>a label=x\r\nAC\r\n>b label=y\r\nGT\r\n"))
    assert [(one.name, one.text, one.label) for one in data.sequences] == [("a", "AC", "x"), ("b", "GT", "y")]


@pytest.mark.parametrize("name", ["a.FA", "a.Fasta.GZ", "a.CSV", "a.TSV.gz", "a.FNA", "a.frn"])
def test_suffixes_in_any_case(tmp_path, name):
    delimiter = "," if "CSV" in name else "\t"
    text = f"seq{delimiter}label\nAC{delimiter}x\n" if "SV" in name else ">a label=x\nAC\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert [(one.text, one.label) for one in read_labelled(tmp_path / name).sequences] == [("AC", "x")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,label\nA,1\n", "has no column seq, sequence or dna; its columns are text, label"),
        ("a.csv", "seq,kind\nA,1\n", "has no column 'label'; its columns are seq, kind"),
        ("a.csv", "seq,label\n", "has no sequence, it is empty"),
        ("a.csv", "seq,label,split\nA,1,later\n", "got 'later'"),
        ("a.txt", "ACGT", r"must be a \.csv, \.tsv or FASTA file"),
    ],
)
def test_refusals(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=words):
        read_labelled(write(tmp_path / name, text))


def test_classes_are_ordered_and_digests_tell_what_matters():
    one = Sequence("a", "ACgg", "x", None)
    assert one.digest == Sequence("b", "acgg", "x", None).digest != Sequence("a", "ACgg", "y", None).digest
    assert one.canonical == Sequence("c", "CCGT", "x", None).canonical == "ACGG"
    rna, dna = (Sequence("d", text, "x", None) for text in ("UUGCU", "TTGCT"))
    assert rna.canonical == dna.canonical == dna._replace(text="AGCAA").canonical  # U is read as T
    rows = [Sequence("a", "A", label, None) for label in ("10", "9", "b", "a")]
    assert Labelled(rows, {}).classes == ["9", "10", "a", "b"]
