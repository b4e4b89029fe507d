"""Accuracy, Matthews' correlation and the area under the ROC curve; means over seeds with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

METRICS = ("accuracy", "mcc", "auroc")
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)  # 0.975 quantiles of Student's t for 1 to 30 degrees of freedom
_NORMAL = 1.960


class Interval(NamedTuple):
    """A mean over seeds."""

    mean: float
    low: float | None
    """Lower end of the 95 % interval by Student's t; None for one seed."""
    high: float | None
    n: int
    """Number of seeds."""


def classification_metrics(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float | None]:
    """Accuracy, Matthews' correlation coefficient and AUROC.

    Args:
        probabilities: (n, n_classes).
        labels: (n,) classes.
    Returns them by name. AUROC is that of class 1 of two, and for more the mean over classes, each against the rest;
    None if all labels are equal.
    """
    predicted = probabilities.argmax(1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "mcc": matthews(predicted, labels, probabilities.shape[1]),
        "auroc": area(probabilities, labels),
    }


def matthews(predicted: NDArray[np.integer], labels: NDArray[np.integer], n_classes: int) -> float:
    """The correlation of predictions and labels for any number of classes; 0 if one of them is constant.

    Source: Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    table = np.zeros((n_classes, n_classes))
    np.add.at(table, (labels, predicted), 1)
    n, correct = table.sum(), np.trace(table)
    true, guessed = table.sum(1), table.sum(0)
    spread = (n**2 - guessed @ guessed) * (n**2 - true @ true)
    return float((correct * n - true @ guessed) / math.sqrt(spread)) if spread > 0 else 0.0


def area(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float | None:
    """The area under the ROC curve; the mean over the classes that occur, each against the rest, for more than two."""
    n_classes = probabilities.shape[1]
    wanted = [1] if n_classes == 2 else range(n_classes)
    found = [_area_of(probabilities[:, k], labels == k) for k in wanted]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _area_of(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float | None:
    """The share of pairs of a positive and a negative in which the positive scores higher; ties count half."""
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place]  # from 1; ties have the mean of theirs
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def interval(values: Sequence[float]) -> Interval:
    """The mean of values over seeds and its 95 % interval."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, None, None, n)
    t = _T_975[n - 2] if n - 1 <= len(_T_975) else _NORMAL
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
