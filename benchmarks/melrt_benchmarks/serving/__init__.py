"""Benchmarks of serving: the same request load on `Vocoder` and on a Triton server."""
