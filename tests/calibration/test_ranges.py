"""Statistics, ranges and equalization."""

from __future__ import annotations

import numpy as np
import pytest

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt_calibration.network import Network
from melrt_calibration.ranges import METHODS, rounding_error
from melrt_calibration.statistics import COUNTED, Histogram
from melrt_export.parity import FP32_MAX_ABS, probe_mel


def test_a_histogram_stays_exact_while_values_grow(noise: np.random.Generator) -> None:
    histogram = Histogram()
    pieces = [noise.standard_normal(5000).astype(np.float32) * scale for scale in (0.01, 1, 30)]
    for piece in pieces:
        histogram.add(piece)
    values = np.concatenate(pieces)
    assert histogram.counts.sum() == len(values)
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    mean = (histogram.counts * histogram.centers).sum() / len(values)
    assert mean == pytest.approx(values.mean(), abs=histogram.width)


def test_each_method_minimizes_its_own_measure(noise: np.random.Generator) -> None:
    """On values with heavy tails, clipping a few of them reduces the rounding error of the others."""
    histogram = Histogram()
    histogram.add(noise.standard_t(3, 200_000).astype(np.float32))
    chosen = {name: method(histogram) for name, method in METHODS.items()}
    errors = {name: rounding_error(histogram, one) for name, one in chosen.items()}
    assert (chosen["minmax"].low, chosen["minmax"].high) == (histogram.low, histogram.high)
    assert chosen["percentile"].high < chosen["minmax"].high
    assert errors["mse"] == min(errors.values())
    assert errors["mse"] < 0.8 * errors["minmax"]
    assert chosen["entropy"].high < 0.9 * chosen["minmax"].high, "a few outliers do not decide"
    uniform = Histogram()
    uniform.add(noise.uniform(0, 1, 200_000).astype(np.float32))
    assert METHODS["entropy"](uniform).high > 0.95 * uniform.high, "clipping has a price"


def test_equalization_changes_ranges_but_not_the_output(tiny_bundle: Bundle) -> None:
    graphs = {(graph, "cpu"): _model(tiny_bundle, graph) for graph in ("edge", "interior")}
    mel = probe_mel(tiny_bundle.manifest.spec)
    network = Network.observed(graphs, [mel])
    equal = network.equalized({t.consumers[0]: 1.0 for t in network.shared_tensors})
    for key in graphs:
        before, after = (OnnxModel(g.graphs[key].SerializeToString()).run(mel[None]) for g in (network, equal))
        assert np.abs(after - before).max() < FP32_MAX_ABS
    unequal, equalized = (_spread(one, "stages.1.upsample") for one in (network, equal))
    assert equalized == pytest.approx(1, abs=1e-3)
    assert unequal > 1.2
    h, x = np.split(np.asarray(equal.statistics["stages.1.blocks.0.merged"].peaks), 2)
    assert h.max() == pytest.approx(x.max(), rel=1e-3), "both halves of [h; x] fill one grid"


def _spread(network: Network, name: str) -> float:
    """Return the ratio of the largest to the smallest channel peak of a layer's input."""
    peaks = np.asarray(network.statistics[name].peaks)
    return float(peaks.max() / peaks.min())


def _model(bundle: Bundle, graph: str):
    import onnx

    return onnx.load_from_string(bundle.read(bundle.find("onnx", graph=graph, precision="fp32")[0]))


def test_many_values_are_counted_evenly_with_exact_ends() -> None:
    """Upsampling gives neighboring samples different statistics; an even spacing would count only some of them."""
    values = np.random.default_rng(0).standard_normal((1, 16, 1, 65536)).astype(np.float32)
    values *= np.tile(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32), 8192)
    values[0, 3, 0, 12345], values[0, 4, 0, 54321] = -100, 90
    histogram = Histogram()
    histogram.add(values)
    assert (histogram.low, histogram.high) == (-100, 90)
    counted = histogram.counts.sum()
    assert COUNTED / 2 < counted <= 2 * COUNTED
    small = histogram.counts[np.abs(histogram.centers) < 1].sum() / counted
    assert small == pytest.approx((np.abs(values) < 1).mean(), rel=0.05)
