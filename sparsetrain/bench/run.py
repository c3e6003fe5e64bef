"""Execution of ``sparsetrain bench``: its directory, earlier measurements, progress, and the files it writes."""

from __future__ import annotations

import csv
import io
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.bench.cells import Cell, cells_of, effort, measure, together
from sparsetrain.bench.config import BenchConfig
from sparsetrain.bench.decoding import READ_BYTES
from sparsetrain.bench.machine import code_fingerprint, describe_machine
from sparsetrain.bench.peers import missing
from sparsetrain.cost.footprint import Workload
from sparsetrain.errors import UserError
from sparsetrain.files import whole_file, write_json, write_text
from sparsetrain.report.bench import FORMAT, load_bench, print_bench, rows_of, summarise
from sparsetrain.report.bench_plots import bench_figure
from sparsetrain.report.contenders import DECODING
from sparsetrain.report.decoding_plots import decoding_figure
from sparsetrain.report.text import duration
from sparsetrain.runs.claim import locked
from sparsetrain.runs.identity import digest, value_differences
from sparsetrain.runs.layout import BENCH
from sparsetrain.runs.provenance import commit
from sparsetrain.runs.recorded import Recorded
from sparsetrain.screen import plain, say
from sparsetrain.stages.memory import check_footprint, check_memory, footprint_of, memory_errors

FIGURE, DECODING_FIGURE, TABLE = "bench.png", "decoding.png", "results.csv"

# Settings that a cell depends on besides its key; cells with other settings are not mixed.
_FIXED = ("repeats", "least_seconds", "patience", "memory", "block", "seed")
# Sections of such settings, without the entries that only decide which cells there are.
_SECTIONS = {"gpt": ("backends",), "decoding": ("backends", "token_counts", "shape")}
_INCIDENTAL = ("run_dir", "runs_dir", "max_seconds", "force")


