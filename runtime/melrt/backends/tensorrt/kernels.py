"""CUDA kernels around an engine: cut windows out of a mel on the device, and copy their kept parts to the output."""

from __future__ import annotations

from typing import Any

THREADS = 256

SOURCE = r"""
// Copy one window of a mel (bands, frames) with any strides to a place (bands, window) in the engine's input.
// Frames outside the utterance hold `value`, or the frame at that end if `value` is NaN.
extern "C" __global__ void cut(const float* mel, long long band_stride, long long frame_stride, int bands, int frames,
                               int start, int window, float value, float* slot) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= bands * window) return;
    const int wanted = start + i % window;
    const int frame = min(max(wanted, 0), frames - 1);
    const bool outside = frame != wanted && value == value;
    slot[i] = outside ? value : mel[(i / window) * band_stride + frame * frame_stride];
}

extern "C" __global__ void keep_float32(const float* audio, int samples, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < samples) out[i] = audio[i];
}

extern "C" __global__ void keep_int16(const short* audio, int samples, short* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < samples) out[i] = audio[i];
}

// Full scale is 32767, as in melrt.files.audio.to_int16; -32768 says that a sample was not a number.
extern "C" __global__ void to_int16(const float* audio, int samples, short* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= samples) return;
    const float x = audio[i];
    out[i] = isfinite(x) ? (short)__float2int_rn(fminf(fmaxf(x, -1.0f), 1.0f) * 32767.0f) : (short)-32768;
}
"""


class Kernels:
    """The kernels, compiled for one device."""

    def __init__(self, device: Any) -> None:
        from cuda.core import LaunchConfig, Program, ProgramOptions, launch

        code = Program(SOURCE, "c++", ProgramOptions(arch=f"sm_{device.arch}")).compile("cubin")
        self._kernels = {name: code.get_kernel(name) for name in ("cut", "keep_float32", "keep_int16", "to_int16")}
        self._config, self._launch = LaunchConfig, launch

    def run(self, name: str, stream: Any, elements: int, *arguments: Any) -> None:
        """Queue a kernel with one thread per element."""
        self._launch(stream, self._config(grid=-(-elements // THREADS), block=THREADS), self._kernels[name], *arguments)
