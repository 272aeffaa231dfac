"""Check that an engine computes in the requested precision. A build that silently fell back to float32 is an error."""

from __future__ import annotations

import json
from typing import Any

import onnx

from melrt.errors import EngineBuildError
from melrt_export.tensorrt.plan_text import PlanText

# Type that the convolutions of each precision output. INT8 convolutions give FP16 to the layers after them.
_OUTPUT_TYPES = {"fp32": "FLOAT", "tf32": "FLOAT", "fp16": "HALF", "int8": "HALF"}
# Names of these types in the engine inspector's text.
_INSPECTOR_NAMES = {"float": ("fp32", "float"), "half": ("fp16", "half")}
# Types of the weights of convolutions that are not quantized, in a plan's text and in the inspector's.
_WEIGHT_TYPES = {"fp32": "float", "tf32": "float", "fp16": "half", "int8": "half"}
# The filter bank of a multi-band voice stays in float32 in every precision, like the tanh before it.
FILTER_BANK = "pqmf"


def audit_network(trt: Any, network: Any, precision: str) -> None:
    """Check the parsed network: the type of each convolution's output, and float32 for the network's input and output.

    Raises:
        EngineBuildError: A type is wrong. The message names the layer or tensor.
    """
    expected = getattr(trt.DataType, _OUTPUT_TYPES[precision])
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    convolutions = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in kinds and FILTER_BANK not in layer.name:
            convolutions += 1
            if layer.get_output(0).dtype != expected:
                raise EngineBuildError(
                    f"{layer.name} computes {layer.get_output(0).dtype}, not {precision}: the graph does not have the precision that "
                    "the manifest states. Export the voice again."
                )
    if not convolutions:
        raise EngineBuildError("the parsed network has no convolution, so the graph is not a generator. Export the voice again.")
    quantized = [network.get_layer(i) for i in range(network.num_layers) if network.get_layer(i).type == trt.LayerType.QUANTIZE]
    if (precision == "int8") != bool(quantized):
        raise EngineBuildError(f"the parsed network has {len(quantized)} quantizing layers, so it is not {precision}.")
    for tensor in (network.get_input(0), network.get_output(0)):
        if tensor.dtype != trt.DataType.FLOAT:
            raise EngineBuildError(f"{tensor.name} is {tensor.dtype}; input and output must be float32 in every precision.")


def audit_plan(plan: bytes, graph: bytes, precision: str) -> str:
    """Check the weight type of every convolution in the text of a TensorRT-RTX plan; no GPU is needed.

    Args:
        plan: Serialized engine.
        graph: ONNX graph that it was built from.
        precision: Precision of the engine.

    Returns:
        `plan` if the plan states types; `network` if it does not, so that only the network was audited.

    Raises:
        EngineBuildError: A convolution has the wrong type, or weights are dequantized in every run.
    """
    text = PlanText.read(plan)
    if not text.weight_types:
        return "network"
    quantized = quantized_convolutions(graph)
    expected = dict.fromkeys(text.weight_types, _WEIGHT_TYPES[precision]) | dict.fromkeys(quantized, "int8")
    computed = {name: text.weight_types.get(name, "nothing of that name") for name in expected if FILTER_BANK not in name}
    wrong = {name: kind for name, kind in computed.items() if kind != expected[name]}
    if wrong:
        name, kind = next(iter(wrong.items()))
        remedy = " Calibrate the voice again with `melrt calibrate`, then build." if quantized else ""
        raise EngineBuildError(
            f"{len(wrong)} of {len(computed)} convolutions have the wrong precision in the engine: {name} computes {kind} instead of "
            f"{expected[name]}.{remedy}"
        )
    if text.weight_dequantizations:
        raise EngineBuildError(
            f"the engine dequantizes {len(text.weight_dequantizations)} constant weights in every run, beginning with "
            f"{text.weight_dequantizations[0]}. Calibrate the voice again with `melrt calibrate`, then build."
        )
    return "plan"


def quantized_convolutions(graph: bytes) -> frozenset[str]:
    """Return the names of the convolutions whose weights are dequantized from bytes in an ONNX graph."""
    nodes = onnx.load_from_string(graph).graph.node
    dequantized = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    return frozenset(node.name for node in nodes if node.op_type == "Conv" and node.input[1] in dequantized)


def audit_engine(trt: Any, plan: bytes, precision: str) -> str:
    """Check the types in a built engine with TensorRT's inspector, on the GPU that the engine is for.

    Returns:
        `engine` if the inspector states types; `network` if the inspector of this flavor does not, so that only the network was audited.

    Raises:
        EngineBuildError: The engine cannot be opened, or a convolution has the wrong type.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError("the engine that was built cannot be opened on this GPU.")
    inspector = engine.create_engine_inspector()
    return audit_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON), precision)


def audit_layers(information: str, precision: str) -> str:
    """Check the weight type of every convolution in the inspector's JSON, or its input type if no weight is listed.

    Output types are not checked: a fused layer may output the type of what follows it.

    Returns:
        `engine` or `network`, as `audit_engine` does.

    Raises:
        EngineBuildError: A convolution has the wrong type.
    """
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        return "network"
    allowed = (*_INSPECTOR_NAMES[_WEIGHT_TYPES[precision]], *(("int8",) if precision == "int8" else ()))
    audited = 0
    for layer in (entry for entry in layers if isinstance(entry, dict)):
        if FILTER_BANK in str(layer.get("Name")) or "conv" not in f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower():
            continue
        weights, inputs = layer.get("Weights"), layer.get("Inputs")
        stated = weights.get("Type") if isinstance(weights, dict) else inputs[0].get("Format/Datatype") if inputs else None
        if stated is None:
            continue
        audited += 1
        if not any(name in str(stated).lower() for name in allowed):
            raise EngineBuildError(f"{layer.get('Name')} computes {stated}, not {precision}: the builder chose another precision.")
    return "engine" if audited else "network"
