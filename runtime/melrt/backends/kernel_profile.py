"""ONNX Runtime's profiler: the time of each kernel of a model, on one CPU thread."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.errors import BackendError
from melrt.types import Mel

_ERRORS_ONLY = 3
_EVENT_SUFFIX = "_kernel_time"


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Times of one kernel."""

    name: str
    """Name that ONNX Runtime's optimizer gave the kernel; unique in the model."""
    kind: str
    """Operator of the kernel, for example `Conv` or `QLinearConv`."""
    seconds: NDArray[np.float64]
    """Seconds of each run, (runs,)."""

    @property
    def origin(self) -> str:
        """Node or tensor of the original graph that the kernel is named after: the last tensor of a fused kernel."""
        return self.name.partition("_token")[0].removesuffix("_nchwc")  # a number for each new node, and the blocked layout


def profile_kernels(model: bytes, mel: Mel, runs: int) -> list[KernelTime]:
    """Run a model under ONNX Runtime's profiler.

    Args:
        model: Serialized ONNX with one input, `mel`.
        mel: Mel frames (B, M, T).
        runs: Number of runs; the first ones include warm-up.

    Returns:
        The kernels in the order in which they run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {"mel": mel})
        profile = Path(session.end_profiling())
        try:
            events = json.loads(profile.read_text())
        except ValueError as error:  # ONNX Runtime does not report a full disk
            raise BackendError(f"{profile} is cut off. Make room on its disk, or set TMPDIR to another folder.") from error
    kinds: dict[str, str] = {}
    microseconds: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_EVENT_SUFFIX):
            name = event["name"].removesuffix(_EVENT_SUFFIX)
            kinds[name] = event["args"]["op_name"]
            microseconds[name].append(event["dur"])
    return [KernelTime(name, kinds[name], np.array(values, np.float64) / 1e6) for name, values in microseconds.items()]
