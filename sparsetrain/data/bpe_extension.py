"""Further merges for a byte-level BPE, learned on text of another language behind the merges that it has.

The `tokenizers` library trains from bytes alone, so the algorithm of Sennrich et al. (arXiv 1508.07909) is here. It
starts from the words as the old merges split them, and it may refuse a merge of two old tokens.

A word is split by the merge of lowest rank first. Since the ranks of new merges are above all old ones, the old merges
do their work first, and the first new merge that acts on a word joins two neighbours of the old split. A word is
therefore split as before exactly if no two neighbours of its old split are one of the new merges.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

# A pair that occurs once would make a token of a single word; the training of a whole BPE has the same limit.
MIN_FREQUENCY = 2
# The bytes of a UTF-8 character but the last one. They name a block of 64 characters.
_BLOCK = re.compile(rb"[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2}")

Pair: TypeAlias = tuple[int, int]
Word: TypeAlias = tuple[int, ...]


def blocks(content: bytes) -> set[bytes]:
    """Return the blocks of 64 characters of which ``content`` has a character or its first bytes, without ASCII.

    A block is named by the bytes that its characters have in common. Bytes that begin no block are skipped, so a part
    of a character may stand at either end.
    """
    return set(_BLOCK.findall(content))


@dataclass
class Merges:
    """The result of `learn_merges`.

    Attributes:
        pairs: the merges as pairs of spellings, in the order of their ranks.
        tokens: the spellings of the new tokens, in the order of their ids.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)


class _Words:
    """Words as lists of ids, the number of each pair of neighbours, and the words in which it may occur."""

    def __init__(self, words: Mapping[Word, int]) -> None:
        self.ids = [list(word) for word in words]
        self.counts = list(words.values())
        self.pairs: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, (word, count) in enumerate(zip(self.ids, self.counts, strict=True)):
            for pair in itertools.pairwise(word):
                self.pairs[pair] += count
                self.where[pair].add(index)

    def merge(self, pair: Pair, token: int) -> set[Pair]:
        """Write ``token`` for each ``pair``, and return the pairs that have become more frequent."""
        grown: set[Pair] = set()
        for index in self.where.pop(pair):
            grown |= self._merge_in(index, pair, token)
        del self.pairs[pair]
        return grown

    def _merge_in(self, index: int, pair: Pair, token: int) -> set[Pair]:
        old, count = self.ids[index], self.counts[index]
        new: list[int] = []
        grown: set[Pair] = set()
        place, last = 0, len(old) - 1
        while place <= last:
            if place == last or old[place] != pair[0] or old[place + 1] != pair[1]:
                new.append(old[place])
                place += 1
                continue
            if new:
                self.pairs[new[-1], pair[0]] -= count
                self.pairs[new[-1], token] += count
                grown.add((new[-1], token))
            if place + 1 < last:
                self.pairs[pair[1], old[place + 2]] -= count
                self.pairs[token, old[place + 2]] += count
                grown.add((token, old[place + 2]))
            new.append(token)
            place += 2
        self.ids[index] = new
        for one in grown:
            self.where[one].add(index)
        return grown


def learn_merges(
    words: Mapping[Word, int], spellings: Sequence[str], n_tokens: int, allowed: Callable[[int, int], bool]
) -> Merges:
    """Learn at most ``n_tokens`` new tokens; equal arguments give equal merges.

    Each step merges the most frequent pair of neighbours; of equally frequent ones, the pair of smallest ids.

    Args:
        words: the ids of each word as the old merges split it, and its number of occurrences.
        spellings: the spelling of each old id in the symbols of `tokenizer_file.byte_symbols`.
        n_tokens: the largest number of new tokens. Their ids follow the old ones.
        allowed: whether two old tokens may be merged. A merge with a new token is always allowed, because a word has a
            new token only after an allowed merge.
    """
    first_new = len(spellings)
    known = {spelling: index for index, spelling in enumerate(spellings)}
    names = list(spellings)
    state, found = _Words(words), Merges()
    heap = [(-count, pair) for pair, count in state.pairs.items()]
    heapq.heapify(heap)
    while heap and len(found.tokens) < n_tokens:
        negative, pair = heapq.heappop(heap)
        count = state.pairs.get(pair, 0)
        if count < MIN_FREQUENCY:
            continue
        if count != -negative:  # the pair has become rarer since it was pushed
            heapq.heappush(heap, (-count, pair))
            continue
        left, right = pair
        if max(pair) < first_new and not allowed(left, right):
            continue
        spelling = names[left] + names[right]
        token = known.setdefault(spelling, len(names))
        if token < first_new:  # old tokens come from old merges only
            continue
        if token == len(names):
            names.append(spelling)
            found.tokens.append(spelling)
        found.pairs.append((names[left], names[right]))
        for one in state.merge(pair, token):
            heapq.heappush(heap, (-state.pairs[one], one))
    return found


def neighbours(ids: Iterable[int], words: Iterable[int | None]) -> set[Pair]:
    """Return the pairs of neighbouring ids within a word; ``words`` has the number of the word of each id."""
    return {
        (left, right)
        for (left, one), (right, other) in itertools.pairwise(zip(ids, words, strict=True))
        if one == other and one is not None
    }
