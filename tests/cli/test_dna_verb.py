"""`anymamba dna score` and `embed`: what they write, and what they refuse."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anymamba.data.dna import DnaTokenizer, Genome, Interval, reverse_complement
from anymamba.evaluation.dna import embed, score
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel


@pytest.fixture(scope="module")
def genome_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text(f">chr1\n{''.join(random.Random(0).choices('ACGT', k=200))}\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def dna_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A causal model of DNA and one that reads both directions."""
    made = {}
    for name in ("mamba", "bimamba"):
        torch.manual_seed(0)
        config = ModelConfig(d_model=16, n_layers=1, vocab_size=12, pad_vocab_multiple=16, mixers=(name,))
        made[name] = tmp_path_factory.mktemp("models") / name
        LanguageModel(config).save_pretrained(made[name], DnaTokenizer())
    return made


@pytest.fixture
def variants(genome_file: Path, tmp_path: Path) -> Path:
    with Genome.open(genome_file) as genome:
        at = [genome.fetch("chr1", i, i + 1) for i in range(200)]
    other = ["ACGT"["ACGT".index(base) - 1] for base in at]
    lines = [
        "##fileformat=VCFv4.2",
        "##source=test",
        "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\ts1",
        f"1\t10\trs1\t{at[9]}\t{other[9]}\t5\tPASS\tAF=0.1;AM_SCORE=9\tGT\t0/1",
        f"1\t50\t.\t{at[49]}\t{at[49]}{other[50]},<DEL>,{other[49]}\t.\t.\t.\tGT\t1/2",
        f"1\t60\t.\t{other[59]}\t{at[59]}\t.\t.\t.\tGT\t0/0",
        f"7\t60\t.\t{at[59]}\t{other[59]}\t.\t.\t.\tGT\t0/0",
    ]
    path = tmp_path / "variants.vcf"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_as_tsv_and_vcf(run, dna_models, genome_file, variants, tmp_path):
    given = ("dna", "score", "--model", dna_models["mamba"], "--fasta", genome_file, "--vcf", variants)
    code, out, err = run(*given, "--context", 40)
    assert code == 0, err
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["chrom", "pos", "id", "ref", "alt", "score", "plus", "minus", "skipped"] and len(rows) == 7
    assert [row[8] != "" for row in rows[1:]] == [False, False, True, False, True, True]
    assert "skipped 1 alleles whose REF is not what the genome has" in err and "scored 3 alleles" in err
    assert "skipped 1 symbolic alleles, breakends and *" in err
    assert "skipped 1 alleles of sequences that the genome does not have" in err
    model, tokenizer = LanguageModel.from_pretrained(dna_models["mamba"]).eval(), DnaTokenizer()
    with Genome.open(genome_file) as genome:
        from anymamba.data.dna.vcf import Vcf

        wanted = [r.variant for r in Vcf(variants, genome).records() if r.variant is not None]
        expected = [one for found in score(model, tokenizer, genome, wanted, context=40) for one in found]
    got = [[float(value) for value in row[5:8]] for row in rows[1:] if not row[8]]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    file = tmp_path / "scored.vcf"
    code, out, err = run(*given, "--context", 40, "--out", file, "--json")
    assert code == 0 and json.loads(out)["scored"] == 3, err
    lines = file.read_text().splitlines()
    assert lines[:2] == ["##fileformat=VCFv4.2", "##source=test"] and lines[5].startswith("#CHROM")
    assert all(line.startswith("##INFO=<ID=AM_") and "Number=A" in line for line in lines[2:5])
    first, second, third, fourth = (line.split("\t") for line in lines[6:])
    assert first[:7] == ["1", "10", "rs1", *first[3:5], "5", "PASS"] and first[8:] == ["GT", "0/1"]
    assert first[7].split(";")[0] == "AF=0.1" and first[7].count("AM_SCORE") == 1
    assert second[7].startswith("AM_SCORE=") and second[7].split(";")[0].split(",")[1] == "."
    assert third[7] == fourth[7] == "."


def test_a_masked_model_leaves_insertions_out(run, dna_models, genome_file, variants):
    given = ("dna", "score", "--model", dna_models["bimamba"], "--fasta", genome_file, "--vcf", variants)
    code, out, err = run(*given)
    assert code == 0 and "skipped 1 insertions and deletions, which a model trained with masks does not score" in err
    assert [line.split("\t")[5] != "." for line in out.splitlines()[1:]] == [True, False, False, True, False, False]


