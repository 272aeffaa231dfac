"""The commands `melrt serve triton` and `melrt serve version`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from melrt.bundle import Bundle
from melrt.cli.commands import BackendName, EndsOption, Precision, Rate
from melrt.errors import ConfigError
from melrt.files.audio import Encoding
from melrt.planning.edges import Ends
from melrt.serving.triton.voice import ServingConfig

console = Console(highlight=False, soft_wrap=True)
DEFAULT = ServingConfig()

Voices = Annotated[list[Path], typer.Argument(metavar="VOICE.melrt...", help="One or more bundles.")]
Name = Annotated[str | None, typer.Option(help="Name of the models, for a single voice; the bundle's file name if left out.")]
Format = Annotated[str, typer.Option("--format", help="Encoding of the audio: float32, int16, mulaw, alaw, flac or opus.")]
StreamFormat = Annotated[
    str | None, typer.Option("--stream-format", help="Encoding of the audio of streams, if another: float32, int16, mulaw or alaw.")
]
Gpus = Annotated[str, typer.Option(help="GPUs to use, for example 0,1; if left out Triton uses all GPUs, or the CPU if there is none.")]


def triton(
    voices: Voices,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the model repository; made if it does not exist.")],
    name: Name = None,
    precision: Precision = DEFAULT.precision,
    backend: BackendName = DEFAULT.backend,
    threads: Annotated[int, typer.Option(help="CPU threads of an instance; 0 for one per usable core.")] = DEFAULT.threads,
    sample_rate: Rate = DEFAULT.sample_rate,
    encoding: Format = DEFAULT.encoding,
    stream_encoding: StreamFormat = DEFAULT.stream_encoding,
    instances: Annotated[int, typer.Option(help="Processes that load the voice, on each GPU or on the CPU.")] = DEFAULT.instances,
    gpus: Gpus = "",
    max_frames: Annotated[int, typer.Option(help="Longest utterance in mel frames.")] = DEFAULT.max_frames,
    max_queue: Annotated[int, typer.Option(help="Whole mels that may wait; a further one is refused.")] = DEFAULT.max_queue,
    queue_timeout: Annotated[float, typer.Option(help="Longest wait in the queue in seconds.")] = DEFAULT.queue_timeout,
    max_streams: Annotated[int, typer.Option(help="Streams that may be open at once in an instance.")] = DEFAULT.max_streams,
    timeout: Annotated[
        float, typer.Option(help="Seconds that an admitted request may take, and that a stream may wait for frames.")
    ] = DEFAULT.timeout,
    trust: Annotated[bool, typer.Option("--trust", help="Let the server open engines that its own user did not build.")] = False,
    edges: EndsOption = DEFAULT.edges,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server, or add a voice or its next version to one.

    A voice `lj` becomes the models `lj` (whole mels) and `lj_stream` (audio as soon as it is ready). The server then serves the newest
    version; `melrt serve version` returns to an older one.
    """
    from melrt.serving.triton.repository import add_voice, models_of

    serving = ServingConfig(
        precision, backend, threads, sample_rate, cast(Encoding, encoding), cast(Encoding | None, stream_encoding),
        max_frames, max_streams, timeout, max_queue, queue_timeout, instances, _gpu_indices(gpus), trust, cast(Ends, edges),
    )  # fmt: skip
    if name and len(voices) > 1:
        raise ConfigError(f"--name is for one voice, but {len(voices)} are given; add them one at a time.")
    for bundle in [Bundle.open(voice) for voice in voices]:
        model = name or bundle.path.resolve().name.removesuffix(".melrt")
        added = add_voice(output, model, bundle, serving)
        console.print(f"Wrote version {added} of {' and '.join(one.name for one in models_of(model))} to {output}.", markup=False)
    console.print(f"Start the server with `tritonserver --model-repository={output}`, or load the models in a running one.", markup=False)


def version(
    repository: Annotated[Path, typer.Argument(help="Folder of the model repository.")],
    voice: Annotated[str, typer.Argument(help="Name of the voice's model for whole mels.")],
    number: Annotated[int, typer.Argument(metavar="VERSION", help="Version to serve.")],
) -> None:
    """Choose which version of a voice in a model repository is served, an older or a newer one."""
    from melrt.serving.triton.repository import models_of, use_version

    use_version(repository, voice, number)
    models = " and ".join(model.name for model in models_of(voice))
    console.print(f"{repository} now serves version {number} of {models}. Load both models in a running server.", markup=False)


def _gpu_indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"--gpus is {text!r}; it must be whole numbers separated by commas, for example 0,1.") from error
