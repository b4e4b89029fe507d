"""The operators that have Triton kernels in the original."""
