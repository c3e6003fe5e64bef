"""The noise scale of all parameters over that of the norm layers, from runs with ``observe=noise_scale_all``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from sparsetrain.errors import UserError
from sparsetrain.reading import read_csv
from sparsetrain.report.law_plots import LawPoint
from sparsetrain.report.noise_plots import NoiseCourse, noise_figure
from sparsetrain.report.run_files import COLUMNS, TableRow, table_cell
from sparsetrain.report.sweep import write_rows
from sparsetrain.report.tables import Sheet
from sparsetrain.runs.layout import METRICS
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.scaling.intervals import mean_interval
from sparsetrain.scaling.law import PowerLaw, Quantity
from sparsetrain.scaling.noise import proportion
from sparsetrain.shapes import Count, check
from sparsetrain.studies.fit_rows import Fitted, Rows, grouped, named
from sparsetrain.studies.sweep import SweepRows, read_sweep

TABLE, FIGURE = "noise_scale.csv", "noise_scale.png"
_NORMS, _ALL = "noise_scale", "noise_scale_all"
_LAST = ("run", "step", "tokens", _NORMS, _ALL)
_TEXTS = ("parameterization", "commit", "run")

_AVERAGED = 100  # steps that the noise scales are averages over: earlier values depend on the first steps
_EARLY = 0.1  # share of a run's tokens at which its growth begins
_SHOWN = 40  # points of a run in the figure of the law


class NoiseRow(TableRow):
    """One logged step of a run; noise scales are in sequences, and null where noise hides the gradient."""

    run: str
    step: Count
    noise_scale: Annotated[float, Meta(ge=0.0, le=1e300)] | None
    noise_scale_all: Annotated[float, Meta(ge=0.0, le=1e300)] | None


def read_noise(places: Sequence[Path]) -> SweepRows:
    """Return a row for each logged step of the finished pre-training runs in ``places`` that measured both.

    A place may also be a ``noise_scale.csv`` written earlier; its rows also count when their runs are gone.

    Raises:
        UserError: see `read_sweep`; no run measured both, or the settings of a table and of runs beside it differ.
    """
    tables, others = [place for place in places if place.suffix == ".csv"], [p for p in places if p.suffix != ".csv"]
    rows: list[dict[str, Any]] = []
    varied: list[str] = []
    unfinished: list[Path] = []
    if others:
        found = read_sweep(others, apart=True)
        varied, unfinished = found.varied, found.unfinished
        for run in found.rows:
            known = {name: run[name] for name in (*COLUMNS, *varied, "run")}
            rows += [
                known | {name: record.get(name) for name in _LAST[1:]}
                for record in read_metrics(found.directories[run["run"]] / METRICS)
                if _ALL in record and _NORMS in record
            ]
    own = {row["run"] for row in rows}
    for table in tables:
        earlier = _table(table)
        settings = [name for name in earlier[0] if name not in (*COLUMNS, *_LAST)]
        if others and settings != varied:
            raise UserError(f"{table} has the settings {settings}, and the runs beside it have {varied}")
        varied = settings
        rows += [row for row in earlier if row["run"] not in own]
    if not rows:
        raise UserError(
            f"{', '.join(map(str, places))}: no run has the noise scale of all parameters; train with "
            "observe=noise_scale_all"
        )
    return SweepRows([_checked(row, row["run"]) for row in rows], varied, unfinished)


def _table(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, cells in enumerate(read_csv(path, (*COLUMNS, *_LAST)), start=1):
        row = {name: (text or None) if name in _TEXTS else table_cell(text) for name, text in cells.items()}
        rows.append(_checked(row, f"{path}, row {number}"))
    if not rows:
        raise UserError(f"{path} has no row")
    return rows


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = check(row, NoiseRow, where)
    if not found["tokens"]:
        raise UserError(f"{where}: tokens={found['tokens'] or ''} must be at least 1")
    return found


def fit_noise(rows: Rows, varied: Sequence[str], per: str, target: float | None) -> Fitted:
    """Return the law ``noise scale of all parameters = slope * that of the norm layers``, and how well it holds.

    The slope of a run is that of least squares through the origin, over the logged steps from 100 on. Its interval is
    Student's t over seeds, in logarithms.

    Raises:
        UserError: no run has three such steps at which both noise scales have a value.
    """
    keys = ("width", "depth", "seed", "run")
    body, points, notes = [], [], []
    slopes: dict[int, list[float]] = {}  # logarithms, by seed
    growths: dict[int, list[float]] = {}
    series: list[tuple[np.ndarray, np.ndarray]] = []
    for key, of in grouped(rows, keys).items():
        name = named(keys[:3], key[:3], rows)
        tokens, x, y = _series(of)
        if len(x) < 3:
            notes.append(f"{name}: fewer than 3 logged steps from step {_AVERAGED} on have both; it is left out.")
            continue
        one = proportion(x, y)
        early = int(np.abs(tokens - _EARLY * tokens[-1]).argmin())
        growth = float(y[-1] / y[early])
        growths.setdefault(of[0]["seed"], []).append(np.log(growth))
        slopes.setdefault(of[0]["seed"], []).append(np.log(one.slope))
        series.append((x, y))
        cells = [f"{number:.3g}" for number in (one.correlation, one.slope, 100.0 * one.variation)]
        begins = f"{y[early]:.3g} at {100.0 * tokens[early] / tokens[-1]:.0f} %"
        body.append((name, str(len(x)), *cells, begins, f"{y[-1]:.3g}", f"{growth:.3g}"))
        every = -(-len(x) // _SHOWN)
        points += [LawPoint((float(a),), float(b)) for a, b in zip(x[::every], y[::every], strict=True)]
    if not series:
        raise UserError(notes[0])
    columns = ("run", "steps", "Pearson r", "slope", "ratio varies by, %", "early", "at the end", "growth")
    note = (
        "Of all parameters over that of the norm layers, averages over about 100 steps, in sequences. Growth: of all "
        "parameters, from 10 % of the tokens, or from step 100 where that is later, to the end."
    )
    said = []
    for what, logs in (("slope", slopes), ("growth", growths)):
        own = [float(np.mean(of)) for of in logs.values()]
        if ends := mean_interval(own):
            said.append(f"{what} {np.exp(np.mean(own)):.3g} [{np.exp(ends[0]):.3g}, {np.exp(ends[1]):.3g}]")
    note += f" 95 %, over {len(slopes)} seeds: {', '.join(said)}." if said else ""
    law = _law([float(np.mean(of)) for of in slopes.values()], *map(np.concatenate, zip(*series, strict=True)))
    return Fitted(law, Sheet("Noise scales", columns, tuple(body), note), points, notes)


def _series(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens and both noise scales of a run, where the averages are full and both have a value."""
    kept = [row for row in rows if row["step"] >= _AVERAGED and row[_NORMS] and row[_ALL]]
    kept.sort(key=lambda row: int(row["step"]))
    tokens, x, y = (np.array([row[name] for row in kept], dtype=float) for name in ("tokens", _NORMS, _ALL))
    return tokens, x, y


