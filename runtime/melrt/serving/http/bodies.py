"""Bodies of requests: read within limits of bytes and time, and turned into mels."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException, Request
from numpy.typing import NDArray

from melrt.checks import all_finite
from melrt.files.mels import one_utterance
from melrt.mel.features import mel_from_audio
from melrt.mel.spec import MelSpec
from melrt.serving.http.config import ServiceConfig
from melrt.serving.http.service import refusal

T = TypeVar("T")
NPY = b"\x93NUMPY"
# A header of numpy's first format version is shorter than this.
_HEADER_BYTES = 1 << 16


async def read_mel(request: Request, spec: MelSpec, config: ServiceConfig) -> NDArray[Any]:
    """Read the body of a request as a mel (M, T).

    Raises:
        HTTPException: 408, 413 or 422, with what is allowed.
        MelError: The mel does not fit the voice's convention.
    """
    body = await read_body(request, _mel_bytes(spec, config), config)
    mel = mel_of(body, spec)
    if mel.shape[1] > config.max_frames:
        raise refusal(413, f"the mel has {mel.shape[1]} frames; at most {config.max_frames} are accepted. Cut the text into shorter parts")
    return spec.check(mel)  # whole, before a stream of audio begins


async def read_recording(request: Request, spec: MelSpec, config: ServiceConfig) -> bytes:
    """Read a body that is a recording of float32 samples, or a mel.

    Raises:
        HTTPException: 408 or 413, with what is allowed.
    """
    return await read_body(request, max(4 * spec.hop * config.max_frames, _mel_bytes(spec, config)), config)


def _mel_bytes(spec: MelSpec, config: ServiceConfig) -> int:
    return 8 * spec.n_mels * config.max_frames + _HEADER_BYTES  # 8 bytes: .npy files may be float64


async def read_body(request: Request, most: int, config: ServiceConfig) -> bytes:
    """Read a body of at most `most` bytes; a longer one that says so is refused before it is read.

    Raises:
        HTTPException: 408 or 413; the connection is closed, so that the rest is not read.
    """
    remedy = "Cut the text into shorter parts"
    too_long = refusal(413, f"the body has more than {most} bytes, enough for {config.max_frames} frames. {remedy}")
    declared = request.headers.get("content-length", "0")
    if int(declared) > most:  # h11 admits at most 20 digits
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(config.upload_seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise refusal(408, f"the body did not arrive within {config.upload_seconds:g} s (--upload-seconds). Send it faster") from None
    return bytes(body)


def mel_of(body: bytes, spec: MelSpec) -> NDArray[Any]:
    """Return the mel (M, T) of a .npy file, or of raw float32 frames one after the other.

    Raises:
        HTTPException: 422, with what is allowed.
    """
    if body.startswith(NPY):
        return one_utterance(_npy(body), "the .npy file")
    frame = 4 * spec.n_mels
    if not body or len(body) % frame:
        raise HTTPException(
            422,
            f"the body has {len(body)} bytes; a frame of this voice is {spec.n_mels} float32, {frame} bytes. Send raw frames, "
            f'mel.T.astype("<f4").tobytes(), or a .npy file of shape ({spec.n_mels}, frames)',
        )
    return np.frombuffer(body, "<f4").reshape(-1, spec.n_mels).T


def mel_of_recording(body: bytes, spec: MelSpec) -> NDArray[Any]:
    """Compute the mel (M, T) of raw float32 samples.

    Raises:
        HTTPException: 422, with what is allowed.
        AudioError: Too short for one frame.
    """
    if len(body) % 4 or not all_finite(audio := np.frombuffer(body, "<f4")):
        what = f"{len(body)} bytes" if len(body) % 4 else "values that are not finite"
        raise HTTPException(422, f"the recording has {what}; send float32 samples at {spec.sample_rate} Hz, or a mel as a .npy file")
    return mel_from_audio(audio, spec)


def _npy(body: bytes) -> NDArray[Any]:
    """Read a .npy file without numpy's own reader of arrays, which allocates what the header says before it looks at the data."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read_header(file)
    except Exception as error:  # a damaged header may fail anywhere in numpy's parser, for example with a TokenError
        raise HTTPException(422, "the header of the .npy file cannot be read. Save the mel with np.save") from error
    if kind.kind != "f" or kind.itemsize > 8 or len(body) - file.tell() != kind.itemsize * int(np.prod(shape, dtype=object)):
        raise HTTPException(422, f"the .npy file says {kind} of shape {shape} in {len(body)} bytes; send float32 or float64, complete")
    return np.frombuffer(body, kind, offset=file.tell()).reshape(shape, order="F" if fortran else "C").astype(np.float32)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
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
