"""The one split of documents into train, validation and test.

It is a function of the document's id alone, so that a task made from the same documents as the pre-training corpus
has its test documents outside of that corpus without either knowing the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from sparsetrain.errors import UserError

Split = Literal["train", "validation", "test"]

VALIDATION_FRACTION = 0.02
TEST_FRACTION = 0.10

# Below this many characters a validation loss says little; small corpora give up at most a tenth of their text.
_SMALLEST_VALIDATION = 4096
_LARGEST_SHARE = 0.10


def position(document_id: str, salt: str = "split") -> float:
    """Return a number in [0, 1) that depends on the id and the salt only."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, person=salt.encode()[:16]).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: exact as a float, and never rounded up to 1


def check_fractions(validation: float, test: float) -> None:
    """Raise `UserError` unless both fractions are in [0, 1) and leave something to train on."""
    for field, value in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0.0 <= value < 1.0:
            raise UserError(f"{field}={value} is outside [0, 1)")
    if validation + test >= 1.0:
        raise UserError(f"validation_fraction={validation} and test_fraction={test} leave nothing to train on")


def split_of(document_id: str, validation: float = VALIDATION_FRACTION, test: float = TEST_FRACTION) -> Split:
    """Return the split that a document belongs to.

    Test comes first on the line, so that the test set does not change with the size of the validation set.
    """
    place = position(document_id)
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def assign(ids: Sequence[str], sizes: Sequence[int], validation: float, test: float) -> list[Split]:
    """Return the split of each document of a corpus, with a usable validation set also for a small corpus.

    `split_of` decides. If the validation documents then hold fewer than 4096 characters (or than a tenth of the
    text, where that is less), the training documents next on the line are added to them, but for one that is more
    than half of the text; one document always stays in train. Equal ids share a split. At least two distinct
    ids outside of the test split are needed.
    """
    splits = [split_of(name, validation, test) for name in ids]
    size_of: dict[str, int] = {}
    for name, size, split in zip(ids, sizes, splits, strict=True):
        if split != "test":
            size_of[name] = size_of.get(name, 0) + size
    if len(size_of) < 2:
        raise UserError(
            f"the corpus has {len(size_of)} distinct documents outside of the test split; it needs at least 2"
        )
    line = sorted(size_of, key=lambda name: (position(name), name))
    total = sum(size_of.values())
    floor = min(_SMALLEST_VALIDATION, _LARGEST_SHARE * total)
    chosen: set[str] = set()
    held = 0
    for name in line:
        drawn = split_of(name, validation, test) == "validation"
        if len(chosen) == len(line) - 1 or (not drawn and chosen and held >= floor):
            break
        if drawn or size_of[name] <= total / 2:
            chosen.add(name)
            held += size_of[name]
    return [
        split if split == "test" else ("validation" if name in chosen else "train")
        for name, split in zip(ids, splits, strict=True)
    ]
