"""Files and directories that appear whole or not at all.

Everything is built under a temporary name beside its final one, flushed to the disk and renamed. A reader therefore
never sees half a file, and of two processes that build the same thing the second finds the first one's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.reading import read_json

__all__ = [
    "file_errors",
    "flush",
    "read_json",
    "sha256_of",
    "whole_directory",
    "whole_file",
    "write_json",
    "write_text",
]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def file_errors(directory: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[None]:
    """Turn a full disk and a directory that cannot be written into one line that says what to do.

    ``needed_bytes`` is an estimate of what the whole operation writes; ``advice`` names another way out, for example
    ``"set SPARSETRAIN_CACHE"``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            needs = f": needs about {max(1, round(needed_bytes / 1e6))} MB" if needed_bytes else ""
            way = f"; free some or {advice}" if advice else "; free some and run the same command again"
            raise UserError(f"no space left on {directory}{needs}{way}") from error
        if error.errno in _UNWRITABLE:
            way = f"; {advice}" if advice else ""
            raise UserError(f"cannot write to {directory} ({error.strerror}){way}") from error
        raise


def flush(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it to ``path``, else remove it."""
    with file_errors(path.parent, needed_bytes, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            flush(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; on success flush its files and rename it to ``path``.

    If another process has put its own at ``path`` meanwhile, that one stays and this one is removed: both were built
    from the same inputs.
    """
    with file_errors(path.parent, needed_bytes, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                flush(file)
            temporary.chmod(0o755)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with whole_file(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all; NaN is refused, since it is no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
