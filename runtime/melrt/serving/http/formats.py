"""Formats of the audio that the service sends."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import HTTPException
from starlette.requests import HTTPConnection

from melrt.errors import ConfigError
from melrt.files.audio import Encoding
from melrt.files.output import Output
from melrt.vocoder import Vocoder


@dataclass(frozen=True, slots=True)
class Format:
    """One value of `format` in a request."""

    encoding: Encoding
    """Encoding of the samples."""
    media_type: str
    """Type of the response; raw samples also state their rate."""
    streamed: bool = False
    """True if the audio leaves in pieces, as soon as they are ready."""


FORMATS = {
    "wav": Format("int16", "audio/wav"), "flac": Format("flac", "audio/flac"), "opus": Format("opus", "audio/ogg"),
    "pcm": Format("int16", "audio/pcm", streamed=True), "mulaw": Format("mulaw", "audio/PCMU", streamed=True),
    "alaw": Format("alaw", "audio/PCMA", streamed=True),
}  # fmt: skip
STREAMED = tuple(name for name, one in FORMATS.items() if one.streamed)


def check_query(request: HTTPConnection, *allowed: str) -> None:
    """Check that a request has no other parameters than these: one that is misspelled would be ignored.

    Raises:
        HTTPException: 422, with what is allowed.
    """
    for name in request.query_params:
        if name not in allowed:
            raise HTTPException(422, f"there is no parameter {name[:80]!r}; there are: {', '.join(allowed)}")


def output_of(name: str, rate: str, vocoder: Vocoder, *, streamed: bool = False) -> Output:
    """Return the output that a request asks for.

    Args:
        name: Value of `format`.
        rate: Value of `rate`, the sample rate in Hz; empty for the voice's own.
        vocoder: The voice.
        streamed: True if only formats that leave in pieces are possible.

    Raises:
        HTTPException: 422, with what is allowed.
    """
    allowed = STREAMED if streamed else tuple(FORMATS)
    if name not in allowed:
        raise HTTPException(422, f"format is {name[:80]!r}; it must be one of {', '.join(allowed)}")
    try:
        output = Output(int(rate) if rate.isdecimal() and len(rate) < 10 else rate or None, FORMATS[name].encoding)  # type: ignore[arg-type]
        output.check(vocoder.sample_rate, streamed=FORMATS[name].streamed)
    except ConfigError as error:
        raise HTTPException(422, str(error)) from error
    return output
