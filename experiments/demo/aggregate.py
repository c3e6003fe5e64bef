"""Collect the runs of the demo into results.csv and figure.png.

    sparsetrain pipeline -m experiment=demo seed=0,1,2        # skips what is done, goes on where it was stopped
    python experiments/demo/aggregate.py runs/pipeline-d128-L4-*

Every row of the table is one stage of one arm of one seed. The figure shows each seed as a point, and the mean over
seeds with a 95 % interval (Student's t over seeds).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsetrain.errors import UserError
from sparsetrain.files import read_json
from sparsetrain.report.sweep import write_rows
from sparsetrain.scaling.intervals import half_width
from sparsetrain.stages.config import differences
from sparsetrain.stages.run import read_config

HERE = Path(__file__).parent
COLOURS = ("#667080", "#0072b2", "#d55e00", "#009e73", "#8a2be2")  # those of the report
COLUMNS = (
    "parameterization",
    "sparsity",
    "width",
    "depth",
    "lr",
    "seed",
    "steps",
    "loss",
    "commit",
    "arm",
    "stage",
    "tokens",
    "bits_per_byte",
    "accuracy",
    "ci_low",
    "ci_high",
    "macro_f1",
    "n_test",
    "majority",
    "train_flops",
    "seconds",
    "peak_rss_bytes",
)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Return one row per finished stage of a pipeline's directory."""
    rows = []
    for path in sorted(directory.glob("*/*/result.json")):
        result = read_json(path)
        low, high = result.get("ci95", (None, None))
        rows.append(
            {
                **{key: result.get(key) for key in COLUMNS},
                "arm": path.parent.parent.name,
                "loss": result.get("loss_last"),
                "ci_low": low,
                "ci_high": high,
                "train_flops": result["flops"]["total"],
            }
        )
    if not rows:
        raise UserError(f"{directory} holds no finished stage of a pipeline")
    return rows


def check_alike(directories: list[Path]) -> None:
    """Raise `UserError` unless the pipelines differ in their seed alone: others must not be averaged."""
    first = read_config(directories[0])
    for directory in directories[1:]:
        changed = [text for text in differences(read_config(directory), first) if not text.startswith("seed=")]
        if changed:
            raise UserError(f"{directory} and {directories[0]} differ in more than the seed: {changed[0]}")


def values(rows: list[dict[str, Any]], arm: str, stage: str, key: str) -> list[float]:
    """Return ``key`` of one stage of one arm, one value per seed."""
    return [row[key] for row in rows if row["arm"] == arm and row["stage"] == stage and row[key] is not None]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Return the figure: bits per byte after pre-training, and accuracies on section roles."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "scratch"]
    seeds = sorted({row["seed"] for row in rows})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.4))
    bars = [(left, place, arm, "pretrain", "bits_per_byte", 1.0) for place, arm in enumerate(arms)]
    labels = []
    for place, (arm, stage) in enumerate(
        [("scratch", "finetune"), *((arm, stage) for stage in ("finetune", "prompt") for arm in arms)]
    ):
        bars.append((right, place, arm, stage, "accuracy", 100.0))
        how = {"finetune": "fine-tuned", "prompt": "soft prompt"}[stage]
        labels.append("from scratch" if arm == "scratch" else f"{arm}\n{how}")
    colours = dict(zip(["scratch", *arms], COLOURS, strict=False))
    for axes, place, arm, stage, key, factor in bars:
        samples = [factor * value for value in values(rows, arm, stage, key)]
        spread = half_width(samples) if len(samples) > 1 else None
        axes.errorbar(place, np.mean(samples), spread, fmt="_", ms=26, capsize=5, color=colours[arm])
        axes.plot([place] * len(samples), samples, "o", ms=4, color=colours[arm], alpha=0.6)
    majority = 100 * float(np.mean([row["majority"] for row in rows if row["majority"] is not None]))
    right.axhline(majority, ls=":", color="0.4")
    right.annotate(
        "majority class", (0.01, majority), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points"
    )
    left.set_xticks(range(len(arms)), arms)
    left.set_xlim(-0.6, len(arms) - 0.4)
    left.set_ylabel("bits per byte, validation text")
    left.set_title("after pre-training")
    right.set_xticks(range(len(labels)), labels)
    right.set_ylabel("accuracy on section roles, %")
    right.set_title(f"on the task ({len(seeds)} seeds; points: seeds, bars: mean and 95 % interval)")
    return figure


def main(directories: list[str]) -> None:
    """Write ``results.csv`` and ``figure.png`` beside this file."""
    check_alike([Path(directory) for directory in directories])
    rows = [row for directory in directories for row in rows_of(Path(directory))]
    write_rows(rows, HERE / "results.csv", COLUMNS)
    draw(rows).savefig(HERE / "figure.png", dpi=160)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
