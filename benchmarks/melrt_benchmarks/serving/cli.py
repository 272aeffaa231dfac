"""The command `melrt bench-serving`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from melrt.bundle import Bundle
from melrt.cli.commands import Voice
from melrt.errors import BackendError, MelrtError, QueueFullError
from melrt.scheduling.limits import Limits
from melrt.serving.triton.voice import probe_mel
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.serving.load import Load, Submit, closed, mixed, offered

console = Console(highlight=False)
# Waiting in this process, about as many as a server with the default limits lets wait; what is beyond is refused by both.
WINDOWS = 256


def bench_serving(
    voice: Voice,
    triton: Annotated[str, typer.Option(help="A Triton server's gRPC address.")] = "127.0.0.1:8001",
    model: Annotated[str | None, typer.Option(help="The voice's model there; the bundle's file name if left out.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Clients at once; 1 and 8 if left out.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each load.", min=0.1)] = 10.0,
    rounds: Annotated[int, typer.Option(help="Times that each load comes, interleaved.", min=1)] = 3,
    overload: Annotated[float, typer.Option(help="Then this many times what the server held with the most clients.")] = 0.0,
    overload_seconds: Annotated[float, typer.Option(help="For so long, and then one client again.", min=0.1)] = 120.0,
) -> None:
    """Compare a voice on a Triton server with `Vocoder` in this process, under the same load of mixed lengths."""
    bundle = Bundle.open(voice)
    mels = mixed(probe_mel(bundle))
    table = Table("voice", "load", "requests/s", "p50 ms", "p99 ms", "refused")
    with Vocoder.load(bundle, options=Options(limits=Limits(max_windows=WINDOWS, wait=False))) as vocoder:
        voices: dict[str, Submit] = {"Vocoder": vocoder.submit, "Triton": _submit(triton, model or voice.resolve().stem)}
        _check_alike(voices, mels[0])
        held = 0.0
        for number in clients or [1, 8]:
            for name, load in _interleaved(voices, mels, number, seconds, rounds).items():
                _row(table, name, f"{number} clients", load)
                held = max(held, load.rate)
        for name, submit in voices.items() if overload else ():
            _row(table, name, f"{overload * held:.0f} requests/s", offered(submit, mels, overload * held, overload_seconds))
            _row(table, name, "1 client, after that", closed(submit, mels, 1, seconds))
    console.print(table)


def _interleaved(voices: dict[str, Submit], mels: list[NDArray[np.float32]], clients: int, seconds: float, rounds: int) -> dict[str, Load]:
    """Of each voice the round of middle throughput."""
    loads: dict[str, list[Load]] = {name: [] for name in voices}
    for _ in range(rounds):
        for name, submit in voices.items():
            loads[name].append(closed(submit, mels, clients, seconds))
    return {name: sorted(done, key=lambda load: load.rate)[len(done) // 2] for name, done in loads.items()}


def _row(table: Table, name: str, kind: str, load: Load) -> None:
    table.add_row(name, kind, f"{load.rate:.1f}", f"{1000 * load.p50:.0f}", f"{1000 * load.p99:.0f}", str(load.refused))


def _check_alike(voices: dict[str, Submit], mel: NDArray[np.float32]) -> None:
    """Times of a voice that says something else mean nothing."""
    audio = [submit(mel).result(60) for submit in voices.values()]
    if audio[0].shape != audio[1].shape or audio[0].dtype != audio[1].dtype or np.abs(audio[0] - audio[1]).max() > 1e-3:
        raise MelrtError("the server's audio is not this voice's; is it the same bundle, precision and format?")


def _submit(url: str, model: str) -> Submit:
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(url)
    try:
        client.is_model_ready(model)
    except InferenceServerException as error:
        raise BackendError(f"no Triton server answers at {url}: {error}. Give its gRPC address with --triton.") from error

    def submit(mel: NDArray[np.float32]) -> Future[Any]:
        future: Future[Any] = Future()

        def end(result: Any, error: Any) -> None:
            if error is None:
                future.set_result(result.as_numpy("audio"))
            else:
                refused = "UNAVAILABLE" in str(error.status())
                future.set_exception((QueueFullError if refused else BackendError)(error.message()))

        client.async_infer(model, [grpc.InferInput("mel", list(mel.shape), "FP32").set_data_from_numpy(mel)], end)
        return future

    return submit
