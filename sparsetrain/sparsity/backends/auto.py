"""Which backend ``auto`` stands for: the one that was measured to be faster, on this machine or on a common one.

A crossover table gives, for layer sizes, numbers of tokens and numbers of threads, the density up to which a training
step of a sparse backend (forward, input gradient, weight gradient) takes no longer than that of ``masked``. Sizes
between the measured ones are interpolated in their logarithms; sizes beyond take the edge of the table. float32 and
bfloat16 have tables of their own, since dense products in bfloat16 are much faster on some processors and much slower
on others.

`sparsetrain tune` measures a table and puts it into the cache. Without one, a shipped table is used: Zen 4 on Zen 4;
Emerald Rapids on any other CPU where torch uses AVX-512; Zen 3 otherwise. Entries of ``csr`` on Emerald Rapids are
medians of three measurements on a shared host, other AVX-512 entries the least of three. Tables for bfloat16 count only
where the processor has the instructions that they were measured with; elsewhere the table for float32 counts.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import torch

from sparsetrain.cache import cache_directory
from sparsetrain.errors import UserError
from sparsetrain.files import write_json
from sparsetrain.machine import machine_key, processor, torch_simd
from sparsetrain.reading import read_json
from sparsetrain.shapes import Fraction, Positive, check
from sparsetrain.sparsity.backends.base import BACKENDS
from sparsetrain.sparsity.backends.few_tokens import MOST
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_log = logging.getLogger(__name__)

FALLBACK = "masked"
_SINGLE = "csr"  # its table stands in for the missing one of another backend
FEW_TOKENS = (_SINGLE, "bsr")  # the backends with kernels for few tokens
# Files by kind of processor: of training, and of decoding, which was measured on Zen 3 and on a Xeon with AVX-512. AMD
# processors with AVX-512 take what the Xeon gave without a bitmap of the weights, which they do not use.
SHIPPED = {
    "AVX2": ("crossover.json", "decoding_avx2.json"),
    "AVX-512": ("crossover_avx512.json", "decoding_avx512.json"),
    "AVX-512, AMD": ("crossover_avx512.json", "decoding_avx512_columns.json"),
    "Zen 4": ("crossover_zen4.json", "decoding_avx512_columns.json"),
}
_BFLOAT16 = "bfloat16"  # what the name of a table of that type ends with
DECODING = f"{_SINGLE} decoding"  # the table by which few tokens are multiplied while weights do not change
MAX_BYTES = 1 << 20  # of a file of tables; ours have some 10 kB


class _Plain(TypedDict):
    """A `Crossover` in a file."""

    sides: list[Positive]
    tokens: list[Positive]
    threads: list[Positive]
    density: list[list[list[Fraction]]]


class _Tables(TypedDict):
    backends: dict[str, _Plain]


@dataclass(frozen=True, eq=False)  # compared by identity: `_limit` caches by table
class Crossover:
    """Densities up to which one backend is the faster one.

    Args:
        sides: geometric means of in_features and out_features, increasing.
        tokens: rows of the input, increasing.
        threads: increasing.
        density: ``[threads][sides][tokens]``; 0 where it is never faster.
    """

    sides: list[int]
    tokens: list[int]
    threads: list[int]
    density: list[list[list[float]]]

    def at(self, side: float, tokens: int, threads: int) -> float:
        """Return the density for one layer."""
        nearest = 0
        for index, count in enumerate(self.threads):  # a plain loop, which torch.compile can trace
            if abs(count - threads) < abs(self.threads[nearest] - threads):
                nearest = index
        columns = [_interpolate(self.tokens, row, tokens) for row in self.density[nearest]]
        return _interpolate(self.sides, columns, side)


def _interpolate(places: Sequence[float], values: Sequence[float], place: float) -> float:
    after = 0
    while after < len(places) and places[after] < place:
        after += 1
    if after == 0 or after == len(places):
        return values[min(after, len(places) - 1)]
    low, high = places[after - 1], places[after]
    share = math.log(place / low) / math.log(high / low)
    return values[after - 1] * (1 - share) + values[after] * share


def table_name(backend: str, dtype: torch.dtype) -> str:
    """Return the name of the table of a backend for inputs of a type: ``csr``, ``csr bfloat16``."""
    return f"{backend} {_BFLOAT16}" if dtype == torch.bfloat16 else backend


def from_plain(content: Any, source: str) -> dict[str, Crossover]:
    """Return the tables by `table_name` from the content of a file.

    Raises:
        UserError: it is none; the message names ``source`` and says what to do.
    """
    try:
        check(content, _Tables, "the file")
        return {name: _crossover(name, entry) for name, entry in content["backends"].items()}
    except UserError as error:
        raise UserError(f"{source} is no crossover table ({error}); delete it or run: sparsetrain tune") from None


def _crossover(name: str, entry: _Plain) -> Crossover:
    axes = {"threads": entry["threads"], "sides": entry["sides"], "tokens": entry["tokens"]}
    for axis, places in axes.items():
        if not places:
            raise UserError(f"{name!r:.60}: {axis} is empty")
        if any(low >= high for low, high in pairwise(places)):
            raise UserError(f"{name!r:.60}: {axis} must increase")
    threads, sides, tokens = map(len, axes.values())
    density = entry["density"]
    if len(density) != threads or any(
        len(rows) != sides or any(len(row) != tokens for row in rows) for rows in density
    ):
        raise UserError(f"{name!r:.60}: density must be [{threads}][{sides}][{tokens}], as its axes are")
    return Crossover(entry["sides"], entry["tokens"], entry["threads"], density)


def tuned_path() -> Path:
    """Return where the table of this machine is kept."""
    return cache_directory() / f"crossover-{machine_key()}.json"


def save(tables: dict[str, Crossover], about: dict[str, Any]) -> Path:
    """Write the table of this machine and use it from now on; return its path."""
    path = tuned_path()
    write_json(path, {**about, "backends": {name: vars(table) for name, table in tables.items()}})
    with _reading:
        _tables.clear()
        _tables.update(tables)
        _read.append(True)
    return path


def tables() -> dict[str, Crossover]:
    """Return the tables to go by: this machine's own, or those of the library; read at the first call.

    A file that is no table is set aside, and a warning is logged.
    """
    if not _read:
        _read_tables()
    return _tables


def _read_tables() -> bool:
    """Read the tables if no other thread has; return True, once they are there."""
    with _reading:
        if not _read:
            try:
                found = _load()
            except UserError as error:
                _log.warning("%s; the table of the library is used", error)
                found = _shipped()
            _tables.update(found)
            _read.append(True)
    return True


# A compiler that traces `choose` must not trace the reading of a file: it calls this function and takes the result as a
# constant. `torch.compiler.assume_constant_result` sets the same attribute, but imports the compiler: a second.
_read_tables._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> dict[str, Crossover]:
    path, shipped = tuned_path(), _shipped()
    if not os.path.exists(path):  # which also says no where the directory may not be entered
        return shipped
    # A file may be older than the tables for bfloat16 and for decoding: those of the library count then.
    later = (_BFLOAT16, DECODING)
    return {name: table for name, table in shipped.items() if name.endswith(later)} | from_plain(
        read_json(path, max_bytes=MAX_BYTES), str(path)
    )


def _shipped() -> dict[str, Crossover]:
    name, decoding = SHIPPED[_kind()]
    content = _content(name)
    # Its tables for bfloat16 were measured with such instructions; without them dense is slower.
    native = content.get("bfloat16_by") in processor().flags
    tables = from_plain(content, name) | from_plain(_content(decoding), decoding)
    return {name: table for name, table in tables.items() if native or not name.endswith(_BFLOAT16)}


def _content(name: str) -> Any:
    place = resources.files("sparsetrain.sparsity.backends").joinpath("tables", name)
    return json.loads(place.read_text("utf-8"))


def _kind() -> str:
    """Return the kind of processor, among the kinds with a shipped table, that this one is most like."""
    if "AVX512" not in torch_simd():
        return "AVX2"
    if processor().vendor != "AuthenticAMD":
        return "AVX-512"
    # Of AMD's family 25, Zen 3 has no AVX-512. Zen 4 computes 16 lanes as two halves, so that dense products gain less.
    return "Zen 4" if processor().family == "25" else "AVX-512, AMD"


def choose(
    pattern: SparsityPattern,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    density: float | None = None,
    forward_only: bool = False,
) -> str:
    """Return the name of the backend for a pattern and a number of tokens.

    Args:
        density: what to decide by in place of the pattern's own, for one that will change.
        forward_only: whether no backward pass may follow. Few tokens are then bound by the bytes of the matrix, which
            a dense product would have to write before it reads them.
    """
    if forward_only and tokens <= MOST:
        for name in FEW_TOKENS:
            if BACKENDS[name].refusal(dtype, device, pattern) is None:
                return name
    density = pattern.density if density is None else density
    chosen, highest = FALLBACK, 0.0
    for name in BACKENDS.names():
        backend = BACKENDS[name]
        if backend.tuned_with is None or backend.refusal(dtype, device, pattern) is not None:
            continue
        table = _table(name, dtype)
        if table is None:
            continue
        # A compiler cannot ask for the number of threads, nor see through a cache; what it traces is decided as for
        # one thread.
        compiling = torch.compiler.is_compiling() or type(tokens) is not int
        limit = _limit.__wrapped__ if compiling else _limit
        threads = 1 if compiling else torch.get_num_threads()
        up_to = limit(table, pattern.shape, tokens, threads)
        # Of several, the one that stays ahead of the dense product up to the higher density.
        if density <= up_to and up_to > highest:
            chosen, highest = name, up_to
    return chosen


def decoding_limit(shape: tuple[int, int], tokens: int) -> float:
    """Return the density up to which a sparse product of few tokens is faster than one with a dense copy of the matrix.

    Both only multiply: the copy is made beforehand.
    """
    table = tables().get(DECODING)
    return 1.0 if table is None else _limit(table, shape, tokens, torch.get_num_threads())


def _table(backend: str, dtype: torch.dtype) -> Crossover | None:
    """Return the table to go by: one for the type first; that of single weights, which are no faster, for blocks."""
    known = tables()
    for kind in (dtype, torch.float32):
        for name in (backend, _SINGLE):
            if (table := known.get(table_name(name, kind))) is not None:
                return table
    return None


# Cached, because every layer asks in every step, and a small layer's step takes hardly longer than this.
@functools.lru_cache(maxsize=4096)
def _limit(table: Crossover, shape: tuple[int, int], tokens: int, threads: int) -> float:
    return table.at(math.sqrt(shape[0] * shape[1]), max(1, tokens), threads)


_tables: dict[str, Crossover] = {}
_read: list[bool] = []  # filled when `_tables` are read: at the first use of auto, since an import reads no user file
_reading = threading.Lock()
