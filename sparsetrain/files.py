"""Files and directories that appear whole or not at all.

Everything is built under a temporary name beside its final one, flushed to the disk and renamed. A reader therefore
never sees half a file, and of two processes that build the same thing the second finds the first one's. A process that
is killed leaves what it was writing under the temporary name; the next one in that place removes it.
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
    """Return the path that somebody typed: as it is, but for ``~`` and ``~user`` at its beginning.

    Args:
        name: the setting, option or variable that holds the text, for the message.

    Raises:
        UserError: the text cannot be a path here, or the system refuses to look: it is empty or too long, has a NUL
            byte, names the home of nobody, or leads through a loop of links or a directory without permission.
    """
    typed = str(text)
    shown = typed if len(typed) <= 80 else f"{typed[:60]}... ({len(typed)} characters)"
    if not typed:
        raise UserError(f"{name} is empty; it must be a path")
    try:
        path = Path(typed).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is to be there, only its reader or writer knows
    except RuntimeError:
        raise UserError(f"{name}={shown}: there is no user of this name, whose home it could be in") from None
    except OSError as error:
        raise UserError(f"{name}={shown}: {os.strerror(error.errno or errno.EINVAL)}") from None
    except ValueError as error:  # a NUL byte, or a character that no file's name can have
        raise UserError(f"{name}={shown!r} is no path: {error}") from None
    return path


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
        if error.errno in NO_SPACE:
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


# What is being written, and the directories of a sweep and of a download: a prefix, eight characters of `tempfile`.
_TEMPORARY = re.compile(r"(?:\.(?P<target>.+)\.[a-z0-9_]{8}\.part|\.(?:sweep-|download\.)[a-z0-9_]{8})")


def _lock(descriptor: int) -> bool:
    """Lock an open file or directory; return False where another process has it.

    The system gives the lock back when a process ends, however it ends. Where a file system has no locks nothing is
    locked, and nothing is ever taken for abandoned either.
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
    """Yield a new file or directory, locked so that no other process takes it for a leftover; remove what is there."""
    while True:
        path = Path(make())
        # Another process may look at it before it is locked, and remove it.
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
    """Yield a new directory in ``directory``; those of the prefix that killed processes left there are removed."""
    clear_leftovers(directory, prefix)
    with _temporary(lambda: tempfile.mkdtemp(prefix=prefix, dir=directory)) as path:
        yield path


def clear_leftovers(directory: Path, prefix: str = ".") -> None:
    """Remove what processes that were killed left in ``directory``, and nothing that a live process writes.

    It looks at the names in this one directory, and at a lock for each name of the form that this module gives.
    """
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(prefix)]
    except OSError:
        return
    for name in names:
        if not _TEMPORARY.fullmatch(name):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(directory / name)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, needed_bytes: int = 0, advice: str = "") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it to ``path``, else remove it.

    What a killed process left of the same file is removed.
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

    If another process has put its own at ``path`` meanwhile, that one stays and this one is removed: both were built
    from the same inputs. What a killed process left of the same directory is removed.
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
    """Write ``text`` to ``path``, whole or not at all."""
    with whole_file(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all; NaN is refused, since it is no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
