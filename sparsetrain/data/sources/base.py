"""Documents, what a source of them is, and the checks that every source makes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsetrain.errors import UserError, nearest

_NAMES_SHOWN, _NAME_CHARACTERS = 20, 80  # of the fields that an error names


@dataclass(frozen=True)
class Section:
    """A part of a structured abstract. ``category`` is NLM's normalised name of it, e.g. ``METHODS``, or empty."""

    label: str
    category: str
    text: str


@dataclass(frozen=True)
class Document:
    """One document of a corpus. ``text`` is what a model is trained on: neither title nor section labels are in it."""

    id: str
    text: str
    title: str = ""
    sections: tuple[Section, ...] = ()


class Source(ABC):
    """Where documents come from.

    A source can be read more than once. It holds one document at a time where its format allows that, so that a corpus
    need not fit in memory. A subclass defines `identity` and `documents`; see `register_source` for an example.

    Attributes:
        licence: what the manifest of a corpus says about the terms of the text.
    """

    licence: str = "not given"

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return what tells this source's content from another's; JSON values, equal for equal content."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents, in the same order at each call."""

    def open(self, report: Callable[[float], None]) -> None:
        """Make the content ready to be read, telling ``report`` the share that is done, 0 to 1."""
        report(1.0)

    def note(self) -> dict[str, object]:
        """Return what the manifest says about the content beside ``identity``, e.g. what was left out of it."""
        return {}

    def size_estimate(self) -> int:
        """Return about how many bytes of text there are; 0 where that is not known."""
        return 0


def content_id(text: str) -> str:
    """Return the id of a document that has none: a hash of its text, so that copies of it share a split."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def clean_id(value: object, where: str) -> str:
    """Return a document id, text or a whole number, as one line without surrounding space.

    Raises `UserError` that begins with ``where`` for any other id.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: the id is {type(value).__name__}, neither text nor a whole number")
    return " ".join(check_text(value, where).split())


def check_document(document: Document, where: str) -> None:
    """Raise `UserError` that begins with ``where`` unless a document has an id as of `clean_id`, and a usable text."""
    if clean_id(document.id, where) != document.id:
        raise UserError(f"{where}: document id {document.id!r} must be text on one line, its words one space apart")
    check_text(document.text, f"{where}, document {document.id!r}")


def check_text(text: object, where: str) -> str:
    """Return ``text`` if it is a string that UTF-8 can hold, else raise `UserError` that begins with ``where``."""
    if not isinstance(text, str):
        raise UserError(f"{where}: the text is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: lone surrogate at character {error.start}, which is not text") from error
    return text


def pick_field(row: dict[str, Any], field: str, where: str) -> Any:
    """Return ``row[field]``, or raise `UserError` that names the fields there are."""
    if field not in row:
        options = ", ".join(_shown(name) for name in sorted(row)[:_NAMES_SHOWN]) or "none"
        options += ", …" if len(row) > _NAMES_SHOWN else ""
        raise UserError(f"{where}: no field text_field={field!r}; it has {options}{_shown(nearest(field, row))}")
    return row[field]


def _shown(name: str) -> str:
    """Return the name of a field as part of a line."""
    return "".join(mark if mark.isprintable() else "\ufffd" for mark in name[:_NAME_CHARACTERS])
