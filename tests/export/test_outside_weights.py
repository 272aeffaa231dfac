"""Weights outside a model are not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from melrt.backends.onnxruntime import OnnxModel
from melrt.errors import BackendError


def test_weights_outside_a_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of a model does not cover them, and ONNX Runtime looks for them in the working directory."""
    monkeypatch.chdir(tmp_path)
    np.full(80, 7, np.float32).tofile("secret.bin")
    weight = numpy_helper.from_array(np.ones((1, 80, 1), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "secret.bin"), ("offset", "0"), ("length", "320")):
        weight.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    node = helper.make_node("Conv", ["mel", "w"], ["audio"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", bands, "t"]) for name, bands in (("mel", 80), ("audio", 1))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(BackendError, match="rejected the model"):
        OnnxModel(model.SerializeToString())