@dataclass(frozen=True)
class BenchResult:
    """The result of a bench: its directory and the content of ``bench.json``."""

    directory: Path
    values: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether all cells of the configuration have been measured."""
        return self.values["complete"]


def bench(config: BenchConfig, console: Console | None = None) -> BenchResult:
    """Measure the configured cells, show them, and write ``bench.json``, ``results.csv`` and the figures.

    ``bench.png`` shows training, ``decoding.png`` few tokens without gradients.

    Each finished cell or series is saved at once. The same command skips cells that were measured on this machine with
    this code.

    Raises:
        UserError: the directory is in use, is not writable, or holds measurements with other settings or of another
            machine.
    """
    console = console or Console()
    directory = Path(config.run_dir) if config.run_dir else _place(config)
    _check_memory(config)
    with locked(directory), memory_errors("this measurement"):
        values = _opened(directory / BENCH, config, console)
        for name in config.peers:
            if reason := missing(name):
                values["unavailable"][name] = reason
                _say(console, f"skipped {name}: {reason}")
        cells = cells_of(config)
        values["complete"] = _measure_all(cells, values, config, directory, console)
        values["summary"] = summarise(values)
        write_json(directory / BENCH, values)
        write_text(directory / TABLE, _csv(values))
        _draw(values, directory)
        print_bench(values, console)
        _say(console, f"run directory: {directory}")
    return BenchResult(directory, values)


def _draw(values: dict[str, Any], directory: Path) -> None:
    parts = {cell["part"] for cell in values["cells"].values()}
    figures = {FIGURE: bench_figure} if parts - set(DECODING) or not parts else {}
    figures |= {DECODING_FIGURE: decoding_figure} if parts & set(DECODING) else {}
    for name, figure in figures.items():
        with whole_file(directory / name) as temporary:
            temporary.write_bytes(figure(values))


def _check_memory(config: BenchConfig) -> None:
    """Raise `UserError` before the first cell if any cell does not fit into memory."""
    gpt, parts = config.gpt, config.parts
    layers = [(shape, config.tokens) for shape in config.shapes] if "layers" in parts else []
    if "scaling" in parts:
        layers.append((config.scaling.shape, max(config.tokens, *config.scaling.token_counts)))
    for (k, m), tokens in layers:
        # The dense float32 baseline of every cell: weight and gradient; input, result and both gradients.
        needed = footprint_of({"the weights": 2 * k * m * 4, "inputs and gradients": 2 * tokens * (k + m) * 4})
        check_footprint(needed, f"a layer of shape [{k},{m}] with tokens={tokens}", config.force)
    if "decoding" in parts:
        _check_decoding(config)
    if "model" in parts:
        model = gpt.model_config()
        workload = Workload(model, batch_size=gpt.batch, micro_batch=gpt.batch, context=gpt.context)
        names = ("batch_size", "batch"), ("context", "context"), ("d_model", "d_model"), ("n_layers", "n_layers")
        what = f"a step with gpt.batch={gpt.batch}, gpt.context={gpt.context}, gpt.d_model={gpt.d_model}"
        knobs = {name: f"gpt.{ours}" for name, ours in (*names, ("vocab_size", "vocab_size"))}
        check_memory(workload, f"{what} and gpt.n_layers={gpt.n_layers}", knobs, force=config.force)


def _check_decoding(config: BenchConfig) -> None:
    few, model = config.decoding, config.decoding.model_config()
    (k, m), rows, hidden = few.shape, max(few.token_counts), 12 * model.n_layers * model.d_model**2
    # A nonzero of the least sparse contenders: its value, columns of up to 64 bits, and what checks it.
    sparse = int(12 * (1.0 - min(config.sparsities)) * (len(few.backends) + len(config.peers)))
    layers = {
        "the weights": few.layers * k * m * (6 + sparse),  # dense in float32 and bfloat16
        "a dense matrix to check by": 8 * k * m,
        "inputs and results": 8 * rows * (k + m),
        "memory to read": READ_BYTES,
    }
    what = f"decoding.layers={few.layers} layers of decoding.shape=[{k},{m}] with decoding.token_counts up to {rows}"
    check_footprint(footprint_of(layers), what, config.force)
    models = 1 + len(few.backends) + len(config.peers)
    length = few.prompt + few.new_tokens
    whole = {
        "the hidden weights": hidden * (4 + sparse),
        "embeddings": 4 * models * model.vocab_size * model.d_model,
        "keys and values": 8 * rows * length * model.n_layers * model.d_model,
        "activations": 4 * rows * few.prompt * (6 * model.d_model + model.vocab_size),
        "memory to read": READ_BYTES,
    }
    what = f"models with decoding.d_model={few.d_model}, decoding.n_layers={few.n_layers}, rows up to {rows}"
    check_footprint(footprint_of(whole), what, config.force)


def _measure_all(
    cells: list[Cell], values: dict[str, Any], config: BenchConfig, directory: Path, console: Console
) -> bool:
    """Measure the missing cells, and the whole series if a cell of it is missing; return whether all are measured."""
    whole = [group for group in together(cells) if any(cell.key not in values["cells"] for cell in group)]
    todo = [cell for group in whole for cell in group]
    if len(todo) < len(cells):
        _say(console, f"bench: {len(cells) - len(todo)} of {len(cells)} cells already measured in {directory}")
    started = time.monotonic()
    left = total = sum(effort(cell, config) for cell in todo)
    number = 0
    for group in whole:
        spent = time.monotonic() - started
        if config.max_seconds is not None and spent > config.max_seconds:
            _say(console, f"bench: stopped after {duration(spent)}, {len(todo) - number} cells left; run it again")
            return False
        # Without a measurement there is no estimate.
        eta = f" ETA {duration(spent * left / (total - left))}" if left < total else ""
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        with console.status(plain(f"[{number + 1}/{len(todo)}]{eta}  {group[0].title}{more}")):
            results = measure(group, config)
        left -= sum(effort(cell, config) for cell in group)
        done = time.monotonic() - started
        remaining = duration(done * left / (total - left)) if left > 0 else "0 s"
        for cell, found in zip(group, results, strict=True):
            number += 1
            _say(console, f"[{number}/{len(todo)}] {cell.title}: {_gist(found)}  ETA {remaining}")
            # The same cell may have been measured beside other contenders; the new measurement replaces it.
            for key in [key for key in values["cells"] if key.rpartition(" ")[0] == cell.title]:
                del values["cells"][key]
            values["cells"][cell.key] = found
        write_json(directory / BENCH, values)
    return True


def _gist(found: dict[str, Any]) -> str:
    """Return the speed-ups of a cell, and what it skipped, on one line."""
    speed = "forward_speedup" if found["part"] in DECODING else "speedup"
    rows = [row for row in rows_of(found) if row[speed] and row["contender"] != "dense"]
    parts = [f"{row['contender']} {row[speed]:.2f}x" for row in rows]
    parts += [f"{name} skipped ({reason})" for name, reason in found["skipped"].items()]
    return ", ".join(parts)


def _opened(path: Path, config: BenchConfig, console: Console) -> dict[str, Any]:
    """Return the content of ``bench.json`` so far, without cells that this command cannot use."""
    machine, code, plain = describe_machine(), code_fingerprint(), asdict(config)
    values: dict[str, Any] = {
        "format": FORMAT,
        "config": plain,
        "machine": machine,
        "code": code,
        "commit": commit(),
        "complete": False,
        "unavailable": {},
        "cells": {},
    }
    if not path.exists():
        return values
    before = load_bench(path)
    theirs = before["config"]
    ours = {key: value for key, value in plain.items() if key in theirs or key not in _SECTIONS}
    changed = value_differences(_fixed(ours), _fixed(theirs), BenchConfig, ())
    changed += [
        f"{key}={machine[key]} (there: {before['machine'].get(key)})"
        for key in machine
        if machine[key] != before["machine"].get(key)
    ]
    if changed:
        raise UserError(
            f"run_dir={path.parent} holds measurements of another setting or machine: {'; '.join(changed[:3])}; "
            "choose another run_dir or delete that one"
        )
    if before["code"] == code:
        values["cells"] = before["cells"]
    elif before["cells"]:
        _say(console, f"bench: the code has changed since {len(before['cells'])} cells were measured; repeating them")
    return values


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: config[key] for key in _FIXED if key in config}
    for section, lists in _SECTIONS.items():
        # An earlier version knew fewer sections; what it measured is measured anew, since the code has changed.
        if section in config:
            kept[section] = {key: value for key, value in config[section].items() if key not in lists}
    return kept


def _place(config: BenchConfig) -> Path:
    """Return the directory of a bench: the configured one, or one that is named after the configuration.

    A bench that an earlier version started under another name keeps its directory.
    """
    if config.run_dir:
        return Path(config.run_dir)
    runs_dir, prefix, values = Path(config.runs_dir), f"bench-{config.what}-", asdict(config)
    # The default thread counts depend on the machine, so they are always part of the name.
    facts: dict[str, str | None] = {"threads": ",".join(map(str, config.threads))}
    named = runs_dir / f"{prefix}{digest(Recorded('bench', BenchConfig, values, facts), _INCIDENTAL)}"
    if not named.exists():
        for path in sorted(runs_dir.glob(f"{prefix}*/{BENCH}")):
            with suppress(UserError):
                theirs = load_bench(path)["config"]
                if theirs.get("run_dir") is None and not value_differences(values, theirs, BenchConfig, _INCIDENTAL):
                    return path.parent
    return named


def _csv(values: dict[str, Any]) -> str:
    """Return CSV text with one row per contender and cell; medians and quartiles are in seconds."""
    rows = [row for cell in values["cells"].values() for row in rows_of(cell)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "commit"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        writer.writerow({**shown, "commit": values["commit"]})
    return text.getvalue()


def _say(console: Console, text: str) -> None:
    say(console, text)
