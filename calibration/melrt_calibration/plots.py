"""The report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from melrt.mel.spec import MelSpec
from melrt_calibration.search import front
from melrt_export.audio_features import mel_from_audio

if TYPE_CHECKING:
    from melrt_calibration.calibrate import Result

BLUE, GREY, RED = "#3477b5", "#b8bec6", "#c0504d"


def sensitivity_bars(result: Result, budget: float) -> Any:
    """What each convolution costs alone, and what leaving it in float gives back when all others are in INT8."""
    reference = result.reference
    figure, (left, right) = _figure(10, 0.6 + 0.2 * len(result.layers), 1, 2, sharey=True)
    names = [row.name for row in result.layers]
    colors = [BLUE if name in result.chosen.names else GREY for name in names]
    left.barh(names, [100 * max(row.alone.above(reference), 1e-6) for row in result.layers], color=colors)
    left.set(xlabel="alone in INT8: log-mel error above FP32, % (log scale)", xscale="log", xlim=(0.005, None))
    left.axvline(100 * budget, color=RED, linewidth=0.8)
    right.barh(names, [100 * row.but_this.above(reference) if row.but_this else 0 for row in result.layers], color=colors)
    right.set(xlabel="all but this in INT8: above FP32, %")
    left.invert_yaxis()
    for axis in (left, right):
        axis.tick_params(axis="y", labelsize=7)
    left.set_title("blue: chosen for INT8", fontsize=9, loc="left")
    return figure


def pareto(result: Result) -> Any:
    """Every measured set of layers, and those that no other beats."""
    figure, axis = _figure(8, 4.2)
    base = result.points[0].seconds
    best = front(result.points)
    axis.scatter(
        [base / p.seconds for p in result.points], [_above(result, p) for p in result.points], s=14, color=GREY, label="measured sets"
    )
    axis.plot([base / p.seconds for p in best], [_above(result, p) for p in best], "o-", color=BLUE, markersize=4, label="Pareto front")
    axis.scatter([base / result.chosen.seconds], [_above(result, result.chosen)], color=RED, zorder=3, label="chosen")
    axis.set(xlabel="times FP32's speed (one window, one thread)", ylabel="log-mel error above FP32, %", yscale="symlog")
    axis.yaxis.set_major_formatter("{x:.2g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def spectrograms(audio: Sequence[NDArray[np.float32]], spec: MelSpec) -> Any:
    """FP32, INT8, and their difference in the convention's unit."""
    float_mel, made = (mel_from_audio(one, spec) for one in audio)
    figure, axes = _figure(10, 6.5, 3, 1, sharex=True)
    low, high = float(float_mel.min()), float(float_mel.max())
    for axis, mel, title in zip(axes, (float_mel, made), ("FP32", "INT8"), strict=False):
        picture = axis.imshow(mel, aspect="auto", origin="lower", cmap="magma", vmin=low, vmax=high)
        axis.set_title(title, fontsize=9, loc="left")
        figure.colorbar(picture, ax=axis)
    picture = axes[2].imshow(made - float_mel, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    figure.colorbar(picture, ax=axes[2])
    axes[2].set_title("INT8 - FP32", fontsize=9, loc="left")
    axes[2].set(xlabel="frame", ylabel="mel band")
    return figure


def _above(result: Result, point: Any) -> float:
    return 100 * float(point.quality.above(result.reference))


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
