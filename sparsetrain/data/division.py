"""The division of a source's documents: for training, for validation, for tests of tasks, and unused."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sparsetrain.data.sources.base import Document, Source, check_document
from sparsetrain.data.split import Split, assign, position, split_of
from sparsetrain.errors import UserError


@dataclass(frozen=True)
class Division:
    """The split of each document of a source, in the source's order.

    Args:
        splits: one entry per document; None marks a document that ``max_documents`` leaves out.
        cut: whether only one document is used; its last tenth is then the validation text.
        bytes: size of all documents in UTF-8.
    """

    splits: list[Split | None]
    cut: bool
    bytes: int

    def assigned(self, documents: Iterable[Document]) -> Iterator[tuple[Split, Document]]:
        """Yield every document that is used, after its split; ``documents`` are those of the source, in its order."""
        for split, document in zip(self.splits, documents, strict=True):
            if split is None:
                continue
            if self.cut:
                head, tail = _cut(document.text)
                yield "train", replace(document, text=head)
                yield "validation", replace(document, text=tail, id=f"{document.id}#end")
                return
            yield split, document

    def sampled(self, documents: Iterable[Document], most: int) -> Iterator[tuple[float, str]]:
        """Yield the texts of training documents, spread evenly, of about ``most`` bytes in all.

        Args:
            documents: those of the source, in its order.

        Yields:
            The share of the documents that was read before it, and a text.
        """
        share = most / self.bytes
        done = taken = 0
        for split, document in self.assigned(documents):
            if split == "train" and taken <= share * done:
                taken += len(document.text)
                yield done / self.bytes, document.text
            done += len(document.text)


def _cut(text: str) -> tuple[str, str]:
    """Cut a text in two at the last white space within its first 90 %."""
    place = max(1, len(text) * 9 // 10)
    space = max(text.rfind(mark, 1, place + 1) for mark in (" ", "\n", "\t"))
    if space > len(text) // 2:
        place = space
    return text[:place], text[place:]


def divide(source: Source, where: str, max_documents: int | None, validation: float, test: float) -> Division:
    """Return the split of each document of ``source``.

    Args:
        source: the documents; they are read once.
        where: the name of the source in messages.
        max_documents: largest number of documents for training and validation; None is no limit.
        validation: share of the documents held out for validation.
        test: share of the documents held out for tests of tasks.

    Raises:
        UserError: the source has no text, only one character, or a document that cannot be used; or all documents
            outside of the test split are of one group.
    """
    # For each document, what decides its split; ids are kept apart only if groups do. Large corpora need compact lists.
    names: list[str] = []
    ids: list[str] | None = None
    sizes = array("q")
    length = 0
    for document in source.documents():
        check_document(document, where)
        if document.group is not None and ids is None:
            ids = names.copy()
        if ids is not None:
            ids.append(document.id)
        names.append(document.id if document.group is None else document.group)
        sizes.append(len(document.text))
        length += len(document.text.encode())
    if not names:
        raise UserError(f"{where}: no text in it")
    ids = names if ids is None else ids
    splits: list[Split | None] = ["test" if split_of(name, 0.0, test) == "test" else None for name in names]
    kept = array("q", (index for index, split in enumerate(splits) if split is None))
    if max_documents is not None:
        by_place = sorted(kept, key=lambda index: (position(ids[index], "subset"), index))
        kept = array("q", sorted(by_place[:max_documents]))
    first = ids[kept[0]] if kept else ""
    if kept and all(ids[index] == first for index in kept):
        if sizes[kept[0]] < 2:
            raise UserError("the corpus is one character; it needs a text to train on and one to validate on")
        splits[kept[0]] = "train"
        return Division(splits, True, length)
    chosen = assign([names[index] for index in kept], [sizes[index] for index in kept], validation, test)
    for index, split in zip(kept, chosen, strict=True):
        splits[index] = split
    return Division(splits, False, length)
