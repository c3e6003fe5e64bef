"""A corpus on disk: found in the cache, or made from a source by splitting, training a tokenizer, and encoding.

`prepare` finds or makes it. The name of a corpus's directory has a hash of everything that its content depends on. The
directory is built under a temporary name and then renamed. It holds ``train.bin``, ``validation.bin``,
``tokenizer.json``, ``train_ids.txt`` and ``manifest.json``, and ``validation.bytes.bin`` for some tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.cache import cache_directory, clear_leftovers, whole_directory
from sparsetrain.data.checksums import sha256_once
from sparsetrain.data.config import DataConfig
from sparsetrain.data.corpus_manifest import (
    SPLITS,
    VALIDATION_BYTES,
    check_files,
    read_manifest,
    read_train_ids,
    write_manifest,
)
from sparsetrain.data.display import Display, Report
from sparsetrain.data.division import Division, divide
from sparsetrain.data.encoding import SIZES, Encoder, Written, write_tokens
from sparsetrain.data.sources.base import Source
from sparsetrain.data.tokenizer import SENTINELS, Tokenizer
from sparsetrain.data.tokens import TokenFile, token_dtype
from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of
from sparsetrain.screen import say

if TYPE_CHECKING:
    from rich.console import Console

_FORMAT = 1  # of a corpus directory; a new number rebuilds every corpus
# A tokenizer is trained on about this much text, spread evenly over the training documents. More text costs time and
# hardly changes the tokens per byte (on MEDLINE, by 0.1 %).
TOKENIZER_BYTES = 1 << 24
_TOKENIZER = "tokenizer.json"


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

    def notes(self) -> list[str]:
        """Return lines that a user should know: the validation text, files left out, and text that does not come back.

        A corpus of short documents with a lossless tokenizer has none.
        """
        lines = [self.manifest["validation"]] if "validation" in self.manifest else []
        if empty := self.manifest["about_source"].get("empty_files"):
            lines.append(f"left out: {empty:,} empty files")
        trip = self.manifest.get("round_trip")
        if trip is not None:
            lines.append(
                f"tokenizer: {trip['changed']:,} of {trip['documents']:,} documents do not come back as they were; "
                f"{trip['unknown_tokens']:,} tokens stand for unknown text"
            )
        return lines


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
    source, fixed, key, directory = _place(config)
    cached = directory.is_dir()
    if not cached:
        with Display(screen, progress) as display:
            source.open(display.task("read"))
            # The token files take two bytes per byte of text with a byte tokenizer, less than one with a trained one.
            with whole_directory(directory, 2 * source.size_estimate()) as temporary:
                _build(temporary, config, source, fixed, key, display)
                if _key(config, source, fixed) != key:
                    raise UserError(f"{config.kind}: the text changed while it was read; run the same command again")
    corpus = replace(open_corpus(directory), cached=cached)
    if progress:
        for line in (corpus.describe(), *corpus.notes()):
            say(screen, line)
    return corpus


def find_prepared(config: DataConfig) -> tuple[str, Corpus | None]:
    """Return the directory name of ``config``'s corpus, and the corpus if the cache has it; nothing is written.

    Raises:
        UserError: the text cannot be read, as in `prepare`.
    """
    directory = _place(config)[3]
    return directory.name, open_corpus(directory) if directory.is_dir() else None


def _place(config: DataConfig) -> tuple[Source, Tokenizer | None, dict[str, Any], Path]:
    """Return the source, the tokenizer unless it is trained, the corpus's `_key`, and the directory that it names."""
    source = config.source()
    fixed = config.fixed_tokenizer()
    key = _key(config, source, fixed)
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return source, fixed, key, cache_directory() / "corpora" / f"{config.kind}-{digest}"


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
    count = manifest["splits"]["validation"]["tokens"]
    sizes = tokenizer.token_bytes if tokenizer.lossless else TokenFile(directory / VALIDATION_BYTES, SIZES, count)
    train = TokenFile(directory / "train.bin", manifest["dtype"], manifest["splits"]["train"]["tokens"])
    validation = TokenFile(directory / "validation.bin", manifest["dtype"], count, sizes)
    check_files(directory, manifest)
    return Corpus(directory, manifest, tokenizer, train, validation, cached=True)


