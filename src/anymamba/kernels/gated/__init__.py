"""Kernels of products with a gate; `parts/gated.py` chooses between them and torch's operations."""
