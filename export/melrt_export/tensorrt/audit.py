"""Check that an engine computes in the requested precision. A build that silently fell back to float32 is an error."""

from __future__ import annotations

import json
from typing import Any

from melrt.errors import EngineBuildError

# Type that the convolutions of each precision output. INT8 convolutions give FP16 to the layers after them.
_OUTPUT_TYPES = {"fp32": "FLOAT", "tf32": "FLOAT", "fp16": "HALF", "int8": "HALF"}
# Names of these types in the engine inspector's text.
_INSPECTOR_NAMES = {"FLOAT": ("fp32", "float"), "HALF": ("fp16", "half")}
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
    """Check the output type of every convolution in the inspector's JSON.

    Returns:
        `engine` or `network`, as `audit_engine` does.

    Raises:
        EngineBuildError: A convolution has the wrong type.
    """
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        return "network"
    expected = _INSPECTOR_NAMES[_OUTPUT_TYPES[precision]]
    audited = 0
    for layer in (entry for entry in layers if isinstance(entry, dict)):
        if FILTER_BANK in str(layer.get("Name")):
            continue
        if "conv" not in f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower():
            continue
        for output in layer.get("Outputs", []):
            datatype = str(output.get("Format/Datatype", ""))
            audited += 1
            if not any(name in datatype.lower() for name in expected):
                raise EngineBuildError(f"{layer.get('Name')} outputs {datatype}, not {precision}: the builder chose another precision.")
    return "engine" if audited else "network"
