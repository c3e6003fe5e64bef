"""``sparsetrain plan VERB ...``: print what a run, a pipeline or a sweep would do."""

from __future__ import annotations

import math
import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sparsetrain.cli import folders
from sparsetrain.errors import UserError, nearest, single_line
from sparsetrain.screen import sparkline

if TYPE_CHECKING:
    from sparsetrain.cli.arguments import Arguments
    from sparsetrain.stages.estimate import Times
    from sparsetrain.stages.hidden import Hidden
    from sparsetrain.stages.plan import Plan, PlannedPhase, PlannedRun

PLANNED = ("pretrain", "adapt", "finetune", "prompt", "pipeline")
_TITLES = ("phase", "steps", "tokens", "learning rate", "density", "context", "batch", "FLOPs", "predicted time")
_MIB = 1 << 20


def plan_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``plan``."""
    parser.epilog = "the settings are those of the verb: sparsetrain pretrain --help"
    parser.add_argument("--step", type=int, metavar="N", help="also name the documents that step N of a pretrain reads")
    parser.add_argument("verb", metavar="VERB", help=", ".join(PLANNED))
    parser.add_argument("arguments", nargs=REMAINDER, metavar="...", help="arguments of that verb, -m included")


def plan(given: Namespace) -> int:
    """Print what a verb would do; return 2 if a point of a multirun is refused, else 0."""
    from sparsetrain.cli.arguments import Arguments

    if given.verb not in PLANNED:
        hint = nearest(given.verb, PLANNED)
        raise UserError(f"plan cannot plan '{given.verb}'{hint}; give one of {', '.join(PLANNED)} and its settings")
    folders.places()  # an error in their names is reported as it is
    arguments = Arguments.of(given.verb, given.arguments)
    if arguments.asks:
        asked = next(name for name in arguments.options if name != "--multirun")
        raise UserError(f"plan does not take {asked}; ask the verb: sparsetrain {given.verb} {asked} ...")
    try:
        if given.step is not None and (given.verb != "pretrain" or arguments.multirun):
            raise UserError(f"--step={given.step} is for a single pretrain")
        return _multirun(given.verb, arguments) if arguments.multirun else _single(given.verb, arguments, given.step)
    except UserError as error:
        raise UserError(f"{single_line(error)}{folders.note()}") from None


def _single(verb: str, arguments: Arguments, step: int | None) -> int:
    from sparsetrain.cli.resolve import load
    from sparsetrain.stages.estimate import estimate
    from sparsetrain.stages.plan import plan_of

    config = load(verb, arguments.overrides)
    found = plan_of(config)
    for line in shown(found, estimate([(config, run) for run in found.runs])):
        print(line)
    if step is not None:
        for line in _documents(config, step):
            print(line)
    return 0


def _documents(config: Any, step: int) -> Iterator[str]:
    """Yield a line for each sample of a step: its corpus, the document in which it begins, and its first tokens."""
    from sparsetrain.data import find_corpora
    from sparsetrain.stages.config import model_config
    from sparsetrain.stages.pretrain import budget_of
    from sparsetrain.stages.text import Text

    _, corpora = find_corpora(config.data)
    if corpora is None:
        raise UserError(f"--step={step}: the text is not prepared yet; sparsetrain data with the same settings does it")
    text = Text(corpora, config)
    budget = budget_of(config, model_config(config.model, corpora.tokenizer.vocab_size), text.samples_per_epoch)
    samples = text.first_documents(budget, step)
    yield f"step {step} reads {len(samples)} samples, which begin in these documents:"
    yield from (f"  {each.corpus}: {each.document}: {each.beginning!r:.60}" for each in samples)


def _multirun(verb: str, arguments: Arguments) -> int:
    from sparsetrain.cli.checks import as_typed, check
    from sparsetrain.cli.multirun import points, with_sweep

    overrides = as_typed(verb, arguments.overrides, sweep=True)
    check(verb, overrides, sweep=True)
    overrides = with_sweep(verb, overrides)
    check(verb, overrides, sweep=True)
    refused: list[UserError] = []
    for line in _sweep(points(verb, overrides, refused.append), refused):
        print(line)
    sys.stdout.flush()
    for reason in dict.fromkeys(map(single_line, refused)):
        print(f"sparsetrain: {reason}{folders.note()}", file=sys.stderr)
    return 2 if refused else 0


def shown(plan: Plan, times: Times) -> Iterator[str]:
    """Yield the lines that describe what a configuration would run."""
    if plan.directory is not None:
        yield f"pipeline: {plan.directory}: {plan.status}"
        yield from (f"note: {note}" for note in plan.notes)
        yield ""
    for index, (run, seconds) in enumerate(zip(plan.runs, times.seconds, strict=True)):
        if index:
            yield ""
        yield f"{run.name}: {run.directory}: {run.status}"
        if run.phases:
            yield from _table(run, times.phases[index] if times.phases else ())
            yield from _reads(run)
            yield from (_curve(name, values) for name, values in run.curves.items())
            if run.hidden is not None:
                yield _timescale(run.hidden, run)
        else:
            yield "steps and tokens: not known yet" if run.trains else "an evaluation, which trains nothing"
        if run.memory is not None:
            yield f"memory: about {_mebibytes(run)} MiB, {run.memory.main.name} most of it"
        if seconds is not None:
            rest = " for the rest" if run.steps_done else ""
            yield f"time: {times.describe(rest, index)}"
            if times.hint and plan.directory is None:
                yield f"      {times.hint}"
        yield from (f"note: {note}" for note in run.notes)
    if plan.directory is not None:
        yield ""
        yield from _in_all(plan.runs, times)


def _reads(run: PlannedRun) -> Iterator[str]:
    """Yield a line for each phase, and for all, about what it reads of each of several corpora."""
    from sparsetrain.stages.text import total

    reads = {f"phase {number}": phase.reads for number, phase in enumerate(run.phases) if phase.reads}
    if len(reads) > 1:
        reads["the run"] = total(list(reads.values()))
    for what, read in reads.items():
        tokens = sum(reading.tokens for reading in read.values())
        parts = (
            f"{name} {reading.tokens:,} tokens ({reading.tokens / tokens:.1%}, {reading.epochs:.3g} epochs)"
            for name, reading in read.items()
        )
        yield f"{what} reads {', '.join(parts)}"


def _curve(name: str, values: Sequence[float]) -> str:
    """Return the line that draws how a setting of the optimizer changes, from the first step to the last."""
    drawn = sparkline(values, sys.stdout.encoding)
    return f"{name:>12} |{drawn}| {min(values):.3g} to {max(values):.3g}, at last {values[-1]:.3g}"


def _timescale(hidden: Hidden, run: PlannedRun) -> str:
    """Return the line about the timescale of AdamW and the tokens per parameter of the hidden matrices."""
    tau, tokens = hidden.tau(run.steps), run.tokens
    ratios = f"{tokens / hidden.weights:.3g} tokens per weight"
    if hidden.nonzeros < hidden.weights and not hidden.resizes:
        ratios += f", {tokens / hidden.nonzeros:.3g} per nonzero"
    if math.isinf(tau):
        return f"hidden matrices: {ratios}; no weight decay"
    off = ": above 1 the weight decay is effectively off" if tau > 1.0 else " of the training"
    return f"hidden matrices: {ratios}; tau {tau:.3g}{off}"


def _sweep(configs: Iterable[Any | None], refused: list[UserError]) -> Iterator[str]:
    from sparsetrain.stages.estimate import estimate
    from sparsetrain.stages.plan import plan_of
    from sparsetrain.stages.plan_inputs import Inputs

    inputs, points = Inputs(), 0
    notes: dict[str, None] = {}
    planned: list[tuple[Any, PlannedRun]] = []
    for config in configs:
        points += 1
        try:
            found = plan_of(config, inputs) if config is not None else None
        except UserError as error:
            refused.append(error)
            found = None
        if found is not None:
            planned += [(config, run) for run in found.runs]
            notes |= dict.fromkeys((*found.notes, *(note for run in found.runs for note in run.notes)))
    yield f"points: {points}" + (f", {len(refused)} of them refused" if refused else "")
    times = estimate(planned)
    for (_, run), seconds in zip(planned, times.seconds, strict=True):
        time = "" if seconds is None else f", about {_duration(seconds)}"
        memory = "" if run.memory is None else f", {_mebibytes(run)} MiB"
        counts = f"{run.steps} steps, {run.tokens} tokens, {run.flops:.4g} FLOPs" if run.phases else "length not known"
        counts = counts if run.trains else "an evaluation"
        yield f"{run.directory}: {run.status}: {counts}{memory}{time}"
    yield from (f"note: {note}" for note in notes)
    yield from _in_all([run for _, run in planned], times)


def _in_all(runs: Sequence[PlannedRun], times: Times) -> Iterator[str]:
    steps, tokens = sum(run.steps for run in runs), sum(run.tokens for run in runs)
    done, count = sum(run.done for run in runs), f"{len(runs)} run{'s' * (len(runs) != 1)}"
    unknown = sum(not run.phases and run.trains for run in runs)
    open_ = f", without {unknown} of unknown length" if unknown else ""
    yield f"in all: {count}, {steps} steps, {tokens} tokens, {sum(run.flops for run in runs):.4g} FLOPs{open_}"
    yield f"done: {done} of {count}"
    if any(each is not None for each in times.seconds):
        yield f"time: {times.describe(' for the rest')}"
        if times.hint:
            yield f"      {times.hint}"


def _mebibytes(run: PlannedRun) -> str:
    assert run.memory is not None
    size = max(run.memory.likely, run.memory.least) / _MIB
    return f"{size:.0f}" if size >= 10.0 else f"{size:.1f}"


def _cells(phase: PlannedPhase) -> tuple[str, ...]:
    low, high = phase.rates
    first, last = phase.densities
    return (
        str(phase.steps),
        str(phase.tokens),
        f"{low:.3g} to {high:.3g}" if low != high else f"{low:.3g}",
        f"{first:.4g}" if first == last else f"{first:.4g} to {last:.4g}",
        str(phase.context),
        str(phase.batch_size),
        f"{phase.flops:.4g}",
    )


def _table(run: PlannedRun, seconds: Sequence[float]) -> Iterator[str]:
    """Yield the table of a run's phases; ``seconds`` are the predicted ones of each phase, if they are known."""
    rows = [(str(number), *_cells(phase)) for number, phase in enumerate(run.phases)]
    rows.append(("all", str(run.steps), str(run.tokens), "", "", "", "", f"{run.flops:.4g}"))
    titles: tuple[str, ...] = _TITLES[:-1]
    if seconds:
        times = [_duration(each) for each in (*seconds, sum(seconds))]
        rows, titles = [(*row, time) for row, time in zip(rows, times, strict=True)], _TITLES
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _duration(seconds: float) -> str:
    from sparsetrain.report.text import duration

    return duration(seconds)
