"""Where an array's memory is."""

from __future__ import annotations

# DLPack's device types of memory that a CUDA device reads (dlpack.h): kDLCUDA and kDLCUDAManaged.
_DLPACK_CUDA = (2, 13)


def on_gpu(array: object) -> bool:
    """Whether an array's memory is a CUDA device's."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    where = getattr(array, "__dlpack_device__", None)
    return where is not None and where()[0] in _DLPACK_CUDA
