"""``sparsetrain fit``: laws from the runs of a sweep, with their files, table and figure."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import file_errors
from sparsetrain.report.law_plots import DrawnLaw, law_figure
from sparsetrain.report.tables import print_sheets
from sparsetrain.scaling.law import Law, PowerLaw
from sparsetrain.scaling.published import batch_opt, tau_opt
from sparsetrain.screen import say
from sparsetrain.studies.fit_critical import fit_critical
from sparsetrain.studies.fit_laws import fit_batch, fit_loss, fit_tau
from sparsetrain.studies.fit_noise import fit_noise, read_noise, write_noise
from sparsetrain.studies.fit_rows import BATCH, DECAY, PER, Fitted, Rows, check_rows, distinguishing, grouped, named
from sparsetrain.studies.sweep import SweepRows, read_sweep


def _read(places: Sequence[Path]) -> SweepRows:
    found = read_sweep(places, apart=True)
    check_rows(found.rows)
    return found


@dataclass(frozen=True)
class Kind:
    """A kind of law that can be fitted to a sweep.

    Args:
        fit: makes it from the rows of one group.
        swept: settings whose values are part of the law, beside sizes and lengths; runs that differ in others have
            other laws.
        published: the law of a paper to show beside it.
        read: reads the rows.
        write: writes what the kind has besides laws and their figure, given all rows, the rows by label and a
            directory, and returns the names of the files.
    """

    fit: Callable[[Rows, Sequence[str], str, float | None], Fitted]
    swept: Sequence[str] = ("lr", DECAY, BATCH)
    published: PowerLaw | None = None
    read: Callable[[Sequence[Path]], SweepRows] = _read
    write: Callable[[SweepRows, Mapping[str, Rows], Path], list[str]] | None = None


FITS: Mapping[str, Kind] = {
    "tau": Kind(fit_tau, (DECAY,), tau_opt),
    "batch": Kind(fit_batch, published=batch_opt),
    "critical": Kind(fit_critical),
    "loss": Kind(fit_loss),
    "noise": Kind(fit_noise, (), read=read_noise, write=write_noise),
}
"""The laws that can be fitted to a sweep, by name."""

_LONGEST = 100  # letters of a file's name that come from settings


@dataclass(frozen=True)
class FitRequest:
    """What to fit.

    Args:
        places: run directories, their parents, or tables that `sparsetrain sweep` wrote; for ``noise``, tables that
            this wrote.
        law: one of `FITS`.
        out: where to write ``law.yaml`` and ``law.png``; None only prints.
        per: whether parameters are the ``weight`` elements of the hidden matrices or their ``nonzero`` ones.
        target: for ``critical``, the loss to reach; None takes several and fits B_crit over D_min.
    """

    places: Sequence[Path]
    law: str
    out: Path | None = None
    per: str = "weight"
    target: float | None = None

    def __post_init__(self) -> None:
        check_choice("law", self.law, FITS)
        check_choice("per", self.per, PER)
        if self.target is not None and (self.law != "critical" or not 0.0 < self.target < float("inf")):
            raise UserError(f"target={self.target} is the loss of law=critical, and must be above 0 and finite")


def fit_sweep(request: FitRequest, console: Console | None = None) -> dict[str, Law]:
    """Fit the laws of a sweep, print them, and write them to ``request.out``; return the laws by label.

    There is one for each sparsity, and for each combination of the other settings in which runs of one law must agree.

    Raises:
        UserError: see `read_sweep`; or no group of runs gives a law. A group without a law beside others with one is
            a line of the output.
    """
    console = console or Console()
    tell = functools.partial(say, console)
    kind = FITS[request.law]
    found = kind.read(request.places)
    names = distinguishing(found.rows, found.varied, kind.swept)
    groups = grouped(found.rows, ("parameterization", "sparsity", *names))
    fitted: list[Fitted] = []
    refused: list[str] = []
    fitted_to: dict[str, Rows] = {}
    for (scheme, sparsity, *key), rows in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        words = [scheme] if len({of[0] for of in groups}) > 1 else []
        words += [f"sparsity {sparsity:g}", *([named(names, key, found.rows)] if names else [])]
        label = ", ".join(words)
        try:
            one = kind.fit(rows, found.varied, request.per, request.target)
        except UserError as error:
            refused.append(f"{label}: {error}")
            continue
        fitted.append(replace(one, label=label, law=_signed(one, rows, sparsity, request.places)))
        fitted_to[label] = rows
    if not fitted:
        raise UserError("; ".join(refused))
    for each in fitted:
        print_sheets([replace(each.sheet, title=f"{each.sheet.title}, {each.label}")], console)
        for note in each.notes:
            tell(f"note: {note}")
    for line in refused:
        tell(f"no law: {line}")
    tell("")
    for each in fitted:
        for line in described(each.label, each.law):
            tell(line)
    if kind.published is not None:
        tell(f"published: {formula(kind.published)}, {kind.published.source}")
    if request.out is not None:
        written = _write(fitted, request.out, kind.published, tell)
        written += kind.write(found, fitted_to, request.out) if kind.write else []
        tell(f"written: {', '.join(written)} in {request.out}")
    return {each.label: each.law for each in fitted}


def _signed(one: Fitted, rows: Sequence[Mapping[str, Any]], sparsity: float, places: Sequence[Path]) -> Law:
    """Return a law with where it comes from."""
    names = ", ".join(dict.fromkeys(place.resolve().name for place in places[:3]))
    more = f" and {len(places) - 3} more places" if len(places) > 3 else ""
    commits = sorted({str(row["commit"])[:12] for row in rows if row.get("commit")})
    at = f", commit {', '.join(commits[:3])}" if commits else ""
    return replace(
        one.law,
        runs=len({row["run"] for row in rows}),
        sparsity=sparsity,
        source=f"own fit of {names}{more}{at}",
        verified=" ".join(
            filter(None, ["Fitted to the runs themselves; not checked on runs outside of the fit.", one.caveat])
        ),
    )


def described(label: str, law: Law) -> list[str]:
    """Return lines that say what a law is, how sure, and where it holds."""
    lines = [f"{label}: {formula(law)}"]
    parts = []
    for name in law.PARAMETERS:
        ends = law.interval(0.95, name)
        if ends is not None and ends[0] < ends[1]:
            parts.append(f"{name} {law.parameters[name]:.4g} [{ends[0]:.3g}, {ends[1]:.3g}]")
    if parts:
        lines.append(f"  95 %: {', '.join(parts)}")
    where = [
        f"{quantity.name} {low:.4g} to {high:.4g}"
        for quantity, (low, high) in zip(law.inputs, law.ranges or (), strict=bool(law.ranges))
    ]
    facts = [f"R^2 {law.r_squared:.3f}"] if law.r_squared is not None else []
    facts += [f"{law.points} points"] if law.points else []
    facts += [f"{law.seeds} seeds"] if law.seeds else []
    lines.append(f"  fitted for {', '.join(where)}; {', '.join(facts)}")
    return lines


def formula(law: Law) -> str:
    """Return the law as a formula with its numbers."""
    p, x = law.parameters, law.inputs[0].name
    if law.FORM == "power":
        return f"{law.output.name} = {p['coefficient']:.4g} {x}^{p['exponent']:.4g}"
    if law.FORM == "hyperbola":
        return f"{law.output.name} = {p['d_min']:.4g} (1 + {x} / {p['b_crit']:.4g})"
    powers = f"{p['a']:.4g} / {x}^{p['alpha']:.4g} + {p['b']:.4g} / {law.inputs[1].name}^{p['beta']:.4g}"
    return f"{law.output.name} = {p['floor']:.4g} + {powers}"


def _remove_earlier(out: Path, written: Sequence[str], kind: str) -> list[str]:
    """Remove the laws of a kind that an earlier fit left in a directory, which would be taken for this one's."""
    removed = []
    for path in sorted(out.glob("law*.yaml")):
        if path.name in written:
            continue
        try:
            earlier = Law.load(path)
        except UserError:
            continue  # no law of ours
        if earlier.kind == kind:
            with file_errors(out):
                path.unlink()
            removed.append(path.name)
    return removed


def _write(fitted: Sequence[Fitted], out: Path, published: PowerLaw | None, tell: Any) -> list[str]:
    """Write the laws and their figure, and return the names of the files."""
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    for each in fitted:
        # A single law has a name that does not depend on its sparsity.
        words = re.sub(r"[^\w.=-]+", "-", each.label.replace("sparsity ", "s"))[:_LONGEST]
        name = "law.yaml" if len(fitted) == 1 else f"law-{words}.yaml"
        path = out / (f"law-{words}-{len(written)}.yaml" if name in written else name)
        each.law.save(path)
        written.append(path.name)
    removed = _remove_earlier(out, written, fitted[0].law.kind)
    if removed:
        tell(f"removed laws of an earlier fit: {', '.join(removed)}")
    law_figure([DrawnLaw(each.label, each.law, each.points) for each in fitted], out / "law.png", published)
    return [*written, "law.png"]
