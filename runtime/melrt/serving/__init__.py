"""Bulk synthesis, and models for the Triton Inference Server. No other package of melrt imports this one."""
