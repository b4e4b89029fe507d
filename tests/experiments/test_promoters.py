"""Promoters: a split by a hash, classifiers of equal size, thresholds and tables."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anymamba.data.dna import reverse_complement
from anymamba.data.dna.labelled import Sequence
from anymamba.evaluation.dna.splits import make_split
from anymamba.experiments import load_experiment
from anymamba.experiments.promoters.arms import ARCHITECTURES, BASES, arms_of, build, model_of
from anymamba.experiments.promoters.data import FILE, held_out, held_out_files, labelled, synthetic, training_batches
from anymamba.lab.classifiers import Classes, Classifier, ConvOptions
from anymamba.lab.experiment import Context
from anymamba.lab.learning import batch_generator
from anymamba.models.config import ModelConfig
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("promoters")
CONTEXT = Context(torch.device("cpu"), 0, lambda *told: None)
DATA = Path(__file__).parents[3] / "shared" / "data"
SIZES = {"train": 6219, "valid": 906, "test": 1909}
DIGEST = "7acc22995974fe4509e654f4f01de4b4bfa3abe3d2e4691930413239983785f1"
MAMBA = ModelConfig(d_model=16, n_layers=2, vocab_size=12)


def test_parts_are_disjoint_on_both_strands():
    parts, digest = labelled("synthetic", None, CONTEXT.device)
    sets = [{tuple(row) for row in own.ids.tolist()} for own in parts.values()]
    assert sum(map(len, sets)) == 80 and len(set.union(*sets)) == 80 and len(digest) >= 16
    one = synthetic()[0]
    other = Sequence("other", reverse_complement(one.text), one.label, None)
    frozen = make_split([*synthetic(), other]).parts([*synthetic(), other])
    (where,) = [name for name, own in frozen.items() if one in own]
    assert other in frozen[where]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_the_split_of_the_real_file_is_fixed():
    parts, digest = labelled("promoters", DATA, CONTEXT.device)
    assert {name: len(own.ids) for name, own in parts.items()} == SIZES and digest == DIGEST
    assert sum(int(own.labels.sum()) for own in parts.values()) == 4915
    assert all(own.ids.shape[1] == 251 for own in parts.values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE):
        labelled("promoters", tmp_path, CONTEXT.device)


def test_batches_are_of_training_and_half_on_the_other_strand():
    train = labelled("synthetic", None, CONTEXT.device)[0]["train"]
    ids, labels = training_batches(train)(batch_generator(CONTEXT), 400)
    known = dict(zip(map(tuple, train.ids.tolist()), train.labels.tolist(), strict=True))
    given = [(tuple(row), label) for row, (label,) in zip(ids.tolist(), labels.tolist(), strict=True)]
    forward = [known[row] == label for row, label in given if row in known]
    assert 150 < len(forward) < 250 and all(forward)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_models_have_about_the_same_parameters(scale):
    arms = EXPERIMENT.arms(scale)
    counts = {arm.name.split("-")[0]: build(arm.settings).n_parameters() for arm in arms}
    assert max(counts.values()) < 1.1 * min(counts.values()), counts
    assert isinstance(model_of(BASES[scale], "cnn"), ConvOptions)


def test_a_class_is_asked_where_it_should_be():
    torch.manual_seed(0)
    ids = torch.randint(7, 11, (3, 24))
    model = Classifier(MAMBA, Classes(4, 8))
    logits = model.logits(model.hidden(ids)[0])
    assert logits.shape == (3, 3, 4)
    torch.testing.assert_close(model.logits(model.hidden(ids[:, :16])[0]), logits[:, :2])  # it has read no further
    torch.testing.assert_close(model.probabilities(ids), logits.detach().double().softmax(-1))
    labels = torch.tensor([[0, -100, 1], [2, 3, -100], [1, 1, 1]])
    out, counted = model.loss(ids, labels), labels != -100
    expected = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
    torch.testing.assert_close(out.loss, expected)
    assert int(out.n_tokens) == 7


@pytest.mark.parametrize("body", [MAMBA, ConvOptions(16)])
def test_the_mean_over_all_positions(body):
    model, ids = Classifier(body, Classes(2, "mean")), torch.randint(7, 11, (3, 24))
    x = model.hidden(ids)[0]
    assert x.shape == (3, 1, 16)
    torch.testing.assert_close(x[:, 0], model.body.hidden(ids)[0].mean(1))


def write_csv(file, sequences):
    lines = "".join(f"{one.text},{one.label}\n" for one in sequences)
    file.write_text(f"sequence,label\n{lines}", encoding="utf-8")


def test_arms_are_judged_on_files_beside_the_one_of_training(tmp_path):
    """Sequences that the file of training has on either strand are left out and counted."""
    known, new = synthetic()[:60], synthetic()[60:]
    with gzip.open(tmp_path / FILE, "wt", encoding="utf-8") as file:
        file.write("sequence,label\n" + "".join(f"{one.text},{one.label}\n" for one in known))
    other = Sequence("other", reverse_complement(known[0].text), known[0].label, None)
    name = "human_nontata_promoters_heldout.csv"
    write_csv(tmp_path / name, [*new, other, known[1]])
    settings = replace(EXPERIMENT.arms("toy")[0].settings, source="promoters")
    context = replace(CONTEXT, data=tmp_path)
    found = EXPERIMENT.measure(settings, context)["held_out"]
    assert found.keys() == {name}
    assert found[name]["sequences"] == 20 and found[name]["left_out"] == 2
    assert 0 <= found[name]["accuracy"] <= 1 and found[name]["auroc"] is not None
    write_csv(tmp_path / "known.csv", known)
    with pytest.raises(ValueError, match=r"known.csv has no sequence that .* does not have"):
        held_out(tmp_path / "known.csv", tmp_path, CONTEXT.device)
    write_csv(tmp_path / "short.csv", [one._replace(text=one.text[1:]) for one in new])
    with pytest.raises(ValueError, match=r"has sequences of 31 bases, those of .* have 32"):
        held_out(tmp_path / "short.csv", tmp_path, CONTEXT.device)
    write_csv(tmp_path / "words.csv", [one._replace(label="positive") for one in new])
    with pytest.raises(ValueError, match=r"words.csv has the label 'positive'; 1 is a promoter"):
        held_out(tmp_path / "words.csv", tmp_path, CONTEXT.device)


def test_names_of_held_out_files(tmp_path):
    """Copies of the file of training, backups, checksums and folders are none."""
    stem = "human_nontata_promoters"
    for name in (
        FILE,
        f"{stem}_test.csv",
        f"{stem}_x.csv~",
        f"{stem}_x.csv.sha256",
        f"{stem}_b.csv",
        f"{stem}_a.csv.xz",
    ):
        (tmp_path / name).touch()
    (tmp_path / f"{stem}_folder.csv").mkdir()
    found = held_out_files("promoters", tmp_path)
    assert [file.name for file in found] == [f"{stem}_a.csv.xz", f"{stem}_b.csv"]


def scored(auroc=None, accuracy=None):
    auroc, accuracy = auroc or {}, accuracy or {}
    values = {}
    for arm in EXPERIMENT.arms("gpu"):
        name = arm.name.split("-")[0]
        bad = arm.name != list(arms_of(BASES["gpu"], name))[1]
        own = {"accuracy": 0.5 if bad else accuracy.get(name, 0.85), "mcc": 0.7, "auroc": auroc.get(name, 0.9)}
        one = {"test": own, "valid": own, "validation_loss": 0.5 + bad, "parameters": 400_000, "learning_rate": 4e-3}
        one |= {"split": "abc", "sequences": {"train": 70, "valid": 10, "test": 20}, "read_bases": 1}
        one |= {"tokens_per_second": 1e6, "training_seconds": 1.0, "peak_gib": None, "recorded": True}
        values[arm.name] = [one] * arm.seeds
    return made_up(EXPERIMENT, "gpu", values)


def test_thresholds():
    assert verdicts(EXPERIMENT, scored()) == ["holds"] * 4
    assert verdicts(EXPERIMENT, scored({"hyena": 0.8})) == ["holds", "fails", "holds", "holds"]
    assert verdicts(EXPERIMENT, scored(accuracy={"cnn": 0.88}))[3] == "fails"
    assert measured(EXPERIMENT, scored(accuracy={"cnn": 0.86}))[3] == pytest.approx([-0.01])
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 4


def test_tables():
    sections = EXPERIMENT.sections(scored())
    assert not sections["Held-out files"]
    table = rows(sections["Test sequences"])
    assert [row[0] for row in table] == ["CNN", "Hyena", "Mamba"] and table[0][2] == "0.850 (0.850 to 0.850)"
    assert "70 train, 10 valid, 20 test; digest of the split abc" in sections["Test sequences"]
    assert len(rows(sections["Rates"])) == 2 * len(ARCHITECTURES)


def test_a_table_of_held_out_files():
    results = scored()
    for record in results.records:
        own = {"accuracy": 0.8, "mcc": 0.6, "auroc": None, "sequences": 1234, "left_out": 5}
        record.values["held_out"] = {"b.csv": own, "a.csv": own}
    table = rows(EXPERIMENT.sections(results)["Held-out files"])
    assert [row[0] for row in table] == ["`a.csv`"] * 3 + ["`b.csv`"] * 3
    assert table[0][1:] == ["1,234 (5)", "CNN", "0.800 (0.800 to 0.800)", "0.600 (0.600 to 0.600)", ""]
