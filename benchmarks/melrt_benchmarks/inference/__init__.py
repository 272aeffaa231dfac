"""Benchmarks of inference: latency, throughput, streams, memory, start-up, roofline."""
