"""A voice on NVIDIA Triton, written by `melrt serve triton`: mel frames in, audio as early as it is exact.

An utterance is a sequence: its requests have one sequence id, the first the start flag and the last the end flag, and a mel that is
known whole is one request with both. Each request gets the audio that its frames make ready, in as many responses as there are pieces.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from melrt import Vocoder
from melrt.errors import MelError, MelrtError, QueueFullError
from melrt.scheduling.stream import Stream
from melrt.serving.triton.voice import Meter, error_code, open_voice, probe_mel

PIECE = 8
"""Frames given to the stream at a time; it gathers them to pieces of its own pace."""
MOST_AHEAD = 256
"""Requests of one sequence that wait to be spoken; a further one is refused."""
NOT_OPEN = "the sequence is not open: it failed, ended, or was idle too long. Begin another with the start flag."


class TritonPythonModel:
    """What Triton runs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the voice."""
        self.vocoder, serving = open_voice(args)
        self.vocoder(probe_mel(self.vocoder.bundle))  # Triton has no warm-up for sequences
        self.idle = serving.timeout
        self.meter = Meter(pb_utils, self.vocoder, args)
        self.utterances: dict[Any, Utterance] = {}

    def execute(self, requests: list[Any]) -> None:
        """Give each request to the thread of its utterance."""
        self.utterances = {key: utterance for key, utterance in self.utterances.items() if utterance.thread.is_alive()}
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._give(request, sender)
            except Exception as error:
                _refuse(sender, error)

    def finalize(self) -> None:
        """Let utterances that are open come to their end, which Triton waits for, and let go of the voice."""
        for utterance in self.utterances.values():
            utterance.leave()
        for utterance in self.utterances.values():
            utterance.thread.join()
        self.vocoder.close()
        self.meter.close()

    def _give(self, request: Any, sender: Any) -> None:
        key, flags = request.correlation_id(), request.flags()
        if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            if key in self.utterances:
                self.utterances.pop(key).leave()  # a sequence that begins again is another utterance
            self.utterances[key] = Utterance(self.vocoder, self.idle)
        if key not in self.utterances:
            raise MelError(NOT_OPEN)
        # a copy: Triton takes the tensor back when `execute` returns
        frames = np.array(pb_utils.get_input_tensor_by_name(request, "mel").as_numpy())
        self.utterances[key].take(frames, bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END), sender)


class Utterance:
    """A stream, and the thread that speaks it."""

    def __init__(self, vocoder: Vocoder, idle: float) -> None:
        """Open a stream.

        Args:
            vocoder: The voice.
            idle: Seconds that it may wait for frames.
        """
        self.stream = vocoder.open_stream()
        self.limits = vocoder.options.limits
        self.idle = idle
        self.frames = 0  # taken
        self.ended = False  # no more are
        self.lock = threading.Lock()  # whoever puts a request into the inbox knows that it is going to be answered
        self.inbox: queue.SimpleQueue[tuple[np.ndarray[Any, Any], bool, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._speak, name="melrt-stream", daemon=True)
        self.thread.start()

    def take(self, frames: np.ndarray[Any, Any], end: bool, sender: Any) -> None:
        """Take frames to speak; what cannot be taken ends the stream.

        Raises:
            MelError: More frames than are let in.
            QueueFullError: The caller is too far ahead of the audio.
        """
        try:
            self.limits.check_frames(self.frames + frames.shape[-1])
            if self.inbox.qsize() >= MOST_AHEAD:
                raise QueueFullError(f"{MOST_AHEAD} requests of this sequence wait to be spoken, which is the limit; wait for audio.")
        except MelrtError:
            self.leave()
            raise
        with self.lock:
            if self.ended:
                raise MelError(NOT_OPEN)
            self.frames += frames.shape[-1]
            self.ended = end
            self.inbox.put((frames, end, sender))

    def leave(self) -> None:
        """End without a last piece, after what was taken."""
        with self.lock:
            self.ended = True
            self.inbox.put(None)

    def _speak(self) -> None:
        with self.stream, contextlib.suppress(queue.Empty):
            while not self.stream.closed and (given := self.inbox.get(timeout=self.idle)):
                _answer(self.stream, *given)
        with self.lock:
            self.ended = True
        while not self.inbox.empty():  # came while the stream failed
            if given := self.inbox.get():
                _refuse(given[2], MelError(NOT_OPEN))


def _answer(stream: Stream, frames: np.ndarray[Any, Any], end: bool, sender: Any) -> None:
    """Send the audio that the frames make ready, unless its listener has gone."""
    try:
        for start in range(0, max(frames.shape[-1], 1), PIECE):
            if sender.is_cancelled():
                stream.close()
                break
            _send(sender, stream.push(frames[:, start : start + PIECE]))
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
    except Exception as unsent:  # the sequence's other requests must still be answered
        pb_utils.Logger.log_error(f"melrt could not send a response: {unsent}")
