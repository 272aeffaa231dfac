"""The command `melrt bulk`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import Progress

from melrt.bundle import MANIFEST, Bundle
from melrt.cli.commands import BackendName, Device, EndsOption, Format, Memory, Precision, Rate, Threads
from melrt.errors import MelError
from melrt.files.atomic import check_writable
from melrt.files.output import Encoder, Output
from melrt.planning.edges import Ends
from melrt.serving.bulk.blocks import Block
from melrt.serving.bulk.inputs import RowVoices, find_blocks
from melrt.serving.bulk.outputs import Kind
from melrt.serving.bulk.ray import import_ray, synthesize_on_ray
from melrt.serving.bulk.run import OutputSettings, UtteranceResult, pending_blocks, synthesize_blocks, write_failures
from melrt.serving.bulk.voices import LoadedVoices, VoiceSettings, find_voices

console = Console(highlight=False, soft_wrap=True)
# Mel files in a block: an actor takes one block at a time, a parquet file holds one block, and a killed run repeats unfinished blocks.
FILES_IN_BLOCK = {"files": 8, "parquet": 64}
# A run whose output is not a terminal reports its progress this many times.
PROGRESS_LINES = 10


VoicePath = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="A bundle; or a folder of bundles, of which each row names one.")]
Mels = Annotated[
    Path,
    typer.Option(
        "--input", help="Folder of mels (.npy, .npz) or of parquet files, at any depth; one parquet file; or a .csv list of mels."
    ),
]
Folder = Annotated[
    Path, typer.Option("-o", "--output", help="Folder for the audio. Utterances that are already there are not synthesized again.")
]
To = Annotated[str, typer.Option("--to", help="files: one audio file for each utterance; parquet: one file for each block.")]
RayAddress = Annotated[
    str | None, typer.Option(help="Run on the Ray cluster at this address; auto: the cluster of this node; local: start one here.")
]
ActorCount = Annotated[
    int, typer.Option(help="With --ray: largest number of actors. Each loads the voices on one GPU, or on --threads cores.", min=1)
]


def bulk(
    voice: VoicePath,
    mels: Mels,
    folder: Folder,
    kind: To = "files",
    encoding: Format = "int16",
    sample_rate: Rate = None,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    edges: EndsOption = "voice",
    memory: Memory = 0,
    ray: RayAddress = None,
    actors: ActorCount = 1,
) -> None:
    """Synthesize thousands of mels with one voice or many, on this machine or on a Ray cluster.

    `melrt bulk voices/ --input list.csv -o speech/` reads the columns `mel`, `voice` and `name` of a list, or of parquet.
    Run the same command again after an interruption: it keeps finished files and synthesizes the others. No file is ever half-written.
    A mel that cannot be synthesized is skipped and listed in `failed.json`, and the command ends with exit code 2.
    """
    output = Output(sample_rate, encoding)  # type: ignore[arg-type]  # Output checks it
    settings = OutputSettings(folder.resolve(), cast(Kind, kind), output)
    if ray is not None:
        import_ray()  # a missing package is reported before the output folder is made
    check_writable(folder, folder=True)
    paths, by_row = find_voices(voice), not (voice / MANIFEST).exists()
    blocks = find_blocks(mels, None if ray is None and kind == "files" else FILES_IN_BLOCK[kind], RowVoices(paths, by_row))
    bundles = {name: Bundle.open(paths[name]) for name in sorted({name for block in blocks for name in block.row_voices})}
    for bundle in bundles.values():
        Encoder(output, bundle.manifest.spec.sample_rate, lambda _: None)  # reports an unsupported rate, or a missing package
    limit = memory << 20 if memory else None
    voices = VoiceSettings(bundles, by_row, cast(Ends, edges), device, precision, backend, threads, limit)
    with settings.lock(voices):
        pending = pending_blocks(blocks, settings.open())
        run = _synthesize_here(voices, pending, settings) if ray is None else synthesize_on_ray(pending, voices, settings, ray, actors)
        total = _follow(run, _count(pending)) if pending else _Total()
        failures = write_failures(folder, total.failed)
    _report(total, _count(pending), _count(blocks), folder)
    if failures:
        first = total.failed[0]
        raise MelError(
            f"{len(total.failed)} of {_count(blocks)} mels could not be synthesized. The first is {first.name}: {first.error}\n"
            f"{failures} lists all of them. Fix or remove these mels and run the same command again."
        )


@dataclass(slots=True)
class _Total:
    """Sums over the results of a run."""

    compute_seconds: float = 0.0
    seconds: float = 0.0
    clipped: int = 0
    failed: list[UtteranceResult] = field(default_factory=list)


def _report(total: _Total, pending: int, count: int, folder: Path) -> None:
    failed = len(total.failed)
    counts = f"{pending - failed} synthesized, {count - pending} already there, {failed} failed"
    console.print(f"Utterances in {folder}: {counts}.", markup=False)
    if total.seconds:
        speed = f"{total.seconds / total.compute_seconds:.1f} times real time"
        console.print(f"{total.seconds:.1f} s of audio took {total.compute_seconds:.1f} s, {speed}.", markup=False)
    if total.clipped:
        console.print(f"{total.clipped} samples were clipped to full scale. --format float32 keeps them.", markup=False)


def _count(blocks: list[Block]) -> int:
    return sum(len(block.names) for block in blocks)


def _synthesize_here(voices: VoiceSettings, blocks: list[Block], settings: OutputSettings) -> Iterator[UtteranceResult]:
    with LoadedVoices(voices) as loaded:
        yield from synthesize_blocks(loaded, blocks, settings)


def _follow(results: Iterator[UtteranceResult], count: int) -> _Total:
    """Show progress on stderr; return the sums, with the failed utterances sorted by name."""
    total, start = _Total(), time.perf_counter()
    screen = Console(stderr=True, highlight=False)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("synthesizing", total=count)
        for done, result in enumerate(results, 1):
            total.seconds += result.seconds
            total.clipped += result.clipped
            if result.error:
                total.failed.append(result)
            bar.advance(task)
            if not screen.is_terminal and PROGRESS_LINES * done // count > PROGRESS_LINES * (done - 1) // count:
                screen.print(f"utterance {done} of {count}")
    total.failed.sort(key=lambda result: result.name)
    total.compute_seconds = time.perf_counter() - start
    return total
