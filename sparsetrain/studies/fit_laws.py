"""The laws of a sweep's rows: which runs make a curve, and which curves a law.

Rows differ in settings. Those that a law does not mention distinguish curves, except where the law is about tuned
trainings: then the best combination of the settings that were tried counts, by the mean over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sparsetrain.errors import UserError
from sparsetrain.report.law_plots import LawPoint
from sparsetrain.report.tables import Sheet
from sparsetrain.scaling.law import Law, Quantity
from sparsetrain.scaling.loss_law import fit_loss_law, unidentified
from sparsetrain.scaling.optima import Best, best_of, law_of_optima
from sparsetrain.scaling.transfer import Curve, Row, make_curves, to_run
from sparsetrain.studies.fit_rows import (
    BATCH,
    DECAY,
    LENGTHS,
    Fitted,
    Rows,
    batch_of,
    check_varied,
    counted,
    grouped,
    left_out,
    levels,
    loss_of,
    named,
    of_one_batch,
    tuned,
    unknown,
)


@dataclass(frozen=True)
class _Swept:
    """A curve of a sweep: its name, the settings that it has, and how its x follows from the swept setting."""

    name: str
    settings: str
    curve: Curve
    best: Best
    setting: str
    value_of: Callable[[float], float]

    def to_run(self) -> str | None:
        """Return the overrides of the runs that would help the curve most, or None."""
        points = to_run(self.curve, self.curve.seeds)
        if not points:
            return None
        first = points[0][1]
        values = ",".join(f"{self.value_of(2.0**log2):.6g}" for log2, seed in points if seed == first)
        seeds = ",".join(map(str, sorted({seed for _, seed in points})))
        return " ".join(filter(None, [self.settings, f"{self.setting}={values}", f"seed={seeds}"]))


def fit_tau(rows: Rows, varied: Sequence[str], per: str, target: float | None) -> Fitted:
    """Return the law of the best timescale over tokens per parameter: curves over tau, by weight decay.

    Raises:
        UserError: no weight decay varies, rows have no tau, or fewer than three curves have a minimum inside.
    """
    check_varied(rows, DECAY)
    decayed = [row for row in rows if row[DECAY] != 0]
    known = [row for row in decayed if row.get("tau") and row.get(counted(per))]
    if not known:
        raise unknown(f"tau and {counted(per)}", per)
    notes = left_out(len(rows) - len(decayed), "without weight decay") + left_out(
        len(decayed) - len(known), f"whose tau or number of {counted(per)} is not known"
    )
    names = ("width", "depth", "lr", *(name for name in varied if name != DECAY))
    swept = []
    for key, of in grouped(known, names).items():
        lengths = _lengths(of)
        for level in lengths:
            tokens = max(row["tokens"] for row in level if loss_of(row) < math.inf)
            product = level[0]["tau"] * level[0][DECAY]
            x, points = tokens / level[0][counted(per)], [(row["tau"], row) for row in level]
            more = (("tokens", f"{tokens:.4g}"),) if len(lengths) > 1 else ()
            swept.append(_swept(names, key, known, x, points, DECAY, partial(_divided, product), more))
        if not lengths:
            notes.append(f"{named(names, key, known)}: every run diverged, so this curve is left out.")
    if not swept:
        raise UserError("every run diverged")
    law = _law(swept)
    unit = f"tokens / {per}"
    law = replace(
        law,
        kind="tau",
        inputs=(Quantity(f"tokens_per_{per}", unit),),
        output=Quantity("tau", "share of the training"),
    )
    return _of_optima(law, swept, f"tokens per {per}", "tau", notes)


def fit_batch(rows: Rows, varied: Sequence[str], per: str, target: float | None) -> Fitted:
    """Return the law of the best batch in tokens over training tokens, with the best weight decay and rate at each.

    Raises:
        UserError: no batch size varies, or fewer than three curves have a minimum inside.
    """
    rows, notes = of_one_batch(rows)
    check_varied(rows, BATCH)
    done = [row for row in rows if loss_of(row) < math.inf]
    names = ("width", "depth", *(name for name in varied if name not in (DECAY, BATCH, *LENGTHS)))
    swept, ends = [], []
    for key, of in grouped(done, names).items():
        for level in levels(of):
            best = tuned(level, (BATCH,), varied)
            ends += _at_the_end(level, best)
            points = [(batch_of(row), row) for row in best]
            per_size = points[0][0] / points[0][1][BATCH]
            x = float(np.mean([row["tokens"] for row in best]))
            length = (("tokens", f"{x:.4g}"),)
            swept.append(_swept(names, key, done, x, points, BATCH, partial(_times, 1.0 / per_size), length))
    law = replace(_law(swept), kind="batch", inputs=(Quantity("tokens", "tokens"),), output=Quantity("batch", "tokens"))
    notes += left_out(len(rows) - len(done), "that diverged")
    caveat = ""
    if len({row.get(DECAY) for row in done}) < 2:
        caveat = "Weight decay was the same at every batch: the best batch moves with it."
    elif ends:
        caveat = f"The best weight decay is at an end of those tried for batches of {'; '.join(ends)}."
    notes += [caveat] if caveat else []
    return replace(_of_optima(law, swept, "tokens", "batch in tokens", notes), caveat=caveat)


def _at_the_end(level: Rows, best: Rows) -> list[str]:
    """Return each batch of a length whose best weight decay is the smallest or largest that was tried at it."""
    found = []
    for (batch,), of in sorted(grouped(best, (BATCH,)).items()):
        tried = [row[DECAY] for row in level if row[BATCH] == batch and row.get(DECAY) is not None]
        if tried and of[0].get(DECAY) in (min(tried), max(tried)):
            found.append(f"{batch_of(of[0]):,.0f} tokens at {of[0]['tokens']:,}")
    return found


def fit_loss(rows: Rows, varied: Sequence[str], per: str, target: float | None) -> Fitted:
    """Return the law of loss over parameters and tokens, of the best settings tried at each.

    Raises:
        UserError: rows have no numbers of parameters, or there are too few sizes, lengths or runs.
    """
    done = [row for row in rows if loss_of(row) < math.inf and row.get(counted(per))]
    if not done:
        raise unknown(counted(per), per)
    best: list[Mapping[str, Any]] = []
    for of in grouped(done, (counted(per),)).values():
        best += [row for level in levels(of) for row in tuned(level, (), varied)]
    n, d, losses = ([row[name] for row in best] for name in (counted(per), "tokens", "loss"))
    law = fit_loss_law(n, d, losses, [row["seed"] for row in best])
    law = replace(law, inputs=(Quantity("parameters", f"hidden {per}s"), law.inputs[1]))
    points = [LawPoint((float(a), float(b)), float(c)) for a, b, c in zip(n, d, losses, strict=True)]
    body = [(f"{p.x[0]:,.0f}", f"{p.x[1]:,.0f}", f"{p.y:.4f}", f"{law(*p.x):.4f}") for p in points]
    sheet = Sheet("Losses", (f"hidden {per}s", "tokens", "loss", "by the law"), tuple(body))
    doubts = unidentified(law)
    notes = left_out(len(rows) - len(done), "that diverged or lack their number of weights")
    return Fitted(law, sheet, points, [*notes, *doubts], caveat=" ".join(doubts))


def _swept(
    names: Sequence[str],
    key: Sequence[Any],
    rows: Rows,
    x: float,
    points: Iterable[tuple[float, Mapping[str, Any]]],
    setting: str,
    value_of: Callable[[float], float],
    more: Sequence[tuple[str, str]] = (),
) -> _Swept:
    name = ", ".join([named(names, key, rows), *(f"{value} {unit}" for unit, value in more)])
    (curve,) = make_curves(Row(name, value, row["seed"], loss_of(row)) for value, row in points).values()
    if not curve.usable:
        raise UserError(f"{name}: every run diverged")
    return _Swept(name, named(names, key, rows, sets=True), curve, best_of(x, curve), setting, value_of)


def _lengths(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """Return the rows of a curve by their tokens; tables may say one length for all, and differ from each other."""
    found = levels([row for row in rows if loss_of(row) < math.inf])
    for row in rows if found else ():
        if loss_of(row) == math.inf:  # tau times weight decay says the steps that a diverged run was meant to have
            product = row["tau"] * row[DECAY]
            distances = [abs(math.log(product / (of[0]["tau"] * of[0][DECAY]))) for of in found]
            found[distances.index(min(distances))].append(row)
    return found


# -- optima ------------------------------------------------------------------------------------------------------------


def _divided(product: float, x: float) -> float:
    return product / x


def _times(factor: float, x: float) -> float:
    return factor * x


def _law(swept: Sequence[_Swept]) -> Law:
    """Return the law of optima; an error names the first curve without a minimum, and the runs that it needs."""
    try:
        return law_of_optima([each.best for each in swept])
    except UserError as error:
        edges = _edges(swept)
        raise UserError(f"{error}{'; ' + edges[0] if edges else ''}") from None


def _edges(swept: Sequence[_Swept]) -> list[str]:
    return [
        f"{each.name}: lowest at the {'smallest' if each.best.optimum.edge == 'low' else 'largest'} value, so its "
        f"minimum is not known; run next: {each.to_run()}"
        for each in swept
        if each.best.value is None
    ]


def _of_optima(law: Law, swept: Sequence[_Swept], x: str, y: str, notes: list[str]) -> Fitted:
    rows, points = [], []
    for each in sorted(swept, key=lambda each: each.best.x):
        best, found = each.best, each.best.optimum
        where = f"beyond {2.0**found.best:.3g} ({found.edge} edge)"
        if best.value is not None:
            ends = None if found.interval is None else (_power(found.interval[0]), _power(found.interval[1]))
            shown = "" if ends is None else " [" + ", ".join(_end(end) for end in ends) + "]"
            where = f"{best.value:.3g}{shown}"
            points.append(LawPoint((best.x,), best.value, ends))
        rows.append((each.name, f"{best.x:.4g}", where, f"{found.loss:.4f}", f"{len(best.own)} of {found.seeds}"))
    beyond = sum(len(each.best.beyond) for each in swept)
    notes = [*notes, *_edges(swept)]
    if beyond:
        notes.append(f"{beyond} optima of single seeds lie outside of their grid and are left out.")
    note = "Brackets: 95 %, Student's t over the seeds' own minima; open: beyond the grid. Losses: validation, nats."
    sheet = Sheet("Optima", ("curve", x, f"best {y}", "loss there", "seeds with a minimum"), tuple(rows), note)
    return Fitted(law, sheet, points, notes)


def _power(log2: float) -> float:
    return 2.0**log2 if math.isfinite(log2) else (0.0 if log2 < 0.0 else math.inf)


def _end(value: float) -> str:
    return f"{value:.3g}" if 0.0 < value < math.inf else "open"