def test_the_objective_is_that_of_the_training(run, dna_models, genome_file, variants, tmp_path):
    """A causal model may have been trained with masks; its run says so, and --objective wins."""
    model = tmp_path / "run"
    shutil.copytree(dna_models["mamba"], model)
    given = ("dna", "score", "--model", model, "--fasta", genome_file, "--vcf", variants)
    scores = {name: run(*given, "--objective", name) for name in ("causal", "mlm")}
    assert scores["causal"][1] != scores["mlm"][1]
    code, out, err = run(*given)
    assert code == 0 and out == scores["causal"][1]
    assert "objective causal: the model is causal, and its folder does not say how it was trained" in err
    (model / "train_config.json").write_text('{"objective": "mlm"}')
    code, out, err = run(*given)
    assert code == 0 and out == scores["mlm"][1] and "objective mlm: the model was trained with it" in err
    file = tmp_path / "counts.TSV"
    code, counts, err = run(*given, "--out", file, "--json")
    assert code == 0 and json.loads(counts)["objective"] == "mlm" and file.read_text() == out, err
    code, out, err = run(*given, "--objective", "causal")
    assert code == 0 and out == scores["causal"][1]
    assert "objective causal: chosen with --objective; the model was trained with mlm" in err


@pytest.mark.parametrize("pooling", ["mean", "last", "positions"])
def test_vectors_as_npz_and_tsv(run, dna_models, genome_file, tmp_path, pooling):
    bed = tmp_path / "regions.bed"
    bed.write_text("track x\nchr1\t0\t30\ta\t0\t+\nchr1\t100\t120\tb\t0\t-\nchr1\t190\t201\n")
    given = ("dna", "embed", "--model", dna_models["mamba"], "--fasta", genome_file, "--bed", bed, "--pooling", pooling)
    file = tmp_path / "vectors.npz"
    code, out, err = run(*given, "--out", file, "--json")
    assert code == 0 and json.loads(out)["regions"] == 2, err
    assert "skipped 1 intervals beyond the end of their sequence" in err
    model, regions = LanguageModel.from_pretrained(dna_models["mamba"]).eval(), [(0, 30, "+"), (100, 120, "-")]
    with Genome.open(genome_file) as genome:
        wanted = list(embed(model, DnaTokenizer(), genome, [Interval("chr1", *r) for r in regions], pooling=pooling))
    with np.load(file) as found:
        vectors = found["vectors"]
        np.testing.assert_allclose(vectors, np.concatenate(wanted) if pooling == "positions" else np.stack(wanted))
        assert found["starts"].tolist() == [0, 100] and found["labels"].tolist() == ["a", "b"]
        assert pooling != "positions" or found["offsets"].tolist() == [0, 30, 50]
    code, out, err = run(*given)
    rows = [line.split("\t") for line in out.splitlines()]
    first = 6 if pooling == "positions" else 5
    assert rows[0][:5] == ["name", "start", "end", "strand", "label"] and len(rows) == len(vectors) + 1
    np.testing.assert_allclose([[float(v) for v in row[first:]] for row in rows[1:]], vectors, rtol=1e-5, atol=1e-6)
    if pooling == "positions":
        assert [row[5] for row in rows[1:]] == [*map(str, range(30)), *map(str, range(119, 99, -1))]


def test_refusals(refused, dna_models, genome_file, variants, model_folder, tmp_path):
    given = ("--model", dna_models["mamba"], "--fasta", genome_file)
    assert "name what to do: anymamba dna score|embed|classify" in refused(2, "dna")
    assert "did you mean 'score'?" in refused(2, "dna", "scroe")
    score_ = ("dna", "score", *given, "--vcf", variants)
    assert "exists; choose another file" in refused(2, *score_, "--out", variants)
    assert "--out must end with .vcf or .tsv" in refused(2, *score_, "--out", tmp_path / "x.txt")
    assert "name a file for these with --out" in refused(2, *score_, "--json")
    assert "--context must be at least 1" in refused(2, *score_, "--context", 0)
    words = refused(
        2, "dna", "score", "--model", dna_models["bimamba"], *given[2:], "--vcf", variants, "--objective", "causal"
    )
    assert "the model is not causal, so it is scored with masks" in words
    words = refused(2, *score_, "--objective", "mlm", "--tokenizer", model_folder)
    assert "vocabulary" in words
    assert "No such file" in refused(2, "dna", "score", *given, "--vcf", tmp_path / "none.vcf")
    text = ("--model", model_folder, "--fasta", genome_file)
    for words in (refused(2, "dna", "embed", *text), refused(2, "dna", "score", *text, "--vcf", variants)):
        assert "the tokenizer bytes is one of text, not of DNA" in words and "anymamba train --data genome.fa" in words


def test_results_end_with_a_suffix_in_any_case(run, dna_models, genome_file, variants, tmp_path):
    given = ("--model", dna_models["mamba"], "--fasta", genome_file)
    code, _, err = run("dna", "score", *given, "--vcf", variants, "--out", tmp_path / "a.VCF")
    assert code == 0 and (tmp_path / "a.VCF").read_text().startswith("##fileformat"), err
    code, _, err = run("dna", "embed", *given, "--out", tmp_path / "a.NPZ")
    assert code == 0 and np.load(tmp_path / "a.NPZ")["vectors"].shape == (1, 16), err


def test_help_of_all(run):
    code, out, _ = run("dna", "--help-all")
    assert code == 0 and "--vcf" in out and "--bed" in out


