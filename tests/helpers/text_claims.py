"""What the tables of text stages support: means, and paired differences, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tests.helpers.claims import Claim, difference, mean_claim, pairs_of, rows_of

from sparsetrain.report.pairs import divided


def text_claims(rows: Path) -> list[Claim]:
    """Return the claims of a table of text stages: means, paired differences in nats or bits, and in percent.

    They are of losses and bits per byte, overall and of each corpus. Arms of one stage are compared that have either
    the same sparsity or the same choice. Stages of one arm are compared by the same score, and by that of one with that
    of another before its adaptation or at its first values.
    """
    by_arm: dict[tuple[str, str, str], dict[int, float]] = {}
    own: dict[str, float] = {}  # the sparsity of each arm, which its name need not have
    for row in rows_of(rows):
        own.setdefault(row["arm"], float(row["sparsity"]))
        for name, text in row.items():
            if text and not row["task"] and name.startswith(("loss", "bits_per_byte", "forgetting")):
                by_arm.setdefault((row["arm"], row["stage"], name), {})[int(row["seed"])] = float(text)
    claims = [claim for of in by_arm.values() for claim in mean_claim(of.values())]
    for (one, other), (of, than) in pairs_of(by_arm):
        named, choices = zip(*(divided(key[0]) for key in (one, other)), strict=True)
        sparsities = [own[key[0]] if s is None else s for key, s in zip((one, other), named, strict=True)]
        alike = one[1:] == other[1:] and (sparsities[0] == sparsities[1]) != (choices[0] == choices[1])
        moments = ("", "_before", "_initialised")
        stages_alike = one[0] == other[0] and other[2] in (
            one[2].replace("bits_per_byte", f"bits_per_byte{moment}", 1) for moment in moments
        )
        if alike or stages_alike:
            claims += difference(of, than, in_percent=one[2] != "forgetting")
    return claims


def position_claims(rows: Path, ranges: Sequence[tuple[int, int]] = ()) -> list[Claim]:
    """Return the claims of a ``positions.csv``: mean losses, and paired differences in nats and in percent.

    The two of a pair differ in one of arm, stage, corpus, scale and length. ``ranges`` are lengths, from one to
    another, whose mean counts as one more length.
    """
    return _measured_claims(rows, ("arm", "stage", "corpus", "scale", "length"), "loss", 1.0, ranges)


def probe_claims(rows: Path) -> list[Claim]:
    """Return the claims of a ``probes.csv``: mean accuracies in percent, and paired differences in points.

    The two of a pair differ in one of arm, stage, kind, size and scale.
    """
    return _measured_claims(rows, ("arm", "stage", "kind", "size", "scale"), "accuracy", 100.0)


FURTHER = ("positions.csv", "probes.csv")
"""The tables of evaluations beside a table of text stages."""


def claims_of_text(folder: Path, ranges: Sequence[tuple[int, int]] = ()) -> list[Claim]:
    """Return the claims of the tables in the folder of an experiment; `position_claims` explains ``ranges``."""
    positions, probes = (folder / name for name in FURTHER)
    found = text_claims(folder / "results.csv")
    found += position_claims(positions, ranges) if positions.exists() else []
    return found + (probe_claims(probes) if probes.exists() else [])


def _measured_claims(
    rows: Path, names: Sequence[str], key: str, factor: float, ranges: Sequence[tuple[int, int]] = ()
) -> list[Claim]:
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows_of(rows):
        if row[key]:
            of = found.setdefault(tuple(row.get(name, "") for name in names), {})
            of[int(row["seed"])] = factor * float(row[key])
    for low, high in ranges:
        within: dict[tuple[str, ...], list[dict[int, float]]] = {}
        for place, seeds in found.items():
            if low <= int(place[-1]) <= high:
                within.setdefault((*place[:-1], f"{low}-{high}"), []).append(seeds)
        means = {
            place: {seed: float(np.mean([of[seed] for of in each])) for seed in set.intersection(*map(set, each))}
            for place, each in within.items()
        }
        found |= means
    claims = [claim for of in found.values() for claim in mean_claim(of.values())]
    for (one, other), (of, than) in pairs_of(found):
        if sum(a != b for a, b in zip(one, other, strict=True)) == 1:
            claims += difference(of, than, in_percent=factor == 1.0)
    return claims
