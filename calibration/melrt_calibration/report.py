"""The report of a calibration: one HTML file that opens offline, with images and audio inside, and its figures as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from melrt import __version__
from melrt.files.audio import write_wav
from melrt.types import FloatAudio
from melrt_calibration.calibrate import CalibrationOptions, CalibrationResult
from melrt_calibration.evaluation import Evaluator
from melrt_calibration.metrics import QUIET_CELL, SignalMetrics
from melrt_calibration.plots import band_errors, pareto, sensitivity_bars, spectrograms
from melrt_calibration.search import pareto_front
from melrt_export.quality import perceptual_metrics

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
.scroll{overflow-x:auto;margin:1rem 0;background:linear-gradient(to right,#fff,#fff0) 0 0/2rem 100% no-repeat local,
linear-gradient(to left,#fff,#fff0) 100% 0/2rem 100% no-repeat local,linear-gradient(to left,#0003,#0000) 100% 0/1rem 100% no-repeat scroll}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
td,th{padding:.2rem .7rem;border-bottom:1px solid #eee;text-align:right}td{white-space:nowrap}td:first-child,th:first-child{text-align:left}
img{max-width:100%}.verdict{padding:.7rem 1rem;background:#eef4fb;border-left:4px solid #3477b5}.no{background:#fbeeee;border-color:#b53434}
audio{height:2rem;width:18rem;max-width:100%}pre{overflow-x:auto}
"""

METRIC_TITLES = {
    "snr_db": "SNR, dB", "si_snr_db": "SI-SNR, dB", "stft_distance": "STFT distance", "lsd_db": "LSD, dB", "stoi": "STOI", "pesq": "PESQ",
}  # fmt: skip


def figures_json(result: CalibrationResult, options: CalibrationOptions) -> str:
    """Return everything that was measured as JSON."""
    reference, fp32 = result.reference, result.evaluated["fp32"]
    values = {
        "melrt": __version__,
        "verdict": result.verdict,
        "written": result.written,
        "settings": asdict(options),
        "data": {"seconds": round(result.data.seconds, 1), "windows": result.data.kinds, "held_out": [p.name for p in result.data.held_out],
                 "evaluated_on": [p.name for p in result.evaluator.pieces]},
        "evaluated": {name: asdict(q) | {"above_fp32": q.error_increase(fp32), "interval": q.increase_interval(fp32)}
                      for name, q in result.evaluated.items()},
        "signal": _signal_metrics(_audio(result), result.evaluator.spec.sample_rate),
        "speedup_one_window_one_thread": result.speedup,
        "equalization": result.powers,
        "repairs": [asdict(repair) for repair in result.repairs],
        "layers": [asdict(layer) | {"cost": layer.alone.error_increase(reference), "quiet_share": layer.alone.quiet_share(reference),
                                    "int8": layer.name in result.chosen.names}
                   for layer in result.layers],
        "pareto": [asdict(one) | {"above_fp32": one.quality.error_increase(reference)} for one in pareto_front(result.sets)],
        "chosen": asdict(result.chosen),
    }  # fmt: skip
    return json.dumps(_plain(values), indent=1, allow_nan=False) + "\n"


