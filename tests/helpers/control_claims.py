"""The statistics that the texts about controls may state, computed by SciPy from the rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tests.helpers.claims import Claim, Seeds, minus, rows_of, student

from sparsetrain.report.sweep import lines_of
from sparsetrain.studies.sweep import read_sweep

WORDS = "bag of words"
BITS = "bits per byte"
# The arms that are pre-trained, each with the stage that ends its training on text.
BITS_AFTER = {"dense": "pretrain", "dense-equal": "pretrain", "sparse-0.75": "pretrain", "pruned": "prune"}
Gap = tuple[str, str, str]  # of what, of one arm, minus another


def control_claims(folder: Path) -> list[Claim]:
    """Return the gaps of SμPar to its controls, in percent, from the rows of the curves and of the searches."""
    curves, drawn, more = (rows_of(folder / name / "results.csv") for name in (".", "search", "tuned"))

    def chosen(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Seeds:
        """Return the logs of the reported losses at the settings with the lowest mean of the other loss."""
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
        whole = [group for group in groups.values() if len(group) == 3]
        best = min(whole, key=lambda group: float(np.mean([float(row["loss"]) for row in group])))
        return {int(row["seed"]): math.log(float(row["reported_loss"])) for row in best}

    def of(scheme: str, sparsity: str, **more: str) -> list[Mapping[str, Any]]:
        wanted = {"parameterization": scheme, "sparsity": sparsity, **more}
        return [row for row in curves if all(row[name] == value for name, value in wanted.items())]

    def beside(one: Seeds, other: Seeds) -> Claim:
        middle, low, high = (100.0 * math.expm1(end) for end in student(one[s] - other[s] for s in one))
        return Claim((middle,), low, high)

    dense = of("supar", "0.0")
    rate = min({row["lr"] for row in dense}, key=lambda lr: sum(float(r["loss"]) for r in dense if r["lr"] == lr))
    found, controls = [], {}
    for sparsity in sorted({row["sparsity"] for row in curves}):
        transferred = chosen(of("supar", sparsity, lr=rate), ["lr"])
        if sparsity != "0.0":
            tuned = chosen(of("mup", sparsity), ["lr"])
            found += [beside(transferred, tuned), beside(transferred, chosen(of("supar", sparsity), ["lr"]))]
            given = chosen(of("mup", sparsity, lr=rate), ["lr"]) if len(of("mup", sparsity, lr=rate)) == 3 else None
            found += [beside(given, tuned)] if given else []
        points = [row for row in (*drawn, *more) if row["sparsity"] == sparsity]
        if points:
            knobs = ["lr", "model.init_std"]  # these tell the draws apart
            controls[sparsity] = {s: transferred[s] - value for s, value in chosen(points, knobs).items()}
            found.append(beside(controls[sparsity], dict.fromkeys(controls[sparsity], 0.0)))
    lines = {line.key[:2]: line for line in lines_of(read_sweep([folder / "results.csv"]).rows, "lr")}
    for (scheme, sparsity), line in lines.items():
        if scheme == "mup":
            pair = lines["supar", sparsity].at_base, line.at_own
            found.append(beside(*({seed: math.log(loss) for seed, loss in each.items()} for each in pair)))
    return [*found, beside(controls["0.9375"], controls["0.0"])]


def equal_flops_gaps(folder: Path) -> dict[Gap, list[Claim]]:
    """Return the differences of any two arms of the pipeline at equal FLOPs, and of each arm to the bag of words.

    Those of accuracies, in points, have two intervals: over the seeds, and over the labelled samples. Those of bits per
    byte, in percent, have one.
    """
    scores, texts = _accuracies(folder), _bits(folder)
    found: dict[Gap, list[Claim]] = {}
    for one, other in itertools.permutations(scores, 2):
        between = np.subtract(scores[one], scores[other])
        claims = [student(between.mean(axis=axis)) for axis in (1, 0)]
        found["accuracy", one, other] = [Claim((middle,), low, high) for middle, low, high in claims]
    for one, other in itertools.permutations(texts, 2):
        logs = minus(*({seed: math.log(value) for seed, value in texts[arm].items()} for arm in (one, other)))
        middle, low, high = (100.0 * math.expm1(end) for end in student(logs.values()))
        found[BITS, one, other] = [Claim((middle,), low, high)]
    return found


def equal_flops_claims(folder: Path) -> list[Claim]:
    """Return the claims of `equal_flops_gaps`, and the mean of each arm over seeds and over samples."""
    claims = list(itertools.chain(*equal_flops_gaps(folder).values()))
    means = [score.mean(axis=axis) for score in _accuracies(folder).values() for axis in (1, 0)]
    for samples in (*means, *(np.array(list(of.values())) for of in _bits(folder).values())):
        middle, low, high = student(samples)
        claims.append(Claim((middle,), low, high))
    return claims


def _accuracies(folder: Path) -> dict[str, np.ndarray]:
    """Return the accuracies in percent, ``[seeds, samples]``, by arm."""
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows_of(folder / "results.csv"):
        if row["accuracy"]:
            # The sample ends the name of a stage, or that of the arm whose stages run once: finetune-3, scratch-3.
            named = row["stage"] if row["arm"] in BITS_AFTER else row["arm"]
            arm = row["arm"] if row["arm"] in BITS_AFTER else "scratch"
            at = int(row["seed"]), int(named[-1])
            cells.setdefault(arm, {})[at] = 100.0 * float(row["accuracy"])
            cells.setdefault(WORDS, {})[at] = 100.0 * float(row["bag_of_words"])
    return {arm: np.array([of[at] for at in sorted(of)]).reshape(3, 5) for arm, of in cells.items()}


def _bits(folder: Path) -> dict[str, Seeds]:
    found: dict[str, dict[int, float]] = {}
    for row in rows_of(folder / "results.csv"):
        if row["stage"] == BITS_AFTER.get(row["arm"]):
            found.setdefault(row["arm"], {})[int(row["seed"])] = float(row["reported_bits_per_byte"])
    return found
