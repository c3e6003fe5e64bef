"""The cache directory, which holds downloaded and derived files."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from sparsetrain import files

# What a user can do, besides freeing space, if the cache is full or not writable.
_ADVICE = "set SPARSETRAIN_CACHE to another directory"

file_errors = partial(files.file_errors, advice=_ADVICE)
whole_file = partial(files.whole_file, advice=_ADVICE)
whole_directory = partial(files.whole_directory, advice=_ADVICE)


def cache_directory() -> Path:
    """Return the cache directory: ``SPARSETRAIN_CACHE``, or ``sparsetrain`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        UserError: the variable holds no valid path.
    """
    if chosen := os.environ.get("SPARSETRAIN_CACHE"):
        return files.typed_path(chosen, "SPARSETRAIN_CACHE").absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return files.typed_path(base, "XDG_CACHE_HOME").absolute() / "sparsetrain"
    return files.typed_path("~/.cache", "HOME").absolute() / "sparsetrain"


def check_room(size: int = 1 << 16) -> None:
    """Check that the cache is writable and has room for ``size`` bytes, before work is done for it.

    Raises:
        UserError: it is not writable, or has too little room.
    """
    root = cache_directory()
    with file_errors(root, size):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            probe.write(bytes(size))
            probe.flush()
            os.fsync(probe.fileno())


def clear_leftovers() -> None:
    """Remove temporary files and directories of killed processes from the cache and its folders."""
    root = cache_directory()
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    for folder in (root, *folders):
        files.clear_leftovers(folder)
