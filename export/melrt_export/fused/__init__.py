"""Fused engines: the generator as a few kernels, compiled ahead of time for several GPUs, without TensorRT."""
