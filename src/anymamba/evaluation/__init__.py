"""Evaluation: perplexity with carried state, and simple byte models to compare with."""
