"""Classifiers: they learn, give either strand the same answer where they should, and a run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from anymamba.data.dna import DnaTokenizer, reverse_complement
from anymamba.data.dna.labelled import Labelled, Sequence, read_labelled
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.evaluation.dna import classifier_runs
from anymamba.evaluation.dna.classifier_config import ClassifierTraining
from anymamba.evaluation.dna.classifier_runs import ClassifierRun, Source, train_run
from anymamba.evaluation.dna.classifying import predict, train_classifier
from anymamba.evaluation.dna.splits import FrozenSplit, make_split
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

CPU = torch.device("cpu")
PROMOTERS = Path(__file__).resolve().parents[4] / "shared/data/genomic_benchmarks/human_nontata_promoters_test.csv.gz"
COUNTS = {"train": 6219, "valid": 906, "test": 1909}
DIGEST = "7acc22995974fe4509e654f4f01de4b4bfa3abe3d2e4691930413239983785f1"
"""Of the frozen split of the promoters by the defaults."""


def labelled(n: int = 240) -> Labelled:
    """Class 1 has more A and C, on either length."""
    draw = random.Random(0)
    rows = []
    for i in range(n):
        weights = (3, 3, 2, 2) if i % 2 else (2, 2, 3, 3)
        text = "".join(draw.choices("ACGT", weights, k=draw.choice((40, 61))))
        rows.append(Sequence(str(i), text, str(i % 2), None))
    return Labelled(rows, {})


def columns(data: Labelled) -> tuple[list[str], np.ndarray]:
    return [one.text for one in data.sequences], np.array([int(one.label or 0) for one in data.sequences])


@pytest.mark.parametrize(("method", "mixer"), [("finetune", "mamba"), ("probe", "bimamba")])
def test_it_learns(model_of, method, mixer):
    config = ClassifierTraining(method=method, epochs=3, learning_rate=1e-2, batch_size=20)
    texts, labels = columns(labelled(160))
    train, valid = (texts[:120], labels[:120]), (texts[120:], labels[120:])
    told = []
    classifier = train_classifier(
        model_of(mixer).float(),
        DnaTokenizer(),
        train,
        valid,
        2,
        config,
        0,
        lambda done, total: told.append((done, total)),
    )
    found = predict(classifier, DnaTokenizer(), valid[0], config)
    assert (found.argmax(1) == valid[1]).mean() > 0.7 and np.allclose(found.sum(1), 1)
    assert told[-1][0] == told[-1][1]


def test_a_probe_is_the_best_linear_map(model_of):
    """No change of the head makes the training loss smaller, to first order; the backbone stays as it is."""
    model = model_of("mamba")
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = ClassifierTraining(method="probe", batch_size=7)
    texts, labels = columns(labelled(40))
    classifier = train_classifier(model, DnaTokenizer(), (texts, labels), (texts, labels), 2, config, 3)
    assert all(torch.equal(p, before[name]) for name, p in classifier.backbone.named_parameters())
    sample = np.random.default_rng(3).integers(0, 40, 40)
    ids = [torch.tensor([DnaTokenizer().encode(texts[i])]) for i in sample]
    loss = torch.stack(
        [classifier.loss(row, torch.tensor([labels[i]])) for row, i in zip(ids, sample, strict=True)]
    ).mean()
    (gradient,) = torch.autograd.grad(loss, classifier.head.bias)  # the intercept has no penalty
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("method", ["finetune", "probe"])
def test_both_strands_have_the_same_probabilities(model_of, method):
    config = ClassifierTraining(method=method, strands="both", epochs=1, pooling="last")
    texts, labels = columns(labelled(30))
    classifier = train_classifier(model_of("mamba"), DnaTokenizer(), (texts, labels), (texts, labels), 2, config, 0)
    found = predict(classifier, DnaTokenizer(), texts, config)
    other = predict(classifier, DnaTokenizer(), [reverse_complement(text) for text in texts], config)
    np.testing.assert_allclose(found, other, atol=1e-6)
    one = predict(classifier, DnaTokenizer(), texts, dataclasses.replace(config, strands="one"))
    assert np.abs(one - found).max() > 1e-6


def test_a_run_goes_on_with_the_seeds_that_it_lacks(tmp_path, monkeypatch):
    data, out = labelled(60), tmp_path / "run"
    split, source = make_split(data.sequences), Source(preset="nano")
    config = ClassifierTraining(epochs=1, seeds=2, batch_size=40)
    trained = []
    original = classifier_runs.train_classifier

    def stops_at_the_second(*arguments, **options):
        trained.append(arguments[6])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(classifier_runs, "train_classifier", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_run(out, data, split, source, config, CPU)
    results = train_run(out, data, split, source, config, CPU)
    assert trained == [0, 1, 1]
    straight = train_run(tmp_path / "straight", data, split, source, config, CPU)
    assert results == straight == json.loads((out / "results.json").read_text())
    assert results["test"]["accuracy"]["n"] == 2
    with pytest.raises(FileExistsError, match="holds a run with another training"):
        train_run(out, data, split, source, dataclasses.replace(config, epochs=2), CPU)
    run = ClassifierRun(out)
    parts = run.split.parts(data.sequences)
    again = run.measure(parts["test"], CPU)
    assert again["accuracy"] == results["test"]["accuracy"] and again["auroc"] == results["test"]["auroc"]
    with pytest.raises(ValueError, match="the label 'x' is none of the classes 0, 1"):
        run.measure([parts["test"][0]._replace(label="x")], CPU)


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run of classifiers: it has no run\.json"):
        ClassifierRun(tmp_path)
    (tmp_path / "x").write_text("")
    data = labelled(60)
    arguments = (make_split(data.sequences), Source(preset="nano"), ClassifierTraining(), CPU)
    with pytest.raises(FileExistsError, match="exists and is no run of classifiers"):
        train_run(tmp_path, data, *arguments)
    same = Labelled([one._replace(label="0") for one in data.sequences], {})
    with pytest.raises(ValueError, match="all sequences have the label '0'"):
        train_run(tmp_path / "run", same, make_split(same.sequences), *arguments[1:])


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_wrong_source_leaves_nothing(tmp_path):
    data, config = labelled(60), ClassifierTraining(epochs=1, seeds=1, batch_size=40)
    split = make_split(data.sequences)
    text = tmp_path / "text"
    LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257)).save_pretrained(text, ByteTokenizer())
    before = files_below(tmp_path)
    wrong = {Source("none"): FileNotFoundError, Source(str(text)): ValueError, Source(preset="nono"): ValueError}
    for source, kind in wrong.items():
        with pytest.raises(kind):
            train_run(tmp_path / "run", data, split, source, config, CPU, split_file=tmp_path / "split.json")
        assert files_below(tmp_path) == before
    with pytest.raises(OSError, match="none"):
        train_run(tmp_path / "run", data, split, Source(preset="nano"), config, CPU, split_file=Path("none/x/s.json"))
    assert files_below(tmp_path) == before


def test_a_folder_without_a_trained_seed_is_taken_over(tmp_path, monkeypatch):
    data, out = labelled(60), tmp_path / "run"
    split, config = make_split(data.sequences), ClassifierTraining(epochs=1, seeds=1, batch_size=40)
    original = classifier_runs.train_classifier

    def stops(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier_runs, "train_classifier", stops)
    with pytest.raises(KeyboardInterrupt):
        train_run(out, data, split, Source(preset="nano"), dataclasses.replace(config, epochs=9), CPU)
    monkeypatch.setattr(classifier_runs, "train_classifier", original)
    new = make_split(data.sequences, seed=1)
    train_run(out, data, new, Source(preset="nano"), config, CPU, split_file=tmp_path / "split.json")
    run = ClassifierRun(out)
    assert run.config.epochs == 1 and run.split == new == FrozenSplit.load(tmp_path / "split.json")
    with pytest.raises(FileExistsError, match="holds a run with another split"):
        train_run(out, data, split, Source(preset="nano"), config, CPU)
    assert ClassifierRun(out).split == new


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_promoters(tmp_path):
    """The promoters of Genomic Benchmarks, of which a fixed split is kept: a tiny model beats the class shares."""
    if not PROMOTERS.is_file():
        pytest.skip(f"{PROMOTERS} is not here")
    data = read_labelled(PROMOTERS)
    assert len(data.sequences) == 9034 and data.classes == ["0", "1"]
    split = make_split(data.sequences)
    assert {name: len(digests) for name, digests in split.digests.items()} == COUNTS
    assert split.digest == DIGEST
    config = ClassifierTraining(epochs=1, seeds=1, learning_rate=4e-3)
    results = train_run(tmp_path / "run", data, split, Source(preset="nano"), config, CPU)
    assert results["test"]["accuracy"]["mean"] > 0.75 and results["test"]["auroc"]["mean"] > 0.8
