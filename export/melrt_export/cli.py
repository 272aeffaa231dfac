"""The commands that make and check artifacts: export, verify, build, mel, demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from melrt.bundle import Bundle
from melrt.errors import EngineBuildError
from melrt.files.atomic import atomic_write

if TYPE_CHECKING:
    from melrt_export.tensorrt.variant_search import Trial

console = Console(highlight=False)

Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")]


def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint file, or the folder that it stands in.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="VOICE.melrt", help="The bundle to write.")],
    precision: Annotated[list[str] | None, typer.Option(help="fp32 or fp16; give it twice for both. Default: both.")] = None,
    name: Annotated[str | None, typer.Option(help="The voice's name; default: the checkpoint's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint as a verified bundle: weight norm folded, ONNX in FP32 and FP16, each held against PyTorch.

    `melrt export runs/best_netG.pt -o voice.melrt` reads the `args.yml` beside the checkpoint, or tells the shape from the weights
    where there is none. If a graph's output is not PyTorch's, nothing is written and the exit code is 1.
    """
    from melrt_export.export import PRECISIONS, ExportOptions, export_voice

    options = ExportOptions(tuple(precision or PRECISIONS), name, force)  # type: ignore[arg-type]  # checked there
    with _steps() as bar:
        task = bar.add_task("export", total=None)
        bundle = export_voice(source, out, options, lambda step: bar.update(task, description=step))
    for entry in bundle.find("onnx"):
        quality = ", ".join(f"{key} {value:g}" for key, value in entry.quality.items())
        console.print(f"{out / entry.file}  {entry.size / 1e6:.2f} MB  {quality}", markup=False)


def verify(
    voice: Voice,
    checkpoint: Annotated[Path | None, typer.Option(help="Compare with this checkpoint in PyTorch, not with the stored output.")] = None,
) -> None:
    """Check every file's hash and every model's output against PyTorch's; exit code 1 if one is out of tolerance.

    `melrt verify voice.melrt` compares with PyTorch's output that the export stored, and needs no torch;
    with `--checkpoint best_netG.pt` PyTorch computes it anew.
    """
    from melrt_export.checkpoints import load_checkpoint
    from melrt_export.parity import verify as rows_of

    bundle = Bundle.open(voice)
    table = Table("file", "precision", "max abs", "SNR dB", "limit", "")
    failed = False
    with _steps() as bar:
        bar.add_task("verifying", total=None)
        for row in rows_of(bundle, load_checkpoint(checkpoint) if checkpoint else None):
            failed |= not row.passed
            if row.difference is None:
                table.add_row(escape(row.file), escape(row.precision), "-", "-", "-", "intact; runs on a GPU only")
                continue
            verdict = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
            difference = row.difference
            table.add_row(
                escape(row.file),
                escape(row.precision),
                f"{difference.max_abs:.1e}",
                f"{difference.snr_db:.1f}",
                row.limit,
                verdict,
            )
    console.print(table)
    if failed:
        raise typer.Exit(1)


