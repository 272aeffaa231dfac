"""The ONNX deploy graph and its exact rewrites."""
