"""A voice on NVIDIA Triton, written by `melrt serve triton`: whole mels of any length in, audio out.

`execute` hands a mel to melrt's in-flight queue and returns, so that mels of all lengths share engine runs. While enough windows wait
to keep the engine busy it blocks, and further requests stay in Triton's own queue, which is bounded.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import triton_python_backend_utils as pb_utils

from melrt.serving.triton.voice import Meter, error_code, open_voice

CANCEL_POLL = 0.05
"""Seconds between two looks whether a caller has gone."""


class TritonPythonModel:
    """What Triton runs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the voice."""
        self.vocoder, _ = open_voice(args)
        self.meter = Meter(pb_utils, self.vocoder, args)
        self.pending: dict[Future[Any], Any] = {}  # to the sender of its response
        self.done: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self.answering = threading.Thread(target=self._answer, name="melrt-answers", daemon=True)
        self.answering.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue each request's mel; its response follows when its audio is done."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                # melrt copies it: Triton takes the tensor back when this returns
                future = self.vocoder.submit(pb_utils.get_input_tensor_by_name(request, "mel").as_numpy())
            except Exception as error:
                _send(sender, error)
                continue
            self.pending[future] = sender
            future.add_done_callback(self.done.put)

    def finalize(self) -> None:
        """Speak what was accepted, and let go of the voice."""
        self.vocoder.close(drain=True)
        self.done.put(None)
        self.answering.join()
        self.meter.close()

    def _answer(self) -> None:
        """Send what is done, and cancel what nobody waits for."""
        looked = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                future = self.done.get(timeout=CANCEL_POLL)
                if future is None:
                    return
                _send(self.pending.pop(future), _outcome(future))
            if time.monotonic() > looked + CANCEL_POLL:
                looked = time.monotonic()
                self._cancel()

    def _cancel(self) -> None:
        for future, sender in self.pending.copy().items():
            if sender.is_cancelled():
                future.cancel()


def _outcome(future: Future[Any]) -> Any:
    if future.cancelled():
        return pb_utils.TritonError("the request was cancelled.", pb_utils.TritonError.CANCELLED)
    return future.exception() or future.result()


def _send(sender: Any, outcome: Any) -> None:
    """Audio, or why there is none."""
    if isinstance(outcome, Exception):
        outcome = pb_utils.TritonError(str(outcome), getattr(pb_utils.TritonError, error_code(outcome)))
    if isinstance(outcome, pb_utils.TritonError):
        response = pb_utils.InferenceResponse(error=outcome)
    else:
        response = pb_utils.InferenceResponse([pb_utils.Tensor("audio", outcome)])
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as error:  # one caller's answer must not keep the others from theirs
        pb_utils.Logger.log_error(f"melrt could not send a response: {error}")
