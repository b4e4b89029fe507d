"""Synthetic tasks, generated on the fly."""
