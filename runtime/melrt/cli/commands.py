"""The runtime's commands: info, synth, tune, doctor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle, Manifest
from melrt.errors import MelError
from melrt.files.mels import mel_pieces
from melrt.files.wav import write_wav
from melrt.scheduling.policy_tuning import record
from melrt.scheduling.policy_tuning import tune as measure
from melrt.system import examine
from melrt.vocoder import Options, Vocoder

console = Console(highlight=False)
# Frames read at a time: twelve seconds, enough for every worker to have several windows.
PIECE = 1024

Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu, or auto: CUDA if it works.")]
Precision = Annotated[str, typer.Option(help="fp32, tf32, fp16, int8, or auto: the fastest that keeps the quality on this device.")]
BackendName = Annotated[str, typer.Option("--backend", help="tensorrt, onnxruntime, or auto: engines where there are any for this GPU.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; one per usable core if left out.")]


def info(voice: Voice) -> None:
    """Show what a voice is: mel convention, architecture, files, provenance.

    Look here first when a voice sounds wrong: most often its mels were made in another convention.
    """
    bundle = Bundle.open(voice)
    manifest = bundle.manifest
    for line in _facts(voice, manifest):
        console.print(line, markup=False)
    table = Table("file", "kind", "graph", "precision", "MB", "against PyTorch")
    for entry in manifest.artifacts:
        quality = ", ".join(f"{k} {v:g}" for k, v in entry.quality.items())
        table.add_row(*map(escape, (entry.file, entry.kind, entry.graph, entry.precision, f"{entry.size / 1e6:.2f}", quality)))
    console.print(table)


def _facts(voice: Path, manifest: Manifest) -> Iterator[str]:
    """What the manifest says, one line each; its texts come from whoever made the bundle, and are shown as they are."""
    spec = manifest.spec
    left, right = manifest.receptive_field.left, manifest.receptive_field.right
    ms = 1000 * spec.hop / spec.sample_rate
    yield f"{manifest.name}  ({voice})"
    yield f"mel            {spec.describe()}, {spec.framing} framing, floor {spec.floor:g}, n_fft {spec.n_fft}, window {spec.win_length}"
    if manifest.normalization is not None:
        clip = manifest.normalization.clip
        limits = f", clipped to {clip[0]:g}..{clip[1]:g}" if clip else ""
        yield f"normalization  part of the graphs{limits}: give plain log-mels"
    if manifest.levels is not None:
        kind = "normalized as in training" if manifest.levels.normalized else "of speech"
        yield f"levels         {manifest.levels.mean:.3g} ± {manifest.levels.deviation:.2g}, {kind}"
    yield f"frame          {ms:.2f} ms; at least {manifest.receptive_field.smallest_input} frames"
    yield f"receptive      {left} frames before, {right} after ({right * ms:.0f} ms look-ahead)"
    edges = manifest.edges
    if edges.left or edges.right:
        value = "the end's own frame" if edges.value is None else f"{edges.value:g}"
        yield f"edges          {edges.left} frames before and {edges.right} after of {value} in its project; --edges voice does the same"
    yield f"architecture   {', '.join(f'{k} {v}' for k, v in manifest.architecture.items())}"
    if manifest.parameters:
        yield f"size           {manifest.parameters / 1e6:.2f} M parameters, {manifest.flop_per_second / 1e9:.2f} GFLOP per second of audio"
    for key, value in manifest.provenance.items():
        yield f"{key:<14} {value}"


def synth(
    voice: Voice,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Mels (.npy, .npz, .pt), or audio for copy-synthesis.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A .wav file for one input, or a folder.")],
    sample_format: Annotated[str, typer.Option("--format", help="int16 or float32.")] = "int16",
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    edges: Annotated[
        str, typer.Option(help="Ends of an utterance: model (as PyTorch's forward), or voice (its project's habit).")
    ] = "model",
) -> None:
    """Turn mels into WAV files, and print the real-time factor (compute time / audio time).

    `melrt synth voice.melrt mels/*.npy -o speech/` makes one file for each mel; `melrt synth voice.melrt recording.wav -o copy.wav`
    computes the recording's mel first, and speaks it again. Utterances may be of any length: memory does not grow with it.
    """
    if edges not in ("model", "voice"):
        raise MelError(f"--edges is {edges!r}; it is model or voice.")
    bundle = Bundle.open(voice)
    options = Options(edges=bundle.manifest.edges) if edges == "voice" else Options()
    targets = _targets(inputs, out)
    clock = _Clock()
    vocoder = Vocoder.load(bundle, device=device, precision=precision, backend=backend, threads=threads, options=options)
    with vocoder, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(inputs))
        for source, target in zip(inputs, targets, strict=True):
            # a long utterance is read, computed and written piece by piece: memory does not grow with it
            mel = mel_pieces(source, vocoder.spec, PIECE)
            pieces = clock.timed(vocoder.stream(mel), _teller(bar, task, source.name, vocoder.sample_rate))
            try:
                write_wav(target, pieces, vocoder.sample_rate, sample_format)  # type: ignore[arg-type]  # checked there
            except MelError as error:
                raise MelError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
            bar.advance(task)
    engine = vocoder.backend
    where = targets[0] if len(targets) == 1 else out
    compute, audio_seconds = clock.seconds, clock.samples / vocoder.sample_rate
    console.print(
        f"{where}: {audio_seconds:.2f} s of audio in {compute:.2f} s, real-time factor {compute / audio_seconds:.4f} "
        f"({audio_seconds / compute:.1f} times real time), {engine.name} {engine.precision} on {engine.device}", markup=False,
    )  # fmt: skip


def tune(
    voice: Voice,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each candidate.", min=1)] = 7,
) -> None:
    """Measure which windows make this voice cheapest on this machine, and keep the answer in the bundle.

    Run it once on each kind of machine, with nothing else going on there: some ten seconds. Whoever loads the voice on such a machine
    runs with the recorded windows; what is exact stays exact with any of them.
    """
    bundle = Bundle.open(voice)
    engine = open_backend(bundle, BackendChoice(device, precision, backend, threads))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=(rounds + 1) * len(engine.candidates))
        trials = measure(bundle, engine, rounds, lambda: bar.advance(task))
    entry = record(bundle, engine, trials)
    table = Table("window, frames", "batch", "workers", "µs per frame", "times real time", "")
    real = 1e6 * bundle.manifest.spec.hop / bundle.manifest.spec.sample_rate
    for trial in sorted(trials, key=lambda trial: (trial.policy.frames, trial.policy.batch)):
        policy, cost = trial.policy, trial.microseconds
        mark = "chosen" if trial is trials[0] else ""
        table.add_row(str(policy.frames), str(policy.batch), str(policy.workers), f"{cost:.0f}", f"{real / cost:.1f}", mark)
    console.print(table)
    console.print(f"{engine.machine}, {engine.name} {engine.precision} on {engine.device}; kept in {voice / entry.file}", markup=False)


def _teller(bar: Progress, task: TaskID, name: str, sample_rate: int) -> Callable[[int], None]:
    def tell(samples: int) -> None:
        bar.update(task, description=f"{escape(name)}: {samples / sample_rate:.0f} s")

    return tell


class _Clock:
    """Adds up the time that pieces take to come, and their samples."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.samples = 0

    def timed(self, pieces: Iterator[NDArray[np.float32]], tell: Callable[[int], None]) -> Iterator[NDArray[np.float32]]:
        """Pass pieces on; `tell` is called with the samples of them so far."""
        samples, start = 0, time.perf_counter()
        for piece in pieces:
            self.seconds += time.perf_counter() - start
            samples += len(piece)
            self.samples += len(piece)
            tell(samples)
            yield piece
            start = time.perf_counter()
        self.seconds += time.perf_counter() - start


def _targets(inputs: list[Path], out: Path) -> list[Path]:
    if out.suffix.lower() == ".wav" and not out.is_dir():
        if len(inputs) > 1:
            raise MelError(f"{len(inputs)} inputs cannot go to one file {out}; give a folder.")
        targets = [out]
    else:
        targets = [out / f"{source.stem}.wav" for source in inputs]
    if overwritten := {t.resolve() for t in targets} & {s.resolve() for s in inputs}:
        raise MelError(f"{', '.join(map(str, overwritten))} would be overwritten by its own synthesis; give another folder.")
    if len(set(targets)) < len(targets):
        raise MelError("two inputs have the same name and would overwrite each other; run them apart.")
    return targets


def doctor() -> None:
    """Show what this machine can run, and how to get what is missing."""
    table = Table("", "what for", "found", "to install")
    for finding in examine():
        remedy = "" if finding.ready else escape(finding.remedy)
        table.add_row("[green]yes[/]" if finding.ready else "no", finding.purpose, finding.found, remedy)
    console.print(table)
