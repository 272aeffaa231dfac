"""Benchmarks: how fast a voice is, against the ways in which it would run without melrt."""
