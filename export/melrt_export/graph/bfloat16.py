"""The bfloat16 graph: the float32 deploy graph with bfloat16 layers, except for the few whose rounding raises the log-mel error.

bfloat16 has 8 significant bits. Measured on eight recordings, a voice whose layers are all bfloat16 has 5 to 6 % more log-mel error than
FP32: noise of the last layers fills quiet bands. With the last convolution and the residual sum of the last stage in float32 it is 0.3 %.
The first convolution stays in float32 as well: it takes 1 % of the time, and the SNR rises from 36 to 45 dB, since the mel is not rounded.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from melrt_export.generator.config import GeneratorConfig

# Opset 22 is the first with a bfloat16 convolution.
OPSET = 22
IR_VERSION = 10
_ROUNDED = ("Conv", "LeakyRelu", "Add")
_UNCHANGED = ("Reshape", "Transpose", "Slice", "Pad", "Unsqueeze")
_LAST_STAGE = ("pointwise", "shortcut", "plain", "add", "sum")


def to_bfloat16(model: onnx.ModelProto, config: GeneratorConfig) -> onnx.ModelProto:
    """Return a float32 deploy graph with bfloat16 layers; input and output stay float32."""
    return _Typing(model).typed(set(_exact_layers(model, config)))


def emulate_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 graph that rounds to bfloat16 wherever this one does: any processor and ONNX Runtime compute it.

    It rounds after each node. An engine that fuses nodes rounds once for all of them, and is as precise or better.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    rounded = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    initializers = [numpy_helper.from_array(_widened(t), t.name) if t.name in rounded else t for t in graph.initializer]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        to = next((a.i for a in node.attribute if a.name == "to"), 0)
        if to == TensorProto.FLOAT:
            nodes.append(helper.make_node("Identity", node.input, node.output, name=node.name))
        elif to == TensorProto.BFLOAT16 or node.input[0] in rounded:
            name = node.output[0]
            node.output[0] = f"{name}.unrounded"
            nodes += [node] if not to else []
            source = node.input[0] if to else node.output[0]
            nodes.append(helper.make_node("Cast", [source], [f"{name}.bits"], name=f"{name}.round", to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}.bits"], [name], name=f"{name}.widen", to=TensorProto.FLOAT))
            rounded.add(name)
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(initializers)
    return result


def _exact_layers(model: onnx.ModelProto, config: GeneratorConfig) -> list[str]:
    """Return the names of the nodes that stay in float32."""
    last = f"stages.{len(config.upsample_scales) - 1}.blocks."
    names = []
    for node in model.graph.node:
        part = node.name.rpartition(".")[2]
        sums = node.name.startswith(last) and part in _LAST_STAGE
        if sums or node.name.startswith(("first", "last", "pqmf", "input")) or node.op_type not in (*_ROUNDED, *_UNCHANGED):
            names.append(node.name)
    return names


class _Typing:
    """Gives each node a type, and inserts a cast where the types of two nodes differ."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.half: set[str] = set()
        """Names of the bfloat16 tensors."""
        self.made: set[str] = set()
        """Names of the casts' outputs and of the rounded constants."""

    def typed(self, exact: set[str]) -> onnx.ModelProto:
        for node in self.model.graph.node:
            # a node that only moves values keeps the type of its input
            half = node.input[0] in self.half if node.op_type in _UNCHANGED else node.name not in exact
            if node.output[0] == self.model.graph.output[0].name:
                half = False
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [self._input(name, half=half) for name in node.input]
            self.nodes.append(copy)
            self.half |= set(node.output) if half else set()
        used = {name for node in self.nodes for name in node.input}
        old = self.model.graph
        constants = [tensor for name, tensor in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, old.name, old.input, old.output, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="melrt")
        helper.set_model_props(model, {prop.key: prop.value for prop in self.model.metadata_props})
        onnx.checker.check_model(model, full_check=True)
        return model

    def _input(self, name: str, *, half: bool) -> str:
        """Return the name of this tensor in the wanted type; shapes and other integers have no other type."""
        constant = self.constants.get(name)
        if half == (name in self.half) or (constant is not None and constant.data_type != TensorProto.FLOAT):
            return name
        result = f"{name}.bf16" if half else f"{name}.fp32"
        if result not in self.made:
            self.made.add(result)
            if constant is not None:
                self.constants[result] = _rounded(constant, result)
            else:
                to = TensorProto.BFLOAT16 if half else TensorProto.FLOAT
                self.nodes.append(helper.make_node("Cast", [name], [result], name=result, to=to))
        return result


def _rounded(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """Round a constant to the nearest bfloat16, ties to even: the upper half of a float32's bits."""
    bits = numpy_helper.to_array(tensor).view(np.uint32)
    half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return helper.make_tensor(name, TensorProto.BFLOAT16, tensor.dims, half.tobytes(), raw=True)


def _widened(tensor: onnx.TensorProto) -> np.ndarray:
    bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(tuple(tensor.dims))
