"""The token files of a corpus: documents are read, encoded and written at the same time, a chunk at a time.

The memory does not grow with the corpus: a thread reads the next chunks while the `tokenizers` library encodes one on
all cores, and another thread writes the chunk before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparsetrain.data.ahead import read_ahead
from sparsetrain.data.corpus_manifest import SPLITS, TRAIN_IDS
from sparsetrain.data.display import Report
from sparsetrain.data.fim import fill_in_the_middle
from sparsetrain.data.sources.base import Document
from sparsetrain.data.split import Split
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.seeds import derive_seed

_CHUNK_CHARACTERS = 1 << 20  # texts are encoded this many characters at a time

Chunk = list[tuple[Split, Document]]


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

    def encode(self, documents: Chunk) -> list[np.ndarray[Any, Any]]:
        """Return the tokens of each document, with the token of its end."""
        found = []
        eos = self.tokenizer.eos_id
        for (split, document), ids in zip(
            documents, self.tokenizer.encode_batch([document.text for _, document in documents]), strict=True
        ):
            if self.fim_rate > 0 and split == "train":
                ids = self._moved(ids, document.id)
            ids.append(eos)
            found.append(np.array(ids, dtype=self.dtype))
        return found

    def _moved(self, ids: list[int], name: str) -> list[int]:
        sentinels = self.tokenizer.sentinels
        assert sentinels is not None
        # The draws depend on the document alone, so that other documents and their order do not change them.
        seed = derive_seed(0, "document", name)
        return list(fill_in_the_middle(ids, self.fim_rate, self.fim_spm_rate, seed, sentinels=sentinels))


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
) -> tuple[dict[str, dict[str, int]], int]:
    """Write the token files and ``train_ids.txt`` of a corpus.

    Args:
        directory: where to write them.
        encoder: makes the tokens.
        documents: all documents that are used, each after its split; a thread reads them.
        size: characters of all documents, for ``report``.
        report: is called with the share that is done.

    Returns:
        The number of documents, tokens and bytes per split, and the number of test documents, which are left out.
    """
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    left_out = done = 0
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            split: stack.enter_context((directory / f"{split}.bin").open("wb")) for split in SPLITS
        }
        files[TRAIN_IDS] = stack.enter_context((directory / TRAIN_IDS).open("wb"))
        writer = stack.enter_context(ThreadPoolExecutor(1, "write tokens"))
        pending: Future[None] | None = None
        for chunk in stack.enter_context(contextlib.closing(read_ahead(_chunks(documents)))):
            used: Chunk = [(split, document) for split, document in chunk if split != "test"]
            left_out += len(chunk) - len(used)
            encoded = encoder.encode(used)
            if pending is not None:
                pending.result()  # at most one chunk waits, and an error of the disk ends the work
            pending = writer.submit(_write, files, counts, used, encoded)
            done += sum(len(document.text) for _, document in chunk)
            report(done / size)
        if pending is not None:
            pending.result()
    return counts, left_out


def _write(
    files: dict[str, IO[bytes]], counts: dict[str, dict[str, int]], used: Chunk, encoded: list[np.ndarray[Any, Any]]
) -> None:
    for (split, document), tokens in zip(used, encoded, strict=True):
        files[split].write(tokens.tobytes())
        count = counts[split]
        count["documents"] += 1
        count["tokens"] += len(tokens)
        count["bytes"] += len(document.text.encode())
        if split == "train":
            files[TRAIN_IDS].write(document.id.encode() + b"\n")
