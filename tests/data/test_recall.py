"""Associative recall: rows against a naive check, the distribution of distances, and the baselines."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from anymamba.data.synthetic.recall import Recall, bag_accuracy, guess_accuracy, recall_batch


def batch(task: Recall, rows: int = 50, seed: int = 0):
    ids, labels = recall_batch(task, torch.Generator().manual_seed(seed), rows)
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("random_filler", [False, True])
@pytest.mark.parametrize(
    ("n_pairs", "length", "vocab_size"), [(4, 64, 8192), (16, 64, 64), (1, 4, 4), (3, 14, 8), (5, 40, 13)]
)
def test_rows_are_pairs_then_queries(n_pairs, length, vocab_size, random_filler):
    task = Recall(n_pairs, length, vocab_size, random_filler=random_filler)
    for row, answers in zip(*batch(task), strict=True):
        assert len(row) == len(answers) == length
        context = row[: 2 * n_pairs]
        keys, values = context[0::2], context[1::2]
        assert len(set(keys)) == len(set(values)) == n_pairs
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        asked = [t for t, answer in enumerate(answers) if answer != -100]
        assert sorted(row[t] for t in asked) == sorted(keys)  # every key once
        assert [dict(zip(keys, values, strict=True))[row[t]] for t in asked] == [answers[t] for t in asked]
        assert all(t >= 2 * n_pairs and t % 2 == 0 for t in asked)
        filler = [row[t] for t in range(2 * n_pairs, length) if t not in asked]
        assert random_filler or not any(filler)
        assert all(0 <= token < vocab_size for token in filler)


def test_random_filler_comes_from_the_whole_vocabulary():
    rows, answers = batch(Recall(1, 64, 8, random_filler=True), rows=200)
    filler = Counter(
        token
        for row, a in zip(rows, answers, strict=True)
        for token, label in zip(row[2:], a[2:], strict=True)
        if label == -100
    )
    expected = sum(filler.values()) / 8
    assert set(filler) == set(range(8))
    assert sum((n - expected) ** 2 / expected for n in filler.values()) < 30  # chi squared, 7 degrees: one in 10,000


def test_gaps_follow_the_power_law():
    rows = 6000
    _, answers = batch(Recall(1, 20, 8), rows)
    places = Counter((next(t for t, label in enumerate(a) if label != -100) - 2) // 2 for a in answers)
    weights = [d ** (0.01 - 1) for d in range(1, 10)]
    expected = [rows * w / sum(weights) for w in weights]
    assert sum((places[i] - e) ** 2 / e for i, e in enumerate(expected)) < 32  # 8 degrees: one in 10,000


def test_the_first_key_is_the_first_to_choose_its_place():
    """Without replacement, the first key's distance has the marginal distribution, the last one's a flatter one."""
    rows, answers = batch(Recall(3, 12, 16), 4000)
    taken = Counter()
    for row, labels in zip(rows, answers, strict=True):
        taken.update(k for k in range(3) if labels[6] != -100 and row[6] == row[2 * k])
    weights = [d ** (0.01 - 1) for d in (1, 2, 3)]  # three places for three keys
    assert taken[0] / 4000 == pytest.approx(weights[0] / sum(weights), abs=0.03)
    assert taken[0] > taken[1] > taken[2]


def test_the_generator_decides_the_rows():
    task = Recall(4, 32, 64, random_filler=True)
    assert batch(task, seed=1) == batch(task, seed=1)
    assert batch(task, seed=1) != batch(task, seed=2)
    generator = torch.Generator().manual_seed(1)
    first, second = (recall_batch(task, generator, 5)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_keys_and_values_are_drawn_evenly_and_in_any_order():
    rows, _ = batch(Recall(2, 8, 12), 3000)
    keys, values = Counter(row[0] for row in rows), Counter(row[3] for row in rows)
    assert set(keys) == set(range(1, 6)) and set(values) == set(range(6, 12))
    assert max(abs(n - 600) for n in keys.values()) < 100 and max(abs(n - 500) for n in values.values()) < 100
    assert len({tuple(row[0:4:2]) for row in rows}) == 20  # all ordered pairs of five keys


def test_baselines():
    assert guess_accuracy(Recall(4, 64, 64)) == 1 / 32 and bag_accuracy(Recall(4, 64, 64)) == 0.25


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0, 8, 16), "n_pairs must be at least 1, got 0"),
        ((4, 14, 64), "at least 4 n_pairs = 16.*got 14; raise it"),
        ((1, 7, 64), "length must be even"),
        ((4, 64, 9), "vocab_size must be at least 2 n_pairs . 2 = 10.*got 9"),
    ],
)
def test_sizes_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        Recall(*sizes)
