"""What a user gets who exports the folded generator without further thought."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any


def plain_onnx(generator: Any) -> bytes:
    """`torch.onnx.export` of a generator, batch and frames dynamic.

    Raises:
        ImportError: onnxscript is not installed.
    """
    import onnxscript  # noqa: F401  # torch's own message for its absence is a page long
    from torch import onnx

    example = next(generator.parameters()).new_zeros(1, generator.config.in_channels, 64)
    stream = io.BytesIO()
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = onnx.export(
                generator, (example,), dynamo=True, verbose=False, input_names=["mel"], dynamic_shapes={"mel": {0: "batch", 2: "frames"}}
            )
            program.save(stream, external_data=False)
    finally:
        noisy.setLevel(level)
    return stream.getvalue()
