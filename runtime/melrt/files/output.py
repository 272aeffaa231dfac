"""Output: the sample rate and encoding in which audio leaves a vocoder."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from melrt.checks import check_fields, one_of, optional, whole
from melrt.errors import ConfigError
from melrt.files.audio import ENCODINGS, FILE_KINDS, Encoding, FileKind, audio_package, clipped, to_int16, write_samples
from melrt.types import Audio, FloatAudio

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
_RATES = whole(4000, 192_000)
# Seconds of signal from which a resampler's delay is measured: several times the longest block of soxr's filters.
_MEASURED_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Output:
    """Sample rate and encoding of audio. The default is float32 samples at the voice's own rate, which is exact."""

    sample_rate: int | None = None
    """Sample rate in Hz; None for the voice's own."""
    encoding: Encoding = "float32"
    """`float32`; `int16`; `mulaw` or `alaw` (G.711, one byte a sample); `flac` or `opus` (the bytes of a whole file)."""

    def __post_init__(self) -> None:
        check_fields(self, {"sample_rate": optional(_RATES), "encoding": one_of(*ENCODINGS)}, "output")
        if self.sample_rate is not None:
            self.check(self.sample_rate)

    def check(self, sample_rate: int, *, streamed: bool = False) -> None:
        """Check that a voice's audio can leave it in this form.

        Args:
            sample_rate: Sample rate of the voice in Hz.
            streamed: True for audio that leaves in pieces.

        Raises:
            ConfigError: The encoding does not support the sample rate, or cannot be streamed.
        """
        rate = self.sample_rate or sample_rate
        if self.encoding == "opus" and rate not in OPUS_RATES:
            raise ConfigError(
                f"output: Opus does not support {rate} Hz; it supports {', '.join(map(str, OPUS_RATES))} Hz. Give another sample rate, "
                "for example 24000."
            )
        if streamed and self.makes_file:
            samples = ", ".join(name for name in ENCODINGS if not FILE_KINDS[name].compressed)
            raise ConfigError(
                f"output: encoding {self.encoding!r} makes a whole file and cannot be streamed: libsndfile completes an Opus page once a "
                f"second, and a FLAC header at the end. Use one of {samples}, or synthesize the utterance in one call."
            )

    @property
    def makes_file(self) -> bool:
        """True if the result is the bytes of a file, not samples."""
        return FILE_KINDS[self.encoding].compressed

    @property
    def file_kind(self) -> FileKind:
        """Kind of file for this encoding."""
        return FILE_KINDS[self.encoding]

    def latency(self, sample_rate: int) -> float:
        """Return the longest time in seconds by which resampling delays a stream; 0 without resampling.

        Args:
            sample_rate: Sample rate of the voice in Hz.
        """
        return resampling_delay(sample_rate, self.sample_rate or sample_rate)


class Encoder:
    """Turns the float samples of one utterance, whole or in pieces, into an output. For use by one thread at a time."""

    def __init__(self, output: Output, sample_rate: int, count_clipped: Callable[[int], None]) -> None:
        """Prepare an utterance.

        Args:
            output: Sample rate and encoding.
            sample_rate: Sample rate of the voice in Hz.
            count_clipped: Function that is told how many samples were clipped, if any were.

        Raises:
            ConfigError: The encoding does not support the voice's rate.
            MissingExtraError: soxr or soundfile is not installed.
        """
        output.check(sample_rate)
        self._encoding = output.encoding
        self._rate = output.sample_rate or sample_rate
        self._count_clipped = count_clipped
        self._resampler = None if self._rate == sample_rate else _resampler(sample_rate, self._rate)
        if self._encoding not in ("float32", "int16"):
            audio_package("soundfile")

    def __call__(self, samples: Audio, *, last: bool = True) -> Audio:
        """Encode a piece.

        Args:
            samples: Shape (N,), float32, or int16 with full scale 32767.
            last: True for the last piece; the resampler then returns what it holds.

        Returns:
            Samples of the encoding's type, shape (N',); for `mulaw` and `alaw` uint8, and for `flac` and `opus` the bytes of the file.
        """
        audio: FloatAudio = samples if samples.dtype == np.float32 else np.float32(1 / 32767) * samples
        if self._resampler is not None:
            audio = self._resampler.resample_chunk(audio, last=last)
        if self._encoding == "float32":
            return audio
        if count := clipped(audio):
            self._count_clipped(count)
        return to_int16(audio) if self._encoding == "int16" else self._encode(audio)

    def _encode(self, audio: FloatAudio) -> Audio:
        kind = FILE_KINDS[self._encoding]
        encoded = io.BytesIO()
        container = kind.container if kind.compressed else "RAW"
        with audio_package("soundfile").SoundFile(encoded, "w", self._rate, 1, kind.subtype, format=container) as file:
            write_samples(file, audio, self._encoding)
        return np.frombuffer(encoded.getvalue(), np.uint8).copy()


def _resampler(rate: int, new_rate: int) -> Any:
    """Return a soxr stream, whose output does not depend on how the samples are cut into pieces."""
    return audio_package("soxr").ResampleStream(rate, new_rate, 1, dtype="float32", quality="HQ")


@lru_cache
def resampling_delay(rate: int, new_rate: int) -> float:
    """Measure the longest time in seconds by which soxr holds samples back, with samples that come one by one.

    Raises:
        MissingExtraError: soxr is not installed.
    """
    if rate == new_rate:
        return 0.0
    resampler, sample = _resampler(rate, new_rate), np.zeros(1, np.float32)
    returned, longest = 0, 0.0
    for received in range(1, int(_MEASURED_SECONDS * rate)):
        longest = max(longest, received / rate - returned / new_rate)
        returned += len(resampler.resample_chunk(sample))
    return longest
