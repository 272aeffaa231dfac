"""A TensorRT whose engines compute a known function with two CUDA kernels, so that melrt's runtime can be proven where TensorRT is missing.

Only the module `tensorrt` is replaced. The device, its memory, streams, captured graphs and kernels are real. A frame's score is a weighted
sum of the mel in the voice's receptive field, and a sample is the score times the sample's position in the frame. Mels of multiples of 1/16
make every sum exact in float32, so that numpy computes the same bits in any order.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from melrt.backends.tensorrt.kernels import Geometry, queue_kernel
from melrt.planning.windows import ReceptiveField
from melrt.types import Audio, Mel

VERSION = "0.0.1"
THREADS = 256
# Keeps most samples of random mels within [-1, 1]; the others show that 16-bit audio is clipped. A power of two, so scaling is exact.
SCALE = 2.0**-18
# A mel value from here on makes the scores that depend on it infinite.
TOO_LARGE = 4096

SOURCE = f"""
// A frame's score, one block for each frame of each place. The edge graph repeats the end frames; the interior graph pads with zeros.
extern "C" __global__ void score(const float* mel, int bands, int frames, int left, int right, int edge, float* scores) {{
    __shared__ float part[{THREADS}];
    const int frame = blockIdx.x, place = blockIdx.y, reach = left + 1 + right;
    float sum = 0;
    for (int i = threadIdx.x; i < bands * reach; i += blockDim.x) {{
        const int band = i / reach, tap = i % reach;
        int at = frame + tap - left;
        if (edge) at = min(max(at, 0), frames - 1);
        const float weight = (1 + 3 * tap % 5) * (band % 7 - 3);
        if (at < 0 || at >= frames) continue;
        const float x = mel[((long long)place * bands + band) * frames + at];
        sum += x < {TOO_LARGE} ? weight * x : __int_as_float(0x7f800000);
    }}
    part[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {{
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }}
    if (threadIdx.x == 0) scores[(long long)place * frames + frame] = part[0];
}}

// The samples of a frame: its score times the sample's position.
extern "C" __global__ void shape(const float* scores, int frames, int hop, float scale, float* audio) {{
    const long long at = (long long)blockIdx.y * frames + blockIdx.x;
    for (int i = threadIdx.x; i < hop; i += blockDim.x) audio[at * hop + i] = scores[at] * (i + 1) * scale;
}}
"""


def expected_audio(mel: Mel, field: ReceptiveField, hop: int) -> Audio:
    """Return the audio (N,) of a mel (M, T) whose values are multiples of 1/16, bit for bit."""
    reach = field.left + 1 + field.right
    padded = np.pad(mel.astype(np.float64), ((0, 0), (field.left, field.right)), mode="edge")
    bands = (np.arange(len(mel)) % 7 - 3) @ padded
    scores = np.correlate(bands, 1.0 + 3 * np.arange(reach) % 5, mode="valid").astype(np.float32)
    return (scores[:, None] * np.arange(1, hop + 1, dtype=np.float32) * np.float32(SCALE)).reshape(-1)


def plan_bytes(**facts: Any) -> bytes:
    """Return a serialized engine. `facts` are bands, hop, left, right, edge, profiles, arch, and the faults to show."""
    return json.dumps(facts).encode()


class Counters:
    """Counts of calls, over all engines of the process."""

    executions = 0
    """Calls of `execute_async_v3`; replays of a captured graph make none."""


class Context:
    """An execution context."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._scratch = 0

    def set_device_memory(self, address: int, size: int) -> None:
        """Take the scratch memory, which holds the scores."""
        assert size >= self._engine.device_memory_size_v2
        self._scratch = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return 0 <= index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return self._shape[0], self._shape[2] * int(self._engine.facts["hop"])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        """Queue both kernels. A plan with the fact `uncapturable` waits within a capture, which the driver refuses."""
        Counters.executions += 1
        if self._engine.facts.get("uncapturable") and _is_capturing(stream):
            _synchronize(stream)
            return False
        facts, (batch, bands, frames) = self._engine.facts, self._shape
        numbers = (bands, frames, facts["left"], facts["right"], facts["edge"])
        grid = Geometry((frames, batch, 1), THREADS)
        scores = np.uint64(self._scratch)
        queue = types.SimpleNamespace(handle=stream)
        arguments = [np.uint64(self._addresses["mel"]), *map(np.int32, numbers), scores]
        queue_kernel("score", self._engine.kernels["score"], queue, grid, [np.asarray(value) for value in arguments])
        arguments = [scores, np.int32(frames), np.int32(facts["hop"]), np.float32(SCALE), np.uint64(self._addresses["audio"])]
        queue_kernel("shape", self._engine.kernels["shape"], queue, grid, [np.asarray(value) for value in arguments])
        return True


class Engine:
    """An engine of the stub."""

    num_io_tensors = 2

    def __init__(self, plan: bytes) -> None:
        self.facts = json.loads(plan)
        self.kernels = compiled(self.facts["arch"])
        self._profiles = self.facts["profiles"]
        self.num_optimization_profiles = len(self._profiles)
        most = max(largest[0] * largest[2] for _, _, largest in self._profiles)
        self.device_memory_size_v2 = self.facts.get("scratch") or 4 * most

    def get_tensor_name(self, index: int) -> str:
        return ("mel", "audio")[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return self._profiles[index]  # type: ignore[no-any-return]

    def create_execution_context(self, strategy: str) -> Context:
        return Context(self)


_kernels: dict[str, dict[str, Any]] = {}


def compiled(arch: str) -> dict[str, Any]:
    """Compile the stub's kernels for an architecture such as `90`, once in a process; this needs no GPU."""
    if arch not in _kernels:
        from cuda.core import Program, ProgramOptions

        code = Program(SOURCE, "c++", ProgramOptions(arch=f"sm_{arch}", std="c++17")).compile("cubin")
        _kernels[arch] = {name: code.get_kernel(name) for name in ("score", "shape")}
    return _kernels[arch]


def _is_capturing(stream: int) -> bool:
    from cuda.bindings import driver

    _, status = driver.cuStreamIsCapturing(stream)
    return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


def _synchronize(stream: int) -> None:
    from cuda.bindings import driver

    driver.cuStreamSynchronize(stream)


def install() -> types.ModuleType:
    """Put the stub in the place of the module `tensorrt` in this process, and return it."""

    class ILogger:
        """Base of loggers."""

        Severity = types.SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    class Runtime:
        """Opens engines."""

        deserialize_cuda_engine: Callable[[bytes], Engine] = staticmethod(Engine)

        def __init__(self, log: ILogger) -> None:
            self.log = log

    module = types.ModuleType("tensorrt")
    for name, value in {
        "__version__": VERSION, "ILogger": ILogger, "Runtime": Runtime, "DataType": types.SimpleNamespace(FLOAT="float"),
        "ExecutionContextAllocationStrategy": types.SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    }.items():  # fmt: skip
        setattr(module, name, value)
    sys.modules["tensorrt"] = module
    return module
