"""The numbers of a sweep: optima with intervals, their shifts, and the cost of a transferred value."""

from __future__ import annotations

import contextlib
import csv
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.files import whole_file
from sparsetrain.parameterization.rules import SAME_WHEN_DENSE
from sparsetrain.reading import parse_yaml
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import percent
from sparsetrain.scaling.transfer import (
    Curve,
    Gap,
    Optimum,
    Row,
    Shift,
    gap_beyond,
    losses_at,
    make_curves,
    optimum,
    relative_gap,
    shift,
    to_run,
)

CONTROLS = {"sp": "SP", "mup": "muP"}  # that a scheme of sparsity is compared with, and their names
REPORTED = "reported_loss"
SHAPE = ("sparsity", "width", "depth")
# Columns of a sweep, mapped to their configuration keys.
OVERRIDES = {
    "parameterization": "parameterization",
    "lr": "optimizer.lr",
    "sparsity": "sparsity.sparsity",
    "width": "model.d_model",
    "depth": "model.n_layers",
}
OPTIMA = (
    *("parameterization", *SHAPE),
    *("points", "seeds", "edge", "optimum", "low", "high", "loss", "shift_steps", "shift_at_least"),
    *("shift_low", "shift_high", "loss_at_base_optimum", "transfer_cost", "seeds_at_base_optimum"),
)


@dataclass(frozen=True)
class Line:
    """One curve of a sweep.

    Args:
        key: parameterization, sparsity, width, depth and the extra columns, in this order.
        curve: its losses, by which its optimum was found.
        reported: its losses on text on which nothing was chosen, if they are known; else those of ``curve``.
        xs: the swept values as the runs have them.
        optimum: its minimum, or the edge at which it is lowest.
        shift: from the base, see `_base_of`; None if the base has no optimum.
        at: log2 of the base's optimum; None if unknown.
        at_base: reported losses by seed at the base's optimum; empty if it is unknown or outside of this curve's
            points.
        at_own: reported losses by seed at this curve's own optimum, or at its best point; empty if it has none.
        cost: gap of the losses at the base's optimum to those at its own; None if unknown.
    """

    key: tuple[Any, ...]
    curve: Curve
    reported: Curve
    xs: tuple[float, ...]
    optimum: Optimum
    shift: Shift | None
    at: float | None
    at_base: dict[int, float]
    at_own: dict[int, float]
    cost: Gap | None

    @property
    def scheme(self) -> str:
        return str(self.key[0])

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.key[1:]


def lines_of(rows: Sequence[Mapping[str, Any]], x: str, extra: Sequence[str] = ()) -> list[Line]:
    """Return the curves of ``rows`` over the column ``x``; the base is the smallest model, dense before sparse.

    Args:
        rows: the table of a sweep, one row per run.
        x: the swept column, such as ``lr``.
        extra: columns that distinguish curves, in addition to parameterization, sparsity, width and depth.

    Raises:
        UserError: the column does not exist, is not a number, does not vary, or distinguishes curves.
    """
    if x in SHAPE:
        raise UserError(f"x={x} distinguishes curves; x must be lr or another setting, such as model.init_std")
    if not all(isinstance(row.get(x), int | float) for row in rows):
        raise UserError(f"x={x} is not a number in every run; columns: {', '.join(name for name in rows[0])}")
    if len({row[x] for row in rows}) < 2:
        raise UserError(f"x={x} has the same value in every run: there is no curve to draw")
    names = [name for name in ("parameterization", *SHAPE, *extra) if name != x]
    data, reported = (
        [Row(tuple(row[name] for name in names), row[x], row["seed"], _loss(row, column)) for row in rows]
        for column in ("loss", REPORTED if all(_is_reported(row) for row in rows) else "loss")
    )
    curves, reported_curves = make_curves(data), make_curves(reported)
    place = {name: index for index, name in enumerate(names)}
    small_first = [place[name] for name in ("depth", "width", "sparsity") if name in place]
    order = sorted(curves, key=lambda key: [str(key[0]), *(key[index] for index in small_first)])  # type: ignore[index]
    lines: list[Line] = []
    for key in order:
        assert isinstance(key, tuple)
        curve, base = curves[key], curves[_base_of(str(key[0]), order, place.get("sparsity"))]
        xs = tuple(sorted({row.x for row in data if row.curve == key}))
        lines.append(_line(key, curve, reported_curves[key], base, xs))
    return lines


