"""Great apes: splits that do not leak, N that tell nothing, homologous loci, the baseline, intervals and thresholds."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anymamba.data.dna import DnaTokenizer, reverse_complement
from anymamba.experiments import load_experiment
from anymamba.experiments.great_apes.arms import BASES, sweep
from anymamba.experiments.great_apes.findings import bootstrapped
from anymamba.experiments.great_apes.genomes import SPECIES, as_slices, loci, read_slices, slices, training_windows
from anymamba.experiments.great_apes.measure import answers_at
from anymamba.experiments.great_apes.sixmers import fitted, frequencies
from anymamba.lab.experiment import Context
from anymamba.lab.learning import batch_generator
from anymamba.lab.saving import SUFFIX, Saving
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("great-apes")
CPU = torch.device("cpu")
CONTEXT = Context(CPU, 0, lambda *told: None)
TOKENIZER = DnaTokenizer()
DATA = Path(__file__).parents[3] / "shared" / "data" / "genomes" / "apes_chr22_splits.tsv"
HEADER = ["#chrom", "start", "end", "split", "run", *(f"{s}_{end}" for s in SPECIES for end in ("from", "to"))]


@pytest.fixture
def files(tmp_path):
    """Two runs. Each species has bases of its own, the gorilla an N, the orang-utan is 10 bases shorter."""
    draw = np.random.default_rng(0)
    records = {f"{s}.{run}": "".join(draw.choice(list("ACGT"), 300)) for s in SPECIES for run in ("run000", "run001")}
    records["gorilla.run000"] = records["gorilla.run000"][:50] + "N" + records["gorilla.run000"][51:]
    table = [["22", 0, 200, "train", "run000", *[0, 200] * 3, 0, 190], ["22", 200, 300, "buffer", "run000"]]
    table[1] += [200, 300] * 3 + [190, 300]
    table += [["22", 400, 640, "test", "run001", *[0, 240] * 4], ["22", 640, 700, "valid", "run001", *[240, 300] * 4]]
    (tmp_path / "apes_chr22.fa").write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    with (tmp_path / "splits.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([HEADER, *table])
    return read_slices(tmp_path / "apes_chr22.fa", tmp_path / "splits.tsv"), records


def test_each_split_has_its_slices_and_no_n(files):
    found, records = files
    assert set(found) == {"train", "valid", "test"}
    train = found["train"]
    assert train.lengths.tolist() == [[200, 200, 199, 190]] and train.cut == 1
    own = [
        TOKENIZER.decode(train.ids[s : s + n].numpy())
        for s, n in zip(train.starts[0].tolist(), train.lengths[0].tolist(), strict=True)
    ]
    assert own[0] == records["human.run000"][:200] and own[2] == records["gorilla.run000"][:200].replace("N", "")
    assert own[3] == records["orangutan.run000"][:190]


def test_training_windows_are_of_their_species_and_of_training_only(files):
    train = files[0]["train"]
    ids, labels = training_windows(train, 24, 8)(batch_generator(CONTEXT), 300)
    assert ids.shape == (300, 24) and labels.shape == (300, 3) and set(labels.flatten().tolist()) == {0, 1, 2, 3}
    assert (labels == labels[:, :1]).all()
    texts = [
        TOKENIZER.decode(train.ids[s : s + n].numpy())
        for s, n in zip(train.starts[0].tolist(), train.lengths[0].tolist(), strict=True)
    ]
    windows, species = [TOKENIZER.decode(row) for row in ids.tolist()], labels[:, 0].tolist()
    forward = [window in texts[k] for window, k in zip(windows, species, strict=True)]
    assert 100 < sum(forward) < 200
    others = [(w, k) for w, k, known in zip(windows, species, forward, strict=True) if not known]
    assert all(reverse_complement(window) in texts[k] for window, k in others)
    plain, _ = training_windows(train, 24, 8, flips=False)(batch_generator(CONTEXT), 50)
    assert all(any(TOKENIZER.decode(row) in text for text in texts) for row in plain.tolist())


def test_windows_of_the_next_base_are_shifted_by_one(files):
    ids, labels = training_windows(files[0]["train"], 24, None)(batch_generator(CONTEXT), 10)
    assert ids.shape == labels.shape == (10, 24) and torch.equal(ids[:, 1:], labels[:, :-1])


def test_loci_are_homologous_and_the_same_at_every_length(files):
    test = files[0]["test"]
    long, short = loci(test, 80, 80), loci(test, 20, 80)
    assert long.species.tolist() == [0, 1, 2, 3] * 3 and long.locus.tolist() == sorted([0, 1, 2] * 4)
    assert torch.bincount(short.locus).tolist() == [16] * 3
    for k in range(4):
        whole = short.ids[short.species == k].view(3, 80)
        assert torch.equal(whole, long.ids[long.species == k])
    assert TOKENIZER.decode(long.ids[0].numpy()) == files[1]["human.run001"][:80]
    assert loci(test, 20, 80, most=2).locus.max() == 1


def test_loci_are_at_the_same_fraction_of_a_slice_in_every_species():
    pieces = [[np.arange(n, dtype=np.uint8) for n in (100, 96, 104, 100)]]
    found = loci(as_slices(pieces), 30, 30)
    assert [row[0] for row in found.ids.tolist()] == [0, 0, 0, 0, 35, 33, 37, 35, 70, 66, 74, 70]


def test_short_slices_are_left_out():
    found = as_slices([[np.full(n, 7, np.uint8)] * 3 + [np.full(n - 5, 8, np.uint8)] for n in (50, 20)])
    assert len(found.at_least(16).lengths) == 1 and len(found.at_least(15).lengths) == 2
    with pytest.raises(ValueError, match="no slice has 46 bases in every species, the longest 50"):
        found.at_least(46)


@pytest.mark.skipif(not DATA.is_file(), reason="the shared data is not here")
def test_the_committed_splits_are_70_kb_apart():
    with DATA.open(newline="") as file:
        table = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] != "buffer"]
    ends = [(int(row["start"]), int(row["end"]), row["split"]) for row in table]
    gaps = [max(b[0] - a[1], a[0] - b[1]) for a in ends for b in ends if a[2] != b[2]]
    assert min(gaps) == 70_000 and {split for *_, split in ends} == {"train", "valid", "test"}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="the shared data is not here")
def test_the_real_loci_have_no_n():
    splits = {name: slices("apes", DATA.parent, name, CPU) for name in ("train", "valid", "test")}
    assert all(int(own.ids.min()) >= 7 and int(own.ids.max()) <= 10 for own in splits.values())
    found = {name: int(loci(own, 1 << 16, 1 << 16).locus.max()) + 1 for name, own in splits.items()}
    assert found == {"train": 173, "valid": 17, "test": 18}
    assert sum(own.cut for own in splits.values()) < 18 + 3024 + 9149 + 3264


def test_frequencies_of_sixmers():
    text = "ACGTACGTAC"
    found = frequencies(torch.tensor([TOKENIZER.encode(text), TOKENIZER.encode("A" * 10)]))
    code = sum("ACGT".index(letter) * 4**i for i, letter in enumerate("ACGTAC"))
    assert found.shape == (2, 4096) and found.sum(1).tolist() == pytest.approx([1, 1])
    assert found[0, code] == pytest.approx(2 / 5) and found[1, 0] == 1


def test_the_regression_finds_what_is_there_and_a_penalty():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 10, generator=draw), torch.randint(4, (400,), generator=draw)
    x[:, :4] += 2 * torch.nn.functional.one_hot(y, 4)
    x[:, 9] = 3.0  # a feature that never changes
    fit = fitted((x[:300], y[:300]), (x[300:], y[300:]), (1e-3, 1e-1, 100.0), 4)
    assert (fit.scores(x[300:]).argmax(-1) == y[300:]).double().mean() > 0.8 and fit.penalty < 100
    noise = fitted((x[:300, 4:], y[:300]), (x[300:, 4:], y[300:]), (1e-4, 100.0), 4)
    assert noise.penalty == 100


def test_answers_are_judged_at_the_last_position():
    test = loci(slices("synthetic", None, "test", CPU), 32, 64)
    said = torch.stack([torch.zeros_like(test.species), test.species], 1)
    found = answers_at(test, said)
    n = len(test.species) // (int(test.locus.max()) + 1)
    assert found["loci"] == [[n, n]] * (int(test.locus.max()) + 1) and found["by_context"] == [0.25, 1.0]
    assert np.array(found["confusion"]).trace() == len(test.species)


def test_a_model_begins_from_the_pretrained_one_of_its_seed(tmp_path):
    arms = {arm.name: arm.settings for arm in EXPERIMENT.arms("toy")}
    settings = replace(arms["mamba-32"], start="pretrain", rate_of=())
    context = replace(CONTEXT, saving=Saving(tmp_path / f"mamba-32-seed0{SUFFIX}", {}))
    with pytest.raises(FileNotFoundError, match="pretrain-seed0, which does not exist; run the arm pretrain first"):
        EXPERIMENT.measure(settings, context)
    first = replace(CONTEXT, saving=Saving(tmp_path / f"pretrain-seed0{SUFFIX}", {}))
    EXPERIMENT.measure(replace(arms["pretrain"], keep=True), first)
    assert (tmp_path / "pretrain-seed0" / "tokenizer.json").is_file()
    own = EXPERIMENT.measure(settings, context)["validation_loss"]
    context.saving.delete()
    assert own != EXPERIMENT.measure(replace(settings, start=None), context)["validation_loss"]
    with pytest.raises(ValueError, match="needs the folder of the results"):
        EXPERIMENT.measure(settings, CONTEXT)


def test_budgets_on_a_gpu():
    base = BASES["gpu"]
    assert (base.pretrain_steps + base.steps) <= 3000
    for arm in EXPERIMENT.arms("gpu"):
        if arm.name.startswith("mamba"):
            settings = arm.settings
            how = settings.optimization
            assert how.batch_size * settings.window == 1 << 17
            assert how.batch_size * settings.window // settings.asked == 128  # answers a step, at every length


def answers(right_by_locus, n=100):
    return {"loci": [[right, n] for right in right_by_locus], "confusion": np.eye(4).tolist(), "by_context": [0.3]}


def with_accuracies(shares=None, spread=4):
    """Every locus with this share of right answers, give or take."""
    shares = shares or {1 << 10: 0.27, 1 << 12: 0.3, 1 << 14: 0.32, 1 << 16: 0.45}
    values = {}
    for arm in EXPERIMENT.arms("gpu"):
        name, _, rest = arm.name.partition("-")
        if name == "pretrain":
            continue
        share = shares[int(rest.split("-")[0])] if name == "mamba" else 0.26
        own = answers([round(100 * share) + (spread if i % 2 else -spread) for i in range(18)])
        loss = 1.3 + 0.01 * list(sweep(BASES["gpu"])).index(arm.name) if arm.name in sweep(BASES["gpu"]) else 1.3
        read = {"parameters": 1_400_000, "learning_rate": 2e-3, "read_bases": 1, "tokens_per_second": 1e6}
        values[arm.name] = [own | read | {"validation_loss": loss, "training_seconds": 1.0, "peak_gib": None}]
        values[arm.name][0]["recorded"] = True
    return made_up(EXPERIMENT, "gpu", values)


def test_intervals_are_over_loci():
    few, many = (bootstrapped(tuple((50.0 + (20 if i % 2 else -20), 100.0) for i in range(n))) for n in (6, 60))
    assert few.mean == many.mean == 0.5 and few.low < many.low < 0.5 < many.high < few.high
    paired = bootstrapped(((40.0, 100.0), (60.0, 100.0)) * 5, ((20.0, 100.0), (40.0, 100.0)) * 5)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.2, 0.2, 0.2))


def test_thresholds():
    assert verdicts(EXPERIMENT, with_accuracies()) == ["holds", "holds"]
    close = {1 << 10: 0.27, 1 << 12: 0.3, 1 << 14: 0.26, 1 << 16: 0.45}
    assert verdicts(EXPERIMENT, with_accuracies(close)) == ["fails", "holds"]
    assert verdicts(EXPERIMENT, with_accuracies(close, spread=0)) == ["holds", "holds"]
    flat = dict.fromkeys(close, 0.4)
    assert verdicts(EXPERIMENT, with_accuracies(flat)) == ["holds", "fails"]
    assert measured(EXPERIMENT, with_accuracies(flat))[1] == pytest.approx([0])
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {})) == ["not judged"] * 2


def test_tables():
    sections = EXPERIMENT.sections(with_accuracies())
    table = rows(sections["Accuracy by length"])
    assert [row[0] for row in table] == ["1,024", "4,096", "16,384", "65,536"]
    assert table[3][1].startswith("45.0 (43.") and table[3][3] == "1,800 of 18 loci" and table[3][4] == "40.7"
    assert "Mamba gains +18.0 points" in sections["Accuracy by length"]
    assert len(rows(sections["Rates"])) == 2 and len(rows(sections["What is taken for what"])) == 4
    assert not any(EXPERIMENT.sections(made_up(EXPERIMENT, "gpu", {})).values())
