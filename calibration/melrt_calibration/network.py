"""A voice's network while it is being calibrated: its graphs, what flows through them, and INT8 graphs of any set of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from melrt.errors import CalibrationError
from melrt.planning.windows import GraphKind
from melrt_calibration.equalization import FILTER_BANK, equalized, equalizing_factors, planned_factors
from melrt_calibration.qdq import Form, Repairs, quantized
from melrt_calibration.ranges import METHODS, weight_scales
from melrt_calibration.statistics import Statistics, observe
from melrt_export.int8_plan import SIGNED_MAX, LayerPlan, Plan


@dataclass(frozen=True, slots=True)
class Network:
    """Float graphs of one function, and the plan of all their layers."""

    graphs: Mapping[tuple[GraphKind, Form], onnx.ModelProto]
    """The bundle's graphs in float: float32 for `cpu`, float16 for `tensorrt`, which may be lacking."""
    statistics: Mapping[str, Statistics]
    """Of the float32 edge graph."""
    plan: Plan
    """Every layer, were it in INT8."""
    windows: Sequence[NDArray[np.float32]]
    """What was observed, (M, T) each."""
    repairs: Repairs = field(default_factory=Repairs)

    @classmethod
    def observed(
        cls,
        graphs: Mapping[tuple[GraphKind, Form], onnx.ModelProto],
        windows: Sequence[NDArray[np.float32]],
        method: str = "mse",
        on_step: Callable[[], None] = lambda: None,
    ) -> Network:
        """Watch windows flow through the float32 edge graph and plan every layer."""
        edge = graphs["edge", "cpu"]
        statistics = {k: v for k, v in observe(edge, windows, on_step).items() if k != FILTER_BANK}
        return cls(graphs, statistics, _plan(edge, statistics, method), windows)

    @classmethod
    def planned(cls, graphs: Mapping[tuple[GraphKind, Form], onnx.ModelProto], plan: Plan) -> Network:
        """Other weights for a plan: they take its ranges and its equalization as they are, and have scales of their own.

        Raises:
            CalibrationError: The plan is not for this network.
        """
        factors = planned_factors(plan, (node.name for node in graphs["edge", "cpu"].graph.node if node.op_type == "Conv"))
        graphs = {key: equalized(graph, factors) for key, graph in graphs.items()}
        layers = (replace(layer, weight_scales=_scales_of_the_largest(graphs["edge", "cpu"], layer.name)) for layer in plan.layers)
        return cls(graphs, {}, Plan(tuple(layers), tuple(name for name in plan.repairs if name == "equalization")), ())

    @property
    def names(self) -> tuple[str, ...]:
        """Every convolution that could be in INT8."""
        return self.plan.names

    def equalized(self, powers: Mapping[str, float], method: str = "mse", on_step: Callable[[], None] = lambda: None) -> Network:
        """The same function with its channels' ranges brought closer, observed anew."""
        factors = equalizing_factors(self.statistics, powers)
        graphs = {key: equalized(graph, factors) for key, graph in self.graphs.items()}
        network = Network.observed(graphs, self.windows, method, on_step)
        layers = (
            replace(layer, input_factors=_told(factors[layer.name].input), output_factors=_told(factors[layer.name].output))
            for layer in network.plan.layers
        )
        return replace(network, plan=Plan(tuple(layers)))

    def model(self, names: Iterable[str], graph: GraphKind = "edge", form: Form = "cpu") -> onnx.ModelProto:
        """A graph with these layers in INT8; without any it is the float graph."""
        return quantized(self.graphs[graph, form], self.plan.only(frozenset(names)), form, self.repairs)


def _told(factors: NDArray[np.float64] | None) -> tuple[float, ...]:
    return () if factors is None else tuple(map(float, factors))


def _scales_of_the_largest(edge: onnx.ModelProto, name: str) -> tuple[float, ...]:
    """As a training in INT8 rounds weights: each output channel's largest is the largest byte."""
    rows = np.abs(weight_of(edge, name).astype(np.float64))
    return tuple(float(scale) for scale in rows.reshape(len(rows), -1).max(axis=1).clip(1e-8) / SIGNED_MAX)


def weight_of(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    """A convolution's weight (C_out, C_in, 1, K).

    Raises:
        CalibrationError: The graph has no such convolution.
    """
    node = next((n for n in model.graph.node if n.name == name and n.op_type == "Conv"), None)
    if node is None:
        raise CalibrationError(f"the plan quantizes {name}, which is no convolution of this voice; calibrate it anew.")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    return numpy_helper.to_array(tensor).astype(np.float32)


def _plan(edge: onnx.ModelProto, statistics: Mapping[str, Statistics], method: str) -> Plan:
    choose = METHODS[method]
    layers = []
    for name, one in statistics.items():
        scales = tuple(float(s) for s in weight_scales(weight_of(edge, name)))
        layers.append(LayerPlan(name, choose(one.input), choose(one.output), scales))
    return Plan(tuple(layers))
