"""Extracts the abstracts of a MEDLINE XML file inside a zip archive, as JSON lines.

This file runs as a script (``python parse.py ARCHIVE MEMBER OUTPUT``), in one process per XML file, because XML parsing
does not release the interpreter lock. It imports only the standard library, so that the process starts at once. While
it works, it prints the number of compressed bytes that it has read, one number per line.
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
# A MEDLINE file has 200 MB of XML. A larger one is damaged, or a decompression bomb.
MOST_BYTES = 1 << 30


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Guarded:
    """A stream of XML that is refused beyond ``most`` bytes, or if it declares an entity.

    MEDLINE declares no entities, and nested entities can expand to fill the memory.
    """

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
    """Return the text inside an element without markup; each run of white space becomes one space."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def records(compressed: IO[bytes], most: int = MOST_BYTES) -> Iterator[dict[str, object] | None]:
    """Yield one entry per ``PubmedArticle``: ``id``, ``title`` and ``sections``, or None without an abstract.

    ``sections`` is a list of ``[Label, NlmCategory, text]``. An abstract without structure has one section, with empty
    label and category. An abstract without text counts as missing.

    Raises:
        ValueError: the XML is larger than ``most`` bytes or declares an entity, or an abstract has no PMID.
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
            element.clear()  # articles are nearly all of the tree, so clearing each keeps memory small
            yield entry


def main(archive: str, member: str, output: str) -> None:
    """Write the abstracts of ``member`` to ``output``; the last line has the number of records, abstract or not."""
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
