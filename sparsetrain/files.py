"""Files and directories that appear completely or not at all.

Everything is built under a temporary name beside its final one, flushed to the disk and renamed. So a reader never sees
a partial file, and if two processes build the same thing, the second finds the result of the first. A killed process
leaves its temporary file, which the next process in that place removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
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

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)


def typed_path(text: str | Path, name: str) -> Path:
    """Return a path that a user typed, with a leading ``~`` or ``~user`` expanded.

    Args:
        name: name of the setting, option or variable that holds the text, for the message.

    Raises:
        UserError: the text is empty, is too long or contains a NUL byte; its user does not exist; or it leads through a
            loop of links or a directory without permission.
    """
    typed = str(text)
    shown = typed if len(typed) <= 80 else f"{typed[:60]}... ({len(typed)} characters)"
    if not typed:
        raise UserError(f"{name} is empty; it must be a path")
    try:
        path = Path(typed).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whether the file must exist depends on who uses the path
    except RuntimeError:
        raise UserError(f"{name}={shown}: there is no such user") from None
    except OSError as error:
        raise UserError(f"{name}={shown}: {os.strerror(error.errno or errno.EINVAL)}") from None
    except ValueError as error:  # a NUL byte, or a character that file names cannot contain
        raise UserError(f"{name}={shown!r} is not a path: {error}") from None
    return path


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def file_errors(directory: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[None]:
    """Turn the error of a full disk or an unwritable directory into a `UserError` that says what to do.

    Args:
        directory: the directory, for the message.
        needed_bytes: estimated size of everything that the operation writes.
        advice: another way out, for example ``"set SPARSETRAIN_CACHE"``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            needs = f": needs about {max(1, round(needed_bytes / 1e6))} MB" if needed_bytes else ""
            way = f"; free some or {advice}" if advice else "; free some and run the same command again"
            raise UserError(f"no space left on {directory}{needs}{way}") from error
        if error.errno in _UNWRITABLE:
            way = f"; {advice}" if advice else ""
            raise UserError(f"cannot write to {directory} ({error.strerror}){way}") from error
        raise


def flush(path: Path) -> None:
    """Force the bytes of a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Names of temporary files, and of the directories of a sweep and a download: a prefix, eight characters of `tempfile`.
_TEMPORARY = re.compile(r"(?:\.(?P<target>.+)\.[a-z0-9_]{8}\.part|\.(?:sweep-|download\.)[a-z0-9_]{8})")


def _lock(descriptor: int) -> bool:
    """Lock an open file or directory; return False if another process holds the lock.

    The system releases the lock when the process ends for any reason. On a file system without locks nothing is locked,
    and nothing is ever considered a leftover.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _temporary(make: Callable[[], str]) -> Iterator[Path]:
    """Yield a new file or directory, locked so that other processes do not take it for a leftover; then remove it."""
    while True:
        path = Path(make())
        # Before it is locked, another process may take it for a leftover and remove it.
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if _lock(descriptor) and path.exists():
            break
        os.close(descriptor)
    try:
        yield path
    finally:
        _remove(path)
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _new_file(directory: Path, prefix: str, suffix: str) -> str:
    descriptor, name = tempfile.mkstemp(suffix, prefix, directory)
    os.close(descriptor)
    return name


@contextlib.contextmanager
def temporary_directory(directory: Path, prefix: str) -> Iterator[Path]:
    """Yield a new directory in ``directory``, after removing those of killed processes with the same prefix."""
    clear_leftovers(directory, prefix)
    with _temporary(lambda: tempfile.mkdtemp(prefix=prefix, dir=directory)) as path:
        yield path


def clear_leftovers(directory: Path, prefix: str = ".") -> None:
    """Remove temporary files and directories of killed processes from ``directory``, but none of a live process.

    Only names in this directory that have the form of this module are considered, and only if their lock is free.
    """
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(prefix)]
    except OSError:
        return
    for name in names:
        if not _TEMPORARY.fullmatch(name):
            continue
        with contextlib.suppress(OSError):  # it is gone, or another user's, or locked
            descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(directory / name)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it to ``path``, otherwise remove it.

    Leftovers of killed processes for the same path are removed first.
    """
    with file_errors(path.parent, needed_bytes, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}."
        clear_leftovers(path.parent, prefix)
        with _temporary(lambda: _new_file(path.parent, prefix, ".part")) as temporary:
            yield temporary
            flush(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            flush(path.parent)


@contextlib.contextmanager
def whole_directory(path: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; on success flush its files and rename it to ``path``.

    If another process has created ``path`` in the meantime, its directory stays and this one is removed: both were
    built from the same inputs. Leftovers of killed processes for the same path are removed first.
    """
    with file_errors(path.parent, needed_bytes, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}."
        clear_leftovers(path.parent, prefix)
        with _temporary(lambda: tempfile.mkdtemp(".part", prefix, path.parent)) as temporary:
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


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, completely or not at all."""
    with whole_file(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, completely or not at all; NaN raises `ValueError`, because JSON has no NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
