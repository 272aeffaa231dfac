"""The HTTP interface: routes, and errors that say what is allowed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import wave
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from melrt.errors import AudioError, BundleError, ClosedError, MelError, MelrtError, OverdueError, QueueFullError
from melrt.serving.http.bodies import NPY, mel_of, mel_of_recording, read_mel, read_recording, while_connected
from melrt.serving.http.conversation import converse
from melrt.serving.http.formats import FORMATS, check_query, output_of
from melrt.serving.http.metrics import Responses, ServiceMetrics
from melrt.serving.http.page import page
from melrt.serving.http.service import Service
from melrt.types import Audio
from melrt.voices import Voices

logger = logging.getLogger(__name__)

STATUS = {MelError: 422, AudioError: 422, QueueFullError: 503, ClosedError: 503, OverdueError: 504}
# Frames that a stream takes at a time from a mel that is known whole.
PIECE = 16


def make_app(service: Service) -> FastAPI:
    """Make the ASGI application of a service."""
    registry = CollectorRegistry()
    registry.register(ServiceMetrics(service))
    # The pages of FastAPI's own documentation load scripts from another host.
    app = FastAPI(openapi_url=None, lifespan=None)
    app.add_middleware(Responses, registry=registry)
    app.add_exception_handler(MelrtError, explain)
    app.add_exception_handler(ClientDisconnect, explain)
    app.add_exception_handler(StarletteHTTPException, explain)
    routes = Routes(service, registry)
    app.add_api_route("/v1/speech", routes.speech, methods=["POST"], dependencies=[Depends(service.admit)])
    app.add_api_websocket_route("/v1/stream", routes.stream)
    app.add_api_route("/v1/mel", routes.mel, methods=["POST"], dependencies=[Depends(service.admit)])
    app.add_api_route("/", routes.page, methods=["GET", "HEAD"])
    for name in ("voices", "healthz", "readyz", "metrics"):
        app.add_api_route(f"/{name}", getattr(routes, name), methods=["GET", "HEAD"])
    return app


class Routes:
    """Functions that answer requests."""

    def __init__(self, service: Service, registry: CollectorRegistry) -> None:
        self._service = service
        self._registry = registry
        self._page = page()
        self.stream = converse(service)

    async def speech(self, request: Request, voice: str = "", format: str = "wav", rate: str = "") -> Response:
        """Return the audio of a mel: a file when it is complete, or raw samples as soon as they are ready."""
        check_query(request, "voice", "format", "rate")
        vocoder = await self._service.voice(voice)
        output = output_of(format, rate, vocoder)
        form = FORMATS[format]
        hertz = output.sample_rate or vocoder.sample_rate
        mel = await read_mel(request, vocoder.spec, self._service.config)
        if not form.streamed:
            audio = await while_connected(request, vocoder.call_async(mel, output))
            return Response(wav_file(audio, hertz) if format == "wav" else audio.tobytes(), media_type=form.media_type)
        pieces = vocoder.stream_async((mel[:, start : start + PIECE] for start in range(0, mel.shape[1], PIECE)), output=output)
        first = await while_connected(request, anext(pieces))  # an error before the first audio still becomes a status

        async def samples() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(pieces):  # type: ignore[type-var]  # an asynchronous generator
                yield first.tobytes()
                async for audio in pieces:
                    yield audio.tobytes()

        return StreamingResponse(samples(), media_type=f"{form.media_type};rate={hertz}")

    async def mel(self, request: Request, voice: str = "") -> Response:
        """Return raw float32 frames: those of a .npy file, or the mel of a recording, raw float32 samples at the voice's rate."""
        check_query(request, "voice")
        spec = (await self._service.voice(voice)).spec
        body = await read_recording(request, spec, self._service.config)
        mel = spec.check(mel_of(body, spec)) if body.startswith(NPY) else await asyncio.to_thread(mel_of_recording, body, spec)
        return Response(mel.T.astype("<f4").tobytes(), media_type="application/octet-stream")

    async def page(self) -> Response:
        """Return the page to look at and to listen to."""
        return self._page

    async def voices(self) -> dict[str, object]:
        """List the voices with what a client must know to make mels for them, and the limits."""
        config = self._service.config
        return {
            "voices": await asyncio.to_thread(_facts, self._service.voices),
            "formats": list(FORMATS),
            "limits": {"max_frames": config.max_frames, "max_requests": config.max_requests, "timeout_seconds": config.timeout},
        }

    async def healthz(self) -> str:
        """Answer as long as the process runs."""
        return "alive"

    async def readyz(self) -> str:
        """Tell a load balancer whether to send requests."""
        if self._service.draining:
            raise HTTPException(503, "the service is shutting down")
        return "ready"

    async def metrics(self) -> Response:
        """Return the metrics for Prometheus."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


async def explain(request: Request, error: Exception) -> Response:
    """Answer an error as JSON: what is wrong, and what is allowed."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it; the status is counted
    if isinstance(error, StarletteHTTPException):
        detail, status, headers = error.detail, error.status_code, error.headers
        if (status, detail) == (404, "Not Found"):
            paths = sorted({route.path for route in request.app.routes})
            detail = f"there is nothing at {request.url.path[:80]!r}; there are: {', '.join(paths)}"
            if request.url.path in paths:
                detail = f"{request.url.path} is for WebSocket connections, such as ws://HOST:PORT{request.url.path}"
        elif status == 405 and headers:
            detail = f"{request.method} is not allowed here; use {headers['Allow']}"
        return JSONResponse({"detail": detail}, status, headers)
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    if status == 500:
        logger.error("%s: %s", request.url.path, error)
    return JSONResponse({"detail": str(error)}, status, {"Retry-After": "1", "Connection": "close"} if status == 503 else None)


def wav_file(audio: Audio, sample_rate: int) -> bytes:
    """Return a WAV file of 16-bit samples."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, sample_rate, 0, "NONE", ""))
        wav.writeframes(audio.tobytes())
    return file.getvalue()


def _facts(voices: Voices) -> list[dict[str, object]]:
    """Return the facts of each voice; a damaged bundle has an `error` instead."""
    facts: list[dict[str, object]] = []
    stats = voices.stats()
    for name in voices.names:
        try:
            spec = voices.bundle(name).manifest.spec
        except BundleError as error:
            facts.append({"name": name, "error": str(error)})
        else:
            numbers = {"sample_rate": spec.sample_rate, "n_mels": spec.n_mels, "hop": spec.hop}
            facts.append({"name": name, **numbers, "convention": spec.describe(), "loaded": name in stats and stats[name].loaded})
    return facts