def text_key(config: DataConfig, source: Source) -> dict[str, Any]:
    """Return everything that the texts of a corpus and their splits depend on, as JSON values."""
    return {
        "source": config.kind,
        **source.identity(),
        "max_documents": config.max_documents,
        "validation_fraction": config.validation_fraction,
        "test_fraction": config.resolved_test_fraction,
    }


def trained(texts: Iterable[str], vocab_size: int, sentinels: bool) -> Tokenizer:
    """Return a tokenizer of at most ``vocab_size`` tokens, of which three may be sentinels; see `Tokenizer.train`."""
    if not sentinels:
        return Tokenizer.train(texts, vocab_size)
    return Tokenizer.train(texts, vocab_size - len(SENTINELS)).with_sentinels()


def _key(config: DataConfig, source: Source, fixed: Tokenizer | None) -> dict[str, Any]:
    """Return everything that the corpus's content depends on, as JSON values.

    A setting that older corpora did not have is a part of it only if it is used, so that they are still found.
    """
    tokenizer: dict[str, Any] = {"kind": config.tokenizer}
    if config.tokenizer_path is not None and fixed is not None:
        tokenizer = {"kind": "given", "sha256": fixed.sha256}
    elif config.tokenizer == "bpe":
        tokenizer["vocab_size"] = config.vocab_size
    fim = {"rate": config.fim_rate, "spm_rate": config.fim_spm_rate}
    return {
        "format": _FORMAT,
        **text_key(config, source),
        "tokenizer": tokenizer,
        "token_dtype": config.token_dtype,
        **({"fill_in_the_middle": fim} if config.fim_rate > 0 else {}),
    }


def _tokenizer(config: DataConfig, division: Division, source: Source, report: Report) -> Tokenizer:

    def texts() -> Iterator[str]:
        for share, text in division.sampled(source.documents(), TOKENIZER_BYTES):
            report(0.99 * share)  # reading only: the merges are computed after the last text
            yield text

    return trained(texts(), config.vocab_size, config.fim_rate > 0)


def division_of(config: DataConfig, source: Source) -> Division:
    """Return the split of each document of a source, as its settings say; see `divide`."""
    where = f"path={config.path}" if config.path is not None else f"source {config.kind}"
    return divide(source, where, config.max_documents, config.validation_fraction, config.resolved_test_fraction)


def _build(
    directory: Path,
    config: DataConfig,
    source: Source,
    fixed: Tokenizer | None,
    key: dict[str, Any],
    display: Display,
) -> None:
    division = division_of(config, source)
    tokenizer = fixed or _tokenizer(config, division, source, display.task("train tokenizer"))
    dtype = token_dtype(config.token_dtype, tokenizer.vocab_size)
    tokenizer.save(directory / _TOKENIZER)
    encoder = Encoder(tokenizer, dtype, config.fim_rate, config.fim_spm_rate)
    documents = division.assigned(source.documents())
    written = write_tokens(directory, encoder, documents, division.bytes, display.task("encode"))
    splits = {split: {**written.counts[split], "sha256": sha256_of(directory / f"{split}.bin")} for split in SPLITS}
    manifest = {
        "source": config.kind,
        "licence": source.licence,
        "built_from": key,
        "about_source": source.note(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": splits,
        "left_out": {"test_documents": written.left_out, "beyond_max_documents": division.splits.count(None)},
        "versions": {name: metadata.version(name) for name in ("tokenizers", "numpy")},
        **_notes(directory, division, tokenizer, written),
    }
    write_manifest(directory, manifest)


def _notes(directory: Path, division: Division, tokenizer: Tokenizer, written: Written) -> dict[str, Any]:
    """Return the entries that manifests of older corpora do not have; see `Corpus.notes`."""
    found: dict[str, Any] = {}
    if division.long:
        held_out = written.counts["validation"]["bytes"]
        found["validation"] = division.validation_note(held_out / (held_out + written.counts["train"]["bytes"]))
    if not tokenizer.lossless:
        documents = sum(count["documents"] for count in written.counts.values())
        trip = {"documents": documents, "changed": written.changed, "unknown_tokens": written.unknown}
        found |= {"round_trip": trip, "validation_bytes_sha256": sha256_of(directory / VALIDATION_BYTES)}
    return found
