"""Collect the runs of masks that evolve into results.csv and figure.png.

    sparsetrain pretrain -m experiment=dynamic_masks sparsity=static,set,rigl,gmp,vspdf seed=0,1,2 \\
        runs_dir=runs/dynamic_masks
    python experiments/dynamic_masks/aggregate.py runs/dynamic_masks/*

One row a run. The figure shows each seed as a point and the mean over seeds with a 95 % interval (Student's t), and
beside it what the masks did. Whether an arm beats the static one is decided by seed-paired differences.
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
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.scaling.intervals import half_width, paired
from sparsetrain.stages.config import differences
from sparsetrain.stages.run import read_config

HERE = Path(__file__).parent
RULES = ("static", "set", "rigl", "gmp", "vspdf")
COLOURS = dict(zip(RULES, ("#667080", "#0072b2", "#d55e00", "#009e73", "#8a2be2"), strict=True))
COLUMNS = (
    *("parameterization", "sparsity", "width", "depth", "lr", "seed", "steps", "loss", "commit"),
    *("rule", "status", "tokens", "bits_per_byte", "density", "itop_rate", "mask_overlap", "dead_rows"),
    *("train_flops", "seconds", "peak_rss_bytes"),
)


def row_of(directory: Path) -> dict[str, Any]:
    """Return the row of a finished run."""
    result, config = read_json(directory / "result.json"), read_config(directory)
    masks = result.get("masks", {})
    layers = masks.get("layers", {}).values()
    return {
        **{key: result.get(key) for key in COLUMNS},
        **{key: masks.get(key) for key in ("itop_rate", "mask_overlap")},
        "rule": config["sparsity"]["evolution"]["rule"],
        "loss": result.get("loss_last"),
        "dead_rows": sum(layer["dead_rows"] for layer in layers),
        "train_flops": result["flops"]["total"],
    }


def finished(directories: list[Path]) -> list[Path]:
    """Return the directories that hold a finished run.

    Raises:
        UserError: none does, or two differ in more than the seed and what masks do.
    """
    done = [directory for directory in directories if (directory / "result.json").exists()]
    if not done:
        raise UserError("none of these directories holds a finished run")
    first = read_config(done[0])
    for directory in done[1:]:
        changed = [
            text
            for text in differences(read_config(directory), first)
            if not text.startswith(("seed=", "sparsity.evolution."))
        ]
        if changed:
            raise UserError(f"{directory} and {done[0]} differ in more than seed and masks: {changed[0]}")
    return done


def _order(directory: Path) -> tuple[int, int]:
    config = read_config(directory)
    return RULES.index(config["sparsity"]["evolution"]["rule"]), config["seed"]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return for each rule but static what the seed-paired difference of losses says."""
    losses: dict[str, dict[int, float]] = {rule: {} for rule in RULES}
    for row in rows:
        if row["loss"] is not None:
            losses[row["rule"]][row["seed"]] = row["loss"]
    said = {}
    for rule in RULES[1:]:
        mean, half, count = paired(losses["static"], losses[rule])
        if count < 2:
            said[rule] = f"{count} seeds beside static: no verdict"
            continue
        verdict = (
            "beats static" if mean - half > 0 else "is worse than static" if mean + half < 0 else "is not told apart"
        )
        said[rule] = f"{verdict}: static - {rule} = {mean:+.4f} ± {half:.4f} nats ({count} seeds)"
    return said


def draw(rows: list[dict[str, Any]], directories: list[Path]) -> Figure:
    """Return the figure: losses at equal FLOPs, and the masks over the course of training."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    rules = [rule for rule in RULES if any(row["rule"] == rule for row in rows)]
    for place, rule in enumerate(rules):
        samples = [row["loss"] for row in rows if row["rule"] == rule and row["loss"] is not None]
        if not samples:
            continue
        half = half_width(samples) if len(samples) > 1 else None
        left.errorbar(place, np.mean(samples), half, fmt="_", ms=24, capsize=5, color=COLOURS[rule])
        left.plot([place] * len(samples), samples, "o", ms=4, color=COLOURS[rule], alpha=0.6)
    left.set_xticks(range(len(rules)), rules)
    left.set_xlim(-0.6, len(rules) - 0.4)
    left.set_ylabel("validation loss, nats per token")
    seeds = len({row["seed"] for row in rows})
    left.set_title(f"at {max(row['train_flops'] for row in rows):.2e} training FLOPs ({seeds} seeds)")
    for row, directory in zip(rows, directories, strict=True):
        records = [record for record in read_metrics(directory / "metrics.jsonl") if "itop_rate" in record]
        steps = [record["step"] / row["steps"] for record in records] if row["steps"] else []
        for axes, key in ((middle, "density"), (right, "itop_rate")):
            label = row["rule"] if row["seed"] == min(r["seed"] for r in rows if r["rule"] == row["rule"]) else None
            axes.plot(steps, [r[key] for r in records[: len(steps)]], color=COLOURS[row["rule"]], label=label, lw=1.2)
    middle.set_title("density of the hidden matrices")
    right.set_title("weights ever active, $R_s$")
    for axes in (middle, right):
        axes.set_xlabel("fraction of training")
        axes.set_ylim(0, 1.03)
    right.legend(fontsize=8)
    winners = [rule for rule, text in verdicts(rows).items() if text.startswith("beats")]
    figure.suptitle("beat static, paired by seed at 95 %: " + (", ".join(winners) or "none"))
    return figure


def main(directories: list[str]) -> None:
    """Write ``results.csv`` and ``figure.png`` beside this file and print the verdicts."""
    done = finished([Path(directory) for directory in directories])
    done.sort(key=_order)
    rows = [row_of(directory) for directory in done]
    write_rows(rows, HERE / "results.csv", COLUMNS)
    draw(rows, done).savefig(HERE / "figure.png", dpi=160)
    for rule, text in verdicts(rows).items():
        print(f"{rule:8} {text}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"aggregate: {error}")
