"""Documents, the base class of their sources, and the checks that every source makes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsetrain.errors import UserError, nearest

_NAMES_SHOWN, _NAME_CHARACTERS = 20, 80  # most field names in an error, and most characters of each


@dataclass(frozen=True)
class Section:
    """A section of a structured abstract; ``category`` is NLM's normalised label, such as ``METHODS``, or empty."""

    label: str
    category: str
    text: str


@dataclass(frozen=True)
class Document:
    """One document of a corpus. Models are trained on ``text``, which has neither the title nor section labels.

    Documents with the same ``group`` share a split, for example the files of a package. Without one, the id decides.
    """

    id: str
    text: str
    title: str = ""
    sections: tuple[Section, ...] = ()
    group: str | None = None


class Source(ABC):
    """A source of documents, which can be read more than once.

    If its format allows, a source holds one document at a time, so that a corpus need not fit in memory. A subclass
    defines `identity` and `documents`; `register_source` has an example.

    Attributes:
        licence: the terms of the text, for the manifest of a corpus.
        long_documents: whether a document may be a whole book. The end of the longest one is then validation text where
            the other documents are too small for it, see `divide`.
    """

    licence: str = "not given"
    long_documents: bool = False

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return JSON values that identify the content: equal for equal content, different for different content."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents, in the same order at each call; raises `UserError` if they cannot be read."""

    def open(self, report: Callable[[float], None]) -> None:
        """Prepare the content for reading, for example download it, and call ``report`` with the done share, 0 to 1."""
        report(1.0)

    def note(self) -> dict[str, object]:
        """Return further JSON values about the content for the manifest, such as the number of dropped documents."""
        return {}

    def size_estimate(self) -> int:
        """Return the approximate size of the text in bytes, 0 if unknown."""
        return 0


def content_id(text: str) -> str:
    """Return an id for a document without one: a hash of its text, so that copies of a document share a split."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def clean_id(value: object, where: str, what: str = "id") -> str:
    """Return a document's id or group, which is text or a whole number, as one line without surrounding space.

    Raises:
        UserError: the id has another type, or is not valid text; the line begins with ``where``.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: the {what} is {type(value).__name__}, neither text nor a whole number")
    return " ".join(check_text(value, where).split())


def check_document(document: Document, where: str) -> None:
    """Raise `UserError`, beginning with ``where``, unless `clean_id` keeps the document's id and its text is valid."""
    if clean_id(document.id, where) != document.id:
        raise UserError(f"{where}: document id {document.id!r} must be text on one line, its words one space apart")
    check_text(document.text, f"{where}, document {document.id!r}")


def check_text(text: object, where: str) -> str:
    """Return ``text`` if it is a string that UTF-8 can encode, else raise `UserError`, beginning with ``where``."""
    if not isinstance(text, str):
        raise UserError(f"{where}: the text is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: lone surrogate at character {error.start}, which is not text") from error
    return text


@dataclass(frozen=True)
class Fields:
    """The fields of a row that become a document, besides ``id``, which counts wherever a row has one.

    Args:
        text: the field with the text.
        group: the field with the group, which every row has; None for no groups.
    """

    text: str = "text"
    group: str | None = None

    def document(self, row: dict[str, Any], where: str) -> Document | None:
        """Return the document of a row; None if the row has no text.

        Raises:
            UserError: a field is missing or has the wrong type; the line begins with ``where``.
        """
        text = pick_field(row, self.text, where)
        if text is None or not check_text(text, where).strip():
            return None
        name = row.get("id")
        group = None
        if self.group is not None:
            group = clean_id(pick_field(row, self.group, where, "group_field"), where, "group")
        return Document(content_id(text) if name is None else clean_id(name, where), text, group=group)

    def identity(self) -> dict[str, object]:
        """Return what identifies the choice of fields; groups count only if there are some."""
        return {"text_field": self.text, **({} if self.group is None else {"group_field": self.group})}


def pick_field(row: dict[str, Any], field: str, where: str, setting: str = "text_field") -> Any:
    """Return ``row[field]``, or raise `UserError` with the names of the row's fields."""
    if field not in row:
        options = ", ".join(_shown(name) for name in sorted(row)[:_NAMES_SHOWN]) or "none"
        options += ", …" if len(row) > _NAMES_SHOWN else ""
        raise UserError(f"{where}: no field {setting}={field!r}; it has {options}{_shown(nearest(field, row))}")
    return row[field]


def _shown(name: str) -> str:
    """Return the name of a field for an error: shortened, with replacements for unprintable characters."""
    return "".join(mark if mark.isprintable() else "\ufffd" for mark in name[:_NAME_CHARACTERS])
