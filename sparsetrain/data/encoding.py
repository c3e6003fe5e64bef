"""The token files of a corpus: documents are read, encoded and written at the same time, a chunk at a time.

The memory does not grow with the corpus: a thread reads the next chunks while the `tokenizers` library encodes one on
all cores, and another thread writes the chunk before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparsetrain.data.ahead import read_ahead
from sparsetrain.data.corpus_manifest import SPLITS, TRAIN_IDS, VALIDATION_BYTES
from sparsetrain.data.display import Report
from sparsetrain.data.fim import fill_in_the_middle
from sparsetrain.data.parts import parts
from sparsetrain.data.sources.base import Document
from sparsetrain.data.split import Split
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.seeds import derive_seed

_CHUNK_CHARACTERS = 1 << 20  # texts are encoded this many characters at a time
_PART_CHARACTERS = 1 << 22  # a longer document is encoded in parts
SIZES = np.dtype("<u4")  # of the numbers in VALIDATION_BYTES

Chunk = list[tuple[Split, Document]]


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Args:
        tokens: with the token of its end.
        sizes: the UTF-8 bytes that each token stands for, if the tokenizer is not lossless; they sum to the document's.
        changed: whether the tokens do not give the text back.
        unknown: tokens that stand for text unknown to the tokenizer.
    """

    tokens: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any] | None = None
    changed: bool = False
    unknown: int = 0


@dataclass(frozen=True)
class Encoder:
    """Documents to the bytes of a token file.

    Args:
        tokenizer: of the corpus; it has sentinels if ``fim_rate`` is above 0.
        dtype: of the token file.
        fim_rate: share of the training documents that `fill_in_the_middle` transforms.
        fim_spm_rate: share of these in the order SPM.
    """

    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.0

    def encode(self, documents: Chunk) -> list[Encoded]:
        """Return the tokens of each document."""
        texts = [document.text for _, document in documents]
        rows = self._lossless(texts) if self.tokenizer.lossless else self._sized(texts)
        found = []
        for (split, document), (ids, sizes) in zip(documents, rows, strict=True):
            changed, unknown = False, 0
            if sizes is not None:
                changed = self.tokenizer.decode(ids) != document.text
                unknown = self.tokenizer.count_unknown(ids)
            if self.fim_rate > 0 and split == "train":
                ids = self._moved(ids, document.id)
            tokens = np.array([*ids, self.tokenizer.eos_id], dtype=self.dtype)
            found.append(Encoded(tokens, sizes, changed, unknown))
        return found

    def _lossless(self, texts: list[str]) -> Iterator[tuple[list[int], None]]:
        if all(len(text) <= _PART_CHARACTERS for text in texts):
            yield from ((ids, None) for ids in self.tokenizer.encode_batch(texts))
            return
        for text in texts:  # part by part, since the library takes a hundred bytes a token
            yield [token for part in parts(text, _PART_CHARACTERS) for token in self.tokenizer.encode(part)], None

    def _sized(self, texts: list[str]) -> Iterator[tuple[list[int], np.ndarray[Any, Any]]]:
        if all(len(text) <= _PART_CHARACTERS for text in texts):
            pairs = self.tokenizer.encode_sized(texts, [False] * len(texts))
            yield from ((ids, np.array(sizes, dtype=SIZES)) for ids, sizes in pairs)
            return
        for text in texts:
            all_ids: list[int] = []
            all_sizes = [0]
            for number, part in enumerate(parts(text, _PART_CHARACTERS)):
                ((ids, sizes),) = self.tokenizer.encode_sized([part], [number > 0])
                all_ids += ids
                # What follows the last token of a part belongs to the first one of the next.
                all_sizes = [*all_sizes[:-1], all_sizes[-1] + sizes[0], *sizes[1:]]
            yield all_ids, np.array(all_sizes, dtype=SIZES)

    def _moved(self, ids: list[int], name: str) -> list[int]:
        sentinels = self.tokenizer.sentinels
        assert sentinels is not None
        # The draws depend on the document alone, so that other documents and their order do not change them.
        seed = derive_seed(0, "document", name)
        return list(fill_in_the_middle(ids, self.fim_rate, self.fim_spm_rate, seed, sentinels=sentinels))


@dataclass
class Written:
    """What was written of a corpus.

    Args:
        counts: documents, tokens and bytes of each split.
        left_out: the test documents.
        changed: documents that their tokens do not give back.
        unknown: tokens for text that the tokenizer does not know.
    """

    counts: dict[str, dict[str, int]] = field(
        default_factory=lambda: {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    )
    left_out: int = 0
    changed: int = 0
    unknown: int = 0


def _chunks(documents: Iterable[tuple[Split, Document]]) -> Iterator[Chunk]:
    chunk: Chunk = []
    characters = 0
    for split, document in documents:
        chunk.append((split, document))
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def write_tokens(
    directory: Path, encoder: Encoder, documents: Iterable[tuple[Split, Document]], size: int, report: Report
) -> Written:
    """Write the token files and ``train_ids.txt`` of a corpus.

    If the tokenizer is not lossless, ``validation.bytes.bin`` has the UTF-8 bytes of text for each validation token.

    Args:
        directory: where to write them.
        encoder: makes the tokens.
        documents: all documents that are used, each after its split; a thread reads them.
        size: characters of all documents, for ``report``.
        report: is called with the share that is done.
    """
    written, done = Written(), 0
    names = [f"{split}.bin" for split in SPLITS] + [TRAIN_IDS]
    if not encoder.tokenizer.lossless:
        names.append(VALIDATION_BYTES)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((directory / name).open("wb")) for name in names}
        writer = stack.enter_context(ThreadPoolExecutor(1, "write tokens"))
        pending: Future[None] | None = None
        for chunk in stack.enter_context(contextlib.closing(read_ahead(_chunks(documents)))):
            used: Chunk = [(split, document) for split, document in chunk if split != "test"]
            written.left_out += len(chunk) - len(used)
            encoded = encoder.encode(used)
            if pending is not None:
                pending.result()  # at most one chunk waits, and an error of the disk ends the work
            pending = writer.submit(_write, files, written, used, encoded)
            done += sum(len(document.text) for _, document in chunk)
            report(done / size)
        if pending is not None:
            pending.result()
    return written


def _write(files: Mapping[str, IO[bytes]], written: Written, used: Chunk, encoded: list[Encoded]) -> None:
    for (split, document), row in zip(used, encoded, strict=True):
        files[f"{split}.bin"].write(row.tokens.tobytes())
        count = written.counts[split]
        count["documents"] += 1
        count["tokens"] += len(row.tokens)
        count["bytes"] += len(document.text.encode())
        written.changed += row.changed
        written.unknown += row.unknown
        if split == "train":
            files[TRAIN_IDS].write(document.id.encode() + b"\n")
        elif row.sizes is not None:
            files[VALIDATION_BYTES].write(row.sizes.tobytes())
