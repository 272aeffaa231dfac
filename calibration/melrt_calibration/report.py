"""The report: one HTML file that opens offline, with pictures and sound inside, and the same figures as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt import __version__
from melrt.files.wav import write_wav
from melrt_calibration.calibrate import Options, Result
from melrt_calibration.metrics import Measures
from melrt_calibration.perceptual_metrics import heard
from melrt_calibration.plots import pareto, sensitivity_bars, spectrograms
from melrt_calibration.search import front

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}td,th{padding:.2rem .7rem;border-bottom:1px solid #eee;
text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}.verdict{padding:.7rem 1rem;background:#eef4fb;
border-left:4px solid #3477b5}.no{background:#fbeeee;border-color:#b53434}audio{height:2rem;width:18rem}
"""

MEASURES = {
    "snr_db": "SNR dB", "si_snr_db": "SI-SNR dB", "stft_distance": "STFT distance", "lsd_db": "LSD dB", "stoi": "STOI", "pesq": "PESQ",
}  # fmt: skip


def figures(result: Result, options: Options) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values."""
    reference = result.reference
    values: dict[str, Any] = _plain({
        "melrt": __version__,
        "verdict": result.verdict,
        "written": result.written,
        "settings": asdict(options),
        "data": {"seconds": round(result.data.seconds, 1), "windows": result.data.kinds, "held_out": [p.name for p in result.data.held_out],
                 "judged_by": [p.name for p in result.judge.pieces]},
        "judged": {name: asdict(q) | {"above_fp32": q.above(result.judged["fp32"])} for name, q in result.judged.items()},
        "signal": signal_measures(result),
        "speedup_one_window_one_thread": result.speedup,
        "equalization": result.powers,
        "repairs": [asdict(repair) for repair in result.repairs],
        "layers": [asdict(layer) | {"cost": layer.alone.above(reference), "int8": layer.name in result.chosen.names}
                   for layer in result.layers],
        "pareto": [asdict(point) | {"above_fp32": point.quality.above(reference)} for point in front(result.points)],
        "chosen": asdict(result.chosen),
    })  # fmt: skip
    return values


def signal_measures(result: Result) -> dict[str, dict[str, float]]:
    """Of the first judged piece: INT8 against FP32, by every measure that is installed."""
    truth, *others = _audio(result)
    names = [name for name in result.judged if name != "fp32"]
    rate = result.judge.spec.sample_rate
    return {name: asdict(Measures.between(truth, audio)) | heard(truth, audio, rate) for name, audio in zip(names, others, strict=True)}


def page(result: Result, options: Options, voice: str) -> str:
    """The HTML."""
    body = "".join(_sections(result, options, voice))
    title = html.escape(f"INT8 calibration of {voice}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}</html>\n'
    )


def dumps(values: dict[str, Any]) -> str:
    """The JSON."""
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _sections(result: Result, options: Options, voice: str) -> Iterator[str]:
    kind = "verdict" if result.verdict.startswith("INT8 pays") else "verdict no"
    written = "It was written to the bundle." if result.written else "Nothing was written."
    yield f'<p class="{kind}"><b>{html.escape(result.verdict)}</b><br>{written} {len(result.chosen.names)} of {len(result.layers)} '
    yield "convolutions in INT8.</p><h2>Quality on the judged speech</h2>"
    base = result.judged["fp32"]
    rows = [(n, f"{q.log_mel_error:.4f}", f"{100 * q.above(base):+.2f} %", f"{q.silence_db:.1f}") for n, q in result.judged.items()]
    yield _table(("graph", "log-mel error", "above FP32", "silence, dB"), rows)
    signal = signal_measures(result)
    names = [name for name in MEASURES if all(name in values for values in signal.values())]
    rows_of = [(graph, *(f"{values[name]:.3g}" for name in names)) for graph, values in signal.items()]
    yield _table(("against FP32, first piece", *(MEASURES[name] for name in names)), rows_of)
    yield "<h2>OutputFormat</h2>" + "".join(_players(result))
    yield "<h2>Spectrograms</h2>" + _image(spectrograms(_audio(result)[:2], result.judge.spec))
    yield "<h2>Quality against time</h2>" + _image(pareto(result))
    yield "<h2>Each convolution alone in INT8, and in float among INT8</h2>" + _image(sensitivity_bars(result, options.budget.log_mel))
    yield "<h2>Repairs</h2>" + _table(
        ("after", "chosen layers", "above FP32", "all layers", "above FP32"),
        [(r.name, f"{r.chosen.log_mel_error:.4f}", f"{100 * r.chosen.above(result.reference):+.2f} %", f"{r.all_layers.log_mel_error:.4f}",
          f"{100 * r.all_layers.above(result.reference):+.0f} %") for r in result.repairs],
    )  # fmt: skip
    yield "<h2>Layers</h2>" + _layers(result)
    settings = html.escape(json.dumps(_plain(asdict(options)), indent=1))
    facts = f"{result.data.seconds:.0f} s of speech; windows: {result.data.kinds}; {len(result.data.held_out)} pieces held out; "
    yield f"<h2>Data and settings</h2><p>{html.escape(facts)}judged by {len(result.judge.pieces)}.</p><pre>{settings}</pre>"


def _layers(result: Result) -> str:
    rows = []
    for row in result.layers:
        alone = f"{100 * row.alone.above(result.reference):+.2f} %"
        but_this = f"{100 * row.but_this.above(result.reference):+.0f} %" if row.but_this else ""
        times = (f"{1e6 * row.float_seconds:.0f}", f"{1e6 * row.int8_seconds:.0f}")
        rows.append((row.name, alone, but_this, row.method, *times, "yes" if row.name in result.chosen.names else ""))
    return _table(("convolution", "alone", "all but this", "ranges", "float µs", "INT8 µs", "INT8?"), rows)


def _audio(result: Result) -> list[NDArray[np.float32]]:
    """The first judged piece by each judged graph, FP32 first."""
    from melrt_calibration.evaluation import Evaluator

    judge = Evaluator(result.judge.pieces[:1], result.judge.spec)
    models = {"fp32": result.network.model(()), "int8": result.network.model(result.chosen.names)}
    if "int8-fp16" in result.judged:
        models["int8-fp16"] = result.network.model(result.chosen.names, form="tensorrt")
    return [judge.audio(model)[0] for model in models.values()]


def _players(result: Result) -> Iterator[str]:
    rate = result.judge.spec.sample_rate
    truth, made, *_ = _audio(result)
    for name, audio in (("FP32", truth), ("INT8", made), ("difference, 20 dB louder", np.clip(10 * (made - truth), -1, 1))):
        data = base64.b64encode(_wav(audio, rate)).decode()
        yield f'<p><audio controls src="data:audio/wav;base64,{data}"></audio> {name}</p>'


def _wav(audio: NDArray[np.float32], rate: int) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.wav"
        write_wav(path, audio, rate)
        return path.read_bytes()


def _image(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + f"</tr>{cells}</table>"


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
