"""Plots of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from melrt.mel.features import mel_from_audio
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio
from melrt_calibration.search import LayerSet, pareto_front

if TYPE_CHECKING:
    from melrt_calibration.calibrate import CalibrationResult

BLUE, GRAY, RED = "#3477b5", "#b8bec6", "#c0504d"
# Width in inches and sizes in points: at 420 px, the width of a phone, text of 12 points is 10 px high.
WIDTH = 6.4
FONT_SIZE = 12
TICK_SIZE = 10
SIZES: Any = {"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE, "xtick.labelsize": TICK_SIZE, "ytick.labelsize": TICK_SIZE}


@mpl.rc_context(SIZES)
def sensitivity_bars(result: CalibrationResult, budget: float) -> Any:
    """Draw the error that each convolution adds alone in INT8, and the error that it removes alone in float."""
    reference, all_int8 = result.reference, result.all_int8.error_increase(result.reference)
    figure, (left, right) = _figure(1.2 + 0.2 * len(result.layers), 1, 2, sharey=True)
    names = [row.name for row in result.layers]
    colors = [BLUE if name in result.chosen.names else GRAY for name in names]
    left.barh(names, [100 * max(row.alone.error_increase(reference), 1e-6) for row in result.layers], color=colors)
    left.set(xlabel="error added\nalone in INT8, %", xscale="log", xlim=(0.005, None))
    left.axvline(100 * budget, color=RED, linewidth=0.8)
    right.barh(names, [100 * (all_int8 - row.leave_one_out.error_increase(reference)) for row in result.layers], color=colors)
    right.set(xlabel="error removed\nalone in float, % points")
    right.axvline(0, color=GRAY, linewidth=0.8)
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=TICK_SIZE - 1)
    return figure


@mpl.rc_context(SIZES)
def band_errors(result: CalibrationResult) -> Any:
    """Draw how much error each convolution, alone in INT8, adds in each mel band."""
    reference = result.reference
    added = np.array([np.subtract(row.alone.bands, reference.bands) for row in result.layers]) / reference.log_mel_error
    figure, axis = _figure(1.2 + 0.2 * len(result.layers))
    limit = float(max(np.quantile(np.abs(added), 0.98), 1e-9))
    image = axis.imshow(100 * added, aspect="auto", cmap="RdBu_r", vmin=-100 * limit, vmax=100 * limit, interpolation="nearest")
    axis.set_yticks(range(len(result.layers)), [row.name for row in result.layers], fontsize=TICK_SIZE - 1)
    axis.set_xlabel("mel band")
    figure.colorbar(image, ax=axis, label="error added in the band, % of FP32's mean error", location="bottom")
    return figure


@mpl.rc_context(SIZES)
def pareto(result: CalibrationResult) -> Any:
    """Draw every measured set of layers, and the sets that no other beats."""
    figure, axis = _figure(4.6)
    front = pareto_front(result.sets)

    def points(sets: Sequence[LayerSet]) -> tuple[list[float], list[float]]:
        base = result.sets[0].seconds
        return [base / one.seconds for one in sets], [100 * one.quality.error_increase(result.reference) for one in sets]

    axis.scatter(*points(result.sets), s=14, color=GRAY, label="measured sets")
    axis.plot(*points(front), "o-", color=BLUE, markersize=4, label="Pareto front")
    axis.scatter(*points([result.chosen]), color=RED, zorder=3, label="chosen")
    axis.set(xlabel="times FP32's speed", ylabel="log-mel error above FP32, %", yscale="symlog")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=FONT_SIZE)
    return figure


@mpl.rc_context(SIZES)
def spectrograms(audio: Sequence[FloatAudio], spec: MelSpec) -> Any:
    """Draw the log-mels of FP32 and INT8, and their difference in the convention's unit."""
    fp32, int8 = (mel_from_audio(one, spec) for one in audio)
    figure, axes = _figure(6.5, 3, 1, sharex=True)
    low, high = float(fp32.min()), float(fp32.max())
    for axis, mel, title in zip(axes, (fp32, int8), ("FP32", "INT8"), strict=False):
        image = axis.imshow(mel, aspect="auto", origin="lower", cmap="magma", vmin=low, vmax=high)
        axis.set_title(title, loc="left")
        figure.colorbar(image, ax=axis)
    image = axes[2].imshow(int8 - fp32, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    figure.colorbar(image, ax=axes[2])
    axes[2].set_title("INT8 - FP32", loc="left")
    axes[2].set(xlabel="frame", ylabel="mel band")
    return figure


def _figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
