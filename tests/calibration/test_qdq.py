"""The merged INT8 form: sums in the accumulator, and bytes between quantized layers."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest

from melrt.backends.kernel_profile import profile_kernels
from melrt.bundle import Bundle
from melrt_calibration.network import Network
from melrt_export.parity import probe_mel


@pytest.fixture
def network(tiny_bundle: Bundle) -> Network:
    graphs = {
        (graph, "cpu"): onnx.load_from_string(tiny_bundle.read(tiny_bundle.find("onnx", graph=graph, precision="fp32")[0]))
        for graph in ("edge", "interior")
    }
    plain = Network.observed(graphs, [probe_mel(tiny_bundle.manifest.spec, 64)])  # type: ignore[arg-type]
    return plain.equalized({t.consumers[0]: 0.5 for t in plain.shared_tensors})


@pytest.mark.parametrize("graph", ["edge", "interior"])
def test_tensors_between_quantized_layers_stay_in_bytes(network: Network, graph: str, tiny_bundle: Bundle) -> None:
    model = network.model(network.names, graph)  # type: ignore[arg-type]
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Add"] == 0, "residual sums are in the accumulator"
    for node in model.graph.node:
        if node.op_type in ("Pad", "Transpose", "Concat", "Slice"):
            assert all(name.endswith(".bytes") for name in node.input if name not in {t.name for t in model.graph.initializer}), node.name
    assert kinds["QuantizeLinear"] == 2 * len(network.names), "of [h; x], only h is rounded again, after its LeakyReLU"
    kernels = Counter(
        kernel.kind for kernel in profile_kernels(model.SerializeToString(), probe_mel(tiny_bundle.manifest.spec, 64)[None], 1)
    )
    assert kernels["QLinearConv"] == len(network.names)
    assert not kernels["Conv"] + kernels["LeakyRelu"] + kernels["FusedConv"], "ONNX Runtime computes all of them in bytes"


def test_a_float_block_between_quantized_ones_keeps_its_two_convolutions(network: Network) -> None:
    names = [name for name in network.names if name != "stages.1.blocks.1.merged"]
    nodes = {node.name: node.op_type for node in network.model(names).graph.node}
    assert nodes["stages.1.blocks.1.add"] == "Add"
    assert sum(kind == "Concat" for kind in nodes.values()) == len(network.plan.merged_blocks) - 1
    assert network.selected(names).names == tuple(names)
