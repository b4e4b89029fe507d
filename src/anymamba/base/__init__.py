"""Helpers for every level: atomic file writes, dataclasses as JSON, size checks and errors."""
