"""Building TensorRT engines."""
