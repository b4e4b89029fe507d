"""The sums of a matrix's columns, in kernels of GPUs; `parts/linear.py` is their user."""
