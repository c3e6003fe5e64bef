"""The wire format of protocol buffers: enough of it to read the fields of a message."""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | float | bytes


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Yield the number and the value of each field of a message, in the order of the file.

    A value is an unsigned integer, a float of 32 bits, the eight bytes of a 64-bit value, or the bytes of a text or of
    a message inside.

    Raises:
        ValueError: the bytes are no message.
    """
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == 2:
            size, place = _varint(message, place)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or number == 0 or place + size > len(message):
            raise ValueError(f"no field at byte {place}")
        content = message[place : place + size]
        yield number, struct.unpack("<f", content)[0] if kind == 5 else content
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the integer at ``place``, seven bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        byte = message[place]
        value, place = value | (byte & 0x7F) << shift, place + 1
        if byte < 0x80:
            return value, place
    raise ValueError(f"no integer before byte {place}")
