"""Voices on a server, each as a function that submits mels: over Triton's gRPC, HTTP and WebSocket."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from melrt.errors import BackendError, MissingExtraError, QueueFullError
from melrt.types import Audio, Mel
from melrt_benchmarks.serving.load import ANSWER_TIMEOUT, Submit

# Requests in progress, each in a thread. An open loop that exceeds them measures its own wait too.
MAX_IN_PROGRESS = 256
# Frames of a message, as an acoustic model would produce them.
CHUNK_FRAMES = 16
WAV_HEADER = 44
UNAVAILABLE, TRY_AGAIN_LATER = 503, 1013


def triton(address: str, model: str) -> Submit:
    """Return a function that submits mels to a model on a Triton server.

    Raises:
        BackendError: No server answers.
    """
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(address)
    try:
        client.is_model_ready(model)
    except InferenceServerException as error:
        raise BackendError(f"no Triton server answers at {address}: {error}. Give its gRPC address with --triton.") from error

    def submit(mel: Mel) -> Future[Audio]:
        future: Future[Audio] = Future()

        def end(result: Any, error: Any) -> None:
            if error is None:
                future.set_result(result.as_numpy("audio"))
            else:
                refused = "UNAVAILABLE" in str(error.status())
                future.set_exception((QueueFullError if refused else BackendError)(error.message()))

        client.async_infer(model, [grpc.InferInput("mel", list(mel.shape), "FP32").set_data_from_numpy(mel)], end)
        return future

    return submit


@contextmanager
def http(address: str, voice: str) -> Iterator[dict[str, Submit]]:
    """Yield functions that submit mels to a voice of `melrt serve http`: whole over HTTP, and as a stream over WebSocket.

    Raises:
        BackendError: No service answers.
        MissingExtraError: The package `websockets` is not installed.
    """
    if find_spec("websockets") is None:
        raise MissingExtraError("a stream over WebSocket", "websockets", "http")
    host = urlsplit(address if "//" in address else f"//{address}").netloc
    idle = deque([HTTPConnection(host, timeout=ANSWER_TIMEOUT)])
    try:
        idle[0].connect()
    except (OSError, HTTPException) as error:
        raise BackendError(f"no HTTP service answers at {address}: {error}. Give its address with --http.") from error

    def post(mel: Mel) -> Audio:
        try:
            connection = idle.pop()
        except IndexError:
            connection = HTTPConnection(host, timeout=ANSWER_TIMEOUT)
        try:
            return _post(connection, voice, mel)
        except ConnectionError:  # the service has closed it, because it was idle
            connection.close()
            return _post(connection, voice, mel)
        finally:
            idle.append(connection)

    threads = ThreadPoolExecutor(MAX_IN_PROGRESS)
    try:
        yield {
            "HTTP": lambda mel: threads.submit(post, mel),
            "WebSocket": lambda mel: threads.submit(_converse, host, voice, mel),
        }
    finally:
        threads.shutdown(cancel_futures=True)
        for connection in idle:
            connection.close()


def _post(connection: HTTPConnection, voice: str, mel: Mel) -> Audio:
    connection.request("POST", f"/v1/speech?voice={quote(voice)}", mel.T.astype("<f4").tobytes())
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise _refusal(answer.status == UNAVAILABLE, body.decode(errors="replace"))
    return _float32(body[WAV_HEADER:])


def _converse(host: str, voice: str, mel: Mel) -> Audio:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    pieces: list[bytes] = []
    try:
        with connect(f"ws://{host}/v1/stream?voice={quote(voice)}", open_timeout=ANSWER_TIMEOUT) as stream:
            for start in range(0, mel.shape[1], CHUNK_FRAMES):
                stream.send(mel[:, start : start + CHUNK_FRAMES].T.astype("<f4").tobytes())
            stream.send("end")
            stream.recv(ANSWER_TIMEOUT)  # facts of the voice
            while isinstance(message := stream.recv(ANSWER_TIMEOUT), bytes):
                pieces.append(message)
    except InvalidStatus as error:
        raise _refusal(error.response.status_code == UNAVAILABLE, str(error)) from error
    if "detail" in json.loads(message):
        raise _refusal(stream.close_code == TRY_AGAIN_LATER, message)
    return _float32(b"".join(pieces))


def _refusal(is_full: bool, text: str) -> QueueFullError | BackendError:
    return (QueueFullError if is_full else BackendError)(text)


def _float32(samples: bytes) -> Audio:
    return np.frombuffer(samples, "<i2").astype(np.float32) / 32767
