"""Collect the runs of the MediSwift recipe into results.csv, bars.md and figure.png.

    python experiments/mediswift_pipeline/run.py runs/mediswift pubmedqa=PUBMEDQA_DIR
    python experiments/mediswift_pipeline/aggregate.py runs/mediswift

One row a stage, arm, task and seed. The bars of the README are computed over the seeds that are there; differences
between ways of fine-tuning are paired by seed, with a 95 % interval of Student's t.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.errors import UserError
from sparsetrain.files import read_json
from sparsetrain.models.config import ModelConfig
from sparsetrain.report.sweep import write_rows
from sparsetrain.scaling.intervals import half_width, paired
from sparsetrain.stages.run import read_config

HERE = Path(__file__).parent
COLOURS = ("#667080", "#0072b2", "#d55e00", "#009e73", "#8a2be2")
COLUMNS = (
    *("parameterization", "sparsity", "width", "depth", "lr", "seed", "steps", "loss", "commit"),
    *("arm", "how", "task", "status", "density", "tokens", "bits_per_byte"),
    *("accuracy", "ci_low", "ci_high", "macro_f1"),
    *("n_test", "majority", "train_flops", "flop_ratio_formula", "seconds", "peak_rss_bytes"),
)
Row = dict[str, Any]


def rows_of(out: Path) -> list[Row]:
    """Return a row for every finished run below ``out``.

    Raises:
        UserError: there is none.
    """
    rows = []
    for path in sorted(out.glob("seed*/*/*/result.json")):
        result = read_json(path)
        arm, how = path.parts[-3], path.parts[-2]
        task = path.parts[-4].partition("-")[2] or "section_roles"
        low, high = result.get("ci95", (None, None))
        rows.append(
            {
                **{key: result.get(key) for key in COLUMNS},
                "arm": arm,
                "how": how,
                "task": "" if how == "pretrain" else task,
                "ci_low": low,
                "ci_high": high,
                "loss": result.get("loss_last"),
                "train_flops": result.get("flops", {}).get("total"),
                "flop_ratio_formula": _formula(result, path.parent) if how == "pretrain" else None,
            }
        )
    if not rows:
        raise UserError(f"{out} holds no finished run; start it with run.py")
    return rows


def _formula(result: Row, directory: Path) -> float:
    """Return F(0) / F(s) of the arm's model by the formula of papers.md, from its nominal sparsity alone."""
    config = ModelConfig(**{key: value for key, value in result["model"].items() if key != "sparsity"})
    context = read_config(directory)["data"]["context"]
    dense = training_flops_per_token(config, 1.0, context).total
    return dense / training_flops_per_token(config, 1.0 - result["sparsity"], context).total


def select(rows: list[Row], key: str, **wanted: Any) -> dict[int, float]:
    """Return ``key`` by seed of the rows that have these values."""
    return {
        row["seed"]: row[key]
        for row in rows
        if row[key] is not None and all(row[name] == value for name, value in wanted.items())
    }


