"""What the runs of every experiment cost: cost.md beside this file, from the rows on file.

    python experiments/cost.py

A row of the table is a kind of run: the tokens that trained each hidden weight and each nonzero, the training FLOPs by
formula, and the seconds by the run's own clock.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# What the runs cost

Made from the rows on file by `python experiments/cost.py`. Tokens per weight and per nonzero count the hidden matrices;
a range is that of the runs, which differ in length or in masks. FLOPs are those of training by formula, on a machine
that skips every zero. Seconds are the median of the runs' own clocks. They compare nothing across experiments: hosts
differ, and most runs shared two cores.

| experiment | run | runs | tokens per weight / per nonzero | FLOPs | seconds |
|---|---|---|---|---|---|
"""
HIDDEN = 12  # weights of a block over width^2, in the tables without a column of weights: attention 4, MLP 8

RESIZING = ("gmp", "vspdf")  # rules that change the number of nonzeros

Cells = Mapping[str, str]


def number(row: Cells, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def rule(row: Cells) -> str:
    """Return the evolution rule of the masks, if the table has one for each run."""
    return row.get("rule") or row.get("sparsity.evolution.rule") or ""


def label(row: Cells) -> tuple[str, ...]:
    """Return what tells a kind of run from the others of its table."""
    shape = (f"{100 * float(row['sparsity']):g} %", f"width {row['width']}", f"{row['depth']} layers")
    if rule(row):
        return (rule(row), *shape)
    if "arm" in row:
        stage = row.get("stage") or row["how"]
        return (row["arm"], *([] if stage == "pretrain" else [stage]), *shape[1:])
    return (row["parameterization"].partition(" ")[0], *shape)


def runs(path: Path) -> Iterator[Cells]:
    """Yield the rows of runs that were trained on text to their end."""
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            on_text = row.get("loss") and row.get("tokens") and row.get("status", "complete") == "complete"
            if on_text and row.get("flops") and row.get("seconds") and float(row.get("steps") or 0) > 0:
                yield row


def ratios(row: Cells) -> tuple[float, float | None]:
    """Return the tokens for each hidden weight and for each nonzero; None if masks changed the latter's number."""
    weights = number(row, "weights") or HIDDEN * float(row["width"]) ** 2 * float(row["depth"])
    nonzeros = number(row, "nonzeros")
    if nonzeros is None and "weights" not in row and rule(row) not in RESIZING:
        nonzeros = weights * (number(row, "density") or 1.0 - float(row["sparsity"]))
    tokens = float(row["tokens"])
    return tokens / weights, tokens / nonzeros if nonzeros else None


def two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def span(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Return the smallest and the largest of some values, or one if they look alike."""
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def lines() -> Iterator[str]:
    for path in sorted(HERE.glob("*/results.csv")):
        found: dict[tuple[str, ...], list[Cells]] = {}
        with path.open(newline="", encoding="utf-8") as stream:
            columns = next(csv.reader(stream))
        if not {"sparsity", "width", "depth", "tokens", "flops"} <= {*columns}:
            continue
        for row in runs(path):
            found.setdefault(label(row), []).append(row)
        for name, rows in found.items():
            per_weight, per_nonzero = zip(*map(ratios, rows), strict=True)
            known = [value for value in per_nonzero if value is not None]
            tokens = f"{span(per_weight, two_digits)} / {span(known, two_digits) if known else '-'}"
            flops = span([float(row["flops"]) for row in rows], "{:.2e}".format)
            seconds = f"{statistics.median(float(row['seconds']) for row in rows):.0f}"
            place = path.parent.name
            yield f"| [{place}]({place}/README.md) | {', '.join(name)} | {len(rows)} | {tokens} | {flops} | {seconds} |"


def main() -> None:
    (HERE / "cost.md").write_text(HEAD + "\n".join(lines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
