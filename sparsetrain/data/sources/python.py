"""The source ``python``: Python files of the standard library and of installed packages, each file a document.

The files are read where they are installed. Files of a package share a split, since they repeat each other's text.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from sparsetrain.data.checksums import digest, sha256_once
from sparsetrain.data.sources.base import Document, Source, clean_id
from sparsetrain.data.sources.registry import SourceConfig, register_source
from sparsetrain.errors import UserError, nearest

_SITES = ("site-packages", "dist-packages")  # installed packages inside the directory of the standard library


class PythonFiles(Source):
    """The files of the standard library and of ``packages``; the id is the path inside of the library.

    A file that is not UTF-8, such as a test of encodings, or that holds no text is left out and counted.

    Args:
        packages: names under which further packages are imported.

    Raises:
        UserError: a package is not installed, or has no Python file.
    """

    licence = (
        "standard library: Python Software Foundation License 2.0; packages: their own licences, see about_source; "
        "read at run time, not redistributed"
    )

    def __init__(self, packages: list[str]) -> None:
        self._files: list[tuple[str, Path]] = []  # id and place, in the order of the documents
        library = Path(sysconfig.get_path("stdlib"))
        self._add((path, library) for path in _walk(library))
        for name in sorted(set(packages)):
            found = [(path, top.parent) for top in _places(name) for path in _walk(top)]
            if not found:
                raise UserError(f"data.packages: the package {name} has no .py file")
            if any(library == above for _, above in found):
                raise UserError(f"data.packages: {name} is in the standard library, which is read in any case")
            self._add(found)
        self._packages = sorted(set(packages))

    def _add(self, found: Iterable[tuple[Path, Path]]) -> None:
        """Add files, each given with the directory that its id is relative to."""
        named = ((path.relative_to(above).as_posix(), path) for path, above in found)
        self._files += sorted((name, path) for name, path in named if _usable(name))

    def identity(self) -> dict[str, object]:
        """Return a hash over the names and the contents of the files, so that another Python makes another corpus."""
        contents = [[name, sha256_once(path)] for name, path in self._files]
        return {"files": len(contents), "sha256": digest(contents)}

    def documents(self) -> Iterator[Document]:
        """Yield the files with text; the group is the top-level name, such as ``json`` for ``json/decoder.py``."""
        for name, path in self._files:
            text = _text(path)
            if text:
                yield Document(name, text, group=name.partition("/")[0].removesuffix(".py"))

    def note(self) -> dict[str, object]:
        """Return Python's version, the number of files left out for each reason, and the packages' licences."""
        counts = {"files": len(self._files), "not_utf8": 0, "empty": 0}
        for _, path in self._files:
            text = _text(path)
            if not text:
                counts["not_utf8" if text is None else "empty"] += 1
        owners = metadata.packages_distributions() if self._packages else {}
        licences = {name: [_licence(owner) for owner in sorted(set(owners.get(name, ())))] for name in self._packages}
        return {"python": platform.python_version(), "counts": counts, "packages": licences}

    def size_estimate(self) -> int:
        """Return the size of the files in bytes."""
        return sum(path.stat().st_size for _, path in self._files)


def _walk(top: Path) -> Iterator[Path]:
    """Yield the Python files in a directory and below, without those of installed packages; or a file itself."""
    if top.is_file() and top.suffix == ".py":
        yield top
    for here, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in _SITES]
        yield from (Path(here, name) for name in files if name.endswith(".py"))


def _usable(name: str) -> bool:
    """Whether a name can be the id of a document: a file name may hold a line break, or bytes that are not UTF-8."""
    try:
        return clean_id(name, name) == name
    except UserError:
        return False


def _text(path: Path) -> str | None:
    """Return the text of a file, or None if it is not UTF-8.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or type(error).__name__}") from error
    return text if text.strip() else ""


def _places(name: str) -> list[Path]:
    """Return the directories of an installed package, or the file of a module; nothing of it is imported.

    Raises:
        UserError: nothing of this name is installed.
    """
    spec: ModuleSpec | None = None
    if isinstance(name, str) and name.isidentifier():
        spec = PathFinder.find_spec(name)
    if spec is None:
        known = metadata.packages_distributions()
        raise UserError(f"data.packages: no package {name!r} is installed{nearest(str(name), known)}")
    folders = spec.submodule_search_locations
    return [Path(place) for place in ([spec.origin or ""] if folders is None else folders)]


def _licence(distribution: str) -> str:
    """Return the name, the version and the licence of a distribution, as far as it says."""
    about = metadata.metadata(distribution)
    said = about.get_all("License-Expression") or about.get_all("License") or []
    classes = [entry for entry in about.get_all("Classifier") or [] if entry.startswith("License ::")]
    named = said or [", ".join(entry.rpartition(" :: ")[2] for entry in classes)]
    line = next(iter(named[0].splitlines()), "")[:100]  # some give the whole text of the licence
    return f"{distribution} {about['Version']}: {line or 'not given'}"


@register_source("python")
def _python(config: SourceConfig) -> PythonFiles:
    return PythonFiles(config.packages)
