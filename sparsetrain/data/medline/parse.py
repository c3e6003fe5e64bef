"""Abstracts out of a MEDLINE XML file inside a zip archive, as JSON lines.

Runs as a script in a process of its own (``python parse.py ARCHIVE MEMBER OUTPUT``), one per file, because XML
parsing does not release the interpreter lock. It imports the standard library only, so that the process starts at
once. While it works it prints the compressed bytes that it has consumed, one number a line.
"""

from __future__ import annotations

import gzip
import json
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from typing import IO, Protocol

_REPORT_EVERY = 500  # records
# A file of MEDLINE is 200 MB of XML. More than this is no such file, but one made to fill the memory.
MOST_BYTES = 1 << 30


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Guarded:
    """A stream of XML of at most ``most`` bytes, without entities: MEDLINE declares none, and they can be bombs."""

    def __init__(self, stream: _Stream, most: int) -> None:
        self._stream = stream
        self._left = most
        self._tail = b""

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError("the XML is larger than any file of MEDLINE")
        if b"<!ENTITY" in self._tail + content:
            raise ValueError("the XML declares an entity, which no file of MEDLINE does")
        self._tail = content[-7:]
        return content


def _text(element: ElementTree.Element | None) -> str:
    """Return all text inside an element, markup dropped, with runs of white space made one space."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def records(compressed: IO[bytes], most: int = MOST_BYTES) -> Iterator[dict[str, object] | None]:
    """Yield one entry per ``PubmedArticle``: None without an abstract, else ``id``, ``title`` and ``sections``.

    ``sections`` is a list of ``[Label, NlmCategory, text]``; an abstract without structure has one, with both
    empty. An abstract whose sections are all empty counts as none.
    """
    with gzip.open(compressed) as stream:
        for _, element in ElementTree.iterparse(_Guarded(stream, most)):
            if element.tag != "PubmedArticle":
                continue
            article = element.find("MedlineCitation/Article")
            parts = [] if article is None else article.findall("Abstract/AbstractText")
            sections = [[part.get("Label", ""), part.get("NlmCategory", ""), _text(part)] for part in parts]
            sections = [section for section in sections if section[2]]
            entry: dict[str, object] | None = None
            if article is not None and sections:
                pmid = _text(element.find("MedlineCitation/PMID"))
                if not pmid:
                    raise ValueError("an abstract has no PMID")
                entry = {
                    "id": pmid,
                    "title": _text(article.find("ArticleTitle")),
                    "sections": sections,
                }
            element.clear()  # an article holds nearly all of the tree, so memory stays small
            yield entry


def main(archive: str, member: str, output: str) -> None:
    """Write the abstracts of ``member`` to ``output``; the last line has the number of all records."""
    count = 0
    with (
        zipfile.ZipFile(archive) as bundle,
        bundle.open(member) as compressed,
        open(output, "w", encoding="utf-8") as lines,
    ):
        for count, entry in enumerate(records(compressed), start=1):
            if entry is not None:
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if count % _REPORT_EVERY == 0:
                print(compressed.tell(), flush=True)
        lines.write(json.dumps({"records": count}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
