"""Where downloaded and derived files live."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from sparsetrain import files

# What a user can do when the cache is full or not writable, beside making room.
_ADVICE = "set SPARSETRAIN_CACHE to another directory"

file_errors = partial(files.file_errors, advice=_ADVICE)
whole_file = partial(files.whole_file, advice=_ADVICE)
whole_directory = partial(files.whole_directory, advice=_ADVICE)


def cache_directory() -> Path:
    """Return the cache directory: ``SPARSETRAIN_CACHE``, else the user's cache folder (``XDG_CACHE_HOME``)."""
    if chosen := os.environ.get("SPARSETRAIN_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "sparsetrain"
