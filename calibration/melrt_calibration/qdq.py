"""Q/DQ graphs: insert quantization around the convolutions of a plan, in one of two forms.

- `cpu`: float32 between the convolutions; unsigned activations with a zero point (half a bit more precise after a LeakyReLU, and the
  operand type of x86's byte products); bytes after the convolution too, the only output of ONNX Runtime's QLinearConv; an INT32 bias.
- `tensorrt`: float16 between the convolutions, strongly typed; signed activations with zero point 0; biases in floating point (TensorRT's
  parser refuses an INT32 bias with Q/DQ); nothing after the convolution, so that its epilogue gives float16 for the residual sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from melrt.errors import CalibrationError
from melrt_export.graph.deploy import initializer
from melrt_export.int8_plan import Int8Plan, LayerPlan

Form = Literal["cpu", "tensorrt"]


@dataclass(frozen=True, slots=True)
class Repairs:
    """Corrections of a graph in addition to its quantization."""

    bias_shifts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Values to add to the biases, (C_out,), by layer."""


def insert_qdq(model: onnx.ModelProto, plan: Int8Plan, form: Form, repairs: Repairs | None = None) -> onnx.ModelProto:
    """Return a deploy graph with Q/DQ around the plan's convolutions.

    Args:
        model: Graph from `deploy_graph`, float32 for `cpu` and float16 for `tensorrt`; it is not changed.
        plan: Layers and their scales.
        form: Form of the graph.
        repairs: Corrected biases.

    Raises:
        CalibrationError: The plan names a layer that this graph does not have, or has with another number of channels.
    """
    layers = {layer.name: layer for layer in plan.layers}
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    if unknown := sorted(set(layers) - convolutions):
        raise CalibrationError(
            f"The plan quantizes {', '.join(unknown)}, but the voice has only {', '.join(sorted(convolutions))}; calibrate the voice again."
        )
    writer = _GraphWriter(model, form, repairs or Repairs())
    for node in model.graph.node:
        layer = layers.get(node.name)
        writer.nodes.extend([node] if layer is None else writer.quantized(node, layer))
    return writer.finish()


class _GraphWriter:
    """Collects the nodes and constants of the new graph."""

    def __init__(self, model: onnx.ModelProto, form: Form, repairs: Repairs) -> None:
        self.model = model
        self.form = form
        self.repairs = repairs
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.dtype = np.dtype(np.float32 if form == "cpu" else np.float16)

    def quantized(self, node: onnx.NodeProto, layer: LayerPlan) -> list[onnx.NodeProto]:
        """Return this convolution with its Q/DQ nodes."""
        name = layer.name
        weight = numpy_helper.to_array(self.constants[node.input[1]]).astype(np.float32)
        if len(layer.weight_scales) != len(weight):
            raise CalibrationError(
                f"The plan has {len(layer.weight_scales)} weight scales for {name}, which has {len(weight)} output channels; "
                "calibrate the voice again."
            )
        self._constant(node.input[1], layer.quantize(weight))
        w = self._dequantize(f"{name}.weight", node.input[1], np.array(layer.weight_scales), np.zeros(len(weight), np.int8), axis=0)
        before, x = self._pair(f"{name}.input", node.input[0], *self._scale_and_zero(layer, "input"))
        bias = [self._bias(node, layer)] if len(node.input) > 2 else []
        conv = onnx.NodeProto()
        conv.CopyFrom(node)
        del conv.input[:]
        conv.input.extend([x, w.output[0], *(b.output[0] if isinstance(b, onnx.NodeProto) else b for b in bias)])
        extra = [b for b in bias if isinstance(b, onnx.NodeProto)]
        if self.form == "tensorrt":
            return [*before, w, *extra, conv]
        conv.output[0] = f"{name}.conv"
        after, _ = self._pair(f"{name}.output", conv.output[0], *self._scale_and_zero(layer, "output"), result=node.output[0])
        return [*before, w, *extra, conv, *after]

    def _scale_and_zero(self, layer: LayerPlan, side: str) -> tuple[float, NDArray[np.generic]]:
        values = layer.input if side == "input" else layer.output
        if self.form == "tensorrt":
            return values.symmetric_scale, np.array(0, np.int8)
        scale, zero = values.affine
        return scale, np.array(zero, np.uint8)

    def _bias(self, node: onnx.NodeProto, layer: LayerPlan) -> onnx.NodeProto | str:
        """Return the corrected bias; for the CPU as INT32 with the product of the scales, exact to about 1e-6 of the output."""
        bias = numpy_helper.to_array(self.constants[node.input[2]]).astype(np.float32)
        bias = bias + self.repairs.bias_shifts.get(layer.name, np.float32(0))
        if self.form == "tensorrt":
            self._constant(node.input[2], bias.astype(self.dtype))
            return str(node.input[2])
        scales = np.array(layer.weight_scales, np.float32) * np.float32(layer.input.affine[0])
        rounded = np.clip(np.rint(bias / scales), -(2**31) + 1, 2**31 - 129).astype(np.int32)
        self._constant(node.input[2], rounded)
        return self._dequantize(f"{layer.name}.bias", node.input[2], scales, np.zeros(len(bias), np.int32), axis=0)

    def _pair(self, name: str, x: str, scale: float, zero: NDArray[np.generic], result: str = "") -> tuple[list[onnx.NodeProto], str]:
        inputs = [self._constant(f"{name}.scale", np.array(scale, self.dtype)), self._constant(f"{name}.zero", zero)]
        quantize = helper.make_node("QuantizeLinear", [x, *inputs], [f"{name}.bytes"], name=f"{name}.quantize")
        result = result or f"{name}.values"
        return [quantize, helper.make_node("DequantizeLinear", [f"{name}.bytes", *inputs], [result], name=f"{name}.dequantize")], result

    def _dequantize(self, name: str, data: str, scales: NDArray[np.floating], zero: NDArray[np.generic], axis: int) -> onnx.NodeProto:
        inputs = [data, self._constant(f"{name}.scale", scales.astype(self.dtype)), self._constant(f"{name}.zero", zero)]
        return helper.make_node("DequantizeLinear", inputs, [f"{name}.values"], name=f"{name}.dequantize", axis=axis)

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.constants[name] = initializer(name, value)
        return name

    def finish(self) -> onnx.ModelProto:
        """Return the new model, checked."""
        old = self.model
        graph = helper.make_graph(self.nodes, old.graph.name, old.graph.input, old.graph.output, list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=old.opset_import, ir_version=old.ir_version, producer_name=old.producer_name)
        helper.set_model_props(model, {p.key: p.value for p in old.metadata_props})
        onnx.checker.check_model(model, full_check=True)
        return model
