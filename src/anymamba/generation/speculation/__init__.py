"""Speculation: guesses at the next tokens, which the model reads several at a time."""

from anymamba.generation.speculation.speculator import Speculation, SpeculationReport, Speculator

__all__ = ["Speculation", "SpeculationReport", "Speculator"]
