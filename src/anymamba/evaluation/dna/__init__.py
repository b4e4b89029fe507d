"""Answers about DNA from a model: scores of variants, vectors of regions, classes of sequences. Names load on use."""

from typing import TYPE_CHECKING

from anymamba.base import lazy_names

__all__ = ["AlleleScore", "ClassifierRun", "embed", "score", "trained_with_masks"]

_HOMES = {
    "AlleleScore": "anymamba.evaluation.dna.scoring",
    "ClassifierRun": "anymamba.evaluation.dna.classifier_runs",
    "embed": "anymamba.evaluation.dna.embedding",
    "score": "anymamba.evaluation.dna.scoring",
    "trained_with_masks": "anymamba.evaluation.dna.scoring",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.evaluation.dna.classifier_runs import ClassifierRun
    from anymamba.evaluation.dna.embedding import embed
    from anymamba.evaluation.dna.scoring import AlleleScore, score, trained_with_masks
