"""Synthetic tasks, made on the fly."""
