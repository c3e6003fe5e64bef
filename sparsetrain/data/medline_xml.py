"""Abstracts out of a MEDLINE XML file inside a zip archive, as JSON lines.

Runs as a script in a process of its own (``python medline_xml.py ARCHIVE MEMBER OUTPUT``), one per file, because XML
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
from typing import IO

_REPORT_EVERY = 500  # records


def _text(element: ElementTree.Element | None) -> str:
    """Return all text inside an element, markup dropped, with runs of white space made one space."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def records(compressed: IO[bytes]) -> Iterator[dict[str, object] | None]:
    """Yield one entry per ``PubmedArticle``: None without an abstract, else ``id``, ``title`` and ``sections``.

    ``sections`` is a list of ``[Label, NlmCategory, text]``; an abstract without structure has one, with both
    empty. An abstract whose sections are all empty counts as none.
    """
    with gzip.open(compressed) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag != "PubmedArticle":
                continue
            article = element.find("MedlineCitation/Article")
            parts = [] if article is None else article.findall("Abstract/AbstractText")
            sections = [[part.get("Label", ""), part.get("NlmCategory", ""), _text(part)] for part in parts]
            sections = [section for section in sections if section[2]]
            entry: dict[str, object] | None = None
            if article is not None and sections:
                entry = {
                    "id": element.findtext("MedlineCitation/PMID", ""),
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
