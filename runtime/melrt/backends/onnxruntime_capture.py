"""One window length in ONNX Runtime on CUDA: its runs are captured as CUDA graphs when the model is loaded, and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from melrt.types import FloatAudio, Mel

# Value of the run option `gpu_graph_id` for a run that is neither captured nor replayed (onnxruntime_run_options_config_keys.h).
_PLAIN = -1
# ONNX Runtime captures a graph after two plain runs, which allocate what it needs; a fourth run proves that it can be replayed.
_WARM_UP_RUNS = 4


class CapturedWindow:
    """A session whose window is replayed from memory on the device.

    All runs are made by one thread: ONNX Runtime keeps a captured graph for the thread that captured it. Nothing is captured after the
    load, because CUDA calls of other threads fail during ONNX Runtime's captures.
    """

    def __init__(self, ort: Any, model: bytes, providers: Sequence[tuple[str, dict[str, str]]], frames: int, batch: int) -> None:
        """Load the model and capture the window.

        Args:
            ort: The package `onnxruntime`.
            model: Serialized ONNX model.
            providers: CUDA with `enable_cuda_graph`, and no other.
            frames: Length of the window.
            batch: Largest batch.

        Raises:
            Exception: ONNX Runtime cannot capture this model; its exceptions have no common base.
        """
        self._ort, self._index, self._frames = ort, int(providers[0][1]["device_id"]), frames
        self._batches: dict[int, _Batch] = {}
        self._thread = ThreadPoolExecutor(1, "melrt-onnxruntime")
        try:
            self._thread.submit(self._capture, model, providers, batch).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def takes(self, mel: Mel) -> bool:
        """Return whether mel frames (B, M, T) are windows of the captured length, and not too many."""
        return mel.shape[2] == self._frames and len(mel) <= max(self._batches)

    def run(self, mel: Mel) -> FloatAudio:
        """Run windows (B, M, T). The batch is rounded up to a captured one."""
        size = min(size for size in self._batches if size >= len(mel))
        return self._thread.submit(self._batches[size].run, mel).result()

    def _capture(self, model: bytes, providers: Sequence[Any], batch: int) -> None:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        session = self._ort.InferenceSession(model, options, providers=list(providers))
        bands = session.get_inputs()[0].shape[1]
        sizes = sorted({1 << power for power in range(batch.bit_length()) if 1 << power < batch} | {batch})
        for size in sizes:
            mel = np.zeros((size, bands, self._frames), np.float32)
            (audio,) = session.run(None, {"mel": mel}, _options(self._ort, _PLAIN))
            self._batches[size] = _Batch(self._ort, session, mel, audio.shape, self._index, graph=len(self._batches) + 1)
            for _ in range(_WARM_UP_RUNS):
                self._batches[size].run(mel)


class _Batch:
    """Input and output of one batch size, at the addresses that its graph holds."""

    def __init__(self, ort: Any, session: Any, mel: Mel, audio: tuple[int, ...], index: int, graph: int) -> None:
        self._session, self._options, self._host = session, _options(ort, graph), mel.copy()
        allocate = ort.OrtValue.ortvalue_from_shape_and_type
        self._mel, self._audio = (allocate(list(shape), np.float32, "cuda", index) for shape in (mel.shape, audio))
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("mel", self._mel)
        self._binding.bind_ortvalue_output(session.get_outputs()[0].name, self._audio)

    def run(self, mel: Mel) -> FloatAudio:
        """Run up to the batch's number of windows; the other places compute what they held before."""
        self._host[: len(mel)] = mel
        self._mel.update_inplace(self._host)
        self._session.run_with_iobinding(self._binding, self._options)
        audio: FloatAudio = self._audio.numpy()[: len(mel)]
        return audio


def _options(ort: Any, graph: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
