"""Metrics against their definitions by counting."""

from __future__ import annotations

import numpy as np
import pytest

from anymamba.evaluation.dna.metrics import area, classification_metrics, interval, matthews

DRAW = np.random.default_rng(0)


def test_area_is_the_share_of_pairs_in_order():
    scores, labels = DRAW.integers(0, 6, 60) / 6, DRAW.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert area(np.stack([1 - scores, scores], 1), labels) == pytest.approx(np.mean(pairs))
    assert area(np.stack([1 - scores, scores], 1), np.ones(60, np.int64)) is None


def test_matthews_of_two_classes_and_of_more():
    predicted, labels = DRAW.integers(0, 2, 50), DRAW.integers(0, 2, 50)
    assert matthews(predicted, labels, 2) == pytest.approx(np.corrcoef(predicted, labels)[0, 1])
    predicted, labels = DRAW.integers(0, 4, 50), DRAW.integers(0, 4, 50)
    x, y = np.eye(4)[predicted], np.eye(4)[labels]  # Gorodkin's definition: covariances of indicators
    covariance = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()  # noqa: E731
    expected = covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))
    assert matthews(predicted, labels, 4) == pytest.approx(expected)
    assert matthews(np.zeros(50, np.int64), labels, 4) == 0.0


def test_several_classes():
    probabilities, labels = DRAW.dirichlet(np.ones(3), 90), DRAW.integers(0, 3, 90)
    found = classification_metrics(probabilities, labels)
    assert found["accuracy"] == (probabilities.argmax(1) == labels).mean()
    each = [area(np.stack([1 - probabilities[:, k], probabilities[:, k]], 1), (labels == k) * 1) for k in range(3)]
    assert found["auroc"] == pytest.approx(np.mean(each))


def test_intervals_over_seeds():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.high - 2.0 == pytest.approx(4.303 / np.sqrt(3)) and found.n == 3
    assert interval([0.5]) == (0.5, None, None, 1)
    many = interval(list(DRAW.normal(size=400)))
    assert many.high - many.mean == pytest.approx(1.96 / 20, rel=0.15)