def build(
    voice: Voice,
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, or int8 (after `melrt calibrate`).")] = "fp16",
    flavor: Annotated[str, typer.Option(help="tensorrt, tensorrt_rtx, or auto: the first that is installed.")] = "auto",
    portable: Annotated[bool, typer.Option("--portable/--this-gpu", help="tensorrt_rtx: for every GPU, or for this machine's.")] = True,
    graph: Annotated[str, typer.Option(help="interior (windows of one length), edge (ends, short utterances), or both.")] = "both",
    batch: Annotated[str, typer.Option(help="Smallest,best,largest batch.")] = "1,4,16",
    frames: Annotated[str | None, typer.Option(help="Smallest,best,largest length in frames; default: from graph and network.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="0 (fast build) to 5 (fast engine).")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that keeps kernel timings between builds; default: in the user's cache.")
    ] = None,
    workspace: Annotated[int | None, typer.Option(help="Most scratch memory of a kernel, MiB.")] = None,
    compatible: Annotated[
        str, typer.Option(help="tensorrt: exact, hardware (also other GPUs from Ampere on), version (also later TensorRT).")
    ] = "exact",
    refittable: Annotated[bool, typer.Option("--refittable", help="The weights can be exchanged later, by `melrt refit`.")] = False,
    cached: Annotated[bool, typer.Option("--cached/--anew", help="Take such an engine from the user's cache, if it is there.")] = True,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try the graph's exact rewrites and several windows on this GPU; keep the fastest.")
    ] = False,
) -> None:
    """Build TensorRT engines from the bundle's ONNX, audit their precision, and add them to the bundle.

    `melrt build voice.melrt --precision fp16` builds one engine for each graph. With `tensorrt` it has to run on the GPU that the
    engines are for; with `tensorrt_rtx` it also runs without a GPU, and the engines are portable. `--tune` needs the GPU: it builds,
    checks and times some eight engines, and keeps the fastest and all times.
    """
    from melrt_export.tensorrt.options import EngineOptions
    from melrt_export.tensorrt.variant_search import build_engines

    options = EngineOptions(
        precision=precision, flavor=flavor, portable=portable, batch=_span("batch", batch),
        frames=None if frames is None else _span("frames", frames), optimization_level=optimization_level, timing_cache=timing_cache,
        workspace=workspace, compatible=compatible, refittable=refittable, cached=cached,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    with _steps() as bar:
        task = bar.add_task("building", total=None)

        def on_progress(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        graphs = ("interior", "edge") if graph == "both" else (graph,)
        wanted = [replace(options, graph=name) for name in graphs]  # type: ignore[arg-type]  # checked there
        for entry, trials in build_engines(Bundle.open(voice), wanted, on_progress, tune=tune):
            if trials:
                console.print(_trials(entry.graph, trials))
            audited = "by the engine inspector" if entry.target["audited"] == "engine" else "in the network; the engine itself on its GPU"
            console.print(f"{voice / entry.file}  {entry.size / 1e6:.2f} MB  precision audited {audited}", markup=False)


def _trials(graph: str, trials: list[Trial]) -> Table:
    table = Table("upsampling", "shortcut", "time axis", "batch", "frames", "µs a frame", "", title=f"{graph}: one change at a time")
    for trial in trials:
        facts = trial.to_dict()
        table.add_row(*(escape(str(value)) for value in facts.values()))
    return table


def refit(
    voice: Voice,
    donor: Annotated[Path, typer.Option("--engines-of", metavar="VOICE.melrt", help="The voice that this one was fine-tuned from.")],
) -> None:
    """Give a fine-tuned voice the engines of the one it began as, with its own weights: milliseconds instead of a build.

    The engines must have been built with `melrt build --refittable`, and the GPU that they are for is needed.
    """
    from melrt_export.tensorrt.refit import refit_engines

    for entry in refit_engines(Bundle.open(voice), Bundle.open(donor)):
        console.print(f"{voice / entry.file}  SNR {entry.quality['snr_db']} dB against FP32", markup=False)


def mel(
    voice: Voice,
    audio: Annotated[Path, typer.Argument(metavar="IN.wav", help="Audio; resampled to the voice's rate if need be.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MEL.npy", help="The mel to write.")],
) -> None:
    """Compute a voice's mel from audio, exactly as the voice expects it.

    `melrt mel voice.melrt recording.wav -o mel.npy`
    """
    from melrt_export.audio_features import mel_from_audio_file

    frames = mel_from_audio_file(audio, Bundle.open(voice).manifest.spec)
    with atomic_write(out) as temporary, temporary.open("xb") as stream:
        np.save(stream, frames)
    console.print(f"{out}: {frames.shape[0]} bands, {frames.shape[1]} frames", markup=False)


def demo(out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the bundle, the WAV and the picture.")] = Path("demo")) -> None:
    """Export the demo voice, verify it, and speak: a WAV and a picture of its spectrogram beside the recording's."""
    from melrt_export.demo import run_demo

    with _steps() as bar:
        task = bar.add_task("demo", total=None)
        result = run_demo(out, lambda step: bar.update(task, description=step))
    for line in result.lines():
        console.print(line, markup=False)


def _span(name: str, text: str) -> tuple[int, int, int]:
    try:
        low, best, high = (int(part) for part in text.split(","))
    except ValueError:
        raise EngineBuildError(f"--{name} is {text!r}; it is three whole numbers, smallest,best,largest, as in 1,4,16.") from None
    return low, best, high


def _steps() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