def _law(slopes: Sequence[float], x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Return a power law whose exponent is 1, from the logarithms of the slopes of the seeds and from all points."""
    log_y = np.log(y)
    total = float(np.square(log_y - log_y.mean()).sum())
    rest = float(np.square(log_y - np.log(x) - np.mean(slopes)).sum())
    law = PowerLaw(
        parameters={"coefficient": float(np.exp(np.mean(slopes))), "exponent": 1.0},
        kind="noise",
        inputs=(Quantity("noise_scale_of_norms", "sequences"),),
        output=Quantity("noise_scale_of_all", "sequences"),
        ranges=((float(x.min()), float(x.max())),),
        r_squared=1.0 - rest / total if total > 0.0 else None,
        points=len(x),
        seeds=len(slopes),
    )
    if len(slopes) < 2:
        return law
    variance = float(np.var(slopes, ddof=1)) / len(slopes)
    return replace(law, covariance=((variance, 0.0), (0.0, 0.0)), freedom=len(slopes) - 1.0)


def write_noise(found: SweepRows, groups: Mapping[str, Rows], out: Path) -> list[str]:
    """Write the table and the figure of noise scales over tokens, and return their names.

    Args:
        groups: the rows of each law, by label.
    """
    write_rows(found.rows, out / TABLE)
    noise_figure([course for label, rows in groups.items() for course in _courses(rows, label)], out / FIGURE)
    return [TABLE, FIGURE]


def _courses(rows: Rows, label: str) -> list[NoiseCourse]:
    return [
        NoiseCourse(label, *(np.array([row[name] or np.nan for row in of], float) for name in ("tokens", _NORMS, _ALL)))
        for of in grouped(rows, ("run",)).values()
    ]
