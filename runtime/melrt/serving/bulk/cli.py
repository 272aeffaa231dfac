"""The command `melrt bulk`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.cli.commands import BackendName, Device, Precision, Threads, Voice
from melrt.errors import AudioError, MelError
from melrt.files.wav import SAMPLE_FORMATS
from melrt.serving.bulk.inputs import Block, find_blocks
from melrt.serving.bulk.outputs import KINDS
from melrt.serving.bulk.ray import Actors, synthesize_on_ray
from melrt.serving.bulk.run import Outcome, Target, pending_blocks, speak, write_failures
from melrt.vocoder import Vocoder

console = Console(highlight=False)
# Mels of a folder that are handed to an actor at once, or make one parquet file: what is done again after a kill.
FILES_IN_BLOCK = {"wav": 8, "parquet": 64}


def bulk(
    voice: Voice,
    mels: Annotated[
        Path, typer.Option("--input", help="A folder of mels (.npy, .npz), at any depth; or parquet: a file, or a folder of them.")
    ],
    output: Annotated[Path, typer.Option(help="A folder for the audio; what is there is not made again.")],
    kind: Annotated[str, typer.Option("--to", help="wav: a file for each utterance, or parquet.")] = "wav",
    sample_format: Annotated[str, typer.Option("--format", help="int16 or float32.")] = "int16",
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster's address, auto for this node's, or local to start one here.")] = None,
    actors: Annotated[
        int, typer.Option(help="With --ray: actors at most, each with the voice on one GPU or on --threads cores.", min=1)
    ] = 1,
) -> None:
    """Speak mels by the thousand, on this machine or on a Ray cluster.

    Run it again after anything that stopped it: finished files are kept, and nothing is ever half-written. A mel that cannot be
    spoken is skipped and listed in `failed.json`, and the command ends with exit code 2.
    """
    target = _target(output, kind, sample_format)
    bundle = Bundle.open(voice)
    blocks = find_blocks(mels, None if ray is None and kind == "wav" else FILES_IN_BLOCK[kind])
    with target.claim(bundle, precision):
        todo = pending_blocks(blocks, target.output(bundle.manifest.spec.sample_rate))
        total, left = (sum(len(block.names) for block in some) for some in (blocks, todo))
        if ray is None:
            outcomes = _here(bundle, todo, target, BackendChoice(device, precision, backend, threads))
        else:
            outcomes = synthesize_on_ray(todo, Actors(voice.resolve(), device, precision, backend, threads or 1, actors), target, ray)
        start = time.perf_counter()
        frames, failed = _follow(outcomes if todo else iter(()), left)
        seconds = time.perf_counter() - start
        listed = write_failures(output, failed)
    audio = frames * bundle.manifest.spec.hop / bundle.manifest.spec.sample_rate
    console.print(
        f"{output}: {left - len(failed)} spoken, {total - left} were there, {len(failed)} failed; "
        f"{audio:.1f} s of audio in {seconds:.1f} s, {audio / seconds:.1f} times real time", markup=False,
    )  # fmt: skip
    if listed:
        raise MelError(f"{len(failed)} of {total} mels could not be spoken, the first is {failed[0].name}: {failed[0].error} ({listed})")


def _target(output: Path, kind: str, sample_format: str) -> Target:
    if kind not in KINDS:
        raise AudioError(f"--to is {kind!r}; it is one of {', '.join(KINDS)}.")
    if sample_format not in SAMPLE_FORMATS:
        raise AudioError(f"--format is {sample_format!r}; it is one of {', '.join(SAMPLE_FORMATS)}.")
    return Target(output.resolve(), kind, sample_format)


def _here(bundle: Bundle, todo: list[Block], target: Target, choice: BackendChoice) -> Iterator[Outcome]:
    with Vocoder(bundle, open_backend(bundle, choice)) as vocoder:
        yield from speak(vocoder, todo, target.output(vocoder.sample_rate))


def _follow(outcomes: Iterator[Outcome], total: int) -> tuple[int, list[Outcome]]:
    """Frames spoken, and what failed, by name."""
    frames, failed = 0, []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("speaking", total=total)
        for outcome in outcomes:
            frames += outcome.frames
            if outcome.error:
                failed.append(outcome)
            bar.advance(task)
    return frames, sorted(failed, key=lambda outcome: outcome.name)
