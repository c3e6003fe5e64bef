"""The tables of a report; each is built once, for a terminal, for Markdown, and for the page of `html`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.report.findings import (
    FLOPS_ARE_THEORETICAL,
    STAGE_NAMES,
    baseline,
    cautions,
    diverged,
    findings,
    reduction,
    scored,
)
from sparsetrain.report.schema import STAGES, Arm, Pretraining, Report, Scored, TextEnd, terms
from sparsetrain.report.text import ABSENT, brackets, byte_size, clean, duration, percent, scalar, si
from sparsetrain.scaling.intervals import mean_interval

Group = Literal["flops", "bytes", "seconds"]

_FILE_WIDTH = 120
_OF_CORPUS = "bits_per_byte_"

TERM_NAMES = {
    "sparse_linears": "hidden matrices",
    "head": "output head",
    "attention": "attention",
    "mask_updates": "dense gradients of mask updates",
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "index": "sparse index",
    "buffers": "other buffers",
}
"""Titles of the terms of FLOPs and bytes, in the order of display."""


@dataclass(frozen=True)
class Sheet:
    """A table of finished strings; the first column names the row and is left-aligned, the others are right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def rich(self) -> Table:
        """Return the table for a terminal; rich's markup in a cell is shown literally."""
        caption = Text(self.note) if self.note else None
        table = Table(title=Text(self.title), caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.title_justify = "left"
        for index, column in enumerate(self.columns):
            # Headers wrap, so that a cell with a number and its interval can stay on one line.
            widest = max([cell_len(row[index]) for row in self.rows] + [cell_len(word) for word in column.split()])
            # In a terminal that is still too narrow, text is folded, since nothing may be cut off.
            table.add_column(
                Text("\n".join(wrap(column, widest, break_on_hyphens=False)), overflow="fold"),
                justify="right" if index else "left",
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """Return the table as GitHub-flavoured Markdown, title and note included."""
        rule = " | ".join("---:" if index else "---" for index in range(len(self.columns)))
        lines = [f"**{_escape(self.title)}**", "", _line(self.columns), f"| {rule} |", *map(_line, self.rows)]
        if self.note:
            lines += ["", _escape(self.note)]
        return "\n".join(lines) + "\n"


def sheets(report: Report) -> list[Sheet]:
    """Return every table for which the report has data: results, texts, cost, FLOPs by term, bytes, evolved masks."""
    candidates = (results(report), texts(report), cost(report), flops(report), memory(report), masks(report))
    return [sheet for sheet in candidates if sheet.rows]


def print_report(report: Report, console: Console | None = None) -> None:
    """Print findings, cautions and every table; to the terminal if no ``console`` is given."""
    console = _wide(console or Console())
    for sentence in findings(report):
        console.print(Text(f"- {sentence}"))
    for sentence in cautions(report):
        console.print(Text(f"! {sentence}", style="yellow"))
    print_sheets(sheets(report), console)


def print_sheets(tables: Sequence[Sheet], console: Console) -> None:
    """Print tables, each after an empty line."""
    console = _wide(console)
    for sheet in tables:
        console.print()
        console.print(sheet.rich())


def _wide(console: Console) -> Console:
    """Return a console wide enough for tables if it writes to a file, for which rich assumes 80 columns."""
    return console if console.is_terminal else Console(file=console.file, width=max(console.width, _FILE_WIDTH))


def results(report: Report) -> Sheet:
    """Return losses and accuracies: one row per arm, then no pre-training, a bag of words and the majority class."""
    stages = [stage for stage in STAGES if any(arm.get(stage) is not None for arm in report["arms"])]
    corpora = _corpora([arm["pretrain"] for arm in report["arms"]])
    columns = ["Arm", "Sparsity", "Pre-training loss", "Bits per byte", *_titles(corpora)]
    for stage in stages:
        columns += [f"Accuracy %, {STAGE_NAMES[stage]}", "Macro F1"]
    rows = []
    for arm in report["arms"]:
        pretrain = arm["pretrain"]
        row = [
            clean(arm["name"]),
            percent(arm["sparsity"]),
            _loss(pretrain["loss_last"]),
            _loss(pretrain["bits_per_byte"]),
            *_by_corpus(pretrain, corpora),
        ]
        for stage in stages:
            row += _accuracy(arm.get(stage))
        rows.append(tuple(row))
    if stages:
        empty = [ABSENT] * (3 + len(corpora))
        rest = [ABSENT] * (len(columns) - len(empty) - 2)
        if (scratch := report["scratch"]) is not None:
            accuracy = f"{100 * scratch['accuracy']:.1f} {brackets(scratch['ci95'])}"
            rows.append(("no pre-training", *empty, accuracy, *rest))
        if (bag := report.get("bag_of_words")) is not None:
            accuracy = f"{100 * bag['accuracy']:.1f}" + (f" {brackets(bag['ci95'])}" if "ci95" in bag else "")
            rows.append(("bag of words", *empty, accuracy, *rest))
        if (majority := report["majority"]) is not None:
            rows.append(("majority class", *empty, f"{100 * majority:.1f}", *rest))
    return Sheet("Results", tuple(columns), tuple(rows), _results_note(report))


def texts(report: Report) -> Sheet:
    """Return the end of each stage of text, corpus by corpus; without rows if every arm has one stage at most."""
    every = [(arm, name, end) for arm in report["arms"] for name, end in arm.get("texts", {}).items()]
    corpora = _corpora([end for *_, end in every])
    rows = []
    if len({name for _, name, _ in every}) > 1:
        for arm, name, end in every:
            numbers = (_loss(end["loss_last"]), _loss(end["bits_per_byte"]), *_by_corpus(end, corpora))
            rows.append((clean(arm["name"]), clean(name), _metric(end.get("tokens")), *numbers))
    columns = ("Arm", "Stage", "Training tokens", "Loss", "Bits per byte", *_titles(corpora))
    return Sheet("Stages of text", columns, tuple(rows), "Loss in nats per token, of the validation text.")


def cost(report: Report) -> Sheet:
    """Return training FLOPs by the formula and measured wall time, in separate columns."""
    reference = clean(baseline(report)["name"])
    stages = term_names(report["arms"], "seconds")
    columns = ["Arm", "Training FLOPs (formula)", f"FLOPs of {reference} / arm", "Wall time (measured)"]
    columns += [f"of it {STAGE_NAMES.get(stage, clean(stage))}" for stage in stages]
    rows = []
    for arm in report["arms"]:
        factor = reduction(report, arm)
        seconds = terms(arm.get("seconds", {}))
        row = [
            clean(arm["name"]),
            si(arm["train_flops"], "FLOP"),
            ABSENT if factor is None else f"{factor:.2f}x",
            duration(sum(seconds.values())) if seconds else ABSENT,
            *(duration(seconds[stage]) if stage in seconds else ABSENT for stage in stages),
        ]
        rows.append(tuple(row))
    return Sheet("Cost", tuple(columns), tuple(rows), FLOPS_ARE_THEORETICAL)


def flops(report: Report) -> Sheet:
    """Return training FLOPs by term; without rows if no arm has terms."""
    note = "Computed by the formula, not measured."
    return _by_term(report, "flops", "Training FLOPs by term", lambda value: si(value, "FLOP"), note)


def memory(report: Report) -> Sheet:
    """Return measured bytes by purpose; without rows if no arm has them."""
    peak = f"Peak resident memory of the whole process, all arms: {byte_size(report['peak_rss_bytes'])}."
    return _by_term(report, "bytes", "Bytes of the training state", byte_size, peak)


def masks(report: Report) -> Sheet:
    """Return the final masks of the arms whose masks evolved; without rows if there is no such arm."""
    changed = [arm for arm in report["arms"] if arm.get("masks", {}).get("rule", "Static") != "Static"]
    rows = []
    for arm in changed:
        entry = arm["masks"]
        numbers = (f"{entry[key]:.4f}" for key in ("density", "target_density", "itop_rate", "mask_overlap"))
        rows.append((clean(arm["name"]), clean(entry["rule"]), *numbers, str(entry.get("dead_rows", ABSENT))))
    columns = ("Arm", "Rule", "Density", "Target", "Ever active (R_s)", "Overlap with first mask", "Dead rows")
    note = "At the end of pre-training, over all sparse layers. R_s: the fraction of weights that were ever active."
    return Sheet("Masks", columns, tuple(rows), note)


def corpora_read(corpora: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Return the scores of each corpus of a run and what it read of them, from its ``result.json``."""
    keys = {"val_loss": "Loss", "bits_per_byte": "Bits per byte", "tokens": "Tokens read", "epochs": "Passes"}
    rows = [(clean(name), *(_metric(entry.get(key)) for key in keys)) for name, entry in corpora.items()]
    return Sheet("Corpora", ("Corpus", *keys.values()), tuple(rows))


def layer_masks(layers: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Return the final masks of a run's layers, from its ``result.json``."""
    keys = {"nnz": "Weights", "density": "Density", "target_density": "Target", "itop_rate": "Ever active (R_s)"}
    keys |= {"overlap": "Overlap with first mask", "dead_rows": "Dead rows"}
    rows = [(clean(name), *(_metric(layer.get(key)) for key in keys)) for name, layer in layers.items()]
    return Sheet("Masks", ("Layer", *keys.values()), tuple(rows))


def noise_scales(found: Mapping[str, Any], whole: Mapping[str, Any] | None) -> Sheet:
    """Return the gradient noise scale of a run's layers, from the entries of its ``result.json``.

    Args:
        found: of the norm layers, and of each layer. whole: of all parameters, if it was measured.
    """
    named = {"all norm layers": found, **({"all parameters": whole} if whole else {}), **found.get("layers", {})}
    rows = [
        (clean(name), *(_metric(entry.get(key)) for key in ("value", "low", "high"))) for name, entry in named.items()
    ]
    note = "At the end, in sequences; 95 % interval. Empty: noise hides the gradient."
    return Sheet("Gradient noise scale", ("Layer", "Noise scale", "From", "To"), tuple(rows), note)


def run_metrics(rows: Sequence[Mapping[str, Any]], limit: int = 20) -> Sheet:
    """Return the metrics of one run, from its ``metrics.jsonl``, in about ``limit`` rows at most.

    The first and the last row are always shown. The others are rows with a validation loss, or any rows if there is
    none, evenly spaced if they do not fit. A column is shown if any row has it; the columns of masks are shown if the
    masks changed.
    """
    columns = {"step": "Step", "tokens": "Tokens", "loss": "Loss", "val_loss": "Validation loss"}
    own = dict.fromkeys(key for row in rows for key in row if key.startswith(_OF_CORPUS))
    columns |= {"bits_per_byte": "Bits per byte"}
    columns |= {key: f"Bits per byte, {clean(key.removeprefix(_OF_CORPUS))}" for key in own}
    columns |= {"lr": "Learning rate", "noise_scale": "Noise scale"}
    present = [key for key in columns if any(row.get(key) is not None for row in rows)]
    watched = {"density": "Density", "target_density": "Target", "itop_rate": "R_s", "mask_overlap": "Overlap"}
    changing = len({row["mask_overlap"] for row in rows if "mask_overlap" in row}) > 1
    changing |= len({row["density"] for row in rows if "density" in row}) > 1
    if changing:
        columns |= watched
        present += watched
    evaluated = [index for index, row in enumerate(rows) if row.get("val_loss") is not None]
    kept = set(spread(evaluated, limit)) or set(spread(range(len(rows)), limit))
    if rows:
        kept |= {0, len(rows) - 1}
    body = tuple(tuple(_metric(rows[index].get(key)) for key in present) for index in sorted(kept))
    shown = f"{len(body)} of {len(rows)} rows." if len(body) < len(rows) else ""
    return Sheet("Metrics", tuple(columns[key] for key in present), body, shown)


def spread(indices: Sequence[int], limit: int) -> list[int]:
    """Return at most ``limit`` of ``indices``, evenly spaced, including both ends."""
    if len(indices) <= limit:
        return list(indices)
    stride = (len(indices) - 1) / max(limit - 1, 1)
    return [indices[round(i * stride)] for i in range(limit)]


def mean_cell(samples: Sequence[float], factor: float, digits: int) -> str:
    """Return the mean with its interval (Student's t), such as ``1.970 [1.963, 1.976]``; a dash for no samples."""
    if not samples:
        return ABSENT
    interval = mean_interval(samples)
    text = f"{factor * float(np.mean(samples)):.{digits}f}"
    return text if interval is None else f"{text} [{', '.join(f'{factor * end:.{digits}f}' for end in interval)}]"


def term_names(arms: Sequence[Arm], group: Group) -> list[str]:
    """Return the names under ``group`` in any arm: known names in the order of display, then the others by name."""
    found = {name for arm in arms for name in terms(arm.get(group, {}))}
    known = STAGE_NAMES if group == "seconds" else TERM_NAMES
    return [name for name in known if name in found] + sorted(found - set(known))


def _by_term(report: Report, group: Group, title: str, show: Callable[[float], str], note: str) -> Sheet:
    names = term_names(report["arms"], group)
    columns = ("Arm", *(TERM_NAMES.get(name, clean(name)) for name in names), "total")
    rows = []
    for arm in report["arms"]:
        if group in arm:
            values = terms(arm[group])
            cells = [show(values[name]) if name in values else ABSENT for name in names]
            rows.append((clean(arm["name"]), *cells, show(sum(values.values()))))
    return Sheet(title, columns, tuple(rows), note)


def _accuracy(result: Scored | None) -> list[str]:
    if result is None:
        return [ABSENT, ABSENT]
    f1 = result.get("macro_f1")
    return [f"{100 * result['accuracy']:.1f} {brackets(result['ci95'])}", ABSENT if f1 is None else f"{f1:.3f}"]


def _corpora(ends: Sequence[Pretraining | TextEnd]) -> list[str]:
    """Return the corpora that any of the stages scored one by one."""
    return list(dict.fromkeys(name for end in ends for name in end.get("corpora", {})))


def _titles(corpora: Sequence[str]) -> list[str]:
    return [f"Bits per byte, {clean(name)}" for name in corpora]


def _by_corpus(end: Pretraining | TextEnd, corpora: Sequence[str]) -> list[str]:
    own = end.get("corpora", {})
    return [_loss(own[name]["bits_per_byte"]) if name in own else ABSENT for name in corpora]


def _results_note(report: Report) -> str:
    tested = {(clean(r["task"]), r["n_test"]) for arm in report["arms"] for _, r in scored(arm)}
    if not tested:
        return "Loss in nats per token."
    tests = "; ".join(f"{task}, {count:,} test examples" for task, count in sorted(tested))
    return f"Accuracy on {tests}, with its 95 % interval in brackets. Loss in nats per token."


def _loss(value: float | None) -> str:
    return "diverged" if value is None or diverged(value) else f"{value:.4f}"


def _metric(value: object) -> str:
    return ABSENT if value is None else scalar(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Return ``text`` with a backslash before every character that is special in Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~!$&" else c for c in text)