def report_html(result: CalibrationResult, options: CalibrationOptions, voice: str) -> str:
    """Return the HTML of the report."""
    body = "".join(_sections(result, options))
    title = html.escape(f"INT8 calibration of {voice}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )


def _sections(result: CalibrationResult, options: CalibrationOptions) -> Iterator[str]:
    spec, audio = result.evaluator.spec, _audio(result)
    kind = "verdict" if result.verdict.startswith("INT8 pays") else "verdict no"
    written = "INT8 was written to the bundle." if result.written else "Nothing was written."
    layers = f"{len(result.chosen.names)} of {len(result.layers)} convolutions are in INT8."
    yield f'<p class="{kind}"><b>{html.escape(result.verdict)}</b><br>{written} {layers}</p>'
    yield "<h2>Quality on the evaluation speech</h2>" + _quality_table(result)
    yield _signal_table(_signal_metrics(audio, spec.sample_rate))
    yield "<h2>Audio of the first piece</h2>" + "".join(_players(audio, spec.sample_rate))
    yield "<h2>Spectrograms of the first piece</h2>" + _image(spectrograms([audio["fp32"], audio["int8"]], spec))
    yield "<h2>Quality against time</h2><p>Each point is one set of layers, timed for one window on one thread.</p>"
    yield _image(pareto(result))
    yield "<h2>Sensitivity of each convolution</h2><p>Left: increase of the log-mel error over FP32 with only this convolution in INT8 "
    yield "(logarithmic; the red line is the budget). Right: how many percentage points of that increase disappear when all convolutions "
    yield f"are in INT8 (+{100 * result.all_int8.error_increase(result.reference):z.1f} %) and only this one returns to float. "
    yield "Blue convolutions were chosen for INT8.</p>" + _image(sensitivity_bars(result, options.budget.log_mel))
    yield "<h2>Where the error falls</h2><p>Error that each convolution adds alone in INT8, by mel band. Of the error of the chosen set, "
    yield f"{_percent(result.chosen.quality.quiet_share(result.reference))} is in quiet cells of the recordings, below {QUIET_CELL:g} in "
    yield f"log10 of magnitude; with all convolutions in INT8 it is {_percent(result.all_int8.quiet_share(result.reference))}.</p>"
    yield _image(band_errors(result))
    yield "<h2>Repairs</h2>" + _repair_table(result)
    yield "<h2>Convolutions</h2>" + _layer_table(result)
    settings = html.escape(json.dumps(_plain(asdict(options)), indent=1))
    windows = ", ".join(f"{count} {kind}" for kind, count in result.data.kinds.items())
    yield f"<h2>Data and settings</h2><p>{result.data.seconds:.0f} s of speech. Observed windows: {windows}. Held out: "
    yield f"{len(result.data.held_out)} pieces. Final evaluation: {len(result.evaluator.pieces)} pieces.</p><pre>{settings}</pre>"


def _quality_table(result: CalibrationResult) -> str:
    fp32 = result.evaluated["fp32"]
    rows = [
        (name, f"{q.log_mel_error:.4f}", f"{100 * q.error_increase(fp32):+z.2f} %",
         " to ".join(f"{100 * end:+z.2f} %" for end in q.increase_interval(fp32)), f"{q.silence_db:z.1f}")
        for name, q in result.evaluated.items()
    ]  # fmt: skip
    return _table(("graph", "log-mel error", "above FP32", "95 % interval over recordings", "median silent frame, dB"), rows)


def _signal_table(signal: Mapping[str, Mapping[str, float]]) -> str:
    names = [name for name in METRIC_TITLES if all(name in values for values in signal.values())]
    rows = [(graph, *(f"{values[name]:z.3g}" for name in names)) for graph, values in signal.items()]
    return _table(("against FP32, first piece", *(METRIC_TITLES[name] for name in names)), rows)


def _repair_table(result: CalibrationResult) -> str:
    rows = [
        (r.name, f"{r.chosen.log_mel_error:.4f}", f"{100 * r.chosen.error_increase(result.reference):+z.2f} %",
         f"{r.all_layers.log_mel_error:.4f}", f"{100 * r.all_layers.error_increase(result.reference):+z.0f} %")
        for r in result.repairs
    ]  # fmt: skip
    return _table(("after", "chosen layers", "above FP32", "all layers", "above FP32"), rows)


def _layer_table(result: CalibrationResult) -> str:
    rows = [
        (row.name, f"{100 * row.alone.error_increase(result.reference):+z.2f} %",
         _percent(row.alone.quiet_share(result.reference)),
         f"{100 * row.leave_one_out.error_increase(result.reference):+z.1f} %", row.method, f"{1e6 * row.float_seconds:.0f}",
         f"{1e6 * row.int8_seconds:.0f}", "yes" if row.name in result.chosen.names else "")
        for row in result.layers
    ]  # fmt: skip
    return _table(
        ("convolution", "alone in INT8", "of it in quiet cells", "alone in float", "ranges", "float, µs", "INT8, µs", "chosen"), rows
    )


def _audio(result: CalibrationResult) -> dict[str, FloatAudio]:
    """Synthesize the first evaluation piece with each evaluated graph, (N,) each."""
    evaluator = Evaluator(result.evaluator.pieces[:1], result.evaluator.spec)
    models = {"fp32": result.network.model(()), "int8": result.network.model(result.chosen.names)}
    if "int8-fp16" in result.evaluated:
        models["int8-fp16"] = result.network.model(result.chosen.names, form="tensorrt")
    return {name: evaluator.audio(model)[0] for name, model in models.items()}


def _signal_metrics(audio: Mapping[str, FloatAudio], sample_rate: int) -> dict[str, dict[str, float]]:
    """Compare each INT8 graph with FP32, with every metric that is installed."""
    fp32 = audio["fp32"]
    return {
        name: asdict(SignalMetrics.between(fp32, one)) | perceptual_metrics(fp32, one, sample_rate)
        for name, one in audio.items()
        if name != "fp32"
    }


def _players(audio: Mapping[str, FloatAudio], sample_rate: int) -> Iterator[str]:
    fp32, int8 = audio["fp32"], audio["int8"]
    for name, one in (("FP32", fp32), ("INT8", int8), ("difference, 20 dB louder", np.clip(10 * (int8 - fp32), -1, 1))):
        data = base64.b64encode(_wav(one, sample_rate)).decode()
        yield f'<p><audio controls src="data:audio/wav;base64,{data}"></audio> {name}</p>'


def _wav(audio: FloatAudio, sample_rate: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio.wav"
        write_wav(path, audio, sample_rate)
        return path.read_bytes()


def _image(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{cells}</table></div>'


def _percent(share: float) -> str:
    """Return a share as text; a dash if there is no error to share."""
    return f"{100 * share:.0f} %" if np.isfinite(share) else "-"


def _plain(value: Any) -> Any:
    """Return plain JSON values; JSON has no NaN, so a value that was not measured becomes null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
