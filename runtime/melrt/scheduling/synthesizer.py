"""Make the requests of one voice from mel frames: check the frames, extend their ends and plan their windows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from melrt.backends.base import DeviceBackend, DeviceUtterance
from melrt.errors import ConfigError
from melrt.files.output import Encoder, Output
from melrt.mel.arrays import on_gpu
from melrt.mel.level_check import LevelCheck
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import ReceptiveField, Span, Window, plan
from melrt.scheduling.queue import RequestQueue
from melrt.scheduling.request import DeviceRequest, HostRequest, OutputFormat, Request
from melrt.types import Audio, Mel


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Synthesizer:
    """State that a vocoder shares with its streams, and the one place where requests are made."""

    spec: MelSpec
    """Mel convention of the input."""
    output: OutputFormat
    """Format of the audio."""
    field: ReceptiveField
    """Receptive field of the network."""
    edges: Edges
    """Frames added at an utterance's ends."""
    queue: RequestQueue
    """Queue of this voice's backend."""
    level_check: LevelCheck
    """Warning about mels of another convention."""

    @property
    def fewest_frames(self) -> int:
        """Fewest frames that an utterance must have."""
        return max(self.field.smallest_input - self.edges.left - self.edges.right, 1)

    def owned_frames(self, mel: ArrayLike) -> Mel:
        """Check one utterance (M, T) and copy it if need be, so that the caller may refill its array while the windows wait.

        Raises:
            MelError: The mel does not fit this voice, or is in GPU memory.
        """
        self.check_call(mel)
        frames = self.spec.check(mel, self.fewest_frames)
        if frames.ndim != 2:
            raise self.spec.wrong_axes(frames.shape)
        if not np.may_share_memory(frames, np.asarray(mel)):
            return frames
        copy = self.output.empty(frames.shape, frames.dtype)
        copy[...] = frames
        return copy

    def encoder(self, output: Output | None) -> Encoder | None:
        """Return a new encoder for one utterance; None if the output is what the voice makes anyway.

        Raises:
            ConfigError: The output does not support this voice's rate.
            MissingExtraError: A package that it needs is not installed.
        """
        rate = self.spec.sample_rate
        if output is None or (output.sample_rate in (None, rate) and output.encoding == self.output.sample_format):
            return None
        return Encoder(output, rate, self.queue.count_clipped)

    def utterance(self, frames: Mel, output: Output | None = None, result: Audio | None = None) -> HostRequest:
        """Make the request for a whole utterance.

        Args:
            frames: Checked frames (M, T). They are not copied.
            output: Sample rate and encoding of the audio; None for what the voice makes.
            result: Where the audio of the voice's own rate and format shall be, (T*hop,); None for new memory.

        Raises:
            MelError: The utterance is longer than `Limits.max_frames`.
        """
        windows = self._plan(frames.shape[1])
        encoder = self.encoder(output)
        made = replace(self.output, encode=encoder) if encoder else self.output
        request = HostRequest(self.edges.extend(frames), 0, windows, made, self._deadline(), result)
        request.observe = partial(self.level_check.observe, frames)
        return request

    def utterances(self, mel: ArrayLike, output: Output | None = None) -> tuple[Sequence[Request], Any]:
        """Make the requests for a mel (M, T) or (B, M, T) in any memory, one per utterance.

        Returns:
            The requests, and the array (T*hop,) or (B, T*hop) that they fill together; None if they have encoded audio as their results.

        Raises:
            MelError: The mel does not fit this voice.
            ConfigError: The output is not possible for this mel.
        """
        self.check_call(mel)
        backend = self.queue.backend
        if not (hasattr(backend, "run_on_device") and on_gpu(mel)):
            frames = self.spec.check(mel, self.fewest_frames)
            if output is not None and output.makes_file and frames.ndim == 3:
                raise ConfigError(f"output: {output.encoding!r} makes a file for each utterance, which one array cannot hold. Use batch().")
            utterances = frames.reshape(-1, *frames.shape[-2:])
            if self.encoder(output) is not None:
                return [self.utterance(one, output) for one in utterances], None
            self.queue.limits.check_frames(frames.shape[-1])
            shape = *frames.shape[:-2], frames.shape[-1] * self.output.hop
            audio = self.output.empty(shape, self.output.sample_format)
            rows = audio.reshape(len(utterances), -1)
            return [self.utterance(one, output, row) for one, row in zip(utterances, rows, strict=True)], audio
        if self.encoder(output) is not None:
            raise ConfigError("output: audio in GPU memory keeps the voice's rate and format. Pass the mel in host memory.")
        device = cast(DeviceBackend, backend)
        view = device.view_mel(mel)
        batch, bands, total = view.shape
        self.spec.check_shape((bands, total), self.fewest_frames)
        windows = list(self._plan(total))
        array, memory = device.make_audio(view, total * self.output.hop)
        places = (DeviceUtterance(view, memory, index, self.edges) for index in range(batch))
        return [DeviceRequest(place, windows, self._deadline()) for place in places], array

    def check_call(self, mel: ArrayLike, received: int = 0) -> None:
        """Check what must be known before a lock is taken or frames are converted: the process, and the number of frames.

        Args:
            mel: Frames that have not been checked.
            received: Earlier frames of the same utterance.

        Raises:
            BackendError: This process was forked after the vocoder was loaded.
            MelError: An array has more frames than `Limits.max_frames`.
        """
        self.queue.check_process()
        shape: tuple[int, ...] = getattr(mel, "shape", ())
        if len(shape) > 1:
            self.queue.limits.check_frames(received + shape[-1])

    def _plan(self, frames: int) -> Iterator[Window]:
        """Plan a whole utterance of this many frames."""
        self.queue.limits.check_frames(frames)
        total = self.edges.left + frames + self.edges.right
        span = Span(self.edges.left, self.edges.left + frames, total, ended=True)
        return plan(span, self.field, self.queue.policy)

    def _deadline(self) -> float:
        return time.monotonic() + self.queue.limits.default_deadline
