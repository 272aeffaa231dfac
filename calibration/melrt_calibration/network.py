"""The network during calibration: its float graphs, the statistics of its layers, and INT8 graphs for any set of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from melrt.errors import CalibrationError
from melrt.planning.windows import GraphKind
from melrt.types import Mel
from melrt_calibration.equalization import (
    FILTER_BANK,
    SharedTensor,
    equalize_graph,
    equalizing_factors,
    layer_factors,
    planned_factors,
    shared_tensors,
)
from melrt_calibration.qdq import Form, Repairs, insert_qdq
from melrt_calibration.ranges import METHODS, weight_scales
from melrt_calibration.statistics import Statistics, observe
from melrt_export.graph.rewrites import merge_shortcuts
from melrt_export.int8_plan import MERGED, SIGNED_MAX, Int8Plan, LayerPlan

GraphKey = tuple[GraphKind, Form]
"""Kind of a graph, and the form of its INT8."""


@dataclass(frozen=True, slots=True)
class Network:
    """Float graphs of one function, and a plan for all their layers."""

    graphs: Mapping[GraphKey, onnx.ModelProto]
    """Float graphs of the bundle: float32 for `cpu`, and float16 for `tensorrt` if the bundle has them."""
    statistics: Mapping[str, Statistics]
    """Statistics of the float32 edge graph with merged residual blocks, by layer."""
    plan: Int8Plan
    """Plan with every layer in INT8."""
    windows: Sequence[Mel]
    """Observed windows, (M, T) each."""
    repairs: Repairs = field(default_factory=Repairs)
    """Corrections that INT8 graphs receive."""

    @classmethod
    def observed(
        cls,
        graphs: Mapping[GraphKey, onnx.ModelProto],
        windows: Sequence[Mel],
        on_window: Callable[[], None] = lambda: None,
    ) -> Network:
        """Run windows through the float32 edge graph and plan every layer from its statistics."""
        edge = merge_shortcuts(graphs["edge", "cpu"])
        statistics = {name: value for name, value in observe(edge, windows, on_window).items() if name != FILTER_BANK}
        return cls(graphs, statistics, _plan_layers(edge, statistics, "mse"), windows)

    def with_ranges(self, method: str) -> Network:
        """Return the network with the ranges that another method takes from the same statistics."""
        return replace(self, plan=_plan_layers(merge_shortcuts(self.graphs["edge", "cpu"]), self.statistics, method))

    @classmethod
    def planned(cls, graphs: Mapping[GraphKey, onnx.ModelProto], plan: Int8Plan) -> Network:
        """Apply a plan to other weights: ranges and equalization are the plan's, weight scales are computed from the weights.

        Raises:
            CalibrationError: The plan is not for this network.
        """
        factors = planned_factors(plan, (node.name for node in graphs["edge", "cpu"].graph.node if node.op_type == "Conv"))
        graphs = {key: equalize_graph(graph, factors) for key, graph in graphs.items()}
        edge = merge_shortcuts(graphs["edge", "cpu"])
        layers = (replace(layer, weight_scales=_largest_weight_scales(edge, layer.name)) for layer in plan.layers)
        return cls(graphs, {}, Int8Plan(tuple(layers), tuple(name for name in plan.repairs if name == "equalization")), ())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all convolutions that can be in INT8."""
        return self.plan.names

    @property
    def shared_tensors(self) -> list[SharedTensor]:
        """Tensors whose channels can be equalized."""
        return shared_tensors([node.name for node in self.graphs["edge", "cpu"].graph.node if node.op_type == "Conv"])

    def equalized(self, powers: Mapping[str, float], on_window: Callable[[], None] = lambda: None) -> Network:
        """Return the same function with equalized channels, with its statistics collected again."""
        factors = equalizing_factors(self.statistics, powers)
        graphs = {key: equalize_graph(graph, factors) for key, graph in self.graphs.items()}
        network = Network.observed(graphs, self.windows, on_window=on_window)
        layers = (
            replace(layer, input_factors=inputs, output_factors=outputs)
            for layer in network.plan.layers
            for inputs, outputs in [layer_factors(layer.name, factors)]
        )
        return replace(network, plan=Int8Plan(tuple(layers)))

    def selected(self, names: Iterable[str]) -> Int8Plan:
        """Return the plan of these layers, in which every tensor between two of them has one grid."""
        plan = self.plan.only(frozenset(names))
        grids = {name: layer.input for layer in plan.layers if layer.name.endswith(MERGED) for name in _producers(layer.name)}
        return replace(plan, layers=tuple(replace(layer, output=grids.get(layer.name, layer.output)) for layer in plan.layers))

    def model(self, names: Iterable[str], graph: GraphKind = "edge", form: Form = "cpu") -> onnx.ModelProto:
        """Return a graph with these layers in INT8; with no layers it is the float graph."""
        return insert_qdq(self.graphs[graph, form], self.selected(names), form, self.repairs)


def weight_of(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    """Return a convolution's weight (C_out, C_in, 1, K).

    Raises:
        CalibrationError: The graph has no such convolution.
    """
    node = next((n for n in model.graph.node if n.name == name and n.op_type == "Conv"), None)
    if node is None:
        raise CalibrationError(f"The plan quantizes {name}, but this voice has no convolution of that name; calibrate the voice again.")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    return numpy_helper.to_array(tensor).astype(np.float32)


def _producers(merged: str) -> tuple[str, str]:
    """Return the layers that make the h and the x of a merged convolution's [h; x].

    With one grid, x is rounded once, and the positive values of h are rounded once: LeakyReLU does not change them. For stages 0 to 2 of
    a trained voice, the log-mel error is 12.8 % above FP32's; it is 14.0 % with a grid of its own for h before LeakyReLU.
    """
    stage, _, block = merged.removesuffix(MERGED).rpartition(".blocks.")
    x = f"{stage}.blocks.{int(block) - 1}{MERGED}" if int(block) else f"{stage}.upsample"
    return f"{stage}.blocks.{block}.dilated", x


def _plan_layers(edge: onnx.ModelProto, statistics: Mapping[str, Statistics], method: str) -> Int8Plan:
    choose = METHODS[method]
    layers = []
    for name, layer in statistics.items():
        scales = tuple(float(s) for s in weight_scales(weight_of(edge, name)))
        layers.append(LayerPlan(name, choose(layer.input), choose(layer.output), scales))
    return Int8Plan(tuple(layers))


def _largest_weight_scales(edge: onnx.ModelProto, name: str) -> tuple[float, ...]:
    """Return the scales of a training in INT8: the largest weight of each output channel becomes the largest byte."""
    rows = np.abs(weight_of(edge, name).astype(np.float64))
    return tuple(float(scale) for scale in rows.reshape(len(rows), -1).max(axis=1).clip(1e-8) / SIGNED_MAX)
