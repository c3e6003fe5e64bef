"""Figures of tables of text stages: bits per byte of each arm, corpus by corpus, and losses over the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsetrain.report.arms import Row, arm_names, select, text_stages
from sparsetrain.report.arms_sheets import BITS, scored_corpora
from sparsetrain.report.measured import POSITIONS, order_of, samples
from sparsetrain.report.pairs import divided
from sparsetrain.report.plots import MUTED, SERIES, save_png, styled
from sparsetrain.report.text import scalar, shorten
from sparsetrain.scaling.intervals import half_width

COLOURS = (MUTED, *SERIES)
DPI = 160
_LETTER = 0.075  # inches
_ACROSS = 4  # panels of lengths


def mark(axes: Axes, place: float, values: Sequence[float], colour: str, narrow: bool = False) -> None:
    """Draw one arm at ``place``: its seeds, their mean and its interval; ``narrow`` fits several arms side by side."""
    if values:
        half = half_width(values) if len(values) > 1 else None
        bar, cap, point = (12, 3, 3) if narrow else (26, 5, 4)
        axes.errorbar(place, float(np.mean(values)), half, fmt="_", ms=bar, capsize=cap, color=colour)
        axes.plot([place] * len(values), values, "o", ms=point, color=colour, alpha=0.6)


@dataclass(frozen=True)
class _Panel:
    """A panel: what it shows at each place, as arms with their stages.

    Args:
        title: the stage, the corpus, or both.
        key: the column.
        places: a name for each place, with the (arm, stage) pairs that stand there side by side.
    """

    title: str
    key: str
    places: dict[str, list[tuple[str, str]]]


def text_figure(rows: Sequence[Row]) -> Figure:
    """Return the figure of text stages.

    It has a line of panels for each stage, a panel for each corpus that the stage scored, and a place for each arm. If
    there are more stages than arms, it has a panel for each corpus, and a place for each stage with all arms; stages of
    a single corpus are left out beside stages of several.
    """
    arms, stages = arm_names([row for row in rows if not row["task"]]), text_stages(rows)
    by_stage = len(stages) > len(arms)
    lines = [_by_corpus(rows, stages)] if by_stage else [_of_stage(rows, stage) for stage in stages]
    panels = [panel for line in lines for panel in line]
    most = max(len(panel.places) for panel in panels)
    level = max(len(name) for panel in panels for name in panel.places) * _LETTER
    tilted = most * level > 6.0
    width = max(2.8, most * (0.45 if tilted else max(level, 0.6))) + 0.8
    height = 2.6 + (0.7 * level if tilted else 0.3) + (0.6 if by_stage else 0.0)
    across = max(map(len, lines))
    figure = Figure(figsize=(width * across, height * len(lines) + 0.3), layout="constrained")
    grid = figure.subplots(len(lines), across, squeeze=False)
    colours = _colours(rows)
    for line, own in zip(grid, lines, strict=True):
        for axes, panel in zip(line, own, strict=False):
            _draw(axes, panel, rows, colours, narrow=most > 3, tilted=tilted)
        line[0].set_ylabel("bits per byte, validation text")
        for axes in line[len(own) :]:
            axes.set_visible(False)
    if by_stage and len(arms) > 1:
        for arm in arms:
            grid[0][0].plot([], [], "o", ms=4, color=colours[arm], label=shorten(arm, 32))
        grid[0][0].legend(fontsize=8)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"{seeds} seed{'s' * (seeds > 1)}; points: seeds, bars: mean and 95 % interval", fontsize=9)
    return figure


def _keys(rows: Sequence[Row], stage: str) -> dict[str, str]:
    """Return the columns of bits per byte that a stage has, by corpus; that of a single corpus has no name."""
    named = {name: f"{BITS}_{name}" for name in scored_corpora(rows)}
    return {name: key for name, key in named.items() if select(rows, key, stage=stage, task=None)} or {"": BITS}


def _of_stage(rows: Sequence[Row], stage: str) -> list[_Panel]:
    arms = arm_names([row for row in rows if row["stage"] == stage and not row["task"]])
    places = {shorten(arm, 32): [(arm, stage)] for arm in arms}
    return [_Panel(", ".join(filter(None, (stage, name))), key, places) for name, key in _keys(rows, stage).items()]


def _by_corpus(rows: Sequence[Row], stages: Sequence[str]) -> list[_Panel]:
    found: dict[str, _Panel] = {}
    for stage in stages:
        arms = arm_names([row for row in rows if row["stage"] == stage and not row["task"]])
        for name, key in _keys(rows, stage).items():
            panel = found.setdefault(name, _Panel(name, key, {}))
            panel.places[shorten(stage, 32)] = [(arm, stage) for arm in arms]
    named = [panel for panel in found.values() if panel.title]
    return named or list(found.values())


def _draw(
    axes: Axes, panel: _Panel, rows: Sequence[Row], colours: Mapping[str, str], narrow: bool, tilted: bool
) -> None:
    for place, pairs in enumerate(panel.places.values()):
        for index, (arm, stage) in enumerate(pairs):
            beside = place + (index - (len(pairs) - 1) / 2) * 0.8 / len(pairs)
            values = list(select(rows, panel.key, arm=arm, stage=stage, task=None).values())
            mark(axes, beside, values, colours[arm], narrow=narrow)
    axes.set_xticks(range(len(panel.places)), list(panel.places))
    if tilted:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(panel.places) - 0.4)
    axes.set_title(panel.title)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Return a colour for each arm; arms of one sparsity have the same one."""
    own: dict[str, float] = {}
    for row in rows:
        named, _ = divided(row["arm"])
        own.setdefault(row["arm"], row["sparsity"] if named is None else named)
    levels = sorted(set(own.values()))
    return {arm: COLOURS[levels.index(sparsity) % len(COLOURS)] for arm, sparsity in own.items()}


