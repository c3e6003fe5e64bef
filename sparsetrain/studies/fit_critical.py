"""Critical batch sizes from a sweep over batch sizes and lengths of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.report.law_plots import LawPoint
from sparsetrain.report.tables import Sheet
from sparsetrain.scaling.critical import fit_critical_batch, tokens_to_reach
from sparsetrain.scaling.law import Hyperbola, Law, Quantity
from sparsetrain.scaling.power_law import fit_power_law
from sparsetrain.studies.fit_rows import (
    BATCH,
    DECAY,
    LENGTHS,
    Fitted,
    Rows,
    batch_of,
    check_varied,
    grouped,
    levels,
    loss_of,
    named,
    of_one_batch,
    tuned,
)

_TARGETS = 5  # losses at which critical batches are looked for, for each model


def fit_critical(rows: Rows, varied: Sequence[str], per: str, target: float | None) -> Fitted:
    """Return the law of the critical batch over D_min or, with a target loss, the hyperbola of that loss.

    Raises:
        UserError: no batch size varies, no loss is reached at three batch sizes, or fewer than three targets give a
            critical batch.
    """
    rows, notes = of_one_batch(rows)
    check_varied(rows, BATCH)
    done = [row for row in rows if loss_of(row) < math.inf]
    names = ("width", "depth", *(name for name in varied if name not in (DECAY, BATCH, *LENGTHS)))
    found: list[tuple[str, float, Hyperbola, dict[int, Hyperbola], list[LawPoint]]] = []
    failed: list[str] = []
    for key, of in grouped(done, names).items():
        name = named(names, key, done)
        best = [row for level in levels(of) for row in tuned(level, (BATCH,), varied)]
        for loss in _targets(best) if target is None else [target]:
            try:
                found.append((name, loss, *_at_loss(best, loss)))
            except UserError as error:
                failed.append(f"{name}, loss {loss:.4g}: {error}")
    if not found:
        raise UserError(f"no critical batch: {failed[0] if failed else 'no loss is reached at three batch sizes'}")
    reasons = [*notes, *failed]
    sheet = Sheet(
        "Critical batches",
        ("runs", "loss", "D_min in tokens", "B_crit in tokens", "R^2", "batches"),
        tuple(
            (
                *(name, f"{loss:.4f}"),
                *(_with_ends(law, each) for each in law.PARAMETERS),
                *(f"{law.r_squared or 0.0:.3f}", str(law.points)),
            )
            for name, loss, law, _, _ in found
        ),
        "D = D_min (1 + B / B_crit) by least squares in logarithms. Brackets: 95 %, over seeds where there are some.",
    )
    if target is not None:
        clearest = max(found, key=lambda each: each[2].r_squared or 0.0)
        name, loss, hyperbola, _, its_points = clearest
        if len(found) > 1:
            reasons.append(f"{len(found)} models reach this loss; the law is that of {name}, whose R^2 is the highest.")
        return Fitted(hyperbola, sheet, its_points, reasons, caveat=f"It holds for a loss of {loss:.6g} and {name}.")
    points = [
        (of_seed.parameters["d_min"], of_seed.parameters["b_crit"], seed)
        for _, _, _, own, _ in found
        for seed, of_seed in own.items()
    ]
    middle = [(law.parameters["d_min"], law.parameters["b_crit"]) for _, _, law, _, _ in found]
    seeds = {seed for *_, seed in points}
    if len(seeds) > 1:
        law: Law = fit_power_law(*(np.array(column) for column in zip(*points, strict=True)))
    else:
        # Targets share their runs, so that the scatter of their points says nothing about the noise of a run.
        law = replace(fit_power_law(*(list(column) for column in zip(*middle, strict=True))), covariance=None)
        reasons.append("One seed: no interval, since the critical batches of several losses come from the same runs.")
    law = replace(law, kind="critical", inputs=(Quantity("d_min", "tokens"),), output=Quantity("b_crit", "tokens"))
    shown = [
        LawPoint((d,), b, hyperbola.interval()) for (d, b), (_, _, hyperbola, _, _) in zip(middle, found, strict=True)
    ]
    return Fitted(law, sheet, shown, reasons)


def _targets(rows: Rows) -> list[float]:
    """Return losses that all batch sizes with a curve reach between their shortest and longest training."""
    best, worst = [], []
    for of in grouped(rows, (BATCH,)).values():
        means = [float(np.mean([loss_of(row) for row in level])) for level in levels(of)]
        if len(means) > 2:
            best.append(min(means))
            worst.append(max(means))
    if len(best) < 3 or max(best) >= min(worst):
        return []
    return [float(loss) for loss in np.linspace(max(best), min(worst), _TARGETS + 2)[1:-1]]


def _at_loss(rows: Rows, loss: float) -> tuple[Hyperbola, dict[int, Hyperbola], list[LawPoint]]:
    """Return the hyperbola of a loss, over seeds where they have curves, that of each such seed, and its points."""
    own: dict[int, dict[float, float]] = {}
    for (seed,), of in grouped(rows, ("seed",)).items():
        of = [
            row for each in grouped(of, (BATCH,)).values() if len({row["tokens"] for row in each}) > 2 for row in each
        ]
        reached = _reached(of, loss) if of else {}
        if len(reached) > 2:
            own[seed] = reached
    if not own:
        reached = _reached(rows, loss)
        if len(reached) < 3:
            raise UserError(f"{len(reached)} batch sizes reach this loss; a critical batch needs 3")
        return fit_critical_batch(list(reached), list(reached.values())), {}, _points(reached)
    points = [(b, d, seed) for seed, reached in own.items() for b, d in reached.items()]
    batches, tokens, seeds = zip(*points, strict=True)
    law = fit_critical_batch(batches, tokens, seeds)
    least = (law.ranges or ((0.0, 0.0),))[0][0]
    fits = {seed: fit_critical_batch(list(of), list(of.values()), b_opt=least) for seed, of in own.items()}
    return law, fits, [point for reached in own.values() for point in _points(reached)]


def _reached(rows: Rows, loss: float) -> dict[float, float]:
    batches, tokens, losses = (
        [of(row) for row in rows] for of in (batch_of, lambda row: float(row["tokens"]), loss_of)
    )
    return tokens_to_reach(loss, batches, tokens, losses, least=1.0, most=1.0)


def _points(reached: Mapping[float, float]) -> list[LawPoint]:
    return [LawPoint((b,), d) for b, d in reached.items()]


def _with_ends(law: Hyperbola, name: str) -> str:
    ends = law.interval(0.95, name)
    return f"{law.parameters[name]:.3g}" + ("" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]")
