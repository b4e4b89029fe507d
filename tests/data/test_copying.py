"""Selective and plain copying: rows against a naive check, and the two baselines."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from anymamba.data.synthetic.copying import Copying, copying_batch, guess_accuracy, histogram_accuracy


def batch(task: Copying, rows: int = 50, seed: int = 0):
    ids, labels = copying_batch(task, torch.Generator().manual_seed(seed), rows)
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize(("n_noise", "n_tokens", "alphabet"), [(128, 8, 16), (7, 3, 5), (0, 4, 16), (5, 1, 3)])
def test_rows_are_tokens_among_noise_then_markers(n_noise, n_tokens, alphabet, selective):
    task = Copying(n_noise, n_tokens, alphabet, selective)
    for row, answers in zip(*batch(task), strict=True):
        before, after = row[: n_noise + n_tokens], row[n_noise + n_tokens :]
        assert len(row) == len(answers) == task.length == n_noise + 2 * n_tokens
        assert after == [alphabet - 1] * n_tokens
        assert before.count(0) == n_noise
        tokens = [token for token in before if token != 0]
        assert all(1 <= token <= alphabet - 2 for token in tokens)
        assert answers == [-100] * (n_noise + n_tokens) + tokens  # in order of appearance, at the markers


def test_plain_copying_has_its_tokens_first():
    rows, _ = batch(Copying(n_noise=9, n_tokens=4, selective=False))
    assert all(0 not in row[:4] and row[4:13] == [0] * 9 for row in rows)


def test_places_of_selective_copying_are_spread_evenly():
    rows, _ = batch(Copying(n_noise=6, n_tokens=2), rows=4000)
    pairs = Counter(tuple(i for i in range(8) if row[i]) for row in rows)
    assert set(pairs) == set(itertools.combinations(range(8), 2))  # every choice of two places of eight
    expected = 4000 / 28
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 60  # chi squared, 27 degrees: one in 4000


def test_symbols_are_drawn_evenly():
    _, answers = batch(Copying(n_noise=0, n_tokens=10), rows=1400)
    counts = Counter(token for row in answers for token in row if token != -100)
    assert set(counts) == set(range(1, 15))
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 40  # chi squared, 13 degrees: one in 7000


def test_the_generator_decides_the_rows():
    task = Copying(n_noise=10, n_tokens=3)
    assert batch(task, seed=1) == batch(task, seed=1)
    assert batch(task, seed=1) != batch(task, seed=2)
    generator = torch.Generator().manual_seed(1)
    first, second = (copying_batch(task, generator, 5)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_histogram_baseline_of_the_paper():
    assert histogram_accuracy(Copying(n_noise=4096, n_tokens=16)) == pytest.approx(0.2036, abs=5e-5)


@pytest.mark.parametrize(("n_tokens", "alphabet"), [(1, 16), (2, 5), (4, 5), (3, 6), (5, 3)])
def test_histogram_baseline_against_all_rows(n_tokens, alphabet):
    task = Copying(0, n_tokens, alphabet)
    rows = list(itertools.product(range(task.n_symbols), repeat=n_tokens))
    commonest = sum(max(Counter(row).values()) for row in rows) / len(rows)
    assert histogram_accuracy(task) == pytest.approx(commonest / n_tokens, rel=1e-12)


def test_guessing():
    assert guess_accuracy(Copying(100, 16)) == pytest.approx(0.0714, abs=5e-5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((-1, 2), "n_noise must be at least 0, got -1"), ((3, 0), "n_tokens must be at least 1"), ((3, 2, 2), "alphabet")],
)
def test_sizes_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        Copying(*sizes)
