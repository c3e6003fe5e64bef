"""``sparsetrain data dedup``: a corpus without its duplicates and near-duplicates, and a report of what was removed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparsetrain.data.display import Display, Report
from sparsetrain.data.near_duplicates import UNITS, Clusters, Signatures, choose_bands, recall, shingles
from sparsetrain.data.sources.base import Document, Source, check_document
from sparsetrain.data.sources.registry import SourceConfig
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path, whole_directory
from sparsetrain.screen import say

if TYPE_CHECKING:
    from rich.console import Console

KEPT, REMOVED, REPORT, TABLE = "kept.jsonl", "removed.jsonl", "report.json", "report.md"
_EXAMPLES = 10  # pairs in the report
_SHOWN = 80  # characters of a text in the report
_HELD = 1024  # texts whose shingles are in memory while candidates are compared


@dataclass
class DedupConfig:
    """Remove duplicates and near-duplicates from a corpus; the first document of each cluster stays.

    Two documents are near-duplicates if the Jaccard similarity of their sets of shingles is at least ``threshold``.
    MinHash finds the candidates (`datasketch`, the extra ``dedup``), and each is confirmed by its true similarity. The
    same settings give the same files.

    Args:
        data: the documents.
        out: a new directory for ``kept.jsonl``, which ``data.path`` can name (its field ``group``, if documents have
            one, is for ``data.group_field``), ``removed.jsonl``, ``report.json`` and ``report.md``.
        threshold: least Jaccard similarity of near-duplicates, above 0 and at most 1.
        shingle: words or characters per shingle.
        unit: ``words`` or ``characters``; the latter is for text without spaces between words.
        permutations: places of a MinHash signature. More need more time and leave fewer pairs to compare.
        seed: of the signatures.

    Raises:
        UserError: a setting is unknown or out of range.
    """

    data: SourceConfig = field(default_factory=SourceConfig)
    out: str = "dedup"
    threshold: float = 0.8
    shingle: int = 5
    unit: str = "words"
    permutations: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        if not 0.0 < self.threshold <= 1.0:
            raise UserError(f"threshold={self.threshold} must be above 0 and at most 1")
        if self.shingle < 1:
            raise UserError(f"shingle={self.shingle} must be at least 1")
        if not 1 <= self.permutations <= 4096:
            raise UserError(f"permutations={self.permutations} must be from 1 to 4096")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be from 0 to {2**32 - 1}")
        choose_bands(self.threshold, self.permutations)


def dedup(config: DedupConfig, console: Console | None = None, progress: bool = True) -> dict[str, Any]:
    """Write the directory ``config.out``, show the report, and return it.

    Raises:
        UserError: ``out`` exists, a document cannot be used, `datasketch` is missing, or the disk is full. Nothing is
            left behind then.
    """
    from rich.console import Console  # slow to import

    screen = console or Console()
    out = typed_path(config.out, "out")
    if out.exists():
        raise UserError(f"out={config.out} exists; delete it, or choose another directory")
    source = config.data.source()
    with Display(screen, progress) as display:
        source.open(display.task("open"))
        with whole_directory(out, 2 * source.size_estimate()) as temporary:
            with _Texts(config, temporary / ".texts") as texts:
                texts.read(source, display.task("read"))
                texts.compare(display.task("compare"))
                found = {"about": _about(config, source), **texts.write(temporary, display.task("write"))}
            (temporary / ".texts").unlink()
            (temporary / REPORT).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (temporary / TABLE).write_text(table(found), encoding="utf-8")
    say(screen, table(found).rstrip())
    hint = "; data.group_field=group keeps its groups together in a split" if texts.grouped else ""
    say(screen, f"written: {out / KEPT}{hint}")
    return found


def _about(config: DedupConfig, source: Source) -> dict[str, Any]:
    bands, rows = choose_bands(config.threshold, config.permutations)
    return {
        "source": config.data.kind,
        "identity": source.identity(),
        "licence": source.licence,
        **{name: getattr(config, name) for name in ("threshold", "shingle", "unit", "permutations", "seed")},
        "bands": bands,
        "rows": rows,
        "recall_at_threshold": recall(config.threshold, bands, rows),
    }


class _Texts:
    """The documents of a source, which wait in a file while their duplicates are looked for.

    Memory holds only numbers per document: its place in the file, the hash of its text, and its bands. ``same[d]`` is
    the number of document d's text among the distinct texts, and ``first_of[t]`` the first document with text t.
    """

    def __init__(self, config: DedupConfig, path: Path) -> None:
        self._config = config
        self._signatures = Signatures(
            config.permutations, *choose_bands(config.threshold, config.permutations), config.seed
        )
        self._path = path
        self._places = array("Q")  # where the line of each document begins
        self._same = array("q")
        self._first_of = array("q")
        self._sizes = array("q")  # shingles of each distinct text
        self._clusters: Clusters | None = None
        self.grouped = False

    def __enter__(self) -> _Texts:
        self._file: IO[bytes] = self._path.open("w+b")
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def _shingles(self, text: str) -> frozenset[str]:
        return shingles(text, self._config.shingle, self._config.unit)

    def read(self, source: Source, report: Report) -> None:
        """Read the documents, and compute the signature of each text that was not there before."""
        numbers: dict[bytes, int] = {}
        expected = max(1, source.size_estimate())
        where = f"source {self._config.data.kind}"
        place = 0
        for document in source.documents():
            check_document(document, where)
            digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            number = numbers.setdefault(digest, len(numbers))
            if number == len(self._first_of):
                found = self._shingles(document.text)
                self._first_of.append(len(self._same))
                self._sizes.append(len(found))
                self._signatures.add(found)
            self._same.append(number)
            self._places.append(place)
            row = {"id": document.id, "text": document.text}
            if document.group is not None:
                row["group"] = document.group
                self.grouped = True
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            self._file.write(line)
            place += len(line)
            report(min(0.99, place / expected))
        report(1.0)
        if not self._same:
            raise UserError(f"{where}: no text in it")
        self._file.flush()

    def _document(self, number: int) -> Document:
        self._file.seek(self._places[number])
        row = json.loads(self._file.readline())
        return Document(row["id"], row["text"])

    def compare(self, report: Report) -> None:
        """Compare the candidates, and join near-duplicates to clusters."""

        @functools.lru_cache(_HELD)
        def shingles_of(number: int) -> frozenset[str]:
            return self._shingles(self._document(self._first_of[number]).text)

        self._clusters = Clusters(self._sizes, shingles_of, self._config.threshold)
        for group in self._signatures.candidates(report):
            self._clusters.join(group)

    def write(self, directory: Path, report: Report) -> dict[str, Any]:
        """Write the documents that are kept and the ids of the others, and return the numbers of the report."""
        assert self._clusters is not None
        counts = {name: {"documents": 0, "bytes": 0} for name in ("read", "exact", "near", "kept")}
        members = Counter(self._clusters.first(number) for number in range(len(self._first_of)))
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context((directory / KEPT).open("wb"))
            removed = stack.enter_context((directory / REMOVED).open("w", encoding="utf-8"))
            for number, (line, document) in enumerate(self._lines()):
                text = self._same[number]
                first = self._first_of[self._clusters.first(text)]
                kind = "kept" if first == number else ("near" if self._first_of[text] == number else "exact")
                for name in ("read", kind):
                    counts[name]["documents"] += 1
                    counts[name]["bytes"] += len(document.text.encode())
                if kind == "kept":
                    kept.write(line)
                else:
                    row = {"id": document.id, "kept": self._document_id(first), "kind": kind}
                    removed.write(json.dumps(row, ensure_ascii=False) + "\n")
                report((number + 1) / len(self._same))
        sizes = [count for count in members.values() if count > 1]
        return {
            **{name: counts[name] for name in ("read", "kept")},
            "exact_duplicates": counts["exact"],
            "near_duplicates": {**counts["near"], "clusters": len(sizes), "largest_cluster": max(sizes, default=1)},
            "compared_pairs": self._clusters.compared,
            "confirmed_pairs": len(self._clusters.confirmed),
            "examples": [
                self._example(*pair) for pair in _spread(sorted(self._clusters.confirmed, key=_by_similarity))
            ],
        }

    def _lines(self) -> Iterator[tuple[bytes, Document]]:
        with self._path.open("rb") as lines:  # a reader of its own: `_document` moves the other one
            for line in lines:
                row = json.loads(line)
                yield line, Document(row["id"], row["text"])

    def _document_id(self, number: int) -> str:
        return self._document(number).id

    def _example(self, one: int, other: int, similarity: float) -> dict[str, Any]:
        pair = [self._document(self._first_of[number]) for number in (one, other)]
        return {
            "jaccard": similarity,
            "ids": [document.id for document in pair],
            "texts": [" ".join(document.text.split())[:_SHOWN] for document in pair],
        }


def _by_similarity(pair: tuple[int, int, float]) -> tuple[float, int, int]:
    return pair[2], pair[0], pair[1]


def _spread(pairs: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Return at most `_EXAMPLES` pairs, evenly from the least similar to the most similar one."""
    if len(pairs) <= _EXAMPLES:
        return pairs
    return [pairs[place * (len(pairs) - 1) // (_EXAMPLES - 1)] for place in range(_EXAMPLES)]


def table(found: dict[str, Any]) -> str:
    """Return the report as text: a table of documents and bytes, the clusters, and examples of confirmed pairs."""
    about, near = found["about"], found["near_duplicates"]
    rows = [("read", found["read"]), ("exact duplicates", found["exact_duplicates"]), ("near-duplicates", near)]
    lines = ["|                  |  documents |            bytes | share |", "|---|---:|---:|---:|"]
    for name, count in [*rows, ("kept", found["kept"])]:
        share = count["bytes"] / max(1, found["read"]["bytes"])
        lines.append(f"| {name:16} | {count['documents']:10,} | {count['bytes']:16,} | {share:5.1%} |")
    lines += [
        "",
        f"{near['clusters']:,} clusters of near-duplicates, the largest of {near['largest_cluster']:,} texts. "
        f"{found['compared_pairs']:,} pairs were compared, {found['confirmed_pairs']:,} confirmed.",
        f"Near-duplicates have a Jaccard similarity of at least {about['threshold']:g} over shingles of "
        f"{about['shingle']} {about['unit']}. A pair at this similarity is found with probability "
        f"{about['recall_at_threshold']:.4f}.",
    ]
    if found["examples"]:
        lines += ["", "Examples, each with its similarity:"]
    for example in found["examples"]:
        lines.append(f"- {example['jaccard']:.3f}: {example['ids'][0]} and {example['ids'][1]}")
        lines += [f"  - {text}" for text in example["texts"]]
    return "\n".join(lines) + "\n"
