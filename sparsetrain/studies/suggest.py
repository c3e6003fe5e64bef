"""``sparsetrain suggest``: rate, weight decay, batch size and steps of a pre-training, from laws, with their intervals.

- Weight decay: the law of the best timescale says tau at the run's tokens per parameter, and
  ``wd = 1 / (tau lr steps)`` with the adjusted rate of the hidden matrices ("Power Lines", arXiv 2505.13738).
- Batch size: the law of the best batch at the run's tokens, at most the critical batch where a law says it.
- Rate: the tuned base of the configuration, which the parameterization carries to the model.
- Schedule: that of the configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path
from sparsetrain.optim import BudgetConfig, RunSchedule, weight_decay_for
from sparsetrain.scaling.law import Hyperbola, Interval, Law, PowerLaw
from sparsetrain.scaling.published import batch_opt, tau_opt
from sparsetrain.stages.config import PretrainConfig, model_config
from sparsetrain.stages.hidden import Hidden, follows, hidden_of_run
from sparsetrain.stages.plan import vocabulary
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.stages.pretrain import budget_of
from sparsetrain.stages.text import Text
from sparsetrain.studies.fit import formula
from sparsetrain.studies.fit_rows import PER

FORMATS = ("text", "json")
_FORMS = {"tau": (PowerLaw,), "batch": (PowerLaw,), "critical": (PowerLaw, Hyperbola)}
_INPUTS = {  # x is the name of an input that was given none
    "tau": ("tokens_per_parameter", *(f"tokens_per_{per}" for per in PER), "x"),
    "batch": ("tokens", "x"),
    "critical": ("d_min", "x"),
}
_READABLE = 10**15  # tokens that are written out


@dataclass
class SuggestConfig(PretrainConfig):
    """Suggest settings for a pre-training, whose settings these are, and some more.

    Args:
        laws: a file of `sparsetrain fit`, or a list of files; a published law stands in for a kind that none has.
        flops: training FLOPs by formula that set the tokens, instead of ``budget``.
        seconds: time that sets the tokens, instead of ``budget``, at ``flops_per_second``.
        flops_per_second: training FLOPs by formula per second, as measured on a run of such a model.
        per: the parameters that the published law of tau counts: the ``weight`` elements of the hidden matrices, or
            their ``nonzero`` ones. A law of your own says it itself.
        format: ``text`` or ``json``.
    """

    laws: Any = field(default=None, metadata={"type": "path, list of paths or null"})
    flops: float | None = None
    seconds: float | None = None
    flops_per_second: float | None = None
    per: str = "weight"
    format: str = "text"

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        check_choice("per", self.per, PER)
        if self.budget.phases is not None:
            raise UserError("budget.phases: suggest is for a run of one phase; leave phases out")
        if self.optimizer.name != "adamw":
            raise UserError(f"optimizer.name={self.optimizer.name}: the laws are about AdamW")
        for name in ("flops", "seconds", "flops_per_second"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise UserError(f"{name}={value} must be above 0 and finite")
        given = [name for name in ("flops", "seconds") if getattr(self, name) is not None]
        if given and (len(given) > 1 or not self.budget.open):
            said = " and ".join([*given, *([f"budget.{self.budget.length}"] if self.budget.length else [])])
            raise UserError(f"{said}: give one length of the run")
        if (self.seconds is None) != (self.flops_per_second is None):
            raise UserError("seconds and flops_per_second belong together: what a second pays for has to be measured")
        work = self.flops if self.seconds is None else self.seconds * (self.flops_per_second or 0.0)
        if work is not None:
            self.budget = replace(self.budget, flops=work)
        super().__post_init__()

    @property
    def law_files(self) -> list[str]:
        if self.laws is None:
            return []
        files = [self.laws] if isinstance(self.laws, str) else self.laws
        if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
            raise UserError(f"laws={self.laws!r} must be a file of sparsetrain fit, or a list of files")
        return list(files)


@dataclass(frozen=True)
class Suggested:
    """A suggested value.

    Args:
        name: what it is.
        value: a number, or the name of a schedule.
        interval: 95 %, of what the law says there; None where it is not known.
        says: how it follows.
        source: where that comes from.
        origin: ``published``, ``fit`` for a law of one's own, ``configuration`` or ``arithmetic``.
        at_most: for a batch, the critical batch, up to which a larger one costs little; None where it is not known.
        warnings: sentences.
    """

    name: str
    value: float | str
    says: str
    source: str
    origin: str
    interval: Interval | None = None
    at_most: float | None = None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Suggestion:
    """What is suggested: values, the overrides that set them, and sentences about the whole.

    Tokens per nonzero are None where masks change their density.
    """

    values: Sequence[Suggested]
    overrides: Sequence[str]
    tokens_per_weight: float
    tokens_per_nonzero: float | None
    notes: Sequence[str]


def suggest(config: SuggestConfig) -> None:
    """Print a suggestion, as text or JSON.

    Raises:
        UserError: see `suggestion`.
    """
    found = suggestion(config)
    if config.format == "json":
        print(json.dumps(asdict(found), indent=2, allow_nan=False))
        return
    for each in found.values:
        value = each.value if isinstance(each.value, str) else f"{each.value:.6g}"
        ends = "" if each.interval is None else f" [{each.interval[0]:.3g}, {each.interval[1]:.3g}]"
        print(f"{each.name}: {value}{ends}")
        published = "published: " if each.origin == "published" else ""
        print(f"  {each.says} ({published}{each.source})")
        for warning in each.warnings:
            print(f"  warning: {warning}")
    for note in found.notes:
        print(f"note: {note}")
    print("append to the command of pretrain:")
    print(f"  {' '.join(found.overrides)}")


def suggestion(config: SuggestConfig, inputs: Inputs | None = None) -> Suggestion:
    """Return what laws suggest for a pre-training.

    Raises:
        UserError: a file holds no law, two of them are about the same, or a law's value is no usable number; the length
            of the run is not known; the schedule does not fit the steps; or the best batch has more tokens than the
            text or the run.
    """
    inputs = inputs or Inputs()
    laws, notes = laws_of(config.law_files)
    _, corpora = inputs.corpora(config.data)
    model = model_config(config.model, vocabulary(config, corpora))
    if corpora is None and config.budget.epochs is not None:
        raise UserError("the text is not prepared yet, so budget.epochs says no number of tokens: give budget.tokens")
    samples = None if corpora is None else Text(corpora, config).samples_per_epoch
    tokens = budget_of(config, model, samples).tokens if config.budget.tokens is None else config.budget.tokens
    text = None if corpora is None else sum(corpora.train_tokens.values())
    batch, sequences = _batch(config, laws, tokens, text)
    length = BudgetConfig(tokens=tokens, batch_size=sequences)
    settled = replace(config, budget=length, flops=None, seconds=None, flops_per_second=None)
    budget = budget_of(settled, model, None)
    schedule = RunSchedule(config.schedule, budget, config.optimizer)
    hidden = hidden_of_run(settled)
    tau, decay = decay_of(config, laws, hidden, tokens, schedule.total_steps)
    # A run has one length, so a length of the command that these words are appended to has to go.
    length_there = None if config.flops or config.seconds else config.budget.length
    overrides = [
        *([] if length_there in (None, "tokens") else [f"budget.{length_there}=null"]),
        f"budget.tokens={tokens}",
        f"budget.batch_size={sequences}",
        f"optimizer.lr={config.optimizer.lr:.6g}",
        f"optimizer.weight_decay={decay.value:.6g}",
    ]
    if text is None:
        notes.append("The text is not prepared yet, so it is not known how often the run reads it.")
    elif tokens > text:
        notes.append(f"The run reads the text {tokens / text:.3g} times; the laws are about texts that are read once.")
    if hidden.others > 1.0 + 1e-9:
        notes.append(
            f"Learning rate times weight decay differs between hidden matrices by a factor of {hidden.others:.3g}, and "
            "so does tau; the values are those of the matrices with the most weights."
        )
    notes += follows(config.parameterization, hidden)
    if config.budget.changing is not None:
        notes.append("budget.batch_size changes during the run; the suggestion is for one size, and replaces it.")
    values = [rate_of(config, hidden), batch, _steps(budget.total_steps, tokens, sequences), tau, decay, _curve(config)]
    per_nonzero = None if hidden.resizes else tokens / hidden.nonzeros
    return Suggestion(values, overrides, tokens / hidden.weights, per_nonzero, notes)


def laws_of(files: Sequence[str]) -> tuple[list[Law], list[str]]:
    """Return the laws of files that suggest something, and notes about the others.

    Raises:
        UserError: a file holds no law, or one whose form or input its kind does not have; or two laws are about the
            same.
    """
    laws: dict[tuple[str, float | None], tuple[str, Law]] = {}
    notes = []
    for file in files:
        law = Law.load(typed_path(file, "laws"))
        if law.kind not in _FORMS:
            notes.append(f"{file} is a law of the kind {law.kind}, which suggests nothing here.")
            continue
        if not isinstance(law, _FORMS[law.kind]):
            raise UserError(f"{file}: form={law.FORM}: a law of the kind {law.kind} does not have this form")
        if isinstance(law, PowerLaw) and (name := law.inputs[0].name) not in _INPUTS[law.kind]:
            taken = ", ".join(_INPUTS[law.kind])
            raise UserError(f"{file}: inputs[0].name={name}: a law of the kind {law.kind} takes one of {taken}")
        other = laws.setdefault((law.kind, law.sparsity), (file, law))
        if other[1] is not law:
            raise UserError(
                f"laws: {other[0]} and {file} are both of the kind {law.kind} at the same sparsity; give one"
            )
    return [law for _, law in laws.values()], notes


def _at(law: Law, x: float) -> tuple[float, Interval | None]:
    """Return a law's value and its interval; None if that is unknown or so wide that its ends are no numbers.

    Raises:
        UserError: the value is no number above 0.
    """
    value, ends = law(x), law.predict_interval(x)
    if not 0.0 < value < math.inf:
        raise UserError(f"laws: {formula(law)} is {value:g} at {law.inputs[0].name} {x:.4g}, which is no usable number")
    return value, None if ends is None or not 0.0 < ends[0] <= ends[1] < math.inf else ends


def rate_of(config: SuggestConfig, hidden: Hidden) -> Suggested:
    scheme = config.parameterization.scheme
    warnings = [] if scheme != "sp" else ["SP carries no rate from one size to another: tune it at this size."]
    return Suggested(
        "learning rate",
        config.optimizer.lr,
        f"the base rate, to be tuned at the base size; {scheme} makes it {hidden.lr:.4g} for the hidden matrices",
        "optimizer.lr",
        "configuration",
        warnings=warnings,
    )


def _curve(config: SuggestConfig) -> Suggested:
    name = config.schedule.name if config.schedule.segments is None else "segments"
    if name == "linear_to_zero":
        return Suggested("schedule", name, "the default", "Straight to Zero, arXiv 2502.15938", "published")
    return Suggested("schedule", name, "as configured", "schedule", "configuration")


def _steps(steps: int, tokens: int, sequences: int) -> Suggested:
    says = f"{tokens:,} tokens in batches of {sequences} sequences"
    return Suggested("steps", steps, says, "budget", "arithmetic")


def decay_of(
    config: SuggestConfig, laws: Sequence[Law], hidden: Hidden, tokens: int, steps: int
) -> tuple[Suggested, Suggested]:
    """Return the suggested timescale, and the base weight decay that gives it."""
    law, warnings = chosen_law(laws, "tau", config.sparsity.sparsity)
    law = tau_opt if law is None else law
    name = law.inputs[0].name
    per = name.removeprefix("tokens_per_") if name.removeprefix("tokens_per_") in PER else config.per
    if per == "nonzero" and hidden.resizes:
        rule = config.sparsity.evolution.rule
        raise UserError(f"sparsity.evolution.rule={rule} changes the number of nonzeros: a law per nonzero needs one")
    if hidden.peak == 0.0:
        raise UserError("optimizer.schedules.weight_decay and schedule leave no weight decay, so there is no timescale")
    ratio = tokens / hidden.count(per)
    value, ends = _at(law, ratio)
    warnings += _outside(law, ratio, f"{ratio:.4g} tokens per {per}")
    if value > 1.0:
        warnings.append("tau above 1 averages over more than the whole training: the weight decay is effectively off.")
    says = f"{formula(law)} at {ratio:.4g} tokens per {per}"
    origin = "published" if law is tau_opt else "fit"
    tau = Suggested("timescale tau", value, says, law.source, origin, ends, warnings=warnings)
    adjusted = weight_decay_for(value, hidden.lr * hidden.peak, steps)
    base = adjusted / hidden.decay_factor
    decays = None if ends is None else (base * value / ends[1], base * value / ends[0])
    peak = "" if math.isclose(hidden.peak, 1.0) else f" {hidden.peak:.4g}"  # of the schedules
    says = (
        f"1 / (tau lr{peak} steps) = {adjusted:.4g} for the hidden matrices, {hidden.decay_factor:.4g} times the base"
    )
    return tau, Suggested("weight decay", base, says, law.source, origin, decays)


def _batch(config: SuggestConfig, laws: Sequence[Law], tokens: int, text: int | None) -> tuple[Suggested, int]:
    """Return the suggested batch in tokens, and in sequences."""
    law, warnings = chosen_law(laws, "batch", config.sparsity.sparsity)
    law = batch_opt if law is None else law
    value, ends = _at(law, tokens)
    source = law.source
    warnings += _outside(law, tokens, f"{tokens:,} tokens")
    says = f"{formula(law)} at {tokens:,} tokens is {value:.4g}"
    critical, more = chosen_law(laws, "critical", config.sparsity.sparsity)
    most = None
    if critical is not None:
        most, widest, beyond = _critical(critical, tokens)
        warnings += [*more, *beyond]
        says += f"; B_crit {most:.4g} by {critical.source}"
        if value > most:
            warnings.append(f"The best batch is above the critical one, so that is taken: {most:.4g} tokens.")
            value, ends, source = most, widest, critical.source
    unit = config.loop.micro_batch or config.loop.accumulation
    smallest = unit * config.data.context
    sequences = max(1, round(value / smallest)) * unit
    if most is not None:  # rounding must not pass it
        sequences = max(unit, min(sequences, math.floor(most / smallest) * unit))
    batch = sequences * config.data.context
    if smallest > min(1.5 * value, math.inf if most is None else most):
        warnings.append(f"The smallest batch here has {smallest:,} tokens, more than the laws say: {value:.4g}.")
    for limit, what in ((text, "of the text"), (tokens, "of the run")):
        if limit is not None and batch > limit:
            shown = f"{batch:,}" if batch < _READABLE else f"{batch:.4g}"
            raise UserError(
                f"the best batch, {shown} tokens, has more than the {limit:,} tokens {what}: a law does not hold for "
                "so few; give a longer one, or a batch of your own"
            )
    says += f"; {sequences} sequences of {config.data.context} tokens"
    origin = "published" if source is batch_opt.source else "fit"
    return Suggested("batch in tokens", batch, says, source, origin, ends, most, warnings), sequences


def _critical(law: Law, tokens: int) -> tuple[float, Interval | None, list[str]]:
    """Return the critical batch of a training of ``tokens``, its interval, and warnings.

    At ``B = B_crit`` a training reads twice the tokens that it needs, so a law over D_min holds at half of the tokens.
    """
    if isinstance(law, Hyperbola):
        most = law.parameters["b_crit"]
        return most, law.interval(of="b_crit"), _range(law, most, f"a critical batch of {most:.4g} tokens")
    least = tokens / 2.0
    return *_at(law, least), _range(law, least, f"D_min = {least:,.0f} tokens of the critical batch")


def chosen_law(laws: Sequence[Law], kind: str, sparsity: float) -> tuple[Law | None, list[str]]:
    """Return the law of a kind whose sparsity is nearest, with a warning if it is another one."""
    of_kind = [law for law in laws if law.kind == kind]
    if not of_kind:
        near = {"tau": tau_opt, "batch": batch_opt}.get(kind)
        dense = [] if near is None or sparsity == 0.0 else ["The published law was fitted to dense models."]
        return None, dense
    law = min(of_kind, key=lambda law: abs((0.0 if law.sparsity is None else law.sparsity) - sparsity))
    if law.sparsity is not None and abs(law.sparsity - sparsity) > 1e-9:
        return law, [f"The law was fitted at a sparsity of {law.sparsity:g}, and the run has {sparsity:g}."]
    return law, []


def _outside(law: Law, x: float, shown: str) -> list[str]:
    return [*_range(law, x, shown), *([] if law.covariance else ["No interval of the law's values is known."])]


def _range(law: Law, x: float, shown: str) -> list[str]:
    inside = law.inside(x)
    if inside is None:
        return ["The range in which the law was fitted is not known here."]
    if inside:
        return []
    low, high = (law.ranges or ((0.0, 0.0),))[0]
    return [f"{shown} is outside of the range of the fit, {low:.4g} to {high:.4g}: an extrapolation."]
