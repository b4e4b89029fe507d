"""Loading, compiling and launching: the compiled CPU module, NVRTC and the CUDA driver, Triton."""
