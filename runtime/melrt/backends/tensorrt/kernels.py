"""CUDA kernels around an engine: cut windows out of mels on the device, check the audio, and copy its kept parts to the output.

One launch serves all windows of a run. Their table is a kernel argument, which the driver copies when the kernel is queued: nothing has
to stay in memory until the kernel runs.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from melrt.errors import BackendError

THREADS = 256
# Windows of one launch. CUDA limits a kernel's arguments to 4,096 bytes, and a window of `cut` takes 40.
MOST_JOBS = 64

CUT_JOB = np.dtype(
    [("mel", "u8"), ("band_stride", "i8"), ("frame_stride", "i8"), ("frames", "i4"), ("start", "i4"), ("value", "f4"), ("unused", "i4")]
)
KEEP_JOB = np.dtype([("audio", "u8"), ("out", "u8"), ("samples", "i4"), ("place", "i4")])

SOURCE = rf"""
struct CutJob {{
    const float* mel; long long band_stride, frame_stride; int frames, start; float value; int unused;
}};
struct CutJobs {{ CutJob job[{MOST_JOBS}]; }};
struct KeepJob {{ const void* audio; void* out; int samples, place; }};
struct KeepJobs {{ KeepJob job[{MOST_JOBS}]; }};

// Copy windows of mels (bands, frames) with any strides to their places (bands, window) in the engine's input.
// Frames outside the utterance hold `value`, or the frame at that end if `value` is NaN.
extern "C" __global__ void cut(const __grid_constant__ CutJobs jobs, int bands, int window, float* places) {{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= bands * window) return;
    const CutJob& job = jobs.job[blockIdx.y];
    const int wanted = job.start + i % window;
    const int frame = min(max(wanted, 0), job.frames - 1);
    const bool outside = frame != wanted && job.value == job.value;
    places[(long long)blockIdx.y * bands * window + i] =
        outside ? job.value : job.mel[(i / window) * job.band_stride + frame * job.frame_stride];
}}

// Set the flag of each place whose audio is not finite; convert the audio (places, samples) to 16 bits if `pcm` is given.
// Full scale is 32767, as in melrt.files.audio.to_int16; -32768 marks a sample that is not finite.
extern "C" __global__ void finish(const float* audio, int samples, short* pcm, int* flags) {{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= samples) return;
    const long long at = (long long)blockIdx.y * samples + i;
    const float x = audio[at];
    const bool finite = isfinite(x);
    if (!finite) flags[blockIdx.y] = 1;
    if (pcm) pcm[at] = finite ? (short)__float2int_rn(fminf(fmaxf(x, -1.0f), 1.0f) * 32767.0f) : (short)-32768;
}}

// Copy the kept samples of each window to their place in the output, and report windows that have a sample that is not finite.
template <typename Sample>
__device__ void keep(const KeepJobs& jobs, const int* flags, int* report) {{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const KeepJob& job = jobs.job[blockIdx.y];
    if (i < job.samples) ((Sample*)job.out)[i] = ((const Sample*)job.audio)[i];
    if (i == 0 && flags[job.place]) *report = 1;
}}

extern "C" __global__ void keep_float32(const __grid_constant__ KeepJobs jobs, const int* flags, int* report) {{
    keep<float>(jobs, flags, report);
}}

extern "C" __global__ void keep_int16(const __grid_constant__ KeepJobs jobs, const int* flags, int* report) {{
    keep<short>(jobs, flags, report);
}}
"""

SOURCE_SHA256 = hashlib.sha256(SOURCE.encode()).hexdigest()

_compiled: dict[str, Any] = {}
_lock = threading.Lock()


class Kernels:
    """The kernels for one device. They are compiled once per architecture and process; a kernel belongs to no context."""

    def __init__(self, device: Any, cubin: bytes = b"") -> None:
        """Load the kernels, from code that `compile_source` made for this device if it is given."""
        with _lock:
            if device.arch not in _compiled:
                _compiled[device.arch] = _loaded(cubin) if cubin else compile_source(device.arch)
        code = _compiled[device.arch]
        self._kernels = {name: code.get_kernel(name) for name in ("cut", "finish", "keep_float32", "keep_int16")}

    def run(self, name: str, stream: Any, elements: int, places: int, *arguments: np.generic | NDArray[Any]) -> None:
        """Queue a kernel with one thread for each element of each place.

        Args:
            name: Name of the kernel.
            stream: The stream.
            elements: Elements of the largest place.
            places: Windows, at most `MOST_JOBS` for a kernel that takes a table.
            arguments: Values of exactly the types that the kernel declares; a table as an array.

        Raises:
            BackendError: The driver refuses the launch.
        """
        grid = (-(-elements // THREADS), places, 1)
        queue_kernel(name, self._kernels[name], stream, Geometry(grid, THREADS), [np.asarray(argument) for argument in arguments])


class Geometry(NamedTuple):
    """Size of a launch."""

    grid: tuple[int, int, int]
    """Blocks in each dimension."""
    threads: int
    """Threads of a block."""
    shared: int = 0
    """Dynamic shared memory of a block in bytes."""


def queue_kernel(name: str, kernel: Any, stream: Any, size: Geometry, values: Sequence[NDArray[Any]]) -> None:
    """Queue a kernel.

    Args:
        name: Its name, for messages.
        kernel: The kernel of cuda-core.
        stream: The stream.
        size: Size of the launch.
        values: Arguments of exactly the types that the kernel declares. The driver copies them.

    Raises:
        BackendError: The driver refuses the launch.
    """
    from cuda.bindings import driver

    addresses = np.array([value.ctypes.data for value in values], np.uint64)
    function = driver.CUfunction(int(kernel.handle))
    (error,) = driver.cuLaunchKernel(
        function, *size.grid, size.threads, 1, 1, size.shared, int(stream.handle), int(addresses.ctypes.data), 0
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the GPU's driver refused to launch the kernel {name}: {error}.")


def table(kind: np.dtype[Any], rows: Sequence[tuple[Any, ...]]) -> NDArray[Any]:
    """Return the argument for a table of jobs: an array of `MOST_JOBS` rows, of which the first ones are given."""
    jobs = np.zeros(MOST_JOBS, kind)
    jobs[: len(rows)] = rows
    return jobs


def compile_source(arch: str) -> Any:
    """Compile the kernels for an architecture such as `90`; this needs no GPU."""
    from cuda.core import Program, ProgramOptions

    return Program(SOURCE, "c++", ProgramOptions(arch=f"sm_{arch}", std="c++17")).compile("cubin")


def _loaded(cubin: bytes) -> Any:
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin)
