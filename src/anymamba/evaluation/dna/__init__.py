"""Answers about DNA from a model: scores of variants, vectors of regions, classes of sequences."""

from __future__ import annotations

from anymamba.evaluation.dna.embedding import embed
from anymamba.evaluation.dna.scoring import AlleleScore, score

__all__ = ["AlleleScore", "embed", "score"]
