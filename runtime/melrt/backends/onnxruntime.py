"""ONNX Runtime, on CPU and CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import BackendError, MissingExtraError

_PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # The default, EXHAUSTIVE, tunes every new input shape anew: hundreds of milliseconds each. HEURISTIC asks cuDNN once.
    "cuda": [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"],
}
_ERRORS_ONLY = 3


def usable_devices() -> tuple[str, ...]:
    """Devices that the installed ONNX Runtime was built for, best first; a device of the list may still be absent."""
    available = _onnxruntime().get_available_providers()
    return ("cuda", "cpu") if "CUDAExecutionProvider" in available else ("cpu",)


class OnnxRuntime:
    """An ONNX model in one session."""

    name = "onnxruntime"

    def __init__(self, model: bytes, precision: str, device: str, threads: int | None = None) -> None:
        """Load a model.

        Args:
            model: Serialised ONNX, verified by the caller.
            precision: Of the model.
            device: `cpu` or `cuda`.
            threads: CPU threads for one run; one per physical core if None.

        Raises:
            BackendError: ONNX Runtime refuses the model, or the device is not to be had.
        """
        ort = _onnxruntime()
        self.precision = precision
        self.device = device
        if _PROVIDERS[device][0][0] == "CUDAExecutionProvider" and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise BackendError('this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then pip install "melrt[gpu]"')
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(model, options, providers=_PROVIDERS[device])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime {ort.__version__} refused the model: {error}") from error
        if device == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError("ONNX Runtime found no usable CUDA device; `melrt doctor` shows what is missing.")

    def run(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            (audio,) = self._session.run(None, {"mel": mel})
        except Exception as error:  # as above
            raise BackendError(f"ONNX Runtime failed on a mel of shape {mel.shape}: {error}") from error
        return np.asarray(audio, np.float32)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("running a voice", "onnxruntime", "cpu") from error
    return onnxruntime
