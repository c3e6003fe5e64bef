"""The results of a bench: ratios of its raw times, their means over shapes, linear fits, and tables.

Every ratio compares two contenders of one cell, which were timed in turns. Times of different cells are never divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from sparsetrain.errors import UserError
from sparsetrain.reading import read_json
from sparsetrain.report.contenders import DECODING, DENSE, Values, geometric_mean, grouped, times, title
from sparsetrain.report.decoding import bound, decoding_sheets, summarise_decoding
from sparsetrain.report.run_files import Bench, check_times
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, byte_size, clean, percent
from sparsetrain.shapes import check

FORMAT = 1

_FILE_WIDTH = 120


def rows_of(cell: Values) -> list[Values]:
    """Return one flat row for each contender of a cell, compared with ``dense`` in the same cell.

    ``speedup`` is the median step of dense over the median step of the contender. ``speedup_low`` and ``speedup_high``
    are the quartiles of this ratio taken round by round. They are None for a contender without a backward pass, which
    has only ``forward_speedup``. ``limit`` is 1/density, and in decoding what memory gives (`decoding.bound`).
    """
    dense = cell["results"][DENSE]
    place = {key: cell[key] for key in ("part", "threads", "in_features", "out_features", "tokens", "sparsity")}
    rows = []
    for name, result in cell["results"].items():
        row: Values = {**place, "contender": name, "stored_weights": result["stored_weights"]}
        for kind in ("step", "forward"):
            row |= _compared(kind, result.get(f"{kind}_seconds"), dense.get(f"{kind}_seconds") or ())
        if (bandwidth := cell.get("bandwidth")) is None:
            row["limit"] = None if cell["sparsity"] is None else 1.0 / (1.0 - cell["sparsity"])
        else:
            row |= bound(row, result.get("bytes"), bandwidth, dense["forward_seconds"])
            row["new_tokens"] = cell.get("new_tokens")
        row["state_bytes_per_weight"] = result.get("state_bytes_per_weight")
        own, other = result.get("peak_activation_bytes"), dense.get("peak_activation_bytes")
        row["peak_activation_bytes"] = own
        row["activation_ratio"] = own / other if own is not None and other else None
        row["rounds"] = len(result["forward_seconds"])
        row["note"] = result["note"]
        rows.append(row)
    return rows


def _compared(kind: str, own: Sequence[float] | None, dense: Sequence[float]) -> Values:
    prefix = "" if kind == "step" else "forward_"
    names = (f"{kind}_seconds", f"{kind}_q1", f"{kind}_q3", f"{kind}_min", f"{kind}_max")
    ratios = (f"{prefix}speedup", f"{prefix}speedup_low", f"{prefix}speedup_high")
    if not own:
        return dict.fromkeys((*names, *ratios))
    q1, middle, q3 = (float(value) for value in np.percentile(own, (25, 50, 75)))
    # A contender that was timed only once has no round for each of dense's, so it is compared with the median.
    rounds = np.divide(dense, own) if len(own) == len(dense) else np.divide(np.median(dense), own)
    low, high = (float(value) for value in np.percentile(rounds, (25, 75)))
    times = (middle, q1, q3, min(own), max(own))
    return dict(zip((*names, *ratios), (*times, float(np.median(dense)) / middle, low, high), strict=True))


def summarise(values: Values) -> Values:
    """Return the numbers of the tables: means over shapes, models with their Amdahl limits, fits and break-evens."""
    rows = [row for cell in values["cells"].values() for row in rows_of(cell)]
    profiles = {cell["threads"]: cell["profile"] for cell in values["cells"].values() if "profile" in cell}
    return {
        "layers": _layers([row for row in rows if row["part"] == "layer"]),
        "models": _models([row for row in rows if row["part"] in ("model", "reference")], profiles),
        "scaling": _scaling([row for row in rows if row["part"] in ("nnz", "tokens")]),
        "decoding": summarise_decoding([row for row in rows if row["part"] in DECODING]),
    }


def _layers(rows: list[Values]) -> list[Values]:
    found = []
    for (threads, sparsity, name), members in grouped(rows, "threads", "sparsity", "contender"):
        entry: Values = {"threads": threads, "sparsity": sparsity, "contender": name, "shapes": len(members)}
        for kind in ("speedup", "forward_speedup"):
            ratios = [row[kind] for row in members if row[kind] is not None]
            entry[kind] = geometric_mean(ratios)
            entry[f"{kind}_min"], entry[f"{kind}_max"] = (min(ratios), max(ratios)) if ratios else (None, None)
        for kind in ("state_bytes_per_weight", "activation_ratio"):
            entry[kind] = max((row[kind] for row in members if row[kind] is not None), default=None)
        entry |= {"limit": members[0]["limit"], "note": members[0]["note"]}
        found.append(entry)
    return found


def amdahl(profile: Values, density: float) -> float:
    """Return the speed-up limit of a model by Amdahl's law, from the profile of its dense step.

    Only the products of the hidden matrices and their share of clipping and of the optimizer's step shrink, to
    ``density`` of their time: with their share s of the step, the limit is ``1 / (1 - s (1 - density))``.
    """
    share = profile["linear_share"] + profile["update_share"] * profile["hidden_share"]
    return 1.0 / (1.0 - share * (1.0 - density))


def _models(rows: list[Values], profiles: dict[int, Values]) -> list[Values]:
    found = []
    kept = ("threads", "sparsity", "contender", "step_seconds", "step_q1", "step_q3", "speedup", "speedup_low")
    for row in rows:
        entry = {key: row[key] for key in (*kept, "speedup_high", "state_bytes_per_weight", "activation_ratio")}
        profile = profiles.get(row["threads"])
        sparse = profile and row["sparsity"] is not None and row["contender"] != DENSE
        entry["amdahl_limit"] = amdahl(profile, 1.0 - row["sparsity"]) if sparse and profile else None
        entry["part"] = row["part"]
        found.append(entry | ({"profile": profile} if row["part"] == "reference" and row["contender"] == DENSE else {}))
    return found


def _scaling(rows: list[Values]) -> list[Values]:
    found = []
    for (threads, name), members in grouped(rows, "threads", "contender"):
        entry: Values = {"threads": threads, "contender": name}
        for part, x in (("nnz", "stored_weights"), ("tokens", "tokens")):
            points = sorted((row[x], row["step_seconds"]) for row in members if row["part"] == part)
            if name != DENSE or part == "tokens":
                entry[part] = linear_fit(points)
        if name != DENSE:
            series = [(row["sparsity"], row["speedup"]) for row in members if row["part"] == "nnz"]
            entry["break_even"] = break_even(series)
        found.append(entry)
    return found


def linear_fit(points: Sequence[tuple[float, float]]) -> Values | None:
    """Return slope, intercept and R^2 of the least-squares line through ``(x, y)``, or None for fewer than three x.

    ``worst`` is the largest deviation of a point from the line, relative to the point's y.
    """
    x, y = (np.array(side, dtype=float) for side in zip(*points, strict=True)) if points else (np.empty(0),) * 2
    if np.unique(x).size < 3:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (slope * x + intercept)
    r_squared = 1.0 - float(rest @ rest) / float(((y - y.mean()) ** 2).sum())
    worst = float(np.abs(rest / y).max())
    return {"slope": float(slope), "intercept": float(intercept), "r_squared": r_squared, "worst": worst, "n": x.size}


def break_even(series: Iterable[tuple[float, float]]) -> Values | None:
    """Return the sparsity above which speed-ups ``(sparsity, speedup)`` exceed 1, by interpolation of logarithms.

    ``bound`` is ``at most`` if the lowest measured sparsity is faster already, else ``equal``. The result is None if
    the highest measured sparsity is slower.
    """
    points = sorted(series)
    if not points or points[-1][1] < 1.0:
        return None
    for (s0, r0), (s1, r1) in reversed(list(pairwise(points))):
        if r0 < 1.0:
            fraction = -math.log(r0) / (math.log(r1) - math.log(r0))
            return {"sparsity": s0 + fraction * (s1 - s0), "bound": "equal"}
    return {"sparsity": points[0][0], "bound": "at most"}


def load_bench(path: Path) -> Values:
    """Return the contents of a ``bench.json``, finished or not, with its `summarise` under ``summary``.

    Raises:
        UserError: the file cannot be read, another version wrote it, or its content is invalid.
    """
    values = read_json(path, dict)
    if values.get("format") != FORMAT:
        raise UserError(f"{path} is no file of this version of sparsetrain bench")
    check(values, Bench, str(path))
    try:
        check_times(values["cells"], DENSE)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return {**values, "summary": summarise(values)}


def print_bench(values: Values, console: Console) -> None:
    """Print the machine and every table that there is data for."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, _FILE_WIDTH))
    console.print(Text(machine_line(values)))
    for sheet in bench_sheets(values):
        console.print()
        console.print(sheet.rich())


