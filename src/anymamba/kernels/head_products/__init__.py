"""Outer products within heads and their sums, in kernels of GPUs; `parts/head_products.py` is their user."""
