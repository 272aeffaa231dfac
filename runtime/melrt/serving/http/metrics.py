"""Metrics of the HTTP service in the text format of Prometheus."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from melrt.errors import MelrtError
from melrt.serving.http.service import Service

logger = logging.getLogger(__name__)

TOTALS = {
    "requests": "Utterances, and pushes of streams, admitted to the queue.", "cancelled": "Requests cancelled by their clients.",
    "failed": "Requests ended by an error.", "windows": "Windows computed.", "runs": "Runs that computed them.",
    "busy_seconds": "Time spent in those runs.", "underruns": "Times that audio came after its playback had run out.",
}  # fmt: skip
BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


class ServiceMetrics(Collector):
    """Counters of the service and of its voices, read when they are scraped."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        service = self._service
        yield CounterMetricFamily("melrt_http_admitted", "Requests and streams that got a place.", value=service.admitted)
        yield CounterMetricFamily("melrt_http_refused", "Requests and streams refused for lack of a place.", value=service.refused)
        yield GaugeMetricFamily("melrt_http_in_progress", "Requests and streams in progress.", value=service.in_progress)
        yield GaugeMetricFamily("melrt_voices_bytes", "Estimated memory of the loaded voices.", value=service.voices.memory)
        stats = service.voices.stats()
        loads = CounterMetricFamily("melrt_loads", "Times that the voice was loaded.", labels=["voice"])
        waiting = GaugeMetricFamily("melrt_queue_windows", "Windows that wait now.", labels=["voice"])
        totals = {name: CounterMetricFamily(f"melrt_{name}", text, labels=["voice"]) for name, text in TOTALS.items()}
        for voice, one in stats.items():
            loads.add_metric([voice], one.loads)
            if one.queue is not None:  # counters begin at 0 with each loading, as Prometheus expects of a restart
                waiting.add_metric([voice], one.queue.queue_windows)
                for name, family in totals.items():
                    family.add_metric([voice], getattr(one.queue, name))
        yield from (loads, waiting, *totals.values())


class Responses:
    """ASGI application around the service's that counts responses by path and status, and measures the time to their first byte."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._count = Counter("melrt_http_responses", "Responses begun.", ["path", "status"], registry=registry)
        text = "Time from the head of a request to the first byte of a successful response."
        self._seconds = Histogram("melrt_http_first_byte_seconds", text, ["path"], registry=registry, buckets=BUCKETS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = time.monotonic()

        async def count(message: Message) -> None:
            if message["type"].endswith("http.response.start"):
                path = getattr(scope.get("route"), "path", "other")  # an unknown path must not become a label
                self._count.labels(path, str(message["status"])).inc()
                if message["status"] == 200:
                    self._seconds.labels(path).observe(time.monotonic() - start)
            await send(message)

        try:
            await self.app(scope, receive, count)
        except RuntimeError as error:  # Starlette's, for an error after the response has begun; uvicorn then closes the connection
            if not isinstance(error.__cause__, MelrtError):
                raise
            logger.warning("a stream ended before its last audio: %s", error.__cause__)