def _base_of(scheme: str, order: Sequence[Any], sparsity: int | None) -> Any:
    """Return the key of a parameterization's base: its first, or, if it has no dense one, that of the same rules."""
    own, others = ([key for key in order if key[0] == one] for one in (scheme, SAME_WHEN_DENSE.get(scheme)))
    if sparsity is None or not all(key[sparsity] for key in own):
        return own[0]
    return next((key for key in others if not key[sparsity] and key[4:] == own[0][4:]), own[0])  # extra columns alike


def _line(key: tuple[Any, ...], curve: Curve, reported: Curve, base: Curve, xs: tuple[float, ...]) -> Line:
    if not curve.usable:
        nothing = Optimum(None, "low", math.inf, float(curve.log2[0]), False, None, len(curve.seeds))
        return Line(key, curve, reported, xs, nothing, None, None, {}, {}, None)
    found = optimum(curve)
    at_own = losses_at(reported, _own(found))
    if not base.usable:
        return Line(key, curve, reported, xs, found, None, None, {}, at_own, None)
    at = optimum(base).log2
    at_base = {} if at is None else losses_at(reported, at)
    cost = relative_gap(at_base, at_own)
    return Line(key, curve, reported, xs, found, shift(curve, base), at, at_base, at_own, cost)


def _own(found: Optimum) -> float:
    """Return log2 of a curve's optimum, or of the best point of the grid if the optimum lies beyond an edge."""
    return found.best if found.log2 is None else found.log2


def _loss(row: Mapping[str, Any], column: str) -> float:
    return math.inf if row.get(column) is None else float(row[column])


def _is_reported(row: Mapping[str, Any]) -> bool:
    """Whether a run has a reported loss, or none at all since it diverged."""
    return row.get(REPORTED) is not None or (REPORTED in row and row.get("loss") is None)


def labels_of(lines: Sequence[Line], extra: Sequence[str] = ()) -> list[str]:
    """Return labels that distinguish the curves of a parameterization, without extra columns that others determine."""
    names = [*SHAPE, *extra]

    def values(*columns: int) -> int:
        return len({tuple(line.shape[i] for i in columns) for line in lines})

    varying = [i for i in range(len(lines[0].shape)) if values(i) > 1]
    for i in reversed(varying[:]):
        others = [j for j in varying if j != i and j >= len(SHAPE)]
        if i >= len(SHAPE) and any(values(j, i) == values(j) for j in others):
            varying.remove(i)
    texts = []
    short = {i: _shortened([line.shape[i] for line in lines]) for i in varying}
    for line in lines:
        settings = [f"{_noun(names[i])} {short[i](line.shape[i])}" for i in varying]
        texts.append(", ".join(settings) or "all")
    return texts


def optima_sheet(lines: Sequence[Line], x: str, extra: Sequence[str] = ()) -> Sheet:
    """Return the table of optima and shifts."""
    rows = []
    for line, label in zip(lines, labels_of(lines, extra), strict=True):
        found = line.optimum
        if found.log2 is None:
            where = "none" if not math.isfinite(found.loss) else f"beyond {2**found.best:.3g} ({found.edge} edge)"
        else:
            where = f"{2**found.log2:.3g}" + _interval(found.interval, lambda value: f"{2**value:.3g}")
            where += "" if found.interpolated else ", on the grid"
        moved = "-"
        if line.shift is not None:
            sign = ">=" if line.shift.at_least and line.shift.steps >= 0 else "<=" if line.shift.at_least else ""
            moved = f"{sign}{line.shift.steps:+.2f}" + _interval(line.shift.interval, lambda value: f"{value:+.2f}")
        there = f"{np.mean(list(line.at_base.values())):.4f}" if line.at_base else "-"
        if 0 < len(line.at_base) < found.seeds:
            there += f" ({_seeds(len(line.at_base))})"
        rows.append((f"{line.scheme}, {label}", where, moved, f"{own_loss(line):.4f}", there, str(found.seeds)))
    columns = ("curve", f"best {x}", "shift in grid steps", "loss there", "loss at the base's best", "seeds")
    note = (
        "Brackets: 95 %, Student's t over the seeds' own minima, shifts paired by seed; open: beyond the grid, or not "
        "known. Base: a parameterization's first curve; if none is dense, that of one with the same dense rules. "
        "Losses: validation, nats."
    )
    if any(map(_is_other, lines)):
        note += " Optima are those of the validation loss; the losses shown are over the reported share of its text."
    return Sheet("Optima", columns, tuple(rows), note)


