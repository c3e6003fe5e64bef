"""The manifest of a prepared corpus: the content of its directory, with checksums of the files and of the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from sparsetrain.data.checksums import digest, sha256_once
from sparsetrain.errors import UserError
from sparsetrain.reading import read_json
from sparsetrain.shapes import Count, Positive, check

MANIFEST = "manifest.json"
TRAIN_IDS = "train_ids.txt"
VALIDATION_BYTES = "validation.bytes.bin"
"""The UTF-8 bytes of text of each validation token, uint32; only for a tokenizer that is not lossless."""

SPLITS = ("train", "validation")


class _Split(TypedDict):
    documents: Count
    tokens: Count
    bytes: Count
    sha256: str


class _Splits(TypedDict):
    train: _Split
    validation: _Split


class _RoundTrip(TypedDict):
    documents: Count
    changed: Count
    unknown_tokens: Count


class _Manifest(TypedDict):
    source: str
    licence: str
    built_from: dict[str, Any]
    about_source: dict[str, Any]
    tokenizer_sha256: str
    vocab_size: Positive
    dtype: Annotated[str, Meta(pattern=r"^uint(16|32)\Z")]
    splits: _Splits
    left_out: dict[str, int]
    versions: dict[str, str]
    validation: NotRequired[str]
    round_trip: NotRequired[_RoundTrip]
    validation_bytes_sha256: NotRequired[str]
    train_ids_sha256: NotRequired[str]
    digest: NotRequired[str]


# Manifests of the first versions have neither the checksum of the ids nor their own; the checksums of their token files
# are compared all the same.
_LATER = {"train_ids_sha256", "digest", "validation", "round_trip", "validation_bytes_sha256"}


def write_manifest(directory: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest of a corpus, with the checksums of its ids and of itself; all other files must be complete."""
    sealed = {**body, "train_ids_sha256": sha256_once(directory / TRAIN_IDS)}
    sealed["digest"] = digest(sealed)
    (directory / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a corpus.

    Raises:
        UserError: the file is missing, damaged, or no manifest; the line says that the directory can be deleted.
    """
    try:
        manifest: dict[str, Any] = read_json(directory / MANIFEST, dict)
        body = {key: value for key, value in manifest.items() if key != "digest"}
        check(manifest, _Manifest, "it")
        of_old = manifest.keys() == _Manifest.__annotations__.keys() - _LATER
        if not of_old and manifest.get("digest") != digest(body):
            raise UserError("its content does not have its checksum")
    except UserError as error:
        raise UserError(
            f"{directory} has no readable {MANIFEST} ({error}); delete the directory to build it again"
        ) from None
    return manifest


def check_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the files of a corpus have the checksums that its manifest gives."""
    expected = {f"{split}.bin": manifest["splits"][split]["sha256"] for split in SPLITS}
    if "train_ids_sha256" in manifest:
        expected[TRAIN_IDS] = manifest["train_ids_sha256"]
    if "validation_bytes_sha256" in manifest:
        expected[VALIDATION_BYTES] = manifest["validation_bytes_sha256"]
    for name, checksum in expected.items():
        if sha256_once(directory / name) != checksum:
            raise UserError(
                f"{directory / name} is damaged: it does not have the checksum of {MANIFEST}; delete the directory to "
                "build it again"
            )


def read_train_ids(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the ids of the training documents, in the order of their tokens.

    Raises:
        UserError: the file is missing or has changed since it was written.
    """
    path = directory / TRAIN_IDS
    try:
        content = path.read_bytes()
        ids = content.decode().split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); delete the directory to build it again") from None
    checksum = manifest.get("train_ids_sha256", hashlib.sha256(content).hexdigest())
    if hashlib.sha256(content).hexdigest() != checksum or len(ids) != manifest["splits"]["train"]["documents"]:
        raise UserError(f"{path} is damaged: it is not what {MANIFEST} says; delete the directory to build it again")
    return ids
