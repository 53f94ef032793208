"""Kernels of our own for GPUs, in Triton, and which algorithm runs for a shape."""
