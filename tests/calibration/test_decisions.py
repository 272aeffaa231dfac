"""The decisions of a calibration: budget, interval, verdict, the search for layers, and the correction of biases."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from melrt import MelSpec
from melrt.bundle import Bundle
from melrt.timing import Timing
from melrt_calibration import repairs, timing
from melrt_calibration.bias_correction import channel_means, correct_biases
from melrt_calibration.equalization import POWERS
from melrt_calibration.evaluation import Budget, Quality, decide
from melrt_calibration.network import Network
from melrt_calibration.progress import ProgressReporter
from melrt_calibration.ranges import mse
from melrt_calibration.repairs import choose_equalization, repair
from melrt_calibration.search import SHARE_USED, LayerSet, search
from melrt_calibration.sensitivity import Sensitivity, measure_sensitivities
from melrt_export.graph.rewrites import merge_shortcuts
from melrt_export.int8_plan import Int8Plan, Range
from melrt_export.parity import probe_mel

FP32 = Quality(0.15, -50.0, (0.1, 0.2))


def worse(error: float, silence: float = 0.0) -> Quality:
    """Return a quality with this relative increase of the error and this increase of silence in dB."""
    return Quality(0.15 * (1 + error), -50.0 + silence, (0.1 * (1 + error), 0.2 * (1 + error)))


def test_a_budget_limits_error_and_silence() -> None:
    budget = Budget(0.02, 1.0)
    assert budget.allows(worse(0.019, 0.9), FP32)
    assert not budget.allows(worse(0.021), FP32)
    assert not budget.allows(worse(0.0, 1.1), FP32)
    assert not budget.allows(worse(0.019), FP32, share=0.9)
    assert not budget.allows(worse(0.0, 0.95), FP32, share=0.9)
    assert budget.allows(replace(worse(0.01), silence_db=float("nan")), FP32), "speech without silence has no limit for it"


@pytest.mark.parametrize(
    ("quality", "speedup", "found", "pays", "text"),
    [
        (worse(0.01), 1.5, True, True, "INT8 pays"),
        (worse(0.03), 1.5, True, False, "exceeds the budget"),
        (worse(0.0, 2.0), 1.5, True, False, "median silent frame +2.0 dB"),
        (worse(0.01), 1.04, True, False, "does not pay on this machine"),
        (worse(0.01), 1.5, False, False, "No set of INT8 layers"),
    ],
)
def test_the_verdict_says_what_decided(quality: Quality, speedup: float, found: bool, pays: bool, text: str) -> None:
    decided, verdict = decide({"fp32": FP32, "int8": quality}, Budget(), speedup, found=found)
    assert decided is pays
    assert text in verdict
    assert "mean log-mel error" in verdict
    assert "95 % interval over 2 recordings" in verdict


def test_the_interval_covers_the_spread_of_recordings() -> None:
    fp32 = Quality(0.1, -50.0, (0.1,) * 8)
    same = Quality(0.102, -50.0, (0.102,) * 8)
    assert same.increase_interval(fp32) == pytest.approx((0.02, 0.02))
    spread = Quality(0.102, -50.0, tuple(0.1 * (1 + x) for x in np.linspace(0, 0.04, 8)))
    low, high = spread.increase_interval(fp32)
    error = 0.04 / np.sqrt(12) / np.sqrt(8)  # standard error of the mean of a uniform spread
    assert low == pytest.approx(0.02 - 2 * error, abs=0.5 * error)
    assert high == pytest.approx(0.02 + 2 * error, abs=0.5 * error)


COSTS = {"cheap": 0.001, "fair": 0.005, "dear": 0.1}


def test_layers_are_added_by_error_per_second_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer adds its own error and halves nothing but its own second; `slow` costs no error and saves no time."""
    names = ("dear", "fair", "slow", "cheap")
    network: Any = SimpleNamespace(names=names, model=lambda names, graph="edge": tuple(names))
    evaluator: Any = SimpleNamespace(quality=lambda model: worse(sum(COSTS.get(name, 0.0) for name in model)))

    def time_graphs(models: dict[str, Iterable[str]], window: object) -> dict[str, Timing]:
        return {key: Timing(np.array([4.0 - 0.5 * len([n for n in model if n in COSTS])])) for key, model in models.items()}

    monkeypatch.setattr(timing, "time_graphs", time_graphs)
    rows = [
        Sensitivity(name, worse(COSTS.get(name, 0.0)), FP32, 1.0, 2.0 if name == "slow" else 0.5, "mse", {})
        for name in names
    ]  # fmt: skip
    steps = ProgressReporter(11, lambda _: None)
    sets, best = search(network, evaluator, Budget(0.02), rows, np.zeros((1, 8, 8), np.float32), steps)
    assert sets[1].names == ("cheap",), "the cheapest layer comes first"
    assert best is not None
    assert set(best.names) == {"cheap", "fair"}
    _, best = search(network, evaluator, Budget(0.005 / SHARE_USED), rows, np.zeros((1, 8, 8), np.float32), steps)
    assert best is not None
    assert set(best.names) == {"fair"} or set(best.names) == {"cheap"}


