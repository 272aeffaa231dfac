"""Does an engine compute in the precision that was asked for? A build that quietly fell back to float32 is an error."""

from __future__ import annotations

import json
from typing import Any

from melrt.errors import EngineBuildError

# INT8 convolutions give half precision to what follows them.
_WANTED = {"fp32": "FLOAT", "tf32": "FLOAT", "fp16": "HALF", "int8": "HALF"}
# How the inspector's "Format/Datatype" names a type, by the builder's name of it.
_INSPECTED = {"FLOAT": ("fp32", "float"), "HALF": ("fp16", "half")}


# The filter bank of a multi-band voice stays in float32 in every precision, like the tanh before it.
FILTER_BANK = "pqmf"


def audit_network(trt: Any, network: Any, precision: str) -> None:
    """Check the parsed network: every convolution gives the wanted type, input and output are float32.

    Raises:
        EngineBuildError: One does not; the layer is named.
    """
    wanted = getattr(trt.DataType, _WANTED[precision])
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    convolutions = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in kinds and FILTER_BANK not in layer.name:
            convolutions += 1
            if layer.get_output(0).dtype != wanted:
                raise EngineBuildError(
                    f"{layer.name} computes {layer.get_output(0).dtype}, not {precision}: the graph is not what it says."
                )
    if not convolutions:
        raise EngineBuildError("the parsed network has no convolution: the graph is not a generator.")
    quantized = [network.get_layer(i) for i in range(network.num_layers) if network.get_layer(i).type == trt.LayerType.QUANTIZE]
    if (precision == "int8") != bool(quantized):
        raise EngineBuildError(f"the parsed network has {len(quantized)} quantizing layers: it is not {precision}.")
    for tensor in (network.get_input(0), network.get_output(0)):
        if tensor.dtype != trt.DataType.FLOAT:
            raise EngineBuildError(f"{tensor.name} is {tensor.dtype}; input and output are float32 in every precision.")


def audit_engine(trt: Any, plan: bytes, precision: str) -> str:
    """Check the built engine with the inspector, on the GPU that it is for.

    Returns:
        `engine` if the inspector named types; `network` if this flavor's inspector does not.

    Raises:
        EngineBuildError: The plan cannot be opened, or a convolution has another type than the one asked for.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError("the engine that was built cannot be opened on this GPU.")
    inspector = engine.create_engine_inspector()
    return audit_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON), precision)


def audit_layers(information: str, precision: str) -> str:
    """Read the inspector's JSON: every layer named after a convolution gives the wanted type.

    Returns:
        As `audit_engine`.

    Raises:
        EngineBuildError: A convolution with another type.
    """
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        return "network"
    names = _INSPECTED[_WANTED[precision]]
    seen = 0
    for layer in (entry for entry in layers if isinstance(entry, dict)):
        if FILTER_BANK in str(layer.get("Name")):
            continue
        if "conv" not in f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower():
            continue
        for output in layer.get("Outputs", []):
            datatype = str(output.get("Format/Datatype", ""))
            seen += 1
            if not any(name in datatype.lower() for name in names):
                raise EngineBuildError(f"{layer.get('Name')} gives {datatype}, not {precision}: the builder fell back.")
    return "engine" if seen else "network"
