"""Decoding in a bench: few tokens without gradients beside what memory gives, as numbers and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsetrain.report.contenders import DECODING, DENSE, Values, grouped, times, title
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, percent

_HEADINGS = {
    "decoding": "Products of few tokens, weights from memory, times as fast as dense",
    "generation": "Generation, times as fast as dense",
}
_KEPT = ("part", "threads", "tokens", "sparsity", "contender", "forward_seconds", "forward_speedup")
_MORE = ("forward_speedup_low", "forward_speedup_high", "limit", "bandwidth", "bytes", "note")


def bound(row: Values, own_bytes: int | None, bandwidth: Values, dense: Sequence[float]) -> Values:
    """Return what memory gives a contender that has to read ``own_bytes``.

    Returns:
        ``bytes``; ``bandwidth``, the bytes a second of a plain read in the same rounds, their median; ``limit``, how
        many times as fast as dense it would be if it did nothing but read; ``of_limit``, the share of that it reaches.
        The last two are None where the bytes are unknown.
    """
    rate = bandwidth["bytes"] / float(np.median(bandwidth["seconds"]))
    limit = None if own_bytes is None else float(np.median(dense)) * rate / own_bytes
    reached = None if limit is None else row["forward_speedup"] / limit
    return {"bytes": own_bytes, "bandwidth": rate, "limit": limit, "of_limit": reached}


def summarise_decoding(rows: Sequence[Values]) -> list[Values]:
    """Return an entry for each contender of each cell; a generation has its ``tokens_per_second``, of all rows."""
    found = []
    for row in rows:
        entry = {key: row[key] for key in (*_KEPT, *_MORE, "of_limit")}
        if row["new_tokens"] is not None:
            entry["tokens_per_second"] = row["tokens"] * row["new_tokens"] / row["forward_seconds"]
        found.append(entry)
    return found


def decoding_sheets(entries: Sequence[Values]) -> list[Sheet]:
    """Return a table of the products and one of the generations."""
    return [_sheet(part, [entry for entry in entries if entry["part"] == part]) for part in DECODING]


def _sheet(part: str, entries: list[Values]) -> Sheet:
    names = list(dict.fromkeys(entry["contender"] for entry in entries if entry["contender"] != DENSE))
    rows = []
    for (threads, tokens, sparsity), members in grouped(entries, "threads", "tokens", "sparsity"):
        by_name = {entry["contender"]: entry for entry in members}
        dense = by_name[DENSE]
        own = (
            f"{dense['tokens_per_second']:.1f}/s"
            if part == "generation"
            else f"{1e3 * dense['forward_seconds']:.1f} ms"
        )
        where = (f"{threads}, {tokens}, {percent(sparsity)}", own, f"{dense['bandwidth'] / 1e9:.1f} GB/s")
        rows.append((*where, *(_cell(by_name.get(name)) for name in names)))
    notes = dict.fromkeys(f"{title(entry['contender'])}: {entry['note']}." for entry in entries if entry["note"])
    counted = "rows" if part == "generation" else "tokens"
    note = (
        "Against torch dense float32 in the same rounds; in brackets the share of what memory gives, the bytes that a "
        "contender has to read at the rate of a plain read in the same rounds."
    )
    if part == "generation":
        note += " Weights that fit into a cache are read faster."
    columns = (f"Threads, {counted}, sparsity", "Dense", "Plain read", *map(title, names))
    return Sheet(_HEADINGS[part], columns, tuple(rows), " ".join([note, *notes]))


def _cell(entry: Values | None) -> str:
    if entry is None:
        return ABSENT
    share = "" if entry["of_limit"] is None else f" ({entry['of_limit']:.0%})"
    return times(entry["forward_speedup"]) + share
