"""Kernels of rotary positions; `parts/rotary.py` chooses between them and torch's operations."""
