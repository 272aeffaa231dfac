"""The demo's page: the same sentence from several sources, with players, spectrograms and measures, in one HTML file."""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.files.atomic import atomic_write
from melrt.files.audio import write_wav
from melrt.mel.features import stft
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio
from melrt_export.quality import SpeechQuality

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin:2rem 0 .3rem;border-bottom:1px solid #ddd}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
td,th{padding:.2rem .8rem;border-bottom:1px solid #eee;text-align:right}td:first-child,th:first-child{text-align:left}
img{width:100%}audio{width:100%;max-width:30rem;height:2.2rem}p{margin:.3rem 0}
"""
# Width of the spectrograms' window in samples. At 22 kHz its main lobe is 43 Hz wide, so tones at multiples of 86 Hz are separate lines.
WINDOW = 2048
TOP_HZ = 6000
RANGE_DB = 80


@dataclass(frozen=True, slots=True)
class Sound:
    """One version of the sentence."""

    name: str
    """Source of the audio."""
    note: str
    """Sentence that says how it was made."""
    audio: FloatAudio
    """Samples, (N,)."""


def measures(sounds: Sequence[Sound], spec: MelSpec) -> list[tuple[str, ...]]:
    """Return a table of each sound's distance from the first, which is the recording: a row of headings, then a row for each sound."""
    rows: list[tuple[str, ...]] = [("", "comb", "level", "log-mel error", "PESQ")]
    for sound in sounds:
        quality = SpeechQuality.between(sounds[0].audio, sound.audio, spec)
        pesq = f"{quality.pesq:.2f}" if np.isfinite(quality.pesq) else "not installed"
        rows.append((sound.name, _signed(quality.comb_db), _signed(quality.level_db), f"{quality.log_mel:.3f}", pesq))
    return rows


def _signed(decibels: float) -> str:
    return f"{round(decibels, 1) + 0.0:+.1f} dB"  # adding 0.0 removes the sign of -0.0


def write_page(path: Path, title: str, introduction: Sequence[str], sounds: Sequence[Sound], spec: MelSpec) -> None:
    """Write the page atomically.

    Args:
        path: The HTML file.
        title: Title of the page.
        introduction: Sentences below it.
        sounds: The recording, then its versions.
        spec: Mel convention, for the measures.
    """
    head, *rows = measures(sounds, spec)
    table = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"
    table += "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    parts = [
        f"<h2>{html.escape(s.name)}</h2><p>{html.escape(s.note)}</p>"
        f'<audio controls src="data:audio/wav;base64,{_wav(s.audio, spec.sample_rate)}"></audio>'
        f'<img alt="spectrogram of {html.escape(s.name)}" src="data:image/png;base64,{_spectrogram(s.audio, spec.sample_rate)}">'
        for s in sounds
    ]
    text = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in introduction)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{text}"
        f'<div class="scroll"><table>{table}</table></div>{"".join(parts)}</html>\n'
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _wav(audio: FloatAudio, sample_rate: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_wav(Path(folder) / "x.wav", audio, sample_rate)
        return base64.b64encode((Path(folder) / "x.wav").read_bytes()).decode()


def _spectrogram(audio: FloatAudio, sample_rate: int) -> str:
    """Draw the spectrum up to TOP_HZ over time as PNG, with a color scale that is the same for all sounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    magnitude = np.abs(stft(np.asarray(audio, np.float32), WINDOW, WINDOW // 8, WINDOW))[: TOP_HZ * WINDOW // sample_rate]
    level = 20 * np.log10(np.maximum(magnitude, 1e-10) / (WINDOW / 4))  # a sine of full scale has 0 dB
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    extent = (0, len(audio) / sample_rate, 0, TOP_HZ / 1000)
    axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=-RANGE_DB - 20, vmax=-20, cmap="magma")
    axis.set_ylabel("kHz")
    axis.set_xlabel("seconds")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode()
