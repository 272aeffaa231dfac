"""Fused engines on NVIDIA GPUs: kernels that were compiled ahead of time, launched through cuda-core alone."""
