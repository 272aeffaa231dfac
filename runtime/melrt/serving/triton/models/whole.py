"""Triton model for whole mels of any length; `melrt serve triton` copies this file into a model repository.

`execute` puts a mel into melrt's queue and returns, so that mels of all lengths share engine runs. While enough windows wait to keep the
engine busy, `execute` blocks, and further requests stay in Triton's own queue, which has a limit.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import triton_python_backend_utils as pb_utils

from melrt.serving.triton.voice import MetricsReporter, error_code, open_voice

CANCEL_POLL = 0.05
"""Seconds between two checks for cancelled requests."""


class TritonPythonModel:
    """The class that Triton's Python backend runs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the voice."""
        self.vocoder, _, self.output = open_voice(args, streams=False)
        self.metrics = MetricsReporter(pb_utils, self.vocoder, args)
        self.senders: dict[Future[Any], Any] = {}
        self.done: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self.responder = threading.Thread(target=self._respond, name="melrt-responses", daemon=True)
        self.responder.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue the mel of each request; the response follows when its audio is done."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                # The vocoder copies the mel, because Triton reuses the tensor's memory when `execute` returns.
                future = self.vocoder.submit(pb_utils.get_input_tensor_by_name(request, "mel").as_numpy(), self.output)
            except Exception as error:
                _send(sender, error)
                continue
            self.senders[future] = sender
            future.add_done_callback(self.done.put)

    def finalize(self) -> None:
        """Complete all admitted requests and release the voice."""
        self.vocoder.close(drain=True)
        self.done.put(None)
        self.responder.join()
        self.metrics.close()

    def _respond(self) -> None:
        """Send finished audio, and cancel the work of requests that their callers have cancelled."""
        checked = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                future = self.done.get(timeout=CANCEL_POLL)
                if future is None:
                    return
                _send(self.senders.pop(future), _result(future))
            if time.monotonic() > checked + CANCEL_POLL:
                checked = time.monotonic()
                self._cancel()

    def _cancel(self) -> None:
        for future, sender in self.senders.copy().items():
            if sender.is_cancelled():
                future.cancel()


def _result(future: Future[Any]) -> Any:
    """Return the audio or the error of a future."""
    if future.cancelled():
        return pb_utils.TritonError("the request was cancelled.", pb_utils.TritonError.CANCELLED)
    return future.exception() or future.result()


def _send(sender: Any, result: Any) -> None:
    """Send audio or an error as the only response to a request."""
    if isinstance(result, Exception):
        result = pb_utils.TritonError(str(result), getattr(pb_utils.TritonError, error_code(result)))
    if isinstance(result, pb_utils.TritonError):
        response = pb_utils.InferenceResponse(error=result)
    else:
        response = pb_utils.InferenceResponse([pb_utils.Tensor("audio", result)])
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as error:  # a response that cannot be sent must not keep the others from being sent
        pb_utils.Logger.log_error(f"melrt could not send a response: {error}")
