"""Benchmark of training steps."""
