"""Layers and blocks."""