def own_loss(line: Line) -> float:
    """Return the loss at a curve's own optimum: the reported one if it is known, else that of the parabola."""
    return float(np.mean(list(line.at_own.values()))) if _is_other(line) and line.at_own else line.optimum.loss


def _is_other(line: Line) -> bool:
    """Whether the reported losses of a curve are not those by which its optimum was found."""
    return line.reported is not line.curve and not np.array_equal(
        line.reported.losses, line.curve.losses, equal_nan=True
    )


def findings(lines: Sequence[Line], extra: Sequence[str] = ()) -> list[str]:
    """Return sentences on the shifts of optima, and on losses at transferred values against those of SP and of muP."""
    sentences = []
    labels = labels_of(lines, extra)
    for scheme in dict.fromkeys(line.scheme for line in lines):
        moves = [line.shift for line in lines if line.scheme == scheme and line.shift is not None]
        if len(moves) > 1 or any(move.steps for move in moves):
            farthest = max(moves, key=lambda move: abs(move.steps))
            sign = "at least " if farthest.at_least else ""
            sentences.append(
                f"{scheme}: the farthest optimum is {sign}{abs(farthest.steps):.2f} grid steps from the base's."
            )
        elif not moves:
            sentences.append(f"{scheme}: the base has no optimum inside the grid, so no shift is known.")
    bases = {line.scheme: line for line in reversed(lines)}  # the first line of each scheme
    for control in CONTROLS:
        controls = {line.shape: line for line in lines if line.scheme == control}
        for line, label in zip(lines, labels, strict=True):
            other = controls.get(line.shape)
            if other is not None and line.scheme not in {control, "sp"}:
                sentences += _beside(line, label, other, bases[line.scheme], bases[control])
    return sentences


def _beside(line: Line, label: str, other: Line, first: Line, others_first: Line) -> list[str]:
    """Return sentences on a curve's loss at its base's best value beside a control's, at its base's and at its own."""
    sentences = []
    name = CONTROLS[other.scheme]
    for text, losses in ((f"{name} with its base's", other.at_base), (f"{name} tuned again", other.at_own)):
        gap = relative_gap(line.at_base, losses) if line.at_base and losses else None
        if gap is None or not math.isfinite(gap.relative):
            continue
        sentences.append(
            f"{label}: {line.scheme} with its base's best value has a loss {_apart(gap)} {text}{_sure(gap)}."
        )
        beyond = gap_beyond(line.at_base, losses, first.at_base, others_first.at_base)
        if beyond is not None and line is not first and first.shape == others_first.shape:
            sentences.append(f"{label}: relative to the gap of the two bases that is {_apart(beyond)}{_sure(beyond)}.")
    return sentences


def _apart(gap: Gap) -> str:
    return f"{percent(abs(gap.relative))} {'below' if gap.relative < 0 else 'above'}"


def _sure(gap: Gap) -> str:
    """Return the interval of a gap, the number of seeds, and a remark if the interval contains zero."""
    unsure = gap.interval is not None and gap.interval[0] <= 0.0 <= gap.interval[1]
    return f"{_interval(gap.interval, percent)} ({_seeds(gap.seeds)}{', not told apart' if unsure else ''})"


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"


