"""Benchmarks of serving: request load on Vocoder and on Triton."""
