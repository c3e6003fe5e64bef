"""The criteria that were set before arms were trained, and their outcomes: the bars of the MediSwift recipe, and masks.

An outcome is ``holds``, ``fails``, ``not established``, ``not told apart``, ``no difference``, ``too few seeds`` or
``not run``. A bar in points holds if the whole interval lies above it and fails if the whole interval lies below it;
otherwise it is not established. Differences are paired by seed, and intervals are Student's t at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsetrain.report.arms import PRETRAIN, SCRATCH, Row, rules, select, tasks
from sparsetrain.report.tables import Sheet
from sparsetrain.scaling.intervals import paired

DENSE, SPARSE = "dense", ("sparse-0.5", "sparse-0.75")
WITHIN = (0.02, 0.04)  # allowed loss of accuracy against the dense arm, for each arm of SPARSE
ABOVE_SCRATCH = 0.10
STATIC = "static"
_COLUMNS = ("bar", "outcome", "numbers")


def bars(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return ``(bar, outcome, numbers)`` for every bar of the recipe; empty unless its three arms are in the rows."""
    arms = (DENSE, *SPARSE)
    if not set(arms) <= {row["arm"] for row in rows}:
        return []
    main = next(iter(tasks(rows)), "")

    def tuned(arm: str, stage: str = "finetune", task: str = main) -> dict[int, float]:
        return select(rows, "accuracy", arm=arm, stage=stage, task=task)

    losses = [select(rows, "loss", arm=arm, stage=PRETRAIN) for arm in arms]
    seeds = set(losses[0]) & set(losses[1]) & set(losses[2])
    ordered = sum(losses[0][seed] < losses[1][seed] < losses[2][seed] for seed in seeds)
    outcome = _outcome(ordered == len(seeds), len(seeds))
    found = [("(a) loss 0 < 50 % < 75 %", outcome, f"{ordered} of {len(seeds)} seeds")]
    for arm, points in zip(SPARSE, WITHIN, strict=True):
        mean, half, count = paired(tuned(arm), tuned(DENSE))
        text = f"{arm} - {DENSE} = {_points(mean, half)} ({count} seeds)"
        name = f"(b) {arm} within {100 * points:.0f} points of {DENSE}"
        found.append((name, _reaches(mean, half, count, -points), text))
    for arm in arms:
        mean, half, count = paired(tuned(arm), tuned(SCRATCH))
        text = f"{arm} - {SCRATCH} = {_points(mean, half)} ({count} seeds)"
        name = f"(b) {arm} {100 * ABOVE_SCRATCH:.0f} points above scratch"
        found.append((name, _reaches(mean, half, count, ABOVE_SCRATCH), text))
    for task in tasks(rows):
        mean, half, count = paired(tuned(SPARSE[1], task=task), tuned(SPARSE[1], "finetune-sparse", task))
        name = f"(c) dense >= sparse fine-tuning at 75 %, {task}"
        found.append((name, _sign(mean, half, count), _points(mean, half)))
        for arm in arms:
            mean, half, count = paired(tuned(arm, "prompt", task), tuned(arm, task=task))
            name = f"(d) soft prompt >= without, {arm}, {task}"
            found.append((name, _sign(mean, half, count), _points(mean, half)))
    return [*found, *(_flop_ratio(rows, arm) for arm in SPARSE)]


def _flop_ratio(rows: Sequence[Row], arm: str) -> tuple[str, str, str]:
    """Return the bar on the FLOP ratio that the runs counted: within 1 % of the formula; one seed is enough."""
    name = f"(e) FLOP ratio of {arm}"
    dense, sparse = (select(rows, "flops", arm=other, stage=PRETRAIN) for other in (DENSE, arm))
    expected = [row.get("flop_ratio_formula") for row in rows if row["arm"] == arm and row["stage"] == PRETRAIN]
    ratios = [dense[seed] / sparse[seed] for seed in sparse if seed in dense and sparse[seed]]
    if not ratios or not expected[0]:
        return name, "not run", ""
    near = abs(ratios[0] / expected[0] - 1) <= 0.01
    return name, "holds" if near else "fails", f"{ratios[0]:.3f} counted, {expected[0]:.3f} by the formula"


def markdown(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return the text of ``bars.md``."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|", *(f"| {' | '.join(entry)} |" for entry in entries)]
    return "\n".join(lines) + "\n"


def bars_sheet(entries: Sequence[tuple[str, str, str]]) -> Sheet:
    """Return the bars for a terminal."""
    return Sheet("Bars", _COLUMNS, tuple(entries), "Paired by seed, ± half of the 95 % interval.")


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    """Return, for each evolution rule except static, a verdict on its seed-paired loss difference from static."""
    static = select(rows, "loss", rule=STATIC)
    found = {}
    for rule in rules(rows):
        if rule == STATIC:
            continue
        mean, half, count = paired(static, select(rows, "loss", rule=rule))
        if count < 2:
            found[rule] = f"{count} seeds beside static: no verdict"
            continue
        verdict = (
            "beats static" if mean - half > 0 else "is worse than static" if mean + half < 0 else "is not told apart"
        )
        found[rule] = f"{verdict}: static - {rule} = {mean:+.4f} ± {half:.4f} nats ({count} seeds)"
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
        return "no difference"  # equal accuracies for every seed, as if all models answer the majority class
    if mean + half < 0:
        return "fails"
    return "holds" if mean - half >= 0 else "not told apart"


def _points(mean: float, half: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{100 * mean:+.2f} ± {100 * half:.2f} points" if math.isfinite(half) else f"{100 * mean:+.2f} points"