def machine_line(values: Values) -> str:
    """Return the machine and the versions on one line."""
    machine = values["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    bf16 = "native bf16" if machine["native_bf16"] else "no native bf16"
    entries = [f"{machine['processor']} ({machine['family']})", f"{machine['cores']} cores", caches]
    entries += [" ".join(machine["vector_flags"]), bf16, versions, f"commit {_short(values['commit'])}"]
    return clean("; ".join(entry for entry in entries if entry))


def _short(commit: str | None) -> str:
    """Return the first digits of a commit, and a plus sign for uncommitted changes."""
    return "unknown" if commit is None else commit[:12] + ("+" if commit.endswith("+") else "")


def bench_sheets(values: Values) -> list[Sheet]:
    """Return the tables: layer steps, forward passes, models, scaling, memory, decoding."""
    summary = values["summary"]
    note = "Geometric mean over shapes (lowest to highest), against torch dense float32 in the same rounds."
    sheets = [
        _ratios(summary["layers"], "speedup", "Training step of a layer, times as fast as dense", note),
        _ratios(summary["layers"], "forward_speedup", "Forward pass of a layer, times as fast as dense", note),
        _model_sheet(summary["models"]),
        _scaling_sheet(summary["scaling"]),
        _memory_sheet(summary["layers"]),
        *decoding_sheets(summary["decoding"]),
    ]
    return [sheet for sheet in sheets if sheet.rows]


def _ratios(entries: list[Values], kind: str, heading: str, note: str) -> Sheet:
    names = list(dict.fromkeys(e["contender"] for e in entries if e[kind] is not None and e["contender"] != DENSE))
    rows = []
    for (threads, sparsity), members in grouped(entries, "threads", "sparsity"):
        by_name = {entry["contender"]: entry for entry in members}
        cells = [f"{threads}, {percent(sparsity)}", times(members[0]["limit"])]
        rows.append((*cells, *(_range(by_name.get(name), kind) for name in names)))
    notes = dict.fromkeys(
        f"{title(e['contender'])}: {e['note']}." for e in entries if e["note"] and e[kind] is not None
    )
    columns = ("Threads, sparsity", "1/density", *map(title, names))
    return Sheet(heading, columns, tuple(rows if names else ()), " ".join([note, *notes]))


def _model_sheet(entries: list[Values]) -> Sheet:
    rows, notes = [], []
    for entry in entries:
        sparse = entry["sparsity"] is not None
        if entry["contender"] == DENSE and sparse:
            continue  # the baseline of a sparse cell repeats the dense model; it is in the file
        where = f"{entry['threads']}, {percent(entry['sparsity']) if sparse else 'dense'}, {title(entry['contender'])}"
        spread = f" ({entry['speedup_low']:.2f}-{entry['speedup_high']:.2f})"
        rows.append(
            (
                where,
                f"{1e3 * entry['step_seconds']:.0f} ms",
                times(entry["speedup"]) + spread,
                times(entry["amdahl_limit"]),
                ABSENT if entry["state_bytes_per_weight"] is None else f"{entry['state_bytes_per_weight']:.1f}",
                times(entry["activation_ratio"]),
            )
        )
        if profile := entry.get("profile"):
            notes.append(
                f"{entry['threads']} thread{'s' * (entry['threads'] > 1)}: hidden matrices "
                f"{percent(profile['linear_share'])} of the dense step, clipping and AdamW "
                f"{percent(profile['update_share'])}."
            )
    columns = ("Threads, sparsity, model", "Step", "Times as fast", "Amdahl limit", "Bytes per nonzero", "Activations")
    note = " ".join(["Each beside the dense model in the same rounds (quartiles of the ratio).", *notes])
    return Sheet("Training step of a GPT, times as fast as dense", columns, tuple(rows), note)


def _scaling_sheet(entries: list[Values]) -> Sheet:
    rows = []
    for entry in entries:
        for part, slope_unit, scale in (("nnz", "ns per nonzero", 1e9), ("tokens", "µs per token", 1e6)):
            if not (fit := entry.get(part)):
                continue
            even = entry.get("break_even") if part == "nnz" else None
            shown = ("" if even["bound"] == "equal" else "<= ") + percent(even["sparsity"]) if even else ABSENT
            rows.append(
                (
                    f"{entry['threads']}, {title(entry['contender'])}, by {part}",
                    f"{scale * fit['slope']:.3g} {slope_unit}",
                    f"{1e3 * fit['intercept']:.2f} ms",
                    f"{fit['r_squared']:.5f}",
                    percent(fit["worst"]),
                    shown,
                )
            )
    columns = ("Threads, layer, series", "Slope", "Intercept", "R^2", "Worst point off", "Break-even")
    note = "Straight lines through the median steps; break-even is the sparsity from which on sparse is faster."
    return Sheet("How the step grows", columns, tuple(rows), note)


def _memory_sheet(entries: list[Values]) -> Sheet:
    rows = []
    for (name, sparsity), members in grouped(entries, "contender", "sparsity"):
        state = max((e["state_bytes_per_weight"] for e in members if e["state_bytes_per_weight"]), default=None)
        ratio = max((e["activation_ratio"] for e in members if e["activation_ratio"]), default=None)
        if state is not None:
            bytes_of_dense = state * (1.0 - sparsity if name != DENSE else 1.0)
            cells = (f"{state:.1f}", byte_size(bytes_of_dense), times(ratio))
            rows.append((f"{title(name)}, {percent(sparsity)}", *cells))
    columns = ("Layer, sparsity", "Bytes per nonzero", "Per dense weight", "Peak activations / dense")
    note = (
        "Bytes between steps with AdamW in float32: value, gradient, two moments and all indices; the largest over "
        "shapes and threads. Activations: the peak of forward and backward without the gradient of the weights."
    )
    return Sheet("Memory of a layer in training", columns, tuple(rows), note)


def _range(entry: Values | None, kind: str) -> str:
    if entry is None or entry[kind] is None:
        return ABSENT
    text = times(entry[kind])
    return text if entry["shapes"] == 1 else f"{text} ({entry[f'{kind}_min']:.2f}-{entry[f'{kind}_max']:.2f})"
