"""The division of a source's documents: for training, for validation, for tests of tasks, and unused."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sparsetrain.data.parts import parts
from sparsetrain.data.sources.base import Document, Source, check_document
from sparsetrain.data.split import Split, assign, position, smallest_validation, split_of
from sparsetrain.errors import UserError

_SAMPLED = 1 << 16  # characters of a long document that are sampled together
_LINE = 2048  # characters in which the end of a line is looked for


@dataclass(frozen=True)
class Division:
    """The split of each document of a source, in the source's order.

    Args:
        splits: one entry per document; None marks a document that ``max_documents`` leaves out.
        only: whether only one document is used, which is cut in two.
        bytes: size of all documents in UTF-8.
        ends: for each document that is cut, the characters at its end that are validation text; None for a tenth.
        long: whether a document may be a whole book, see `Source.long_documents`.
    """

    splits: list[Split | None]
    only: bool
    bytes: int
    ends: Mapping[int, int | None] = field(default_factory=dict)
    long: bool = False

    def assigned(self, documents: Iterable[Document]) -> Iterator[tuple[Split, Document]]:
        """Yield every document that is used, after its split; ``documents`` are those of the source, in its order."""
        for index, (split, document) in enumerate(zip(self.splits, documents, strict=True)):
            if split is None:
                continue
            if index not in self.ends:
                yield split, document
                continue
            end = self.ends[index]
            head, tail = _cut(document.text) if end is None else _cut_at_line(document.text, end)
            yield "train", replace(document, text=head)
            yield "validation", replace(document, text=tail, id=f"{document.id}#end")
            if self.only:
                return

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
            for text in parts(document.text, _SAMPLED) if self.long else (document.text,):
                if split == "train" and taken <= share * done:
                    taken += len(text)
                    yield done / self.bytes, text
                done += len(text)

    def validation_note(self, share: float) -> str:
        """Return one line that says which documents are validation text; ``share`` is their part of the bytes."""
        whole, used = self.splits.count("validation"), sum(split in ("train", "validation") for split in self.splits)
        texts = [f"{whole} of {used} documents"] if whole else []
        if self.ends:
            texts.append("the end of the only document" if self.only else "the end of the longest one")
        return f"validation: {' and '.join(texts)}, {100 * share:.1f} % of the text"


def _cut(text: str) -> tuple[str, str]:
    """Cut a text in two at the last white space within its first 90 %."""
    place = max(1, len(text) * 9 // 10)
    space = max(text.rfind(mark, 1, place + 1) for mark in (" ", "\n", "\t"))
    if space > len(text) // 2:
        place = space
    return text[:place], text[place:]


def _cut_at_line(text: str, end: int) -> tuple[str, str]:
    """Cut about ``end`` characters off a text: behind the end of a line, or else at white space, not far before."""
    place = min(max(1, len(text) - end), len(text) - 1)
    line = text.rfind("\n", max(0, place - _LINE), place)
    if line > 0:
        return text[: line + 1], text[line + 1 :]
    space = max(text.rfind(mark, max(1, place - _LINE), place + 1) for mark in (" ", "\t"))
    place = space if space > 0 else place
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
        end = max(1, _wanted(sizes[kept[0]], validation)) if source.long_documents else None
        return Division(splits, True, length, {kept[0]: end}, source.long_documents)
    chosen = assign([names[index] for index in kept], [sizes[index] for index in kept], validation, test)
    for index, split in zip(kept, chosen, strict=True):
        splits[index] = split
    ends = _ends(splits, names, sizes, validation) if source.long_documents else {}
    return Division(splits, False, length, ends, source.long_documents)


def _wanted(characters: int, validation: float) -> int:
    """Return how many characters the validation text of a corpus should have."""
    return round(max(validation * characters, smallest_validation(characters)))


def _ends(
    splits: Sequence[Split | None], names: Sequence[str], sizes: Sequence[int], validation: float
) -> dict[int, int | None]:
    """Return the documents of which the end is validation text too, since those held out whole are too small for it.

    This is so if the longest one has most of the text. Its copies are cut as it is.
    """
    used = [index for index, split in enumerate(splits) if split in ("train", "validation")]
    total = sum(sizes[index] for index in used)
    held_out = sum(sizes[index] for index in used if splits[index] == "validation")
    if held_out >= smallest_validation(total):
        return {}
    longest = max((index for index in used if splits[index] == "train"), key=lambda index: sizes[index])
    end = max(1, _wanted(total, validation) - held_out)
    return {index: end for index in used if names[index] == names[longest] and sizes[index] > 1}
