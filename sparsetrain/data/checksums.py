"""Checksums of JSON values, and checksums of files that are computed once per process while the file is unchanged."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of

# A file that was modified this recently may change again without a new time stamp, so its checksum is not remembered.
_UNSETTLED_NS = 2_000_000_000
_known: dict[tuple[int, ...], str] = {}


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value in hexadecimal; equal values have equal checksums."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_once(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal.

    The checksum is remembered under the file's device, inode, size and times, so that a sweep reads each corpus once.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if (known := _known.get(key)) is not None:
            return known
        found = sha256_of(path)
        if max(status.st_mtime_ns, status.st_ctime_ns) + _UNSETTLED_NS < time.time_ns():
            _known[key] = found
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return found
