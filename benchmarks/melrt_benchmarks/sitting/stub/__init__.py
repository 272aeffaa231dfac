"""melrt's CUDA runtime on a GPU without TensorRT: only the engine is replaced, by one whose audio numpy can compute."""
