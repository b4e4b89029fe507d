"""`anymamba train` on genomes: what is printed, presets, and each kind of bad input in one line."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest

from anymamba.cli import train
from anymamba.models.presets import PRESETS

SMALL = ["--model.d-model", 8, "--model.n-layers", 1, "--threads", 1, "--sample-tokens", 5]


@pytest.fixture
def genome(tmp_path):
    """A compressed FASTA file with N, an ambiguity code, lower case and an empty record; and a BED file."""
    draw = random.Random(0)
    letters = "".join(draw.choices("ACGTacgt", k=60_000))
    text = f">chr1 first\n{letters[:20_000]}{'N' * 300}R{letters[20_000:]}\n>empty\n>chr2\n{letters[:9000]}\n"
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(text.encode()))
    bed = tmp_path / "regions.bed"
    bed.write_text("track name=x\n1\t0\t55000\nchr2\t100\t9000\nchr9\t0\t5\nchr1\t0\t99999\nchr1\t7\t7\n")
    return path, bed


def test_the_command_of_the_readme(run, genome, tmp_path):
    path, bed = genome
    warm = ["--length-warmup", "--length-warmup-epochs", 0.2, "--steps", 12, "--context", 4096, "--batch-size", 1]
    code, out, err = run("train", "--data", path, bed, "--preset", "dna-1.4m", *SMALL, *warm, "--out", tmp_path / "run")
    assert code == 0, err
    for words in (
        "with and without chr are taken as the same sequence",
        "genome.fa.gz: 300 N; letters other than A, C, G, T and N: 1 R; U is read as T, the others as N, which makes",
        "genome.fa.gz: skipped 1 empty record, the first 'empty'",
        "regions.bed: skipped header and comment lines: 1",
        "regions.bed: skipped intervals of sequences that the genome does not have: 1",
        "regions.bed: skipped intervals beyond the end of their sequence: 1",
        "regions.bed: skipped intervals without a base: 1",
        "DNA: 2 intervals; both strands, upper and lower case are one, windows with more than 10% of N are dropped",
        "length warm-up: 4 x 1,024 for 3 steps, 2 x 2,048 for 3 steps, then 1 x 4,096",
        "held-out",
        "bits per base",
    ):
        assert words in err, f"{words}\n{err}"
    assert "bits per base" in out and "bits per byte" not in out + err
    tokenizer = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"]["A"] == 7
    code, out, err = run("generate", "--model", tmp_path / "run", "--prompt", "ACGT", "--max-new-tokens", 9)
    assert code == 0, err


WARM = ["--length-warmup", "--length-warmup-epochs", 0.2, "--context", 4096, "--batch-size", 1]


def test_a_length_warm_up_without_steps(run, genome, tmp_path):
    """The steps are those of the epochs, and the run keeps them."""
    path, _ = genome
    data, out = ["--data", path, *SMALL, *WARM], tmp_path / "run"
    code, _, err = run("train", *data, "--out", out)
    assert code == 0, err
    assert "no --steps: 10, which are 0.2 epochs at each length, 4,096 included" in err
    assert "length warm-up: 4 x 1,024 for 4 steps, 2 x 2,048 for 3 steps, then 1 x 4,096" in err
    assert json.loads((out / "train_config.json").read_text())["steps"] == 10
    values = {"length_warmup": True, "length_warmup_epochs": 0.2, "context": 4096, "batch_size": 1}
    (file := tmp_path / "c.json").write_text(json.dumps(values))
    code, _, err = run("train", "--data", path, *SMALL, "--config", file, "--out", tmp_path / "two")
    assert code == 0 and "no --steps: 10" in err, err


@pytest.mark.parametrize("where", ["flag", "file"])
def test_too_few_steps_for_a_length_warm_up(refused, genome, tmp_path, where):
    path, _ = genome
    (file := tmp_path / "c.json").write_text('{"steps": 7}')
    steps = ["--steps=7"] if where == "flag" else ["--config", file]
    line = refused(2, "train", "--data", path, *SMALL, *WARM, *steps, "--out", tmp_path / "run")
    assert "the length warm-up takes 7 steps before it reaches 4,096 tokens" in line and "(--steps)" in line
    assert not (tmp_path / "run").exists()


def test_what_is_dropped_and_read_in_place(run, tmp_path):
    """Held-out windows with N, and ambiguity codes of a file with an index."""
    path = tmp_path / "g.fa"
    letters = ("RACG" + "ACGT" * 7) * 75 + "N" * 64 + "ACGT" * 16
    path.write_text(f">a\n{letters}\n")
    path.with_name("g.fa.fai").write_text(f"a\t{len(letters)}\t3\t{len(letters)}\t{len(letters) + 1}\n")
    words = ["--data", path, "--data.held-out-fraction", 0.051, *SMALL, "--context", 64, "--steps", 60]
    code, out, err = run("train", *words, "--batch-size", 1, "--out", tmp_path / "run")
    assert code == 0, err
    assert "1 held-out windows have too many N and are dropped" in err
    assert "0 windows to train on (each time that one is drawn) and 1 held-out ones with too many N" in out
    assert re.search(rf"{path}: read \(counted at each reading\) \d+ N; letters other than A, C, G, T and N: ", out)


def test_a_preset_of_dna_has_its_own_defaults(tmp_path):
    read = lambda *words: train.read_options([*map(str, words), "--data", "a.fa", "--out", "x"]).train  # noqa: E731
    config = read("--preset", "dna-7.0m")
    assert (config.context, config.batch_size, config.model) == (4096, 4, PRESETS["dna-7.0m"])
    assert read("--preset", "dna-7.0m", "--context", 256).context == 256
    (tmp_path / "c.json").write_text('{"context": 512}')
    config = read("--config", tmp_path / "c.json", "--preset", "DNA-1.4M")
    assert (config.context, config.batch_size) == (512, 4)


def bad(text: str | bytes, name: str = "g.fa", bed: str | None = None):
    return name, text if isinstance(text, bytes) else text.encode(), bed


BAD = {
    "a protein": (
        bad(">p\nMVLSPADKTNVKAAWGKVGA\n"),
        "record 'p' has 'L' at base 3, which is no base or ambiguity code",
    ),
    "two records of one name": (bad(">a\nACGT\n>a\nAC\n"), "two records named 'a', in lines 1 and 3"),
    "a truncated gzip": (bad(gzip.compress(b">a\n" + b"ACGT" * 999)[:30], "g.fa.gz"), "damaged or truncated .gz data"),
    "no .2bit": (bad("ACGT" * 9, "g.2bit"), "is not .2bit"),
    "an empty file": (bad(""), "is not FASTA: it has no line that begins with >"),
    "a BED of another assembly": (
        bad(">1\n" + "A" * 99, bed="chrZ\t0\t99\n"),
        "the first is chrZ:0-99, and the genome ",
    ),
    "beyond the end": (bad(">1\n" + "A" * 99, bed="chr1\t0\t100\n"), "intervals beyond the end of their sequence: 1"),
    "a BED line": (
        bad(">1\n" + "A" * 99, bed="chrom\tstart\tend\n1\t1\t2\n1\tb\t2\n"),
        "line 3 is no interval of a BED file: start and end",
    ),
    "skipped, and short": (
        bad(">1\n" + "A" * 99, bed="1\t0\t9\n1\t0\t100\n"),
        "the longest has 9; take a shorter context (--context) or longer intervals; {bed}: skipped intervals beyond",
    ),
    "short sequences": (bad(">a\nACGT\n"), "no interval to train on has 32 bases"),
    "nothing but N": (bad(">a\n" + "N" * 999), "each window has more than 10% of N"),
}


@pytest.mark.parametrize(("files", "words"), BAD.values(), ids=BAD)
def test_bad_genomes(refused, tmp_path, files, words):
    name, content, bed = files
    (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name]
    if bed is not None:
        (tmp_path / "g.bed").write_text(bed)
        paths.append(tmp_path / "g.bed")
    line = refused(2, "train", "--data", *paths, "--out", tmp_path / "run", *SMALL, "--context", 32)
    assert words.format(bed=tmp_path / "g.bed") in line, line
    assert not (tmp_path / "run").exists()


def test_bad_lines_are_skipped_if_that_is_wanted(run, genome, tmp_path):
    path, bed = genome
    bed.write_text("chr1\t0\t20000\nchr1\tx\t5\n")
    words = ["--data", path, bed, *SMALL, "--context", 64, "--steps", 1, "--on-bad-row", "skip"]
    code, _, err = run("train", *words, "--out", tmp_path / "run")
    assert code == 0 and "regions.bed: skipped lines that are no intervals: 1" in err


def test_a_preset_of_dna_with_text(refused, texts, tmp_path):
    line = refused(2, "train", "--data", texts, "--preset", "dna-1.4m", "--out", tmp_path / "run")
    assert "the preset dna-1.4m is for DNA, and the data is text; name FASTA or .2bit files with --data" in line
    assert line.endswith("whose names end with .fa, .fasta, .fna, .ffn, .frn, .2bit")


def test_real_two_bit_and_both_strands(run, shared_data, tmp_path):
    path = shared_data / "genomes" / "arabidopsis_thaliana_chr1.2bit"
    words = ["--data", path, *SMALL, "--context", 512, "--steps", 2, "--batch-size", 2, "--json"]
    code, out, err = run("train", *words, "--out", tmp_path / "run")
    assert code == 0, err
    result = json.loads(out)
    assert result["unit"] == "base" and 1 < result["bits_per_byte"] < 6
