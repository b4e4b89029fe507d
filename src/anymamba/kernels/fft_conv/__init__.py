"""The causal convolution with filters as long as the sequence, in kernels of GPUs; `parts/fft_conv.py` is its user."""
