"""Ranges of activations from histograms, with four methods, and scales of weights. Each layer takes the method that measures best.

- min-max: clips nothing.
- percentile: clips 1 in 100,000 values (Wu et al. 2020, "Integer Quantization for Deep Learning Inference", 4.2: 99.999 %).
- entropy: minimizes the Kullback-Leibler divergence of the quantized histogram over shares of the range (Migacz 2017, "8-bit Inference
  with TensorRT"). Values outside a range count in its outermost bins, in the reference alone, so that clipping has a price.
- mean-squared error: minimizes the squared error of rounding and clipping together, over clipped shares of the range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from melrt_calibration.statistics import Histogram
from melrt_export.int8_plan import SIGNED_MAX, UNSIGNED_MAX, Range

PERCENTILE = 99.999
# Shares of the full range that are tried.
SHARES = np.linspace(1.0, 0.3, 36)


def minmax(histogram: Histogram) -> Range:
    """Return the range of all observed values."""
    return _range(histogram.low, histogram.high, "minmax")


def percentile(histogram: Histogram) -> Range:
    """Return the range without the outermost values on each side."""
    cumulated: NDArray[np.float64] = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (100 - PERCENTILE) / 100
    edges = np.append(histogram.centers - histogram.width / 2, histogram.centers[-1] + histogram.width / 2)
    first, last = int(np.searchsorted(cumulated, tail)), min(int(np.searchsorted(cumulated, 1 - tail)) + 1, len(edges) - 1)
    return _range(max(float(edges[first]), histogram.low), min(float(edges[last]), histogram.high), "percentile")


def mse(histogram: Histogram) -> Range:
    """Return the range with the least squared error; each end is clipped separately."""
    low = min(SHARES, key=lambda share: rounding_error(histogram, _range(share * histogram.low, histogram.high, "mse")))
    high = min(SHARES, key=lambda share: rounding_error(histogram, _range(low * histogram.low, share * histogram.high, "mse")))
    return _range(low * histogram.low, high * histogram.high, "mse")


def entropy(histogram: Histogram) -> Range:
    """Return the range with the least loss of information; both ends are clipped by the same share."""
    share = min(SHARES, key=lambda share: _divergence(histogram, _range(share * histogram.low, share * histogram.high, "entropy")))
    return _range(share * histogram.low, share * histogram.high, "entropy")


METHODS: dict[str, Callable[[Histogram], Range]] = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}


def rounding_error(histogram: Histogram, chosen: Range) -> float:
    """Return the mean squared error that rounding to this range causes on the observed values."""
    scale, zero = chosen.affine
    quantized = np.clip(np.rint(histogram.centers / scale) + zero, 0, UNSIGNED_MAX)
    # The error is taken at the centers of the bins. It includes the rounding noise only because bins are narrower than a step.
    error = (quantized - zero) * scale - histogram.centers
    return float((histogram.counts * error**2).sum() / histogram.counts.sum())


def _divergence(histogram: Histogram, chosen: Range) -> float:
    """Return the Kullback-Leibler divergence of the clipped histogram from its quantized form."""
    scale, zero = chosen.affine
    index = np.clip(np.rint(histogram.centers / scale) + zero, 0, UNSIGNED_MAX).astype(np.int64)
    inside = np.flatnonzero((histogram.centers >= chosen.low) & (histogram.centers <= chosen.high))
    if not len(inside):
        return float("inf")
    first, last = inside[0], inside[-1]
    counts, index = histogram.counts[first : last + 1].astype(np.float64), index[first : last + 1]
    seen = counts > 0
    per_byte = np.bincount(index, weights=counts, minlength=UNSIGNED_MAX + 1)
    bins = np.bincount(index, weights=seen, minlength=UNSIGNED_MAX + 1)
    q = np.where(seen, (per_byte / np.maximum(bins, 1))[index], 0.0)
    p = counts.copy()
    p[0] += histogram.counts[:first].sum()
    p[-1] += histogram.counts[last + 1 :].sum()
    p, q, filled = p / p.sum(), q / max(q.sum(), 1e-300), p > 0
    return float((p[filled] * np.log(p[filled] / np.maximum(q[filled], 1e-12))).sum())


def weight_scales(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return a scale for each output channel, (C_out,): the clipped share of its largest weight with the least squared error."""
    rows = np.asarray(weight, np.float64).reshape(len(weight), -1)
    largest = np.maximum(np.abs(rows).max(axis=1), 1e-8)
    best, least = largest / SIGNED_MAX, np.full(len(rows), np.inf)
    for share in SHARES:
        scales = share * largest / SIGNED_MAX
        error = ((np.clip(np.rint(rows / scales[:, None]), -SIGNED_MAX, SIGNED_MAX) * scales[:, None] - rows) ** 2).sum(axis=1)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return np.asarray(best)


def _range(low: float, high: float, method: str) -> Range:
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    return Range(low, high if high - low > 1e-8 else low + 1e-8, method)