def next_commands(lines: Sequence[Line], x: str, extra: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return overrides that extend the grid at edges and add seeds around minima; empty if the sweep is complete.

    A curve gives one line for each set of values that is missing for the same seeds.
    """
    names = [name for name in ("parameterization", *SHAPE, *extra) if name != x]
    varying = [i for i in range(len(names)) if len({line.key[i] for line in lines}) > 1]
    commands = []
    for line in lines:
        if not math.isfinite(line.optimum.loss):
            continue
        known = {math.log2(value): value for value in line.xs}
        wanted: dict[tuple[float, ...], list[int]] = {}
        by_seed: dict[int, list[float]] = {}
        for log2, seed in to_run(line.curve, seeds, at=line.at):
            by_seed.setdefault(seed, []).append(known.get(log2, _power(log2)))
        for seed, values in by_seed.items():
            wanted.setdefault(tuple(values), []).append(seed)
        fixed = [_override(names[i], line.key[i]) for i in varying]
        commands += [
            " ".join([*fixed, f"{OVERRIDES.get(x, x)}={','.join(map(str, values))}", f"seed={','.join(map(str, of))}"])
            for values, of in wanted.items()
        ]
    return commands


def _override(name: str, value: Any) -> str:
    """Return the override that sets a column to its value on the command line."""
    if name == "parameterization":
        value = str(value).partition(" ")[0]  # drop the options in brackets
    text = f"{OVERRIDES.get(name, name)}={'null' if value is None else value}"
    return shlex.quote(text) if " " in text else text


def write_optima(lines: Sequence[Line], path: Path, extra: Sequence[str] = ()) -> None:
    """Write ``optima.csv`` with a row for each curve; unknown values are empty."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*OPTIMA[:4], *extra, *OPTIMA[4:]])
        for line in lines:
            found, moved = line.optimum, line.shift
            low, high = (None, None) if found.interval is None else map(_opened, found.interval)
            ends = (None, None) if moved is None or moved.interval is None else moved.interval
            writer.writerow(
                [
                    *line.key,
                    *(len(line.curve.log2), found.seeds, found.edge or ""),
                    *map(_cell, (None if found.log2 is None else 2**found.log2, low, high, found.loss)),
                    *(_cell(None if moved is None else moved.steps), "" if moved is None else int(moved.at_least)),
                    *map(_cell, ends),
                    _cell(float(np.mean(list(line.at_base.values()))) if line.at_base else None),
                    _cell(None if line.cost is None else line.cost.relative),
                    len(line.at_base),
                ]
            )


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str] | None = None) -> None:
    """Write ``results.csv`` with a row for each run; without ``columns``, the keys of the first row are the columns."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _power(log2: float) -> float:
    """Return 2 to a power: exactly for an integer power, as in the usual grids, else to six digits."""
    whole = round(log2)
    return 2.0**whole if abs(log2 - whole) < 1e-9 else float(f"{2**log2:.6g}")


def _noun(setting: str) -> str:
    """Return the last word of a dotted setting; of a name, what it is the name of, as in ``schedule cosine``."""
    return setting.removesuffix(".name").rpartition(".")[2]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shortened(values: Sequence[Any]) -> Callable[[Any], str]:
    """Return how to write the values of a setting; of sections, such as ramps of the batch, only what tells them apart.

    That is one entry with a different text in each, such as ``led_by gns``, or else all that differ.
    """
    sections: dict[str, dict[str, Any]] = {}
    for text in {value for value in values if isinstance(value, str) and value.startswith("{")}:
        with contextlib.suppress(UserError):  # a text that only looks like a section
            sections[text] = parse_yaml(text, "a setting", dict[str, Any])
    keys = dict.fromkeys(key for found in sections.values() for key in found)
    differing = [key for key in keys if len({str(found.get(key)) for found in sections.values()}) > 1]
    telling = [
        key
        for key in differing
        if all(isinstance(found.get(key), str) for found in sections.values())
        and len({found[key] for found in sections.values()}) == len(sections)
    ]
    shown = telling[:1] or differing

    def write(value: Any) -> str:
        if value not in sections or not shown:
            return _number(value)
        return " ".join(f"{key} {_number(sections[value][key])}" for key in shown if key in sections[value])

    return write


def _interval(interval: tuple[float, float] | None, show: Any) -> str:
    """Return an interval in brackets; an end beyond the grid is ``open``."""
    if interval is None:
        return ""
    low, high = (show(end) if math.isfinite(end) else "open" for end in interval)
    return f" [{low}, {high}]"


def _opened(log2: float) -> float | None:
    return 2**log2 if math.isfinite(log2) else None


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
