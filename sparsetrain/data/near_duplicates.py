"""Near-duplicates among texts: shingles, MinHash signatures, candidates that share a band, clusters of true neighbours.

MinHash keeps, for each of many random orders, the first shingle of a text. Two texts agree in a place of their
signatures with the probability of their Jaccard similarity J, so they agree in at least one of b bands of r places with
probability 1 - (1 - J^r)^b. Pairs that share a band are only candidates: the similarity of each is then computed.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from sparsetrain.data.display import Report
from sparsetrain.errors import UserError

UNITS = ("words", "characters")
RECALL = 0.999  # least probability that a pair at the threshold becomes a candidate

_WORD = re.compile(r"\w+")


def shingles(text: str, size: int, unit: str) -> frozenset[str]:
    """Return the shingles of a text: all runs of ``size`` words, or of ``size`` characters.

    Case does not count, nor does white space, nor, between words, punctuation. A shorter text is one shingle.
    """
    if unit == "words" and (words := _WORD.findall(text.lower())):
        return frozenset(" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1)))
    plain = " ".join(text.lower().split())
    if unit == "words":
        return frozenset((plain,))  # signs alone
    return frozenset(plain[start : start + size] for start in range(max(1, len(plain) - size + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the size of the intersection over the size of the union of two sets that are not empty."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def recall(similarity: float, bands: int, rows: int) -> float:
    """Return the probability that a pair of this Jaccard similarity shares at least one band."""
    return float(1.0 - (1.0 - similarity**rows) ** bands)


def choose_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Return the number of bands and the rows of each: as many rows as keep `recall` at the threshold at `RECALL`.

    More rows give fewer candidates to compare.

    Raises:
        UserError: there are too few permutations for a pair at the threshold to be found so reliably.
    """
    for rows in range(permutations, 0, -1):
        if recall(threshold, permutations // rows, rows) >= RECALL:
            return permutations // rows, rows
    raise UserError(
        f"permutations={permutations} are too few for threshold={threshold}: a pair at the threshold is found with "
        f"probability {recall(threshold, permutations, 1):.3f}, and {RECALL} is needed"
    )


class Signatures:
    """The bands of the MinHash signatures of texts, 8 bytes per band and text; `datasketch` computes the signatures.

    Args:
        permutations: places of a signature.
        bands: number of bands.
        rows: places per band.
        seed: of the random orders, from 0 to 2**32 - 1.

    Raises:
        UserError: `datasketch` is not installed.
    """

    def __init__(self, permutations: int, bands: int, rows: int, seed: int) -> None:
        try:
            self._datasketch = importlib.import_module("datasketch")
        except ImportError as error:
            raise UserError("near-duplicates need datasketch: pip install 'sparsetrain[dedup]'") from error
        first = self._datasketch.MinHash(permutations, seed=seed, scheme="affine32")
        self._orders = first.permutations  # drawing them takes longer than a signature
        self._permutations, self.bands, self.rows = permutations, bands, rows
        self._keys = array("Q")

    def __len__(self) -> int:
        return len(self._keys) // self.bands

    def signature(self, of: frozenset[str]) -> npt.NDArray[np.uint32]:
        """Return the signature of a text's shingles, uint32 [permutations]."""
        sketch = self._datasketch.MinHash(self._permutations, permutations=self._orders, scheme="affine32")
        sketch.update_batch([shingle.encode() for shingle in of])
        values: npt.NDArray[np.uint32] = sketch.hashvalues
        return values

    def add(self, of: frozenset[str]) -> None:
        """Add the next text by its shingles."""
        content = self.signature(of).astype("<u4").tobytes()
        width = 4 * self.rows
        for band in range(self.bands):
            part = content[band * width : (band + 1) * width]
            self._keys.append(int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little"))

    def candidates(self, report: Report = lambda share: None) -> Iterator[npt.NDArray[np.int64]]:
        """Yield groups of texts that share a band: ascending numbers int64 [k], with k at least 2."""
        keys = np.frombuffer(self._keys, dtype=np.uint64).reshape(-1, self.bands)
        for band in range(self.bands):
            column = keys[:, band]
            order = np.argsort(column, kind="stable")
            borders = np.flatnonzero(np.diff(column[order])) + 1
            borders = np.concatenate([[0], borders, [len(order)]])
            for number in np.flatnonzero(np.diff(borders) > 1):
                yield order[borders[number] : borders[number + 1]]
            report((band + 1) / self.bands)


class Clusters:
    """Texts that are linked by pairs of a similarity of at least the threshold; a link may lead over further texts.

    Args:
        sizes: number of shingles of each text.
        shingles_of: returns the shingles of a text by its number.
        threshold: least Jaccard similarity of near-duplicates.
    """

    def __init__(self, sizes: array[int], shingles_of: Callable[[int], frozenset[str]], threshold: float) -> None:
        self._sizes, self._shingles_of, self._threshold = sizes, shingles_of, threshold
        self._above = array("q", range(len(sizes)))
        self._apart: set[tuple[int, int]] = set()
        self.compared = 0
        self.confirmed: list[tuple[int, int, float]] = []
        """The links: two texts and their similarity. Pairs that earlier links already join are not among them."""

    def first(self, text: int) -> int:
        """Return the first text of the cluster of ``text``."""
        root = text
        while self._above[root] != root:
            root = self._above[root]
        while self._above[text] != root:
            self._above[text], text = root, self._above[text]
        return root

    def join(self, group: npt.NDArray[np.int64]) -> None:
        """Compare the texts of a group of candidates, and join near-duplicates.

        A pair that is joined already is not compared: its similarity would not change the clusters. Nor is a pair
        whose numbers of shingles alone keep it below the threshold.
        """
        members = group.tolist()
        for place, later in enumerate(members):
            for earlier in members[:place]:
                if self._may_join(earlier, later):
                    self._compare(earlier, later)

    def _may_join(self, earlier: int, later: int) -> bool:
        few, many = sorted((self._sizes[earlier], self._sizes[later]))
        if few / many < self._threshold or (earlier, later) in self._apart:
            return False
        return self.first(earlier) != self.first(later)

    def _compare(self, earlier: int, later: int) -> None:
        self.compared += 1
        similarity = jaccard(self._shingles_of(earlier), self._shingles_of(later))
        if similarity < self._threshold:
            self._apart.add((earlier, later))
            return
        self.confirmed.append((earlier, later, similarity))
        one, other = sorted((self.first(earlier), self.first(later)))
        self._above[other] = one
