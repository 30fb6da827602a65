"""CuTe kernels, compiled ahead of time for NVIDIA GPUs. Nothing is here yet."""
