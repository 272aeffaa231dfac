"""Serving: bulk synthesis and the Triton Inference Server. Nothing else in melrt imports this package."""
