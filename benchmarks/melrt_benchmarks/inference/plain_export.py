"""The plain export: the ONNX model that `torch.onnx.export` makes of the folded generator, with no further work."""

from __future__ import annotations

import io
import logging
import warnings
from importlib.util import find_spec
from typing import Any

from melrt.errors import MissingExtraError


def plain_onnx(generator: Any) -> bytes:
    """Return the plain export of a generator, with dynamic batch and frames.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    if find_spec("onnxscript") is None:  # PyTorch's own message about it fills a page
        raise MissingExtraError("the plain ONNX export", "onnxscript", "benchmarks")
    from torch import onnx

    example = next(generator.parameters()).new_zeros(1, generator.config.in_channels, 64)
    stream = io.BytesIO()
    export_logger = logging.getLogger("torch.onnx")
    level = export_logger.level
    export_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = onnx.export(
                generator, (example,), dynamo=True, verbose=False, input_names=["mel"], dynamic_shapes={"mel": {0: "batch", 2: "frames"}}
            )
            program.save(stream, external_data=False)
    finally:
        export_logger.setLevel(level)
    return stream.getvalue()
