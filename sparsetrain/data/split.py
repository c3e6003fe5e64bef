"""The split of documents into train, validation and test, shared by corpora and tasks.

The split is a function of the document's id alone, or of its group if it has one. A task made from the documents of a
pre-training corpus therefore has its test documents outside of that corpus, although neither refers to the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from sparsetrain.errors import UserError

Split = Literal["train", "validation", "test"]

VALIDATION_FRACTION = 0.02
TEST_FRACTION = 0.10

# A validation loss over fewer characters is too noisy. A small corpus gives up at most a tenth of its text for it.
_SMALLEST_VALIDATION = 4096
_LARGEST_SHARE = 0.10


def position(document_id: str, salt: str = "split") -> float:
    """Return a number in [0, 1) that depends on the id and the salt only."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, person=salt.encode()[:16]).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: exact as a float, and never rounded up to 1


def smallest_validation(characters: int) -> float:
    """Return the characters that the validation text of a corpus needs at least."""
    return min(_SMALLEST_VALIDATION, _LARGEST_SHARE * characters)


def check_fractions(validation: float, test: float) -> None:
    """Raise `UserError` unless both fractions are in [0, 1) and leave something to train on."""
    for field, value in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0.0 <= value < 1.0:
            raise UserError(f"{field}={value} is outside [0, 1)")
    if validation + test >= 1.0:
        raise UserError(f"validation_fraction={validation} and test_fraction={test} leave nothing to train on")


def split_of(document_id: str, validation: float = VALIDATION_FRACTION, test: float = TEST_FRACTION) -> Split:
    """Return the split that a document belongs to.

    Test documents have the lowest positions, so the test set does not depend on the size of the validation set.
    """
    place = position(document_id)
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def assign(ids: Sequence[str], sizes: Sequence[int], validation: float, test: float) -> list[Split]:
    """Return the split of each document of a corpus, with a usable validation set also for a small corpus.

    `split_of` decides first. The validation set needs 4096 characters, or a tenth of the text if that is less. If it
    holds fewer, training documents move to it in the order of their `position`, except a document with more than half
    of the text. At least one document stays in train. Equal ids share a split.

    Args:
        ids: the ids of the documents, or the groups whose documents share a split.
        sizes: characters of each document.
        validation: share of the documents held out for validation.
        test: share of the documents held out for tests of tasks.

    Raises:
        UserError: fewer than two distinct ids lie outside of the test split.
    """
    splits = [split_of(name, validation, test) for name in ids]
    size_of: dict[str, int] = {}
    for name, size, split in zip(ids, sizes, splits, strict=True):
        if split != "test":
            size_of[name] = size_of.get(name, 0) + size
    if len(size_of) < 2:
        raise UserError(
            f"the corpus has {len(size_of)} distinct documents, or groups of them, outside of the test split; it needs "
            "at least 2"
        )
    total = sum(size_of.values())
    floor = smallest_validation(total)
    held_out: set[str] = set()
    characters = 0
    for name, drawn in _by_position(size_of, validation, test):
        if len(held_out) == len(size_of) - 1 or (not drawn and held_out and characters >= floor):
            break
        if drawn or size_of[name] <= total / 2:
            held_out.add(name)
            characters += size_of[name]
    return [
        split if split == "test" else ("validation" if name in held_out else "train")
        for name, split in zip(ids, splits, strict=True)
    ]


def _by_position(names: Iterable[str], validation: float, test: float) -> Iterator[tuple[str, bool]]:
    """Yield the names outside of the test split by their `position`, with whether they are drawn for validation.

    The drawn ones have the lowest positions. The others, which are many, are sorted only if they are asked for.
    """
    for drawn in (True, False):
        some = [name for name in names if (split_of(name, validation, test) == "validation") == drawn]
        for name in sorted(some, key=lambda name: (position(name), name)):
            yield name, drawn
