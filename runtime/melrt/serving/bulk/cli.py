"""The command `melrt bulk`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import Progress

from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.cli.commands import BackendName, Device, EndsOption, Precision, Threads, Voice
from melrt.errors import MelError
from melrt.files.atomic import check_writable
from melrt.files.audio import SampleFormat
from melrt.planning.edges import Ends
from melrt.serving.bulk.inputs import Block, find_blocks
from melrt.serving.bulk.outputs import Kind
from melrt.serving.bulk.ray import ActorSettings, import_ray, synthesize_on_ray
from melrt.serving.bulk.run import OutputSettings, UtteranceResult, pending_blocks, synthesize_blocks, write_failures
from melrt.vocoder import Options, Vocoder

console = Console(highlight=False, soft_wrap=True)
# Mel files in a block: an actor takes one block at a time, a parquet file holds one block, and a killed run repeats unfinished blocks.
FILES_IN_BLOCK = {"wav": 8, "parquet": 64}
# A run whose output is not a terminal reports its progress this many times.
PROGRESS_LINES = 10


Mels = Annotated[Path, typer.Option("--input", help="Folder of mels (.npy, .npz) or of parquet files, at any depth; or one parquet file.")]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="Folder for the audio. Utterances that are already there are not synthesized again.")
]
To = Annotated[str, typer.Option("--to", help="wav: one file for each utterance; parquet: one file for each block.")]
Format = Annotated[str, typer.Option("--format", help="Format of the samples: int16 or float32.")]
RayAddress = Annotated[
    str | None, typer.Option(help="Run on the Ray cluster at this address; auto: the cluster of this node; local: start one here.")
]
ActorCount = Annotated[
    int, typer.Option(help="With --ray: largest number of actors. Each loads the voice on one GPU, or on --threads cores.", min=1)
]


def bulk(
    voice: Voice,
    mels: Mels,
    output: Output,
    kind: To = "wav",
    sample_format: Format = "int16",
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    edges: EndsOption = "voice",
    ray: RayAddress = None,
    actors: ActorCount = 1,
) -> None:
    """Synthesize thousands of mels, on this machine or on a Ray cluster.

    Run the same command again after an interruption: it keeps finished files and synthesizes the others. No file is ever half-written.
    A mel that cannot be synthesized is skipped and listed in `failed.json`, and the command ends with exit code 2.
    """
    settings = OutputSettings(output.resolve(), cast(Kind, kind), cast(SampleFormat, sample_format), cast(Ends, edges))
    if ray is not None:
        import_ray()  # a missing package is reported before the output folder is made
    check_writable(output, folder=True)
    bundle = Bundle.open(voice)
    blocks = find_blocks(mels, None if ray is None and kind == "wav" else FILES_IN_BLOCK[kind])
    with settings.lock(bundle, precision):
        pending = pending_blocks(blocks, settings.open(bundle.manifest.spec.sample_rate))
        if ray is None:
            results = _synthesize_here(bundle, pending, settings, BackendChoice(device, precision, backend, threads))
        else:
            actor = ActorSettings(voice.resolve(), device, precision, backend, threads or 1, actors)
            results = synthesize_on_ray(pending, actor, settings, ray)
        start = time.perf_counter()
        frames, failed = _follow(results, _count(pending)) if pending else (0, [])
        seconds = time.perf_counter() - start
        failures = write_failures(output, failed)
    counts = f"{_count(pending) - len(failed)} synthesized, {_count(blocks) - _count(pending)} already there, {len(failed)} failed"
    console.print(f"Utterances in {output}: {counts}.", markup=False)
    if frames:
        audio = frames * bundle.manifest.spec.hop / bundle.manifest.spec.sample_rate
        console.print(f"{audio:.1f} s of audio took {seconds:.1f} s, {audio / seconds:.1f} times real time.", markup=False)
    if failures:
        raise MelError(
            f"{len(failed)} of {_count(blocks)} mels could not be synthesized. The first is {failed[0].name}: {failed[0].error}\n"
            f"{failures} lists all of them. Fix or remove these mels and run the same command again."
        )


def _count(blocks: list[Block]) -> int:
    return sum(len(block.names) for block in blocks)


def _synthesize_here(bundle: Bundle, blocks: list[Block], settings: OutputSettings, choice: BackendChoice) -> Iterator[UtteranceResult]:
    options = Options(edges=bundle.manifest.choose_edges(settings.edges))
    with Vocoder(bundle, open_backend(bundle, choice), options) as vocoder:
        yield from synthesize_blocks(vocoder, blocks, settings.open(vocoder.sample_rate))


def _follow(results: Iterator[UtteranceResult], total: int) -> tuple[int, list[UtteranceResult]]:
    """Show progress on stderr; return the number of frames synthesized and the failed utterances, sorted by name."""
    frames, failed = 0, []
    screen = Console(stderr=True, highlight=False)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("synthesizing", total=total)
        for done, result in enumerate(results, 1):
            frames += result.frames
            if result.error:
                failed.append(result)
            bar.advance(task)
            if not screen.is_terminal and PROGRESS_LINES * done // total > PROGRESS_LINES * (done - 1) // total:
                screen.print(f"utterance {done} of {total}")
    return frames, sorted(failed, key=lambda result: result.name)