def positions_figure(rows: Sequence[Row], arms: Sequence[str], path: Path) -> None:
    """Draw a table of positions as a PNG: losses over the length, a panel for each arm and a line for each scale.

    A line is the mean over seeds, and its band the 95 % interval. Several stages or corpora have panels of their own.
    """
    found = samples(POSITIONS, rows)
    groups = list(dict.fromkeys((stage, corpus) for _, stage, corpus, *_ in found))
    known = {group: [arm for arm in arms if any(key[:3] == (arm, *group) for key in found)] for group in groups}
    scales = sorted({key[3] for key in found}, key=order_of)
    lengths = sorted({key[4] for key in found})
    across = min(_ACROSS, max(map(len, known.values())))
    lines = [(group, of[start : start + across]) for group, of in known.items() for start in range(0, len(of), across)]
    with styled("arms"):
        figure = Figure(figsize=(max(2.9 * across, 5.0) + 0.6, 2.7 * len(lines) + 0.3), layout="constrained")
        grid = figure.subplots(len(lines), across, squeeze=False, sharey="row")
        for panels, (group, of) in zip(grid, lines, strict=True):
            for axes, arm in zip(panels, of, strict=False):
                for index, scale in enumerate(scales):
                    curve = {length: list(found.get((arm, *group, scale, length), {}).values()) for length in lengths}
                    _line(axes, curve, COLOURS[index % len(COLOURS)], "" if scale is None else f"scale {scalar(scale)}")
                axes.set_xscale("log", base=2)
                axes.set_xticks(_ticks(lengths), [f"{length}" for length in _ticks(lengths)])
                axes.set_xticks([], minor=True)
                axes.tick_params(axis="x", labelsize=8)
                axes.set_title(shorten(arm, 32))
                axes.set_xlabel("tokens of a context")
            stage, corpus = group
            said = [stage] * (len({stage for stage, _ in groups}) > 1) + [corpus] * (corpus is not None)
            panels[0].set_ylabel("\n".join([", ".join(said), "nats per token"]).strip())
            for axes in panels[len(of) :]:
                axes.set_visible(False)
        if scales != [None]:
            grid[0][0].legend(fontsize=8)
        save_png(figure, path, DPI)


def _line(axes: Axes, curve: dict[int, list[float]], colour: str, label: str) -> None:
    known = {length: values for length, values in curve.items() if values}
    if not known:
        return
    middle = np.array([np.mean(values) for values in known.values()])
    axes.plot(list(known), middle, "o-", ms=3, lw=1.4, color=colour, label=label)
    if all(len(values) > 1 for values in known.values()):
        half = np.array([half_width(values) for values in known.values()])
        axes.fill_between(list(known), middle - half, middle + half, color=colour, alpha=0.2, lw=0)


def _ticks(lengths: Sequence[int]) -> list[int]:
    """Return the lengths that have a tick: each at least twice the one before."""
    kept: list[int] = []
    for length in lengths:
        if not kept or length >= 2 * kept[-1]:
            kept.append(length)
    return kept
