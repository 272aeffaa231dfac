"""Reading of protocol buffers (https://protobuf.dev/programming-guides/encoding) without the library of their schema."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from melrt.errors import BundleError

_VARINT, _LONG, _BYTES, _SHORT = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
Value = int | memoryview


def fields(data: memoryview, known: Collection[int], what: str) -> Iterator[tuple[int, Value]]:
    """Yield number and value of each field of a message, in the order of the file.

    Args:
        data: The message.
        known: Numbers of the fields that may occur.
        what: Name of the message for errors.

    Raises:
        BundleError: The message is damaged, or has another field.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number not in known:
            raise BundleError(f"{what} has a field {number}, which melrt does not write")
        value: Value
        if wire == _VARINT:
            value, at = _varint(data, at)
        else:
            size = {_LONG: 8, _SHORT: 4}.get(wire)
            if wire == _BYTES:
                size, at = _varint(data, at)
            if size is None or at + size > len(data):
                raise BundleError(f"{what} is damaged at byte {at}")
            value, at = data[at : at + size], at + size
        yield number, value


def message(value: Value) -> memoryview:
    """Return a field that must be a message."""
    if isinstance(value, int):
        raise BundleError("a number is stored where a message belongs")
    return value


def text(value: Value) -> str:
    """Return a field that must be text."""
    try:
        return bytes(message(value)).decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"a name is not text in UTF-8 ({error})") from error


def integers(value: Value) -> list[int]:
    """Return the signed 64-bit numbers of a field: one, or several that are packed."""
    if isinstance(value, int):
        return [_signed(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(_signed(number))
    return numbers


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a number and the position after it."""
    number = 0
    for shift, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number & ((1 << 64) - 1), at + shift + 1
    raise BundleError(f"a number at byte {at} is damaged")
