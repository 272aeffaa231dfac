"""Inference engines behind one interface: ONNX Runtime and TensorRT."""
