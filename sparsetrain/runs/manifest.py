"""The manifest of a checkpoint directory: sizes and hashes of its files, in a format in which every byte is checked.

``manifest.json`` holds a format version, the step, the size and SHA-256 of every other file, and a digest of itself.
Its content has exactly one valid serialisation, and reading compares the file with it byte for byte. So no byte of
the directory can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from sparsetrain.errors import UserError
from sparsetrain.files import flush, sha256_of
from sparsetrain.reading import parse_json
from sparsetrain.shapes import Count, check

FORMAT = 1
MANIFEST = "manifest.json"


class _File(TypedDict):
    size: Count
    sha256: str


class _Body(TypedDict):
    step: Count
    files: dict[str, _File]


class RefusedError(Exception):
    """A checkpoint cannot be used; the message says why."""


def canonical(value: Any) -> bytes:
    """Return the only JSON serialisation of ``value`` that a checkpoint may contain.

    Raises:
        TypeError: ``value`` holds something that JSON cannot represent.
    """
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _sealed(body: Mapping[str, Any]) -> bytes:
    return canonical({**body, "digest": hashlib.sha256(canonical(body)).hexdigest()})


def write_durably(path: Path, content: bytes) -> None:
    """Write a file; its bytes are on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def seal(directory: Path, step: int, names: Iterable[str]) -> None:
    """Flush the files ``names`` to disk and write their manifest."""
    files = {}
    for name in names:
        path = directory / name
        flush(path)
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    write_durably(directory / MANIFEST, _sealed({"format": FORMAT, "step": step, "files": files}))
    flush(directory)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RefusedError(f"{path.name} is missing") from None
    except OSError as error:
        raise RefusedError(f"{path.name} cannot be read: {error.strerror}") from None


def read_manifest(directory: Path, step: int) -> dict[str, Any]:
    """Return the manifest of the checkpoint of ``step``.

    Raises:
        RefusedError: it is missing, was changed, or has another format or step.
    """
    content = _read(directory / MANIFEST)
    try:
        body = {key: value for key, value in parse_json(content, MANIFEST, dict).items() if key != "digest"}
        genuine = content == _sealed(body)
    except UserError:  # not UTF-8, not JSON, not an object, nested beyond the limit
        genuine = False
    if not genuine:
        raise RefusedError(f"{MANIFEST} has been changed or is incomplete")
    if body.get("format") != FORMAT:
        raise RefusedError(f"it has format {body.get('format')}, but this version reads format {FORMAT}")
    try:
        check(body, _Body, MANIFEST)
    except UserError as error:
        raise RefusedError(str(error)) from None
    if body["step"] != step:
        raise RefusedError(f"{MANIFEST} is of step {body['step']}")
    return body


def read_file(directory: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Return the content of the file ``name``, after comparing it with the manifest.

    Raises:
        RefusedError: the file is missing or unreadable, or differs from the manifest.
    """
    expected = manifest["files"].get(name)
    if expected is None:
        raise RefusedError(f"{name} is not in {MANIFEST}")
    content = _read(directory / name)
    if len(content) != expected["size"]:
        raise RefusedError(f"{name} has {len(content)} bytes, expected {expected['size']}")
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise RefusedError(f"{name} does not have the SHA-256 that {MANIFEST} gives")
    return content
