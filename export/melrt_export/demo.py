"""The demo: it exports and verifies the voice that ships with melrt, and synthesizes an utterance with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.bundle import Bundle
from melrt.errors import ParityError
from melrt.files.atomic import atomic_write
from melrt.files.audio import read_audio, write_wav
from melrt.mel.features import mel_from_audio
from melrt.types import FloatAudio, Mel
from melrt.vocoder import Vocoder
from melrt_export.assets import DEMO_VOICE, RECORDING
from melrt_export.checkpoints import load_checkpoint
from melrt_export.demo_page import Sound, measures, write_page
from melrt_export.export import ExportOptions, OnStep, export_voice
from melrt_export.generator.reference import PyTorchReference
from melrt_export.griffin_lim import ITERATIONS, griffin_lim
from melrt_export.parity import Difference, verify

_EXPORT = ExportOptions(overwrite=True)
STEPS = _EXPORT.steps + 4
VOICE, MEL, SPEECH, SPECTROGRAMS = "lj.melrt", "mel.npy", f"{RECORDING.stem}.wav", f"{RECORDING.stem}.png"
PAGE = "listen.html"
VOICE_NOTE = (
    "The demo voice is a small network that was trained on 3.5 minutes of speech, without discriminators. Griffin-Lim, which needs no "
    "network, is nearer to the recording by every measure except the level. The demo shows that melrt reproduces PyTorch, not how good "
    "a voice can be."
)
_INTRODUCTION = (
    VOICE_NOTE,
    "All versions are made from the mel of the recording. Comb is the power at multiples of the frame rate over the power between them, "
    "from 1 to 4 kHz; comb and level are relative to the recording. The versions of the demo voice should sound the same. The report of "
    "melrt calibrate has the voice in INT8.",
)
NAME_WIDTH = 20


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Files and measurements of the demo."""

    folder: Path
    """Folder of the files."""
    seconds: float
    """Length of the synthesized audio in seconds."""
    compute_seconds: float
    """Duration of the synthesis in seconds."""
    engine: str
    """Backend, precision and device of the synthesis."""
    difference: Difference
    """Difference between the deployed model and PyTorch on the whole utterance."""
    measures: list[tuple[str, ...]]
    """Table of the recording, Griffin-Lim and the voice: a row of headings, then a row for each."""

    def lines(self) -> Iterator[str]:
        """Yield sentences for the terminal."""
        factor = self.compute_seconds / self.seconds
        yield f"Exported the demo voice to {self.folder / VOICE} and verified it against PyTorch."
        yield f"Computed the log-mel {self.folder / MEL} from a recording that was not used in the voice's training."
        yield (
            f"Synthesized {self.folder / SPEECH} from it: {self.seconds:.2f} s of speech in {self.compute_seconds:.2f} s "
            f"({1 / factor:.1f} times real time, real-time factor {factor:.4f}) with {self.engine}."
        )
        yield (
            f"The samples differ from PyTorch's by at most {self.difference.max_abs:.1e} of full scale; "
            f"the signal-to-noise ratio is {self.difference.snr_db:.1f} dB."
        )
        yield f"Drew the spectrograms of the recording and of the synthesis in {self.folder / SPECTROGRAMS}."
        yield f"Wrote {self.folder / PAGE}: the recording and its versions, to listen to in a browser. Compared with the recording:"
        for row in self.measures:
            yield "  " + row[0].ljust(NAME_WIDTH) + "".join(cell.rjust(15) for cell in row[1:])
        yield VOICE_NOTE


def run_demo(folder: Path, on_step: OnStep = lambda _: None) -> DemoResult:
    """Export the demo voice, verify it, synthesize speech from the mel of a recording, and draw the spectrograms of both.

    Args:
        folder: Folder for the files, created if it is missing. The demo's files in it are replaced.
        on_step: Called with a short description when a step begins; there are `STEPS` steps.

    Raises:
        ParityError: The output of the deployed model differs too much from PyTorch's.
    """
    bundle = export_voice(DEMO_VOICE, folder / VOICE, _EXPORT, on_step)
    on_step("verifying the bundle")
    if failed := [row.file for row in verify(bundle) if not row.passed]:
        raise ParityError(f"{', '.join(failed)} out of tolerance against PyTorch. `melrt verify {bundle.path}` shows the differences.")
    on_step("synthesizing speech")
    vocoder = Vocoder.load(bundle)
    recording = read_audio(RECORDING, vocoder.sample_rate)
    mel = mel_from_audio(recording, vocoder.spec)
    with atomic_write(folder / MEL) as temporary, temporary.open("xb") as stream:
        np.save(stream, mel)
    vocoder(mel)  # not timed, because the first run also allocates memory
    start = time.perf_counter()
    audio = vocoder(mel)
    compute_seconds = time.perf_counter() - start
    write_wav(folder / SPEECH, audio, vocoder.sample_rate)
    checkpoint = load_checkpoint(DEMO_VOICE)
    reference = PyTorchReference(checkpoint.config, checkpoint.weights).audio(mel[None])[0]
    on_step("drawing the spectrograms")
    _draw(folder / SPECTROGRAMS, mel, mel_from_audio(audio, vocoder.spec), vocoder)
    on_step("comparing with Griffin-Lim")
    sounds = _sounds(bundle, recording[: len(audio)], mel, reference)
    write_page(folder / PAGE, "melrt: the demo voice", _INTRODUCTION, sounds, vocoder.spec)
    engine = f"{vocoder.backend.name} in {vocoder.backend.precision.upper()} on {vocoder.backend.device}"
    difference = Difference.between(reference, audio)
    return DemoResult(folder, len(audio) / vocoder.sample_rate, compute_seconds, engine, difference, measures(sounds[:3], vocoder.spec))


def _sounds(bundle: Bundle, recording: FloatAudio, mel: Mel, reference: FloatAudio) -> list[Sound]:
    """Return the recording, Griffin-Lim, and the voice in PyTorch and in each precision of the bundle."""
    estimated = griffin_lim(mel, bundle.manifest.spec)
    sounds = [
        Sound("recording", "LJ Speech, public domain. It was not used in the voice's training.", recording),
        Sound(
            "Griffin-Lim",
            f"{ITERATIONS} estimates of the phase from the same mel, without a network.",
            estimated,
        ),
        Sound("demo voice, PyTorch", "The output of the trained network in PyTorch, in FP32.", reference),
    ]
    for precision in dict.fromkeys(entry.precision for entry in bundle.find("onnx")):
        with Vocoder.load(bundle, device="cpu", precision=precision, backend="onnxruntime") as vocoder:
            sounds.append(Sound(f"demo voice, {precision.upper()}", f"melrt with ONNX Runtime, {precision.upper()}.", vocoder(mel)))
    return sounds


def _draw(path: Path, recording: Mel, synthesis: Mel, vocoder: Vocoder) -> None:
    """Draw two log-mel spectrograms, one below the other, with the same color scale."""
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
