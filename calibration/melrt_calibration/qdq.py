"""Q/DQ graphs from a plan: around the chosen convolutions only, in two forms.

- `cpu`: float32 between, unsigned activations with a zero point (half a bit better after a LeakyReLU, and what x86's
  byte products take), bytes after the convolution too, since ONNX Runtime's QLinearConv gives nothing else, and an INT32 bias.
- `tensorrt`: float16 between, strongly typed; signed activations, zero points 0, biases in floating point (an INT32 bias with
  Q/DQ is refused by TensorRT's parser), nothing after the convolution: its epilogue gives float16 for the residual add.
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
from melrt_export.int8_plan import LayerPlan, Plan

Form = Literal["cpu", "tensorrt"]


@dataclass(frozen=True, slots=True)
class Repairs:
    """What is done to a graph beside rounding it."""

    bias_shifts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Added to the biases (C_out,), by layer."""


def quantized(model: onnx.ModelProto, plan: Plan, form: Form, repairs: Repairs | None = None) -> onnx.ModelProto:
    """A deploy graph with Q/DQ around the plan's convolutions.

    Args:
        model: Of `deploy_graph`, float32 for `cpu`, float16 for `tensorrt`; it is not changed.
        plan: Layers and scales.
        form: For which engine.
        repairs: Corrected biases.

    Raises:
        CalibrationError: The plan names a layer that this graph does not have, or has with other channels.
    """
    wanted = {layer.name: layer for layer in plan.layers}
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    if unknown := sorted(set(wanted) - convolutions):
        raise CalibrationError(f"the plan quantizes {', '.join(unknown)}; the voice has {', '.join(sorted(convolutions))}.")
    writer = _Writer(model, form, repairs or Repairs())
    for node in model.graph.node:
        layer = wanted.get(node.name)
        writer.nodes.extend([node] if layer is None else writer.around(node, layer))
    return writer.finish()


class _Writer:
    """Collects the new graph's nodes and constants."""

    def __init__(self, model: onnx.ModelProto, form: Form, repairs: Repairs) -> None:
        self.model = model
        self.form = form
        self.repairs = repairs
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.dtype = np.dtype(np.float32 if form == "cpu" else np.float16)

    def around(self, node: onnx.NodeProto, layer: LayerPlan) -> list[onnx.NodeProto]:
        """This convolution with its Q/DQ nodes."""
        name = layer.name
        weight = numpy_helper.to_array(self.constants[node.input[1]]).astype(np.float32)
        if len(layer.weight_scales) != len(weight):
            raise CalibrationError(f"the plan has {len(layer.weight_scales)} scales for {name}, which has {len(weight)} output channels.")
        self._constant(node.input[1], layer.quantize(weight))
        w = self._dequantize(f"{name}.weight", node.input[1], np.array(layer.weight_scales), np.zeros(len(weight), np.int8), axis=0)
        before, x = self._pair(f"{name}.input", node.input[0], *self._grid(layer, "input"))
        bias = [self._bias(node, layer)] if len(node.input) > 2 else []
        conv = onnx.NodeProto()
        conv.CopyFrom(node)
        del conv.input[:]
        conv.input.extend([x, w.output[0], *(b.output[0] if isinstance(b, onnx.NodeProto) else b for b in bias)])
        extra = [b for b in bias if isinstance(b, onnx.NodeProto)]
        if self.form == "tensorrt":
            return [*before, w, *extra, conv]
        conv.output[0] = f"{name}.conv"
        after, _ = self._pair(f"{name}.output", conv.output[0], *self._grid(layer, "output"), result=node.output[0])
        return [*before, w, *extra, conv, *after]

    def _grid(self, layer: LayerPlan, side: str) -> tuple[float, NDArray[np.generic]]:
        """Scale and zero point of an activation."""
        values = layer.input if side == "input" else layer.output
        if self.form == "tensorrt":
            return values.symmetric_scale, np.array(0, np.int8)
        scale, zero = values.affine
        return scale, np.array(zero, np.uint8)

    def _bias(self, node: onnx.NodeProto, layer: LayerPlan) -> onnx.NodeProto | str:
        """The bias, corrected; in the CPU's form as INT32 with the product of the scales, exact to about 1e-6 of the output."""
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
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def finish(self) -> onnx.ModelProto:
        graph = self.model.graph
        made = helper.make_graph(self.nodes, graph.name, graph.input, graph.output, list(self.constants.values()))
        model = helper.make_model(
            made, opset_imports=self.model.opset_import, ir_version=self.model.ir_version, producer_name=self.model.producer_name
        )
        helper.set_model_props(model, {p.key: p.value for p in self.model.metadata_props})
        onnx.checker.check_model(model, full_check=True)
        return model
