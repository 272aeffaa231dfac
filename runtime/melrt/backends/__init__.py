"""Inference engines behind one interface: ONNX Runtime, OpenVINO and TensorRT."""
