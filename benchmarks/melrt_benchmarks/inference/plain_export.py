"""The plain export: the ONNX model that `torch.onnx.export` makes of the folded generator, with no further work."""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from importlib.util import find_spec
from typing import Any


def plain_onnx(generator: Any) -> bytes:
    """Return the plain export of a generator in its own precision, with dynamic batch and frames.

    PyTorch's exporter needs onnxscript. Without it, this is what PyTorch's older exporter makes of the same network.
    """
    onnx: Any = importlib.import_module("torch.onnx")
    example = next(generator.parameters()).new_zeros(1, generator.config.in_channels, 64)
    axes = {0: "batch", 2: "frames"}
    stream = io.BytesIO()
    export_logger = logging.getLogger("torch.onnx")
    level = export_logger.level
    export_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if find_spec("onnxscript") is None:
                onnx.export(generator, (example,), stream, dynamo=False, input_names=["mel"], dynamic_axes={"mel": axes})
            else:
                program = onnx.export(generator, (example,), dynamo=True, verbose=False, input_names=["mel"], dynamic_shapes={"mel": axes})
                program.save(stream, external_data=False)
    finally:
        export_logger.setLevel(level)
    return stream.getvalue()
