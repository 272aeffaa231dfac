"""Triton model for streams: mel frames in, audio as soon as it is exact; `melrt serve triton` copies this file into a model repository.

An utterance is a sequence. Its requests have one sequence id, the first the start flag and the last the end flag; a mel that is known
whole is one request with both flags. Each request is answered with the audio that its frames complete, one response for each piece.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from melrt import Output, Vocoder
from melrt.errors import MelError, MelrtError, QueueFullError
from melrt.scheduling.stream import Stream
from melrt.serving.triton.voice import MetricsReporter, error_code, open_voice

PUSH_FRAMES = 8
"""Frames pushed to the stream at a time; the stream gathers them into pieces at its own pace."""
MAX_WAITING = 256
"""Requests of one sequence that may wait for their audio; a further one is refused."""
NOT_OPEN = "the sequence is not open: it failed, ended, or was idle too long. Begin another with the start flag."


class TritonPythonModel:
    """The class that Triton's Python backend runs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the voice."""
        self.vocoder, serving, self.output = open_voice(args, streams=True)
        self.idle_timeout = serving.timeout
        self.metrics = MetricsReporter(pb_utils, self.vocoder, args)
        self.utterances: dict[Any, Utterance] = {}

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to the thread of its utterance."""
        self.utterances = {key: utterance for key, utterance in self.utterances.items() if utterance.thread.is_alive()}
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except Exception as error:
                _refuse(sender, error)

    def finalize(self) -> None:
        """Complete the open utterances, for which Triton waits, and release the voice."""
        for utterance in self.utterances.values():
            utterance.end()
        for utterance in self.utterances.values():
            utterance.thread.join()
        self.vocoder.close()
        self.metrics.close()

    def _accept(self, request: Any, sender: Any) -> None:
        key, flags = request.correlation_id(), request.flags()
        if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            if key in self.utterances:
                self.utterances.pop(key).end()  # a sequence that begins again is another utterance
            self.utterances[key] = Utterance(self.vocoder, self.output, self.idle_timeout)
        if key not in self.utterances:
            raise MelError(NOT_OPEN)
        # A copy, because Triton reuses the tensor's memory when `execute` returns.
        frames = np.array(pb_utils.get_input_tensor_by_name(request, "mel").as_numpy())
        self.utterances[key].accept(frames, bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END), sender)


class Utterance:
    """A stream and the thread that synthesizes it."""

    def __init__(self, vocoder: Vocoder, output: Output | None, idle_timeout: float) -> None:
        """Open a stream and start its thread.

        Args:
            vocoder: Loaded voice.
            output: Sample rate and encoding of the audio; None for the voice's own.
            idle_timeout: Seconds that the stream may wait for frames.
        """
        self.stream = vocoder.open_stream(output=output)
        self.limits = vocoder.options.limits
        self.idle_timeout = idle_timeout
        self.frames = 0
        self.ended = False
        self.lock = threading.Lock()  # held while a request is put into the inbox, so that none is put there after the thread's last look
        self.inbox: queue.SimpleQueue[tuple[np.ndarray[Any, Any], bool, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="melrt-stream", daemon=True)
        self.thread.start()

    def accept(self, frames: np.ndarray[Any, Any], end: bool, sender: Any) -> None:
        """Queue frames for synthesis; a refusal ends the stream.

        Raises:
            MelError: The utterance is longer than the limit.
            QueueFullError: Too many requests wait for their audio.
        """
        try:
            self.limits.check_frames(self.frames + frames.shape[-1])
            if self.inbox.qsize() >= MAX_WAITING:
                raise QueueFullError(f"{MAX_WAITING} requests of this sequence wait for their audio, which is the limit; wait for audio.")
        except MelrtError:
            self.end()
            raise
        with self.lock:
            if self.ended:
                raise MelError(NOT_OPEN)
            self.frames += frames.shape[-1]
            self.ended = end
            self.inbox.put((frames, end, sender))

    def end(self) -> None:
        """End the stream after the requests that are already queued, without the last piece of audio."""
        with self.lock:
            self.ended = True
            self.inbox.put(None)

    def _run(self) -> None:
        with self.stream, contextlib.suppress(queue.Empty):
            while not self.stream.closed and (request := self.inbox.get(timeout=self.idle_timeout)):
                _answer(self.stream, *request)
        with self.lock:
            self.ended = True
        while not self.inbox.empty():  # requests that came while the stream failed
            if request := self.inbox.get():
                _refuse(request[2], MelError(NOT_OPEN))


def _answer(stream: Stream, frames: np.ndarray[Any, Any], end: bool, sender: Any) -> None:
    """Send the audio that the frames complete; if the client has cancelled the request, close the stream instead."""
    try:
        for start in range(0, max(frames.shape[-1], 1), PUSH_FRAMES):
            if sender.is_cancelled():
                stream.close()
                break
            _send(sender, stream.push(frames[:, start : start + PUSH_FRAMES]))
        if end and not stream.closed:
            _send(sender, stream.flush())
    except Exception as error:
        stream.close()
        _refuse(sender, error)
    else:
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _send(sender: Any, audio: np.ndarray[Any, Any]) -> None:
    if audio.size:
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("audio", audio)]))


def _refuse(sender: Any, error: Exception) -> None:
    reason = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error_code(error)))
    try:
        sender.send(pb_utils.InferenceResponse(error=reason), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as unsent:  # a response that cannot be sent must not keep the sequence's other requests from being answered
        pb_utils.Logger.log_error(f"melrt could not send a response: {unsent}")
