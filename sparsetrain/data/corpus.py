"""A corpus on disk: found in the cache, or made from a source by splitting, training a tokenizer, and encoding.

`prepare` finds or makes it. The name of a corpus's directory has a hash of everything that its content depends on. The
directory is built under a temporary name and then renamed. It holds ``train.bin``, ``validation.bin``,
``tokenizer.json``, ``train_ids.txt`` and ``manifest.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.cache import cache_directory, clear_leftovers, whole_directory
from sparsetrain.data.checksums import sha256_once
from sparsetrain.data.config import DataConfig
from sparsetrain.data.corpus_manifest import (
    SPLITS,
    TRAIN_IDS,
    check_files,
    read_manifest,
    read_train_ids,
    write_manifest,
)
from sparsetrain.data.division import Division, divide
from sparsetrain.data.sources.base import Document, Source
from sparsetrain.data.split import Split
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import TokenFile, token_dtype
from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of
from sparsetrain.screen import say

if TYPE_CHECKING:
    from rich.console import Console

_FORMAT = 1  # of a corpus directory; a new number rebuilds every corpus
_CHUNK_CHARACTERS = 1 << 20  # texts are encoded this many characters at a time
# A tokenizer is trained on about this much text, spread evenly over the training documents. More text costs time and
# hardly changes the tokens per byte (on MEDLINE, by 0.1 %).
TOKENIZER_BYTES = 1 << 24
_TOKENIZER = "tokenizer.json"

Report = Callable[[float], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; ``cached`` is True if the cache had it, False if it was built."""

    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    cached: bool

    def train_ids(self) -> set[str]:
        """Return the ids of the training documents."""
        return set(read_train_ids(self.directory, self.manifest))

    def document_at(self, place: int) -> str:
        """Return the id of the training document that the token at ``place`` of the training text belongs to."""
        return read_train_ids(self.directory, self.manifest)[self.train.count(self.tokenizer.eos_id, place)]

    def describe(self) -> str:
        """Return one line with the corpus's place and size."""
        counts = [self.manifest["splits"][split] for split in SPLITS]
        documents, tokens, size = (sum(count[key] for count in counts) for key in ("documents", "tokens", "bytes"))
        origin = "found in cache" if self.cached else "built in"
        return (
            f"corpus: {origin} {self.directory} "
            f"({documents:,} documents, {tokens:,} tokens, {size:,} bytes, vocabulary {self.tokenizer.vocab_size:,})"
        )


def prepare(config: DataConfig, progress: bool = True, console: Console | None = None) -> Corpus:
    """Return the corpus that ``config`` describes; build it if the cache does not have it.

    Args:
        config: the settings of the corpus.
        progress: whether to show progress bars and, at the end, `Corpus.describe`.
        console: where to show them; None is stdout.

    Raises:
        UserError: the input cannot be read or used, or the disk is full. No partial corpus is left behind.
    """
    from rich.console import Console  # slow to import

    screen = console or Console()
    clear_leftovers()
    source, given, key, directory = _place(config)
    cached = directory.is_dir()
    if not cached:
        with Display(screen, progress) as display:
            source.open(display.task("read"))
            # The token files take two bytes per byte of text with a byte tokenizer, less than one with a trained one.
            with whole_directory(directory, 2 * source.size_estimate()) as temporary:
                _build(temporary, config, source, given, key, display)
                if _key(config, source, given) != key:
                    raise UserError(f"{config.kind}: the text changed while it was read; run the same command again")
    corpus = replace(open_corpus(directory), cached=cached)
    if progress:
        say(screen, corpus.describe())
    return corpus


def find_prepared(config: DataConfig) -> tuple[str, Corpus | None]:
    """Return the directory name of ``config``'s corpus, and the corpus if the cache has it; nothing is written.

    Raises:
        UserError: the text cannot be read, as in `prepare`.
    """
    directory = _place(config)[3]
    return directory.name, open_corpus(directory) if directory.is_dir() else None


def _place(config: DataConfig) -> tuple[Source, Tokenizer | None, dict[str, Any], Path]:
    """Return the source, the given tokenizer or None, the corpus's `_key`, and the directory that it names."""
    source = config.source()
    given = None if config.tokenizer_path is None else Tokenizer.load(config.tokenizer_path)
    key = _key(config, source, given)
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return source, given, key, cache_directory() / "corpora" / f"{config.kind}-{digest}"


