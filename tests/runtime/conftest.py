"""The backends of a CPU. What every backend must do is tested on both."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"needs the extra of {request.param}")
    return str(request.param)
