"""Where the code runs: CUDA, or CPU with gloo."""
