"""The commands `melrt serve triton` and `melrt serve version`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from melrt.bundle import Bundle
from melrt.cli.commands import BackendName, Precision
from melrt.errors import BackendError, BundleError
from melrt.files.wav import SampleFormat
from melrt.serving.triton.voice import Serving

console = Console(highlight=False)
DEFAULT = Serving()

Voices = Annotated[list[Path], typer.Argument(metavar="VOICE.melrt...", help="The bundles.")]
Name = Annotated[str | None, typer.Option(help="Of the models, for one voice; its file's name if left out.")]
Format = Annotated[str, typer.Option("--format", help="Of the audio: float32 or int16.")]
Gpus = Annotated[str, typer.Option(help="GPUs, as in 0,1; Triton's choice if left out: all, or else the CPU.")]


def triton(
    voices: Voices,
    output: Annotated[Path, typer.Option("-o", "--output", help="The model repository; made, or added to.")],
    name: Name = None,
    precision: Precision = DEFAULT.precision,
    backend: BackendName = DEFAULT.backend,
    threads: Annotated[int, typer.Option(help="CPU threads of an instance; 0: one per usable core.")] = DEFAULT.threads,
    sample_format: Format = DEFAULT.sample_format,
    instances: Annotated[int, typer.Option(help="Processes with the voice on each GPU, or on the CPU.")] = DEFAULT.instances,
    gpus: Gpus = "",
    max_frames: Annotated[int, typer.Option(help="Longest utterance, mel frames.")] = DEFAULT.max_frames,
    max_queue: Annotated[int, typer.Option(help="Whole mels waiting; a further one is refused.")] = DEFAULT.max_queue,
    queue_timeout: Annotated[float, typer.Option(help="Longest wait there, seconds.")] = DEFAULT.queue_timeout,
    max_streams: Annotated[int, typer.Option(help="Streams open at once in an instance.")] = DEFAULT.max_streams,
    timeout: Annotated[float, typer.Option(help="Seconds for an accepted request, and between a stream's.")] = DEFAULT.timeout,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server, or add the next version of a voice to one.

    A voice `lj` becomes the models `lj` (whole mels) and `lj_stream` (audio as it is ready). The newest version is served;
    `melrt serve version` goes back to an older one.
    """
    from melrt.serving.triton.repository import add_voice, models_of

    serving = Serving(
        precision, backend, threads, cast(SampleFormat, sample_format), max_frames, max_streams, timeout, max_queue, queue_timeout,
        instances, _numbers(gpus),
    )  # fmt: skip
    if name and len(voices) > 1:
        raise BundleError(f"--name is for one voice; {len(voices)} are given.")
    for bundle in [Bundle.open(voice) for voice in voices]:
        model = name or bundle.path.resolve().name.removesuffix(".melrt")
        added = add_voice(output, model, bundle, serving)
        console.print(f"{output}: {' and '.join(one.name for one in models_of(model))}, version {added}", markup=False)


def version(
    repository: Annotated[Path, typer.Argument(help="The model repository.")],
    voice: Annotated[str, typer.Argument(help="The voice, by its model's name.")],
    number: Annotated[int, typer.Argument(metavar="VERSION", help="The version to serve.")],
) -> None:
    """Serve a version of a voice that is in a model repository: back to an older one, or forward again."""
    from melrt.serving.triton.repository import use_version

    use_version(repository, voice, number)
    console.print(f"{repository}: {voice} is served in version {number}", markup=False)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise BackendError(f"--gpus is {text!r}; it is numbers with commas, as in 0,1.") from error
