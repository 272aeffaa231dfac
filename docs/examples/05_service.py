"""Synthesize mels over HTTP. `VOICE` is the bundle, `PORT` the port; `pip install ".[service]"` installs what it needs.

POST /speech returns a WAV file, POST /stream raw 16-bit samples as soon as they are ready.
The body is a mel (M, T) as raw float32 frames: `mel.T.astype("<f4").tobytes()`.
"""

import asyncio
import contextlib
import io
import os
import signal
import wave
from collections.abc import AsyncIterator
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from melrt import ClosedError, Limits, MelError, MelrtError, Options, OverdueError, QueueFullError, Vocoder

MAX_FRAMES = 4000  # longest utterance: 46 s
MAX_REQUESTS = int(os.environ.get("MAX_REQUESTS", "64"))  # in progress; a further one is refused before its upload
UPLOAD_SECONDS = float(os.environ.get("UPLOAD", "10"))  # longest time in which a mel must arrive
DRAIN_SECONDS = float(os.environ.get("DRAIN", "5"))  # time for load balancers to notice that this process is not ready
STATUS = {MelError: 422, QueueFullError: 503, ClosedError: 503, OverdueError: 504}


class Service:
    """State of the process."""

    vocoder: Vocoder
    server: uvicorn.Server
    draining = False
    in_progress = 0
    admitted = 0
    refused = 0

    async def admit(self) -> AsyncIterator[Vocoder]:
        """Reserve a place for one request until its response has been sent."""
        if self.draining or self.in_progress >= MAX_REQUESTS:
            self.refused += 1
            busy = f"{MAX_REQUESTS} requests are in progress already"
            raise HTTPException(503, "shutting down" if self.draining else busy, {"Retry-After": "1"})
        self.admitted += 1
        self.in_progress += 1
        try:
            yield self.vocoder
        finally:
            self.in_progress -= 1

    def drain(self) -> None:
        """Refuse new requests, close the port a little later, complete the admitted requests and end the process."""
        self.draining = True
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, setattr, self.server, "should_exit", True)

    def collect(self):
        """Yield the metrics for Prometheus."""
        stats = self.vocoder.stats()
        yield CounterMetricFamily("melrt_requests", "HTTP requests admitted.", value=self.admitted)
        yield CounterMetricFamily("melrt_refused", "HTTP requests refused.", value=self.refused)
        yield GaugeMetricFamily("melrt_requests_in_progress", "HTTP requests in progress.", value=self.in_progress)
        for name in ("cancelled", "failed", "windows", "runs", "busy_seconds", "underruns"):
            yield CounterMetricFamily(f"melrt_{name}", f"See {name} of Vocoder.stats().", value=getattr(stats, name))
        yield GaugeMetricFamily("melrt_queue_windows", "Windows that wait now.", value=stats.queue_windows)
        yield GaugeMetricFamily("melrt_open_streams", "Streams that are open now.", value=self.vocoder.open_streams)


service = Service()
metrics = CollectorRegistry()
metrics.register(service)
Admitted = Annotated[Vocoder, Depends(service.admit)]


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI):
    """Load the voice before the first request, and close it after the last."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, service.drain)
    limits = Limits(max_frames=MAX_FRAMES, timeout=20.0)
    with Vocoder.load(os.environ.get("VOICE", "demo/lj.melrt"), options=Options(limits=limits, sample_format="int16")) as service.vocoder:
        yield  # the port opens


app = FastAPI(lifespan=lifespan)


@app.post("/speech")
async def speech(request: Request, vocoder: Admitted) -> Response:
    """Return a WAV file."""
    audio = await while_connected(request, vocoder.call_async(await read_mel(request, vocoder)))
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, vocoder.sample_rate, 0, "NONE", ""))
        wav.writeframes(audio.tobytes())
    return Response(file.getvalue(), media_type="audio/wav")


@app.post("/stream")
async def stream(request: Request, vocoder: Admitted) -> Response:
    """Return 16-bit samples, as soon as they are ready."""
    mel = await read_mel(request, vocoder)
    pieces = vocoder.stream_async(mel[:, start : start + 16] for start in range(0, mel.shape[1], 16))
    first = await while_connected(request, anext(pieces))  # an error before the first audio still becomes a status

    async def samples():
        async with contextlib.aclosing(pieces):
            yield first.tobytes()
            async for audio in pieces:
                yield audio.tobytes()

    return StreamingResponse(samples(), media_type=f"audio/pcm;rate={vocoder.sample_rate}")


async def read_mel(request: Request, vocoder: Vocoder) -> np.ndarray:
    """Read the body as a mel (M, T), and no more of it than the longest utterance."""
    body, frame = bytearray(), 4 * vocoder.spec.n_mels
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_FRAMES * frame:
                    raise HTTPException(413, f"the mel has more than {MAX_FRAMES} frames")
    except TimeoutError:
        raise HTTPException(408, f"the mel did not arrive within {UPLOAD_SECONDS} s") from None
    if body.startswith(b"\x93NUMPY"):
        raise HTTPException(422, 'send raw float32 frames, not .npy: mel.T.astype("<f4").tobytes()')
    if not body or len(body) % frame:
        raise HTTPException(422, f"the body has {len(body)} bytes; a frame is {frame // 4} float32, {frame} bytes")
    return np.frombuffer(bytes(body), "<f4").reshape(-1, vocoder.spec.n_mels).T


async def while_connected(request: Request, work):
    """Return the result of the work; if the client disconnects, cancel the work, which frees its windows."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(request.receive())  # after the body, the next message is a disconnection
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has disconnected")
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


@app.exception_handler(MelrtError)
async def explain(_: Request, error: MelrtError) -> Response:
    """Return melrt's own message, which says what is wrong and what to do."""
    status = STATUS.get(type(error), 500)
    return JSONResponse({"detail": str(error)}, status, {"Retry-After": "1"} if status == 503 else None)


@app.get("/healthz")
async def alive() -> str:
    """Answer as long as the process runs."""
    return "alive"


@app.get("/readyz")
async def ready() -> str:
    """Tell a load balancer whether to send requests."""
    if service.draining:
        raise HTTPException(503, "draining")
    return "ready"


@app.get("/metrics")
async def scrape() -> Response:
    """Return the metrics for Prometheus."""
    return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8080"))
    config = uvicorn.Config(app, "0.0.0.0", port, limit_concurrency=500, timeout_graceful_shutdown=30)
    service.server = uvicorn.Server(config)
    service.server.run()
