"""The runtime's commands: info, synth, doctor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from melrt.audio import write_wav
from melrt.bundle import Bundle
from melrt.doctor import examine
from melrt.errors import MelError
from melrt.mel_files import read_mel
from melrt.vocoder import Vocoder

console = Console(highlight=False)

Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")]
Device = Annotated[str, typer.Option(help="cuda, cpu, or auto: CUDA if it works.")]
Precision = Annotated[str, typer.Option(help="fp32, fp16, int8, or auto: the fastest that keeps the quality on this device.")]
BackendName = Annotated[str, typer.Option("--backend", help="onnxruntime or auto.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; one per physical core if left out.")]


def info(voice: Voice) -> None:
    """Show what a voice is: mel convention, architecture, files, provenance."""
    bundle = Bundle.open(voice)
    manifest = bundle.manifest
    left, right = manifest.receptive_field
    ms = 1000 * manifest.spec.hop / manifest.spec.sample_rate
    console.print(f"[bold]{manifest.name}[/]  ({voice})", markup=True)
    console.print(f"mel            {manifest.spec.describe()}, {manifest.spec.framing} framing, floor {manifest.spec.floor:g}")
    console.print(f"frame          {ms:.2f} ms; at least {manifest.smallest_input} frames")
    console.print(f"receptive      {left} frames before, {right} after ({right * ms:.0f} ms look-ahead)")
    console.print(f"architecture   {', '.join(f'{k} {v}' for k, v in manifest.architecture.items())}")
    for key, value in manifest.provenance.items():
        console.print(f"{key:<14} {value}", markup=False)
    table = Table("file", "kind", "graph", "precision", "MB", "against PyTorch")
    for entry in manifest.artifacts:
        quality = ", ".join(f"{k} {v:g}" for k, v in entry.quality.items())
        table.add_row(entry.file, entry.kind, entry.graph, entry.precision, f"{entry.size / 1e6:.2f}", quality)
    console.print(table)


def synth(
    voice: Voice,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Mels (.npy, .npz, .pt), or audio for copy-synthesis.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A .wav file for one input, or a folder.")],
    sample_format: Annotated[str, typer.Option("--format", help="int16 or float32.")] = "int16",
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
) -> None:
    """Turn mels into WAV files, and print the real-time factor (compute time / audio time)."""
    vocoder = Vocoder.load(voice, device=device, precision=precision, backend=backend, threads=threads)
    targets = _targets(inputs, out)
    compute = audio_seconds = 0.0
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for source, target in bar.track(list(zip(inputs, targets, strict=True)), description="synthesising"):
            mel = read_mel(source, vocoder.spec)
            start = time.perf_counter()
            try:
                audio = vocoder(mel)
            except MelError as error:
                raise MelError(f"{source}: {error}") from error
            compute += time.perf_counter() - start
            audio_seconds += len(audio) / vocoder.sample_rate
            write_wav(target, audio, vocoder.sample_rate, sample_format)  # type: ignore[arg-type]  # checked there
    engine = vocoder.backend
    where = targets[0] if len(targets) == 1 else out
    console.print(
        f"{where}: {audio_seconds:.2f} s of audio in {compute:.2f} s, real-time factor {compute / audio_seconds:.4f} "
        f"({audio_seconds / compute:.1f} times real time), {engine.name} {engine.precision} on {engine.device}", markup=False,
    )  # fmt: skip


def _targets(inputs: list[Path], out: Path) -> list[Path]:
    if out.suffix.lower() == ".wav" and not out.is_dir():
        if len(inputs) > 1:
            raise MelError(f"{len(inputs)} inputs cannot go to one file {out}; give a folder.")
        return [out]
    targets = [out / f"{source.stem}.wav" for source in inputs]
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
