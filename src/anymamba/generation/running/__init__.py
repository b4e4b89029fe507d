"""Rows that are being generated, one token of each at a time."""

from anymamba.generation.running.adjustments import Adjustments
from anymamba.generation.running.rows import Chosen, FinishReason, Row, RunningRows, n_ids

__all__ = ["Adjustments", "Chosen", "FinishReason", "Row", "RunningRows", "n_ids"]
