"""Figures of tables of arms: one point per seed, and the mean over seeds with its 95 % interval (Student's t)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsetrain.report.arms import PRETRAIN, SCRATCH, Arms, Course, Row, arm_names, pretrained, rules, select
from sparsetrain.report.arms import tasks as task_names
from sparsetrain.report.arms import ways as way_names
from sparsetrain.report.bars import verdicts
from sparsetrain.report.plots import MUTED, save_png, styled
from sparsetrain.report.text_plots import COLOURS, DPI, mark, text_figure

_SHORT = {"finetune": "fine-tuned", "prompt": "soft prompt"}


def arms_figure(table: Arms, path: Path) -> None:
    """Draw a table as a PNG: losses and masks for evolution rules, bits per byte and accuracies for pipelines.

    Raises:
        UserError: the file cannot be written.
    """
    with styled("arms"):
        if table.of_masks:
            figure = _masks(table.rows, table.courses)
        elif not task_names(table.rows):
            figure = text_figure(table.rows)
        elif len(task_names(table.rows)) == 1 and set(way_names(table.rows)) <= set(_SHORT):
            figure = _one_task(table.rows)
        else:
            figure = _tasks(table.rows)
        save_png(figure, path, DPI)


def _accuracies(rows: Sequence[Row], arm: str, stage: str, task: str) -> list[float]:
    return [100.0 * value for value in select(rows, "accuracy", arm=arm, stage=stage, task=task).values()]


def _majority(axes: Axes, rows: Sequence[Row], task: str) -> float | None:
    shares = [row["majority"] for row in rows if row["task"] == task and row["majority"] is not None]
    if not shares:
        return None
    level = 100.0 * float(np.mean(shares))
    axes.axhline(level, ls=":", color="0.4")
    return level


def _one_task(rows: Sequence[Row]) -> Figure:
    """Return the figure of pipelines with one task: one position per arm and stage, one colour per arm."""
    arms, ways = pretrained(rows), way_names(rows)
    (task,) = task_names(rows)
    colours = {arm: COLOURS[index % len(COLOURS)] for index, arm in enumerate([SCRATCH, *arms])}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.4))
    for place, arm in enumerate(arms):
        bits = list(select(rows, "bits_per_byte", arm=arm, stage=PRETRAIN).values())
        mark(left, place, bits, colours[arm])
    tuned = [(SCRATCH, "finetune")] if SCRATCH in arm_names(rows) else []
    tuned += [(arm, stage) for stage in ways for arm in arms]
    for place, (arm, stage) in enumerate(tuned):
        mark(right, place, _accuracies(rows, arm, stage, task), colours[arm])
    level = _majority(right, rows, task)
    if level is not None:
        place_of_text = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        right.annotate("majority class", (0.01, level), (0, 3), **place_of_text)
    left.set_xticks(range(len(arms)), arms)
    left.set_xlim(-0.6, len(arms) - 0.4)
    left.set_ylabel("bits per byte, validation text")
    left.set_title("after pre-training")
    labels = ["from scratch" if arm == SCRATCH else f"{arm}\n{_SHORT[stage]}" for arm, stage in tuned]
    right.set_xticks(range(len(tuned)), labels)
    right.set_ylabel(f"accuracy on {task.replace('_', ' ')}, %")
    seeds = len({row["seed"] for row in rows})
    right.set_title(f"on the task ({seeds} seeds; points: seeds, bars: mean and 95 % interval)")
    return figure


def _tasks(rows: Sequence[Row]) -> Figure:
    """Return the figure of several tasks or ways of tuning: one panel per task, one colour per way.

    Ways that differ in a number at their end, as labelled samples do, have one colour.
    """
    arms, ways, tasks = arm_names(rows), way_names(rows), task_names(rows)
    figure = Figure(figsize=(4 + 4.5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, 1 + len(tasks), width_ratios=(1, *[2] * len(tasks)), squeeze=False)[0]
    texts = sorted({(row["arm"], row["stage"]) for row in rows if row["bits_per_byte"] is not None})
    for place, (arm, stage) in enumerate(texts):
        mark(panels[0], place, list(select(rows, "bits_per_byte", arm=arm, stage=stage).values()), MUTED, narrow=True)
    _name_arms(panels[0], [arm if stage == PRETRAIN else f"{arm}, {stage}" for arm, stage in texts])
    panels[0].set_ylabel("bits per byte, validation text")
    kinds = list(dict.fromkeys(map(_unnumbered, ways)))
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    for axes, task in zip(panels[1:], tasks, strict=True):
        for place, arm in enumerate(arms):
            found = {way: values for way in ways if (values := _accuracies(rows, arm, way, task))}
            apart = min(0.18, 0.8 / max(1, len(found)))
            for index, (way, values) in enumerate(found.items()):
                beside = place + apart * (index - (len(found) - 1) / 2)
                mark(axes, beside, values, colours[_unnumbered(way)], narrow=True)
        _majority(axes, rows, task)
        _name_arms(axes, arms)
        axes.set_ylabel("accuracy, %")
        axes.set_title(f"{task} (dotted: majority class)")
    marks = [panels[-1].plot([], [], "o", color=colour, label=kind)[0] for kind, colour in colours.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8)
    return figure


def _unnumbered(name: str) -> str:
    return re.sub(r"-\d+$", "", name)


def _name_arms(axes: Axes, arms: Sequence[str]) -> None:
    axes.set_xticks(range(len(arms)), arms, rotation=20, ha="right", rotation_mode="anchor")


def _masks(rows: Sequence[Row], courses: Mapping[tuple[str, int], Course]) -> Figure:
    """Return the figure of masks: losses, and the masks over training, or at its end if a course is missing."""
    names = rules(rows)
    colours = {rule: COLOURS[index % len(COLOURS)] for index, rule in enumerate(names)}
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    for place, rule in enumerate(names):
        mark(left, place, list(select(rows, "loss", rule=rule).values()), colours[rule])
    left.set_xticks(range(len(names)), names)
    left.set_xlim(-0.6, len(names) - 0.4)
    left.set_ylabel("validation loss, nats per token")
    seeds = len({row["seed"] for row in rows})
    flops = [row["flops"] for row in rows if row["flops"] is not None]
    left.set_title(f"at {max(flops, default=0.0):.2e} training FLOPs ({seeds} seeds)")
    if all((row["rule"], row["seed"]) in courses for row in rows):
        _courses(middle, right, courses, colours)
    else:
        _ends(middle, right, rows, colours)
    winners = [rule for rule, text in verdicts(rows).items() if text.startswith("beats")]
    figure.suptitle("beat static, paired by seed at 95 %: " + (", ".join(winners) or "none"))
    return figure


def _courses(middle: Axes, right: Axes, courses: Mapping[tuple[str, int], Course], colours: Mapping[str, str]) -> None:
    labelled: set[str] = set()
    for (rule, _), course in courses.items():
        label = None if rule in labelled else rule
        labelled.add(rule)
        for axes, column in ((middle, 1), (right, 2)):
            fractions = [point[0] for point in course]
            axes.plot(fractions, [point[column] for point in course], color=colours[rule], label=label, lw=1.2)
    middle.set_title("density of the hidden matrices")
    right.set_title("weights ever active, $R_s$", parse_math=True)
    for axes in (middle, right):
        axes.set_xlabel("fraction of training")
        axes.set_ylim(0, 1.03)
    right.legend(fontsize=8)


def _ends(middle: Axes, right: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    kinds = (
        ("density", "s", "density"),
        ("itop_rate", "^", "ever active, $R_s$"),
        ("mask_overlap", "o", "overlap with the first"),
    )
    for index, (key, marker, label) in enumerate(kinds):
        for place, (rule, colour) in enumerate(colours.items()):
            values = list(select(rows, key, rule=rule).values())
            beside = [place + 0.2 * (index - 1)] * len(values)
            middle.plot(beside, values, marker, ms=5, color=colour, alpha=0.6)
        middle.plot([], [], marker, ms=5, color=MUTED, label=label)
    for place, (rule, colour) in enumerate(colours.items()):
        dead = list(select(rows, "dead_rows", rule=rule).values())
        right.plot([place] * len(dead), dead, "o", ms=4, color=colour, alpha=0.6)
    middle.set_title("masks at the end")
    middle.set_ylim(0, 1.03)
    for text in middle.legend(fontsize=8).get_texts():
        text.set_parse_math(True)
    right.set_title("outputs without a weight")
    for axes in (middle, right):
        axes.set_xticks(range(len(colours)), list(colours))