# ------------------------------------------------------------------------------------------------- classify


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [("".join(draw.choices("ACGT", (4, 4, 1, 1) if i % 2 else (1, 1, 4, 4), k=20)), i % 2) for i in range(60)]
    path = tmp_path / "data.csv"
    path.write_text("seq,label\n" + "".join(f"{text},{label}\n" for text, label in rows) + "AXC,1\n")
    return path


def test_a_classifier_is_trained_measured_and_used(run, refused, dna_models, labelled, tmp_path):
    out, split = tmp_path / "run", tmp_path / "split.json"
    given = ("--data", labelled, "--on-bad-row", "skip")
    train = ("dna", "classify", "train", *given, "--model", dna_models["mamba"], "--method", "probe", "--seeds", 2)
    code, text, err = run(*train, "--out", out, "--split-file", split, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert "skipped 1 records with letters that DNA does not have" in err
    assert result["n_train"] + result["n_valid"] + result["n_test"] == 60
    assert result["test"]["accuracy"]["mean"] > 0.8 and result["test"]["mcc"]["n"] == 2
    assert split.read_bytes() == (out / "split.json").read_bytes()
    code, text, err = run(*train, "--out", tmp_path / "again", "--split-file", split)
    assert code == 0 and "accuracy" in text and "2 seeds)" in text and f"{result['n_train']} train" in text
    code, text, err = run("dna", "classify", "eval", "--run", out, *given, "--split", "test", "--json")
    assert code == 0 and json.loads(text)["accuracy"] == result["test"]["accuracy"]
    code, text, err = run("dna", "classify", "eval", "--run", out, *given)
    assert code == 0 and f"the run was trained on {result['n_train']} of these 60 sequences" in err and "AUROC" in text
    fasta = tmp_path / "some.fa"
    fasta.write_text(">one\nACACACACACACR\n>two\nGTGTGTGGTGTG\n")
    code, text, err = run("dna", "classify", "predict", "--run", out, "--data", fasta)
    assert f"{fasta}: letters other than A, C, G, T and N: 1 R; U is read as T, the others as N" in err
    rows = [line.split("\t") for line in text.splitlines()]
    assert rows[0] == ["name", "class", "p_0", "p_1"] and [row[:2] for row in rows[1:]] == [["one", "1"], ["two", "0"]]
    assert all(abs(float(row[2]) + float(row[3]) - 1) < 1e-5 for row in rows[1:])
    other = tmp_path / "other.csv"
    other.write_text("seq,label\nACGT,1\n")
    assert "the data is not what was split" in refused(
        2, "dna", "classify", "eval", "--run", out, "--data", other, "--split", "test"
    )


def test_what_was_trained_on_is_told_whatever_its_split_and_strand(run, dna_models, labelled, tmp_path):
    out = tmp_path / "run"
    rows = [line.split(",") for line in labelled.read_text().splitlines()[1:-1]]
    draw = random.Random(1)
    splits = [draw.choice(("train", "train", "test")) for _ in rows]
    labelled.write_text("seq,label,split\n" + "".join(f"{t},{y},{s}\n" for (t, y), s in zip(rows, splits, strict=True)))
    train = ("--model", dna_models["mamba"], "--method", "probe", "--seeds", 1, "--json")
    code, text, err = run("dna", "classify", "train", "--data", labelled, "--out", out, *train)
    assert code == 0, err
    n = json.loads(text)["n_train"]
    other = tmp_path / "other.csv"
    other.write_text("seq,label\n" + "".join(f"{reverse_complement(t).lower()},{y}\n" for t, y in rows))
    code, _, err = run("dna", "classify", "eval", "--run", out, "--data", other)
    assert code == 0 and f"the run was trained on {n} of these 60 sequences" in err


def test_a_wrong_model_leaves_no_run(run, refused, dna_models, labelled, model_folder, tmp_path):
    out, split = tmp_path / "run", tmp_path / "split.json"
    train = ("dna", "classify", "train", "--data", labelled, "--on-bad-row", "skip", "--method", "probe")
    train = (*train, "--seeds", 1, "--out", out, "--split-file", split)
    assert "is one of text, not of DNA" in refused(2, *train, "--model", model_folder)
    assert "none" in refused(2, *train, "--model", tmp_path / "none")
    assert "none" in refused(2, *train, "--model", dna_models["mamba"], "--device", "none")
    assert not out.exists() and not split.exists()
    code, _, err = run(*train, "--model", dna_models["mamba"])
    assert code == 0 and split.exists(), err


def test_refusals_of_classify(refused, dna_models, labelled, tmp_path):
    assert "train|eval|predict; did you mean 'eval'?" in refused(2, "dna", "classify", "evla")
    given = ("dna", "classify", "train", "--data", labelled, "--out", tmp_path / "run")
    assert "row 61" in refused(2, *given, "--preset", "nano")
    assert "name a model with --model, or sizes of a new one with --preset" in refused(2, *given)
    assert "unknown preset" in refused(2, *given, "--preset", "nono", "--on-bad-row", "skip")


def test_help_does_not_import_torch():
    code = "import sys; from anymamba.cli import main; main(['dna', '--help-all']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