def open_corpus(directory: Path) -> Corpus:
    """Read a prepared corpus.

    Raises:
        UserError: a file is missing, or its length or checksum differs from the manifest; or the tokens were made by
            another tokenizer than the directory's.
    """
    manifest = read_manifest(directory)
    found, expected = sha256_once(directory / _TOKENIZER), manifest["tokenizer_sha256"]
    if found != expected:
        raise UserError(
            f"{directory}: token file of another tokenizer (tokens: {expected}, {_TOKENIZER}: {found}); delete the "
            "directory to build it again"
        )
    tokenizer = Tokenizer.load(directory / _TOKENIZER)
    train, validation = (
        TokenFile(directory / f"{split}.bin", manifest["dtype"], manifest["splits"][split]["tokens"])
        for split in SPLITS
    )
    check_files(directory, manifest)
    return Corpus(directory, manifest, tokenizer, train, validation, cached=True)


def _key(config: DataConfig, source: Source, given: Tokenizer | None) -> dict[str, Any]:
    """Return everything that the corpus's content depends on, as JSON values."""
    tokenizer: dict[str, Any] = {"kind": config.tokenizer}
    if given is not None:
        tokenizer = {"kind": "given", "sha256": given.sha256}
    elif config.tokenizer == "bpe":
        tokenizer["vocab_size"] = config.vocab_size
    return {
        "format": _FORMAT,
        "source": config.kind,
        **source.identity(),
        "tokenizer": tokenizer,
        "max_documents": config.max_documents,
        "validation_fraction": config.validation_fraction,
        "test_fraction": config.resolved_test_fraction,
        "token_dtype": config.token_dtype,
    }


class Display:
    """One progress bar per step, shown only if enabled and on a terminal."""

    def __init__(self, console: Console, enabled: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # slow to import

        columns = (TextColumn("{task.description:>16}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True)

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def task(self, name: str) -> Report:
        """Add a bar and return a function that sets it to a share from 0 to 1."""
        bar = self._bars.add_task(name, total=None)
        return lambda share: self._bars.update(bar, total=1.0, completed=share)


def _tokenizer(config: DataConfig, division: Division, source: Source, report: Report) -> Tokenizer:
    if config.tokenizer == "bytes":
        return Tokenizer.bytes()

    def texts() -> Iterator[str]:
        for share, text in division.sampled(source.documents(), TOKENIZER_BYTES):
            report(0.99 * share)  # reading only: the merges are computed after the last text
            yield text

    return Tokenizer.train(texts(), config.vocab_size)


def _chunks(documents: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    chunk: list[tuple[Split, Document]] = []
    characters = 0
    for split, document in documents:
        chunk.append((split, document))
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(
    directory: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], division: Division, source: Source, report: Report
) -> tuple[dict[str, dict[str, int]], int]:
    """Write the token files and ``train_ids.txt``; return the counts per split and the number of test documents."""
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    left_out = done = 0
    eos = np.array([tokenizer.eos_id], dtype=dtype)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context((directory / f"{split}.bin").open("wb")) for split in SPLITS}
        train_ids = stack.enter_context((directory / TRAIN_IDS).open("w", encoding="utf-8"))
        for chunk in _chunks(division.assigned(source.documents())):
            used = [(split, document) for split, document in chunk if split != "test"]
            left_out += len(chunk) - len(used)
            encoded = tokenizer.encode_batch([document.text for _, document in used])
            for (split, document), ids in zip(used, encoded, strict=True):
                files[split].write(np.asarray(ids, dtype=dtype).tobytes() + eos.tobytes())
                count = counts[split]
                count["documents"] += 1
                count["tokens"] += len(ids) + 1
                count["bytes"] += len(document.text.encode())
                if split == "train":
                    train_ids.write(document.id + "\n")
            done += sum(len(document.text) for _, document in chunk)
            report(done / division.bytes)
    return counts, left_out


def division_of(config: DataConfig, source: Source) -> Division:
    """Return the split of each document of a source, as its settings say; see `divide`."""
    where = f"path={config.path}" if config.path is not None else f"source {config.kind}"
    return divide(source, where, config.max_documents, config.validation_fraction, config.resolved_test_fraction)


def _build(
    directory: Path,
    config: DataConfig,
    source: Source,
    given: Tokenizer | None,
    key: dict[str, Any],
    display: Display,
) -> None:
    division = division_of(config, source)
    tokenizer = given or _tokenizer(config, division, source, display.task("train tokenizer"))
    dtype = token_dtype(config.token_dtype, tokenizer.vocab_size)
    tokenizer.save(directory / _TOKENIZER)
    counts, left_out = _encode(directory, tokenizer, dtype, division, source, display.task("encode"))
    splits = {split: {**counts[split], "sha256": sha256_of(directory / f"{split}.bin")} for split in SPLITS}
    manifest = {
        "source": config.kind,
        "licence": source.licence,
        "built_from": key,
        "about_source": source.note(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": splits,
        "left_out": {"test_documents": left_out, "beyond_max_documents": division.splits.count(None)},
        "versions": {name: metadata.version(name) for name in ("tokenizers", "numpy")},
    }
    write_manifest(directory, manifest)
