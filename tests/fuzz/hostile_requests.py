"""Hostile HTTP requests and WebSocket streams as bytes, made from a generator of random numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import quote

import numpy as np

T = TypeVar("T")
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
_ODD = (
    "", "none", "tiny/../tiny", "x" * 3000, "\x00", "\ud800", "\U0001f600", "-1", "0", "1", "1e9", "9" * 30, "nan", "٣", "8000.0", "None",
    "{}", "a\r\nX: y", "%", "wav", "TINY", "96001", "7999",
)  # fmt: skip
_RATES = ("", "8000", "16000", "24000", "48000")
_FORMATS = ("pcm", "mulaw", "alaw") * 2 + ("wav", "flac", "opus")
_PATHS = (
    b"/v1/mel", b"/", b"/voices", b"/metrics", b"/healthz", b"/readyz", b"/v1/stream", b"/v1/sing", b"/%00", b"*", b"//", b"/\xff", b"x",
)  # fmt: skip
_HEADERS = (
    b"Expect: 100-continue\r\n", b"Expect: 200-never\r\n", b"Host: a\r\nHost: b\r\n", b"X: " + b"y" * 70_000 + b"\r\n", b"X:\r\n" * 300,
    b"Content-Type: multipart/form-data; boundary=x\r\n", b"Content-Type: \xff\xfe\r\n", b"Content-Encoding: gzip\r\n", b" folded: x\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
    UPGRADE, b"Range: bytes=9-1\r\n", b"Bad header\r\n", b"\x00: x\r\n", b"Content-Type: application/json\r\n",
)  # fmt: skip
_LENGTHS = (
    b"-1", b"0", b"1", b"0x10", b"1e3", b"9" * 15, b"9" * 18, b"9" * 19, b"9" * 400, b"9" * 5000, b"5, 5", b"", b"\xb2", b"+7", b"100000",
)  # fmt: skip
_CODES = (b"", b"\x03", b"\x03\xe8", b"\x00\x00", b"\xff\xff", b"\x03\xe8\xff\xff", b"\x03\xe8" + b"x" * 130)
_TEXTS = (b"", b"End", b"end ", b'{"end": 1}', b"\xff\xfe", b"x" * 2000, b"\x00")
_WRONG_HANDSHAKES = (b"", b"Sec-WebSocket-Version: 8\r\n", b"Sec-WebSocket-Key: x\r\n", b"Content-Length: 5\r\n")


def hostile_request(noise: np.random.Generator) -> bytes:
    """Return one request. About a third is right, so that what comes after the checks is attacked as well."""
    method = _one(noise, (b"GET", b"PUT", b"HEAD", b"OPTIONS", b"post", b"\xff", b"CONNECT")) if noise.random() < 0.06 else b"POST"
    path = _one(noise, _PATHS) if noise.random() < 0.15 else b"/v1/speech"
    head = b"%s %s?%s HTTP/%s\r\nHost: melrt\r\n" % (method, path, _query(noise), b"1.1" if noise.random() < 0.96 else b"1.0")
    if noise.random() < 0.8:
        head += b"Connection: close\r\n"
    if noise.random() < 0.15:
        head += _one(noise, _HEADERS)
    body = hostile_body(noise)
    match noise.integers(16):
        case 0:
            return head + b"Content-Length: %s\r\n\r\n" % _one(noise, _LENGTHS) + body
        case 1:
            return head + b"\r\n" + body
        case 2 | 3 | 4:
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(noise, body)
        case _:
            return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def hostile_stream(noise: np.random.Generator) -> bytes:
    """Return a WebSocket handshake and messages, as a client sends them that does not wait for answers."""
    head = b"GET /v1/stream?%s HTTP/1.1\r\nHost: melrt\r\n" % _query(noise)
    upgrade = UPGRADE
    if noise.random() < 0.15:
        lines = upgrade.splitlines(keepends=True)
        del lines[noise.integers(len(lines))]
        upgrade = b"".join(lines) + _one(noise, _WRONG_HANDSHAKES)
    messages = b"".join(_message(noise) for _ in range(noise.integers(8)))
    return head + upgrade + b"\r\n" + messages + (b"" if noise.random() < 0.03 else _frame(1, b"end"))


def hostile_body(noise: np.random.Generator, *, frames: int = 400) -> bytes:
    """Return the body of a request: a mel, mostly damaged. A mel of more than `frames` frames is refused."""
    length = noise.choice([5, 20, 40, 60, 80, 100, frames]) if noise.random() < 0.9 else noise.choice([1, 2, frames + 1, 3 * frames])
    mel = noise.standard_normal((80, length)).astype(np.float32)
    if noise.random() < 0.1:
        mel.flat[noise.integers(mel.size)] = noise.choice([np.nan, np.inf, -np.inf, 1e38, 1e-45])
    data = mel.T.tobytes()
    if noise.random() < 0.3:
        kind = str(noise.choice(["<f4", "<f4", "<f4", ">f4", "<f8", "<f2", "<i4", "<c8", "?", "U3"]))
        shaped = (mel, mel.T, mel[None], mel[:, 0], mel[None, None], mel[:0])[noise.choice(6, p=[0.6, 0.1, 0.1, 0.1, 0.05, 0.05])]
        file = io.BytesIO()
        with np.errstate(all="ignore"):
            np.save(file, shaped.astype(kind))
        data = file.getvalue()
        if noise.random() < 0.3:
            at = int(noise.integers(min(120, len(data))))
            data = data[:at] + _one(noise, (b"", b"9", b"\xff", b"{" * 200, b"(" * 500, b"-1,")) + data[at + int(noise.integers(3)) :]
    match noise.integers(20):
        case 0:
            return data[: noise.integers(len(data))]
        case 1:
            return data + noise.bytes(int(noise.integers(1, 400)))
        case 2:
            return _one(noise, (b"", b"\x00", b"{}", b"RIFF\x00\x00\x00\x00WAVE", b"\x93NUMPY", b"PK\x03\x04", noise.bytes(3200)))
    return data


def _query(noise: np.random.Generator) -> bytes:
    values = {"voice": "tiny", "format": _one(noise, _FORMATS), "rate": _one(noise, _RATES)}
    for name in list(values):
        if noise.random() < 0.07:
            values[name] = _one(noise, _ODD)
        if noise.random() < 0.05:
            del values[name]
    parts = [f"{name}={quote(value, safe='', errors='replace')}" for name, value in values.items()]
    if noise.random() < 0.1:
        parts.append(_one(noise, ("voice=other", "format[]=pcm", "=", "&&", "rate", "%zz", "timeout=1e99", "x=" + "y" * 5000)))
    return "&".join(parts).encode()


def _chunks(noise: np.random.Generator, body: bytes) -> bytes:
    sent = b""
    while body:
        size = int(noise.integers(1, len(body) + 1))
        sent += b"%x%s\r\n" % (size, b";x=y" if noise.random() < 0.05 else b"") + body[:size] + b"\r\n"
        body = body[size:]
        if noise.random() < 0.03:
            return sent + _one(noise, (b"zz\r\n", b"-1\r\n", b"fffffffffffffffffffff\r\n", b"5\r\nab", b"\r\n\r\n"))
    return sent + _one(noise, (b"0\r\n\r\n",) * 8 + (b"0\r\nX: y\r\n\r\n", b"0\r\n\xff\r\n\r\n"))


def _message(noise: np.random.Generator) -> bytes:
    """Return a message of frames, a message that the service does not take, or what is not a message of a WebSocket."""
    mel = noise.standard_normal((int(noise.choice([1, 3, 7, 16, 30])), 80)).astype(np.float32)
    frames = mel.tobytes()
    if noise.random() < 0.7:
        return _frame(2, frames)
    mel.flat[noise.integers(mel.size)] = noise.choice([np.nan, np.inf])
    begun, size = _frame(2, frames, final=False), int(noise.choice([0, 5, 125, 126]))
    return _one(noise, (
        _frame(2, mel.tobytes()), _frame(2, frames[: noise.integers(len(frames))]), _frame(1, _one(noise, _TEXTS)), _frame(1, frames),
        _frame(2, bytes(320 * 900)), begun, begun + _frame(0, frames), _frame(0, frames), _frame(int(noise.choice([3, 7, 11, 15])), b"abc"),
        _frame(9, bytes(size)), _frame(10, b""), _frame(8, _one(noise, _CODES)), _frame(2, frames, masked=False), b"\xf2" + frames,
        b"\x82\xff" + _one(noise, (b"\xff" * 8, b"\x7f" + b"\xff" * 7, (1 << 40).to_bytes(8, "big"))) + bytes(4),
    ))  # fmt: skip


def _frame(opcode: int, payload: bytes, *, final: bool = True, masked: bool = True) -> bytes:
    """Return a frame of RFC 6455, section 5.2, with an all-zero mask, which leaves the payload as it is."""
    size = len(payload)
    if size < 126:
        length, extended = size, b""
    else:
        length, extended = (126, size.to_bytes(2, "big")) if size < 1 << 16 else (127, size.to_bytes(8, "big"))
    return bytes([opcode | final << 7, length | masked << 7]) + extended + bytes(4 * masked) + payload


def _one(noise: np.random.Generator, values: Sequence[T]) -> T:
    return values[noise.integers(len(values))]
