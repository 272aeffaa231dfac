"""Q/DQ graphs: insert quantization around the convolutions of a plan, in one of two forms.

- `cpu`: unsigned activations with a zero point (half a bit more precise after a LeakyReLU, and the operand type of x86's byte products);
  bytes after the convolution too, the only output of ONNX Runtime's QLinearConv; an INT32 bias. Between two quantized convolutions,
  tensors stay in bytes through padding, interleaving, concatenation and LeakyReLU; around other convolutions they are float32.
- `tensorrt`: float16 between the convolutions, strongly typed; signed activations with zero point 0; biases in floating point (TensorRT's
  parser refuses an INT32 bias with Q/DQ); nothing after the convolution, so that its epilogue gives float16 to the LeakyReLU.

In both forms a residual block whose convolution `merged` is in the plan sums in that convolution's INT32 accumulator and rounds once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from melrt.errors import CalibrationError
from melrt_export.graph.deploy import initializer
from melrt_export.graph.rewrites import merge_shortcuts
from melrt_export.int8_plan import Int8Plan, LayerPlan, Range

Form = Literal["cpu", "tensorrt"]
# Operations that only move values, so that they move bytes as well.
MOVES = ("Reshape", "Transpose", "Slice", "Pad")


@dataclass(frozen=True, slots=True)
class Repairs:
    """Corrections of a graph in addition to its quantization."""

    bias_shifts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Values to add to the biases, (C_out,), by layer."""


class _Bytes(NamedTuple):
    """Bytes of a tensor, and the constants of their grid."""

    name: str
    scale: str
    zero: str


def insert_qdq(model: onnx.ModelProto, plan: Int8Plan, form: Form, repairs: Repairs | None = None) -> onnx.ModelProto:
    """Return a deploy graph with Q/DQ around the plan's convolutions, and with the plan's residual blocks merged.

    Args:
        model: Graph from `deploy_graph`, float32 for `cpu` and float16 for `tensorrt`; it is not changed.
        plan: Layers and their scales.
        form: Form of the graph.
        repairs: Corrected biases.

    Raises:
        CalibrationError: The plan names a layer that this graph does not have, or has with another number of channels.
    """
    merged = merge_shortcuts(model, plan.merged_blocks)
    layers = {layer.name: layer for layer in plan.layers}
    convolutions = {node.name for node in merged.graph.node if node.op_type == "Conv"}
    if unknown := sorted(set(layers) - convolutions):
        raise CalibrationError(
            f"The plan quantizes {', '.join(unknown)}, but the voice has only {', '.join(sorted(convolutions))}; calibrate the voice again."
        )
    writer = _GraphWriter(merged, form, repairs or Repairs())
    for node in merged.graph.node:
        writer.add(node, layers)
    return writer.finish()