def bars(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Return ``(bar, outcome, numbers)`` for every bar.

    An outcome is holds, fails, not established, not told apart, no difference, too few seeds, or not run. A bar of
    points holds or fails where the whole interval does; with the bar inside of the interval it is not established.
    """
    found: list[tuple[str, str, str]] = []
    arms = ("dense", "sparse-0.5", "sparse-0.75")
    losses = [select(rows, "loss", arm=arm, how="pretrain") for arm in arms]
    seeds = sorted(set(losses[0]) & set(losses[1]) & set(losses[2]))
    ordered = sum(losses[0][seed] < losses[1][seed] < losses[2][seed] for seed in seeds)
    found.append(
        ("(a) loss 0 < 50 % < 75 %", _outcome(ordered == len(seeds), len(seeds)), f"{ordered} of {len(seeds)} seeds")
    )

    def tuned(arm: str, how: str = "finetune", task: str = "section_roles") -> dict[int, float]:
        return select(rows, "accuracy", arm=arm, how=how, task=task)

    for arm, points in (("sparse-0.5", 0.02), ("sparse-0.75", 0.04)):
        mean, half, count = paired(tuned(arm), tuned("dense"))
        text = f"{arm} - dense = {_points(mean, half)} ({count} seeds)"
        outcome = _reaches(mean, half, count, -points)
        found.append((f"(b) {arm} within {100 * points:.0f} points of dense", outcome, text))
    for arm in arms:
        mean, half, count = paired(tuned(arm), tuned("scratch"))
        text = f"{arm} - scratch = {_points(mean, half)} ({count} seeds)"
        found.append((f"(b) {arm} 10 points above scratch", _reaches(mean, half, count, 0.10), text))
    tasks = sorted({row["task"] for row in rows if row["task"]}, reverse=True)
    for task in tasks:
        mean, half, count = paired(tuned("sparse-0.75", task=task), tuned("sparse-0.75", "finetune-sparse", task))
        found.append(
            (f"(c) dense >= sparse fine-tuning at 75 %, {task}", _sign(mean, half, count), _points(mean, half))
        )
        for arm in arms:
            mean, half, count = paired(tuned(arm, "prompt", task), tuned(arm, task=task))
            found.append((f"(d) soft prompt >= without, {arm}, {task}", _sign(mean, half, count), _points(mean, half)))
    flops = {arm: select(rows, "train_flops", arm=arm, how="pretrain") for arm in arms}
    for arm in arms[1:]:
        ratios = [flops["dense"][seed] / flops[arm][seed] for seed in flops[arm] if seed in flops["dense"]]
        expected = [row["flop_ratio_formula"] for row in rows if row["arm"] == arm and row["how"] == "pretrain"]
        near = bool(ratios) and abs(ratios[0] / expected[0] - 1) <= 0.01
        outcome = ("holds" if near else "fails") if ratios else "not run"  # a formula needs no seeds
        text = f"{ratios[0]:.3f} counted, {expected[0]:.3f} by the formula" if ratios else ""
        found.append((f"(e) FLOP ratio of {arm}", outcome, text))
    return found


def _outcome(holds: bool, count: int) -> str:
    if count < 2:
        return "too few seeds" if count else "not run"
    return "holds" if holds else "fails"


def _reaches(mean: float, half: float, count: int, bar: float) -> str:
    if count < 2 or mean - half >= bar or mean + half < bar:
        return _outcome(mean - half >= bar, count)
    return "not established"


def _sign(mean: float, half: float, count: int) -> str:
    if count < 2:
        return "too few seeds" if count else "not run"
    if mean == half == 0:
        return "no difference"  # the same accuracy from every seed: models that all answer the majority class
    if mean + half < 0:
        return "fails"
    return "holds" if mean - half >= 0 else "not told apart"


def _points(mean: float, half: float) -> str:
    return f"{100 * mean:+.2f} ± {100 * half:.2f} points" if np.isfinite(half) else f"{100 * mean:+.2f} points"


def draw(rows: list[Row]) -> Figure:
    """Return the figure: bits per byte, and for each task the accuracies by arm and way of tuning."""
    arms = [arm for arm in ("dense", "sparse-0.5", "sparse-0.75", "scratch") if any(row["arm"] == arm for row in rows)]
    tasks = sorted({row["task"] for row in rows if row["task"]}, reverse=True)
    hows = [
        how for how in ("finetune", "finetune-sparse", "prompt", "prompt-frozen") if any(r["how"] == how for r in rows)
    ]
    figure = Figure(figsize=(4 + 4.5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, 1 + len(tasks), width_ratios=(1, *[2] * len(tasks)), squeeze=False)[0]
    for place, arm in enumerate(arms[:3]):
        _mark(panels[0], place, list(select(rows, "bits_per_byte", arm=arm, how="pretrain").values()), COLOURS[place])
    panels[0].set_xticks(range(len(arms[:3])), arms[:3], rotation=20)
    panels[0].set_ylabel("bits per byte, validation text")
    for axes, task in zip(panels[1:], tasks, strict=True):
        for index, how in enumerate(hows):
            for place, arm in enumerate(arms):
                samples = [100 * value for value in select(rows, "accuracy", arm=arm, how=how, task=task).values()]
                _mark(axes, place + 0.18 * (index - (len(hows) - 1) / 2), samples, COLOURS[index])
            axes.plot([], [], "o", color=COLOURS[index], label=how)
        majority = [row["majority"] for row in rows if row["task"] == task and row["majority"] is not None]
        if majority:
            axes.axhline(100 * majority[0], ls=":", color="0.4")
        axes.set_xticks(range(len(arms)), arms)
        axes.set_ylabel("accuracy, %")
        axes.set_title(f"{task} (dotted: majority class)")
        axes.legend(fontsize=8)
    return figure


def _mark(axes: Any, place: float, samples: list[float], colour: str) -> None:
    if samples:
        half = half_width(samples) if len(samples) > 1 else None
        axes.errorbar(place, np.mean(samples), half, fmt="_", ms=12, capsize=3, color=colour)
        axes.plot([place] * len(samples), samples, "o", ms=3, color=colour, alpha=0.6)


def main(out: str) -> None:
    """Write the three files beside this one and print the bars."""
    rows = rows_of(Path(out))
    write_rows(rows, HERE / "results.csv", COLUMNS)
    outcome = bars(rows)
    lines = ["| bar | outcome | numbers |", "|---|---|---|", *(f"| {' | '.join(entry)} |" for entry in outcome)]
    (HERE / "bars.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows).savefig(HERE / "figure.png", dpi=160)
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"aggregate: {error}")
