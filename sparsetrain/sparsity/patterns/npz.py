"""Arrays of a ``.npz`` file, each checked before memory is allocated for it.

``numpy.load`` believes the header of an array: a shape of 10^12 entries is allocated, whatever the file holds, and a
header that is no Python literal raises errors of several kinds. Here an array must have exactly the bytes that its
header announces, and all arrays together at most `FREE_BYTES` plus `EXPANSION` times the bytes of the file, which
bounds what compression can hide. The checksum of each member is compared by `zipfile`.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.errors import UserError

FREE_BYTES = 64 << 20
EXPANSION = 64
MAX_HEADER = 1024  # bytes; numpy writes 118 for an array of numbers
# Bool, integers, floats, complex, and the texts by which scipy names its formats.
_TYPE = re.compile(r"[<>=|]?([biufcSU][0-9]{1,4}|\?)")

_HEADER_LENGTH = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
_BROKEN = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError, KeyError, IndexError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a ``.npz`` file by name, in the byte order of this machine.

    Raises:
        UserError: no such file, a damaged archive, or a member that is not an array of numbers or text; one line.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path)
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError as error:
        raise UserError(f"{path} cannot be read as .npz: {error}") from None
    except _BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as .npz: {reason[:200]}") from None


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse members that no ``.npz`` has, and arrays that need much more memory than the file has bytes."""
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise UserError("two members have one name")
    for member in members:
        if not member.filename.endswith(".npy"):
            raise UserError(f"the member {member.filename!r:.60} is not an array")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise UserError(f"the member {member.filename!r:.60} has a compression that numpy does not use")
    total, most = sum(member.file_size for member in members), FREE_BYTES + EXPANSION * path.stat().st_size
    if total > most:
        raise UserError(f"its arrays have {total} bytes; of a file of this size at most {most} are read")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    name = f"the member {member.filename!r:.60}"
    content = archive.read(member)
    version = (content[6], content[7]) if len(content) > 8 and content.startswith(b"\x93NUMPY") else None
    if version not in _HEADER_LENGTH:
        raise UserError(f"{name} is not an array")
    start = 8 + struct.calcsize(_HEADER_LENGTH[version])
    (length,) = struct.unpack(_HEADER_LENGTH[version], content[8:start])
    if length > min(MAX_HEADER, len(content) - start):
        raise UserError(f"{name} has a header of {length} bytes; at most {MAX_HEADER} are read")
    dtype, fortran, shape = _header(content[start : start + length], name)
    announced, present = math.prod(shape) * dtype.itemsize, len(content) - start - length
    if announced != present:
        raise UserError(f"{name} announces {announced} bytes and has {present}")
    flat = np.frombuffer(content, dtype, offset=start + length)
    # A copy if numpy's order or the byte order differs, else a view of the bytes.
    return flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), order="C")


def _header(content: bytes, name: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """Return the type, the order and the shape that a header gives."""
    try:
        header = ast.literal_eval(content.decode("latin1"))
        dtype, fortran, shape = (header[key] for key in ("descr", "fortran_order", "shape"))
        kind = np.dtype(dtype) if isinstance(dtype, str) and _TYPE.fullmatch(dtype) else None
    except (SyntaxError, ValueError, TypeError, LookupError, MemoryError, RecursionError):
        raise UserError(f"{name} has no valid header") from None
    if kind is None or kind.itemsize > (1024 if kind.kind in "SU" else 16):
        raise UserError(f"{name} has the type {str(dtype)!r:.60}; numbers are needed")
    sides = isinstance(shape, tuple) and all(type(side) is int and 0 <= side < 2**48 for side in shape)
    if not isinstance(fortran, bool) or not sides or len(shape) > 8:
        raise UserError(f"{name} has the shape {str(shape)!r:.60}; up to 8 whole numbers are needed")
    return kind, fortran, shape