class _GraphWriter:
    """Collects the nodes and constants of the new graph. It converts a tensor to bytes or to values where a node needs it."""

    def __init__(self, model: onnx.ModelProto, form: Form, repairs: Repairs) -> None:
        self.model = model
        self.form = form
        self.repairs = repairs
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.dtype = np.dtype(np.float32 if form == "cpu" else np.float16)
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.bytes: dict[str, list[_Bytes]] = {}
        """Bytes of a tensor, by the tensor's name; more than one if its readers have different grids."""
        self.values = {*self.constants, *(value.name for value in model.graph.input)}
        """Tensors that exist in floating point."""

    def add(self, node: onnx.NodeProto, layers: Mapping[str, LayerPlan]) -> None:
        """Add a node: quantized if it is in the plan, and in bytes if it moves bytes. Padding and joins wait for their reader."""
        if layer := layers.get(node.name):
            self._quantized(node, layer)
        elif node.op_type in MOVES and node.input[0] in self.bytes:
            self.bytes[node.output[0]] = [self._moved(node, [self.bytes[node.input[0]][0]])]
        elif node.op_type not in ("Pad", "Concat"):
            self._in_floats(node)

    def _in_floats(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            self._need_values(name)
        self.nodes.append(node)
        self.values |= set(node.output)

    def _need_values(self, name: str) -> None:
        """Make a tensor exist in floating point."""
        if name in self.values:
            return
        if name in self.bytes:
            self._dequantize_to(self.bytes[name][0], name)
        else:
            self._in_floats(self.producers[name])
        self.values.add(name)

    def _bytes_of(self, tensor: str, name: str, values: Range) -> _Bytes:
        """Return a tensor in bytes on a grid. Padding and joins of a convolution's input are done in bytes."""
        scale, zero = self._grid(name, values)
        for known in self.bytes.get(tensor, ()):
            if self._equal(known.scale, scale) and self._equal(known.zero, zero):
                return known
        producer = self.producers.get(tensor)
        if producer is not None and producer.op_type in ("Pad", "Concat") and tensor not in self.values:
            data = [one for one in producer.input if one not in self.constants]
            parts = [self._bytes_of(one, name if len(data) == 1 else f"{name}{i}", values) for i, one in enumerate(data)]
            found = self._moved(producer, parts)
        else:
            self._need_values(tensor)
            found = self._quantize(tensor, name, scale, zero)
        self.bytes.setdefault(tensor, []).append(found)
        return found

    def _moved(self, node: onnx.NodeProto, parts: list[_Bytes]) -> _Bytes:
        """Add a node that moves bytes instead of values."""
        moved = onnx.NodeProto()
        moved.CopyFrom(node)
        moved.input[: len(parts)] = [part.name for part in parts]
        moved.output[0] = f"{node.output[0]}.bytes"
        self.nodes.append(moved)
        return parts[0]._replace(name=moved.output[0])

    def _quantized(self, node: onnx.NodeProto, layer: LayerPlan) -> None:
        """Add this convolution with its Q/DQ nodes."""
        name = layer.name
        weight = numpy_helper.to_array(self.constants[node.input[1]]).astype(np.float32)
        if len(layer.weight_scales) != len(weight):
            raise CalibrationError(
                f"The plan has {len(layer.weight_scales)} weight scales for {name}, which has {len(weight)} output channels; "
                "calibrate the voice again."
            )
        before = self._bytes_of(node.input[0], f"{name}.input", layer.input)
        self._dequantize_to(before, f"{name}.input.values", f"{name}.input.dequantize")
        self._constant(node.input[1], layer.quantize(weight))
        inputs = [f"{name}.input.values", self._constants_values(f"{name}.weight", node.input[1], np.array(layer.weight_scales))]
        if len(node.input) > 2:
            inputs.append(self._bias(node, layer))
        conv = onnx.NodeProto()
        conv.CopyFrom(node)
        conv.input[:] = inputs
        self.nodes.append(conv)
        if self.form == "tensorrt":
            self.values.add(node.output[0])
            return
        conv.output[0] = f"{name}.conv"
        after = self._quantize(conv.output[0], f"{name}.output", *self._grid(f"{name}.output", layer.output))
        self.bytes[node.output[0]] = [after]

    def _bias(self, node: onnx.NodeProto, layer: LayerPlan) -> str:
        """Return the corrected bias; for the CPU as INT32 with the product of the scales, exact to about 1e-6 of the output."""
        bias = numpy_helper.to_array(self.constants[node.input[2]]).astype(np.float32)
        bias = bias + self.repairs.bias_shifts.get(layer.name, np.float32(0))
        if self.form == "tensorrt":
            return self._constant(node.input[2], bias.astype(self.dtype))
        scales = np.array(layer.weight_scales, np.float32) * np.float32(layer.input.affine[0])
        rounded = np.clip(np.rint(bias / scales), -(2**31) + 1, 2**31 - 129).astype(np.int32)
        return self._constants_values(f"{layer.name}.bias", self._constant(node.input[2], rounded), scales)

    def _grid(self, name: str, values: Range) -> tuple[str, str]:
        """Return the constants of a grid of bytes."""
        scale, zero = (values.symmetric_scale, np.array(0, np.int8))
        if self.form == "cpu":
            scale, zero_point = values.affine
            zero = np.array(zero_point, np.uint8)
        return self._constant(f"{name}.scale", np.array(scale, self.dtype)), self._constant(f"{name}.zero", zero)

    def _equal(self, one: str, other: str) -> bool:
        return bool(numpy_helper.to_array(self.constants[one]) == numpy_helper.to_array(self.constants[other]))

    def _quantize(self, tensor: str, name: str, scale: str, zero: str) -> _Bytes:
        self.nodes.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], [f"{name}.bytes"], name=f"{name}.quantize"))
        return _Bytes(f"{name}.bytes", scale, zero)

    def _dequantize_to(self, data: _Bytes, result: str, name: str = "") -> None:
        self.nodes.append(helper.make_node("DequantizeLinear", list(data), [result], name=name or f"{result}.dequantize"))

    def _constants_values(self, name: str, data: str, scales: NDArray[np.floating]) -> str:
        """Dequantize a constant with a scale for each output channel."""
        zero = np.zeros(len(scales), numpy_helper.to_array(self.constants[data]).dtype)
        inputs = [data, self._constant(f"{name}.scale", scales.astype(self.dtype)), self._constant(f"{name}.zero", zero)]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.values"], name=f"{name}.dequantize", axis=0))
        return f"{name}.values"

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.constants[name] = initializer(name, value)
        return name

    def finish(self) -> onnx.ModelProto:
        """Return the new model, checked."""
        old = self.model
        for output in old.graph.output:
            self._need_values(output.name)
        used = {name for node in self.nodes for name in node.input}
        constants = [tensor for name, tensor in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, old.graph.name, old.graph.input, old.graph.output, constants)
        model = helper.make_model(graph, opset_imports=old.opset_import, ir_version=old.ir_version, producer_name=old.producer_name)
        helper.set_model_props(model, {p.key: p.value for p in old.metadata_props})
        onnx.checker.check_model(model, full_check=True)
        return model
