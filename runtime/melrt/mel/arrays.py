"""Memory location of arrays."""

from __future__ import annotations

# DLPack's device types of memory that a CUDA device reads (dlpack.h): kDLCUDA and kDLCUDAManaged.
_DLPACK_CUDA = (2, 13)


def on_gpu(array: object) -> bool:
    """Return whether an array is in the memory of a CUDA device."""
    if type(array).__module__ == "numpy":
        return False
    dlpack_device = getattr(array, "__dlpack_device__", None)
    if dlpack_device is not None:
        return dlpack_device()[0] in _DLPACK_CUDA
    return hasattr(array, "__cuda_array_interface__")  # last: PyTorch describes the array in full to answer
