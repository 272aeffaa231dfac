"""Benchmarks: the speed of a voice in melrt and in the ways to run it without melrt."""
