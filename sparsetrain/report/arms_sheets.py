"""The tables of arms for a terminal: means over seeds, and differences.

Every interval is Student's t at 95 %, over seeds. Differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsetrain.report.arms import (
    MOMENTS,
    SCRATCH,
    WAYS,
    Row,
    arm_names,
    corpora,
    pretrained,
    rules,
    select,
    tasks,
    text_stages,
    ways,
)
from sparsetrain.report.pairs import comparisons
from sparsetrain.report.tables import Sheet, mean_cell
from sparsetrain.report.text import ABSENT, clean, percent, si
from sparsetrain.scaling.intervals import paired
from sparsetrain.scaling.transfer import relative_gap

BITS = "bits_per_byte"


def scored_corpora(rows: Sequence[Row]) -> list[str]:
    """Return the corpora that the rows score one by one, in order."""
    return corpora(dict.fromkeys(name for row in rows for name in row))


def means(rows: Sequence[Row]) -> Sheet:
    """Return the mean over seeds of each stage of each arm; a table without a task says how much was read, too."""
    tasked, names = tasks(rows), scored_corpora(rows)
    body = []
    for task in [None, *tasked]:
        for stage, arm in _stages_of_arms(rows, ways(rows) if task else text_stages(rows), by_stage=not tasked):
            same = _stage(arm, stage, task)
            seeds = select(rows, "seed", **same)
            if not seeds:
                continue

            def mean(key: str, factor: float = 1.0, digits: int = 4, same: Row = same) -> str:
                return mean_cell(list(select(rows, key, **same).values()), factor, digits)

            cells = [mean(BITS), *(mean(f"{BITS}_{name}") for name in names)]
            if tasked:
                cells.append(mean("accuracy", 100.0, 1))
            else:
                read = (list(select(rows, f"tokens_per_{one}", **same).values()) for one in ("weight", "nonzero"))
                cells += [f"{np.mean(counts):.3g}" if counts else ABSENT for counts in read]
            flops = list(select(rows, "flops", **same).values())
            cells.append(si(float(np.mean(flops)), "FLOP") if flops else ABSENT)
            name = ", ".join([arm, stage, *([task] if task else [])])
            body.append((name, str(len(seeds)), *cells))
    note = "Brackets: 95 %, Student's t over seeds."
    for task in tasked:
        shares = select(rows, "majority", task=task)
        if shares:
            note += f" Majority class, {task}: {percent(float(np.mean(list(shares.values()))))}."
    last = ("accuracy, %",) if tasked else ("tokens per weight", "tokens per nonzero")
    columns = ("stage", "seeds", "bits per byte", *(f"bits per byte, {clean(name)}" for name in names), *last)
    return Sheet("Arms", (*columns, "training"), tuple(body), note)


def _stage(arm: str, stage: str, task: str | None) -> Row:
    return {"arm": arm, "stage": stage, "task": task}


def _stages_of_arms(rows: Sequence[Row], stages: Sequence[str], by_stage: bool) -> list[tuple[str, str]]:
    """Return the pairs of a stage and an arm in the order of display."""
    arms = arm_names(rows)
    if by_stage:
        return [(stage, arm) for stage in stages for arm in arms]
    return [(stage, arm) for arm in arms for stage in stages]


def adaptations(rows: Sequence[Row]) -> Sheet:
    """Return what adaptations began with and ended with, corpus by corpus; without rows if there is none."""
    prefixes = [f"{BITS}_{moment}_" for moment in MOMENTS]
    names = dict.fromkeys(
        name.removeprefix(prefix) for row in rows for name in row for prefix in prefixes if name.startswith(prefix)
    )
    keys = {
        f"{moment}, {clean(name)}": key
        for name in names
        for moment, key in zip(
            ("before", "new rows", "after"),
            (*(f"{prefix}{name}" for prefix in prefixes), f"{BITS}_{name}"),
            strict=True,
        )
    }
    keys["forgetting"] = "forgetting"
    shown = {title: key for title, key in keys.items() if any(row.get(key) is not None for row in rows)}
    began = [key for key in shown.values() if key.startswith(tuple(prefixes))]
    body = []
    for stage, arm in _stages_of_arms(rows, text_stages(rows), by_stage=True):
        same = _stage(arm, stage, None)
        if any(select(rows, key, **same) for key in began):
            cells = (mean_cell(list(select(rows, key, **same).values()), 1.0, 4) for key in shown.values())
            body.append((f"{arm}, {stage}", *cells))
    note = "In bits per byte. New rows: of the embeddings, with their first values. Brackets: 95 %, Student's t."
    return Sheet("Adaptation", ("arm", *shown), tuple(body), note)


def differences(rows: Sequence[Row], with_tasks: bool = True, base: str | None = None) -> Sheet:
    """Return differences paired by seed: of arms from others and from scratch, of stages from fine-tuning.

    Args:
        rows: of a table of pipelines.
        with_tasks: whether to include accuracies on tasks beside the losses on text.
        base: the arm to compare with, see `sparsetrain.report.pairs.comparisons`.
    """
    body = []
    stages, names = text_stages(rows), scored_corpora(rows)
    sparsity = {row["arm"]: row["sparsity"] for row in reversed(rows)}
    arms = pretrained(rows)

    def compare(name: str, key: str, one: Row, other: Row, from_key: str | None = None) -> None:
        a, b = select(rows, key, **one), select(rows, from_key or key, **other)
        if key == "accuracy":
            mean, half, count = paired(a, b)
            numbers, ends = f"{100 * mean:+.2f} points", (100 * (mean - half), 100 * (mean + half))
        elif gap := relative_gap(a, b):
            numbers, count, inner = f"{100 * gap.relative:+.2f} %", gap.seeds, gap.interval or (0.0, 0.0)
            ends = (100 * inner[0], 100 * inner[1])
        else:
            count = 0
        if not count:
            return
        interval = f"[{ends[0]:.2f}, {ends[1]:.2f}]" if count > 1 else "-"
        apart = "one seed" if count < 2 else "not told apart" if ends[0] <= 0.0 <= ends[1] else "told apart"
        body.append((name, numbers, interval, str(count), apart))

    for stage in stages:
        there = [arm for arm in arms if select(rows, "seed", arm=arm, stage=stage, task=None)]
        where = f", {stage}" if len(stages) > 1 else ""
        for arm, other in comparisons(there, sparsity, base):
            one, its_base = (_stage(name, stage, None) for name in (arm, other))
            for key, said in ((BITS, ""), *((f"{BITS}_{name}", f", {clean(name)}") for name in names)):
                compare(f"{arm} - {other}{where}, bits per byte{said}", key, one, its_base)
        for arm in there:
            own = _stage(arm, stage, None)
            for name in names:
                said = f"after - before, {arm}{where}, bits per byte, {clean(name)}"
                compare(said, f"{BITS}_{name}", own, own, f"{BITS}_{MOMENTS[0]}_{name}")
    for task in tasks(rows) if with_tasks else []:
        for stage in ways(rows):
            for arm, other in comparisons(arms, sparsity, base):
                one, its_base = (_stage(name, stage, task) for name in (arm, other))
                compare(f"{arm} - {other}, {stage}, {task}", "accuracy", one, its_base)
        for arm in arms:
            tuned, control = (_stage(name, WAYS[0], task) for name in (arm, SCRATCH))
            compare(f"{arm} - {SCRATCH}, {WAYS[0]}, {task}", "accuracy", tuned, control)
            for stage in ways(rows):
                if stage != WAYS[0]:
                    compare(f"{stage} - {WAYS[0]}, {arm}, {task}", "accuracy", tuned | {"stage": stage}, tuned)
    columns = ("difference", "mean", "95 % interval", "seeds", "")
    return Sheet("Differences, paired by seed", columns, tuple(body))


def mask_means(rows: Sequence[Row]) -> Sheet:
    """Return, for each evolution rule, the means over seeds of the loss and of the masks at the end."""
    body = []
    for rule in rules(rows):
        same = [row for row in rows if row["rule"] == rule]
        cells = [mean_cell([row["loss"] for row in same if row["loss"] is not None], 1.0, 4)]
        for key in ("density", "itop_rate", "mask_overlap"):
            values = list(select(same, key).values())
            cells.append(f"{np.mean(values):.3f}" if values else "-")
        dead = sorted(set(select(same, "dead_rows").values()))
        cells.append(" to ".join(f"{end}" for end in dict.fromkeys((dead[0], dead[-1]))) if dead else "-")
        steps = sorted(set(select(same, "steps").values()))
        body.append((rule, str(len(same)), ", ".join(map(str, steps)), *cells))
    columns = ("rule", "seeds", "steps", "loss", "density", "ever active", "overlap", "outputs without a weight")
    note = "Brackets: 95 %, Student's t over seeds. Loss: validation, nats per token. Masks: at the end."
    return Sheet("Masks that evolve", columns, tuple(body), note)
