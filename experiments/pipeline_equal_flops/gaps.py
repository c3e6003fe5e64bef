"""Differences of the arms, from the rows on file: gaps.csv and gaps.png beside this file.

    python experiments/pipeline_equal_flops/gaps.py

An accuracy of an arm is that of a seed of pre-training and a labelled sample. A difference of two arms has two
intervals, both Student's t: over the seeds, each the mean over its samples, and over the samples, each the mean over
the seeds. It is told apart only if both leave out zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsetrain.report.arms import read_arms
from sparsetrain.report.plots import MARKERS, MUTED, SERIES, save_png, styled
from sparsetrain.report.sweep import write_rows
from sparsetrain.scaling.intervals import half_width

HERE = Path(__file__).parent
ARMS = ("dense", "dense-equal", "sparse-0.75", "pruned", "scratch")
WORDS = "bag of words"
# What the rule compares, and the other arms beside the sparse one.
PAIRS = (
    *(("sparse-0.75", other) for other in ("dense-equal", "pruned", "dense")),
    ("pruned", "dense-equal"),
    *((arm, "scratch") for arm in ARMS[:-1]),
    *((arm, WORDS) for arm in ARMS),
)
PRETRAINED = {"dense": "pretrain", "dense-equal": "pretrain", "sparse-0.75": "pretrain", "pruned": "prune"}
Row = Mapping[str, Any]


def accuracies(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return the test accuracies by arm, ``[seeds, samples]``, and those of the bag of words on the same sentences."""
    on_task = [row for row in rows if row["accuracy"] is not None]
    seeds = sorted({row["seed"] for row in on_task})
    samples = sorted({place(row)[1] for row in on_task})
    cells = {(row["seed"], *place(row)): row["accuracy"] for row in on_task}
    found = {arm: np.array([[cells[seed, arm, each] for each in samples] for seed in seeds]) for arm in ARMS}
    words = {place(row)[1]: row["bag_of_words"] for row in on_task}
    found[WORDS] = np.array([[words[each] for each in samples]] * len(seeds))
    return found


def place(row: Row) -> tuple[str, int]:
    """Return the arm of a row and the number of its labelled sample.

    The sample ends the name of a stage: finetune-3. A stage that runs once has it in the arm's place: scratch-3.
    """
    once = row["arm"].startswith("scratch-")
    sample = int(row["arm" if once else "stage"].rpartition("-")[2])
    return "scratch" if once else row["arm"], sample


def bits(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return the reported bits per byte at the end of pre-training by arm, ``[seeds]``."""
    found = {}
    for arm, stage in PRETRAINED.items():
        chosen = sorted(
            (row for row in rows if (row["arm"], row["stage"]) == (arm, stage)), key=lambda row: row["seed"]
        )
        found[arm] = np.array([row["reported_bits_per_byte"] for row in chosen])
    return found


def gaps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a row for each difference of accuracies, in points, and of bits per byte, in percent."""
    found, scores, texts = [], accuracies(rows), bits(rows)
    for one, other in PAIRS:
        between = 100.0 * (scores[one] - scores[other])
        halves = half_width(between.mean(axis=1)), half_width(between.mean(axis=0))
        mean = float(between.mean())
        found.append(gap("accuracy", one, other, mean, halves, "points"))
    for one, other in itertools.combinations(texts, 2):
        logs = np.log(texts[one] / texts[other])
        mean, half = float(logs.mean()), half_width(logs)
        ends = [100.0 * (np.exp(value) - 1.0) for value in (mean, mean - half, mean + half)]
        row = gap("bits per byte", one, other, ends[0], (0.0,), "percent")
        found.append(row | {"seeds_low": ends[1], "seeds_high": ends[2], "told_apart": bool(ends[1] * ends[2] > 0)})
    return found


def gap(what: str, one: str, other: str, mean: float, halves: Sequence[float], unit: str) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "arm": one, "minus": other, "unit": unit, "mean": mean}
    for name, half in zip(("seeds", "samples"), halves, strict=False):
        row |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
    return row | {"told_apart": all(abs(mean) > half for half in halves)}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over pre-training FLOPs with both intervals of the mean, and bits per byte over FLOPs."""
    scores, texts, flops = accuracies(rows), bits(rows), trained(rows)
    with styled():
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, arm in enumerate(ARMS):
            look = {"color": SERIES[number], "marker": MARKERS[number], "capsize": 3, "linestyle": "none"}
            by_seed = 100.0 * scores[arm].mean(axis=1)
            left.errorbar([flops[arm]], [by_seed.mean()], yerr=[half_width(by_seed)], label=arm, **look)
            if arm in texts:
                right.errorbar([flops[arm]], [texts[arm].mean()], yerr=[half_width(texts[arm])], label=arm, **look)
        left.axhline(100.0 * scores[WORDS].mean(), color=MUTED, linestyle="--", label=WORDS)
        left.set_ylabel("accuracy on section roles, %")
        right.set_ylabel("reported bits per byte")
        for axes in (left, right):
            axes.set_xlabel("pre-training FLOPs")
        left.legend(fontsize="small")
        save_png(figure, path)


def trained(rows: Sequence[Row]) -> dict[str, float]:
    """Return the pre-training FLOPs of each arm, those of all its stages of text."""
    stages: Callable[[str], list[float]] = lambda arm: [  # noqa: E731 - a short look-up
        row["flops"] for row in rows if row["arm"] == arm and row["accuracy"] is None and row["flops"] is not None
    ]
    seeds = len({row["seed"] for row in rows})
    return {arm: sum(stages(arm)) / seeds for arm in ARMS}


def main() -> None:
    rows = read_arms(HERE / "results.csv").rows
    found = gaps(rows)
    columns = list(dict.fromkeys(name for row in found for name in row))
    write_rows([{name: row.get(name) for name in columns} for row in found], HERE / "gaps.csv", columns)
    draw(rows, HERE / "gaps.png")
    for row in found:
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))


if __name__ == "__main__":
    main()
