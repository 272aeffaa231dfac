"""The demo: the voice that ships with melrt, from its checkpoint to sound."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.errors import ParityError
from melrt.files.atomic import atomic_write
from melrt.files.wav import write_wav
from melrt.vocoder import Vocoder
from melrt_export.assets import DEMO_VOICE, RECORDING
from melrt_export.audio_features import mel_from_audio, read_audio
from melrt_export.checkpoints import load_checkpoint
from melrt_export.export import ExportOptions, Step, export_voice
from melrt_export.parity import Difference, pytorch_audio, verify


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo made and measured."""

    folder: Path
    seconds: float
    """Of audio."""
    compute: float
    """Seconds that the synthesis took."""
    engine: str
    """Backend, precision and device."""
    difference: Difference
    """Between the deployed model and PyTorch on the whole utterance."""

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        factor = self.compute / self.seconds
        speed = f"real-time factor {factor:.4f} ({1 / factor:.1f} times real time)"
        yield f"{self.seconds:.2f} s of speech in {self.compute:.2f} s, {speed}, {self.engine}"
        yield f"against PyTorch: SNR {self.difference.snr_db:.1f} dB, largest difference {self.difference.max_abs:.1e}"
        yield f"voice      {self.folder / 'lj.melrt'}"
        yield f"sound      {self.folder / 'LJ001-0032.wav'}"
        yield f"picture    {self.folder / 'LJ001-0032.png'}"


def run_demo(folder: Path, on_step: Step = lambda _: None) -> DemoResult:
    """Export the demo voice, verify it, synthesize LJ001-0032 from its mel, and draw it beside the recording.

    Args:
        folder: Made if missing; `lj.melrt`, `LJ001-0032.wav` and `LJ001-0032.png` in it are replaced.
        on_step: Called with a few words as each step begins.

    Raises:
        ParityError: The deployed model does not give PyTorch's output.
    """
    bundle = export_voice(DEMO_VOICE, folder / "lj.melrt", ExportOptions(overwrite=True), on_step)
    on_step("verifying the bundle")
    if failed := [row.file for row in verify(bundle) if not row.passed]:
        raise ParityError(f"{', '.join(failed)} out of tolerance against PyTorch; run `melrt verify {bundle.path}`.")
    on_step("speaking")
    vocoder = Vocoder.load(bundle)
    recording = read_audio(RECORDING, vocoder.sample_rate)
    mel = mel_from_audio(recording, vocoder.spec)
    vocoder(mel)  # the first run also allocates
    start = time.perf_counter()
    audio = vocoder(mel)
    compute = time.perf_counter() - start
    difference = Difference.between(pytorch_audio(load_checkpoint(DEMO_VOICE), mel[None])[0], audio)
    write_wav(folder / "LJ001-0032.wav", audio, vocoder.sample_rate)
    on_step("drawing")
    draw(folder / "LJ001-0032.png", mel, mel_from_audio(audio, vocoder.spec), vocoder)
    engine = f"{vocoder.backend.name} {vocoder.backend.precision} on {vocoder.backend.device}"
    return DemoResult(folder, len(audio) / vocoder.sample_rate, compute, engine, difference)


def draw(path: Path, recording: NDArray[np.float32], synthesis: NDArray[np.float32], vocoder: Vocoder) -> None:
    """Two log-mel spectrograms, one below the other, on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spec = vocoder.spec
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    pictures = ((recording, "recording"), (synthesis, f"melrt, {vocoder.backend.precision} on {vocoder.backend.device}"))
    for axis, (mel, title) in zip(axes, pictures, strict=True):
        extent = (0, mel.shape[1] * spec.hop / spec.sample_rate, 0, spec.n_mels)
        image = axis.imshow(mel, origin="lower", aspect="auto", extent=extent, vmin=spec.silence, vmax=float(recording.max()), cmap="magma")
        axis.set_title(title, loc="left")
        axis.set_ylabel("mel band")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=axes, label=f"magnitude ({spec.log})")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
