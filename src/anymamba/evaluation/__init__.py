"""Evaluation: perplexity with carried state, and simple models of bytes to compare with."""