def test_bias_correction_removes_the_shift_of_every_layer(tiny_bundle: Bundle) -> None:
    """Input ranges that clip shift the means; afterwards each layer's mean is that of the float network."""
    graphs = {("edge", "cpu"): onnx.load_from_string(tiny_bundle.read(tiny_bundle.find("onnx", graph="edge", precision="fp32")[0]))}
    network = Network.observed(graphs, [probe_mel(tiny_bundle.manifest.spec, 64, seed) for seed in range(2)])  # type: ignore[arg-type]
    clipped = (replace(layer, input=Range(0.8 * layer.input.low, 0.6 * layer.input.high, "mse")) for layer in network.plan.layers)
    names = network.names[:8]
    network = replace(network, plan=Int8Plan(tuple(clipped)).only(frozenset(names)))
    names, plan = network.names, network.selected(network.names)
    before, after = (_means(one.model(names), plan) for one in (network, correct_biases(network, names)))
    float_graph = merge_shortcuts(network.graphs["edge", "cpu"], plan.merged_blocks)
    outputs = {node.name: node.output[0] for node in float_graph.graph.node}
    wanted = channel_means(float_graph, [outputs[name] for name in names], network.windows)
    for name, x, y, z in zip(names, before, after, wanted, strict=True):
        assert np.abs(y - z).mean() < 0.1 * np.abs(x - z).mean(), name


def test_a_layer_keeps_the_ranges_with_the_least_error(tiny_bundle: Bundle, noise: np.random.Generator) -> None:
    """On inputs with heavy tails the methods differ; here the error grows with the distance of the input's step from that of `mse`."""
    (edge,) = tiny_bundle.find("onnx", graph="edge", precision="fp32")
    graphs = dict.fromkeys([("edge", "cpu"), ("interior", "cpu")], onnx.load_from_string(tiny_bundle.read(edge)))
    network = Network.observed(graphs, [probe_mel(tiny_bundle.manifest.spec, 64)])  # type: ignore[arg-type]
    layer = network.plan.layers[1]
    network.statistics[layer.name].input.add(noise.standard_t(2, 100_000).astype(np.float32))
    wanted = mse(network.statistics[layer.name].input).affine[0]

    def quality(model: onnx.ModelProto) -> Quality:
        scales = [t for t in model.graph.initializer if t.name == f"{layer.name}.input.scale"]
        return worse(sum(abs(float(onnx.numpy_helper.to_array(scale)) / wanted - 1) for scale in scales))

    evaluator: Any = SimpleNamespace(quality=quality)
    steps = ProgressReporter(1, lambda _: None)
    alone = replace(network, plan=Int8Plan((layer,)))
    tuned, rows, _ = measure_sensitivities(alone, evaluator, network.windows[0][None], steps)
    assert len(rows[0].errors) > 1
    assert rows[0].method == tuned.plan.layers[0].input.method == "mse"
    assert rows[0].alone.log_mel_error == pytest.approx(0.15, rel=1e-5)


def test_repairs_are_kept_by_the_measured_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are scripted: the second power of each stage is best, then the correction is better, and at last it is worse."""
    graphs = {("edge", "cpu"): onnx.load_from_string(tiny_bundle.read(tiny_bundle.find("onnx", graph="edge", precision="fp32")[0]))}
    network = Network.observed(graphs, [probe_mel(tiny_bundle.manifest.spec, 64)])  # type: ignore[arg-type]
    errors: Iterator[float] = itertools.cycle([0.3, 0.1, 0.2])
    evaluator: Any = SimpleNamespace(quality=lambda model: worse(next(errors)))
    steps = ProgressReporter(4, lambda _: None)
    powers = choose_equalization(network, evaluator, steps)
    assert len(POWERS) == 3
    assert {*powers} == {tensor.consumers[0] for tensor in network.shared_tensors}
    assert {*powers.values()} == {POWERS[1]}

    monkeypatch.setattr(repairs, "correct_biases", lambda network, names: network)
    chosen = LayerSet(network.names[:2], worse(0.5))
    for corrected, kept in ((0.1, ("bias correction",)), (0.3, ())):
        errors = iter([0.5, 0.6, 0.4, 0.5, 0.2, 0.3, corrected, 0.4])
        repaired, best, rows = repair(network, network, chosen, evaluator, steps)
        assert repaired.plan.repairs == kept
        assert best.quality == worse(min(0.2, corrected))
        assert [row.all_layers for row in rows] == [worse(error) for error in (0.6, 0.5, 0.3, 0.4)]


def _means(model: onnx.ModelProto, plan: Int8Plan) -> list[np.ndarray]:
    """Return the means of the layers' rounded outputs."""
    rounded = channel_means(model, [f"{name}.output.bytes" for name in plan.names], [probe_mel(MelSpec(), 64, seed) for seed in range(2)])
    grids = (layer.output.affine for layer in plan.layers)
    return [scale * (mean - zero) for mean, (scale, zero) in zip(rounded, grids, strict=True)]
