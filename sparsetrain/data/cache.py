"""Where downloaded and derived files live, and how they get there whole or not at all.

Every file and directory of the cache is built under a temporary name beside its final one, flushed to the disk and
renamed. A reader therefore never sees half a file, and of two processes that build the same thing the second
finds the first one's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def cache_directory() -> Path:
    """Return the cache directory: ``SPARSETRAIN_CACHE``, else the user's cache folder (``XDG_CACHE_HOME``)."""
    if chosen := os.environ.get("SPARSETRAIN_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "sparsetrain"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def file_errors(directory: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk and a directory that cannot be written into one line that says what to do.

    ``needed_bytes`` is an estimate of what the whole operation writes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            megabytes = max(1, round(needed_bytes / 1e6))
            raise UserError(
                f"no space left on {directory}: needs about {megabytes} MB; free some or set SPARSETRAIN_CACHE"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"cannot write to {directory} ({error.strerror}); set SPARSETRAIN_CACHE to a directory you own"
            ) from error
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it to ``path``, else remove it."""
    with file_errors(path.parent, needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            _flush(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; on success flush its files and rename it to ``path``.

    If another process has put its own at ``path`` meanwhile, that one stays and this one is removed: both were
    built from the same inputs.
    """
    with file_errors(path.parent, needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            temporary.chmod(0o755)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
