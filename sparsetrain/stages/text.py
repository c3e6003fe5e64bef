"""The text of a run as streams of samples: one corpus, or a mixture of several whose weights follow the phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsetrain.data import Corpora, Mixture, PackedSamples, Samples
from sparsetrain.errors import UserError
from sparsetrain.optim import Budget
from sparsetrain.stages.config import RunConfig

KIND = "pretrain"  # samples are drawn from streams of this name
_BEGINNING = 24  # tokens


@dataclass(frozen=True)
class Reading:
    """What a phase, or a whole run, reads of a corpus.

    Args:
        tokens: tokens of its samples.
        epochs: passes over its training text.
    """

    tokens: int
    epochs: float


@dataclass(frozen=True)
class FirstDocument:
    """Where a sample begins: its corpus, the id of the document there, and its first tokens as text."""

    corpus: str
    document: str
    beginning: str


class Text:
    """The samples of a run.

    Args:
        corpora: the text.
        config: the settings of the run.

    Raises:
        UserError: the text is shorter than a context; see `PackedSamples`.
    """

    def __init__(self, corpora: Corpora, config: RunConfig) -> None:
        self.corpora, self._config = corpora, config

    def samples_per_epoch(self, context: int) -> int:
        """Return the samples of one pass over the text; several corpora count together."""
        return sum(self._packed(name, 0, context).samples_per_epoch for name in self.corpora)

    def streams(self, budget: Budget) -> list[Samples]:
        """Return the samples of each stream of a budget."""
        return [self._stream(budget, stream, context) for stream, context in enumerate(budget.contexts)]

    def _packed(self, name: str, stream: int, context: int) -> PackedSamples:
        # A run without phases has one stream, and it must keep its name: samples are drawn from it.
        phase = KIND if stream == 0 else f"{KIND}-{stream}"
        if len(self.corpora) > 1:
            phase = f"{phase}/{name}"
        tokens = len(self.corpora[name].train)
        if tokens <= context:
            where = f"data.sources.{name}: " if len(self.corpora) > 1 else ""
            raise UserError(
                f"{where}the training text holds {tokens} tokens, fewer than context + 1 = {context + 1}; use a "
                "smaller data.context (or budget.phases[].context) or more text"
            )
        return PackedSamples(self.corpora[name].train, context, self._config.samples_seed, phase)

    def _stream(self, budget: Budget, stream: int, context: int) -> Samples:
        packed = {name: self._packed(name, stream, context) for name in self.corpora}
        if len(packed) == 1:
            return next(iter(packed.values()))
        changes: list[tuple[int, Mapping[str, float]]] = []
        for phase in budget.phases:
            weights = self.weights(phase.index)
            if phase.stream == stream and (not changes or changes[-1][1] != weights):
                changes.append((phase.first_sample, weights))
        (_, first), *later = changes
        return Mixture(packed, first, self._config.samples_seed, f"{KIND}-{stream}", later)

    def weights(self, phase: int) -> Mapping[str, float]:
        """Return the weights of the corpora in a phase: its own, those of the run, or the tokens of the corpora."""
        phases, given = self._config.budget.phases, self._config.data.mixture
        if phases is not None and phases[phase].mixture is not None:
            given = phases[phase].mixture
        return dict(self.corpora.train_tokens) if given is None else given

    def read(self, budget: Budget) -> list[dict[str, Reading]]:
        """Return what each phase of a budget reads of each corpus; parts of a phase count on their own."""
        found = []
        streams = self.streams(budget)
        for phase in budget.phases:
            samples, end = streams[phase.stream], phase.first_sample + phase.steps * phase.batch_size
            if isinstance(samples, Mixture):
                before = samples.shares(phase.first_sample)
                counts = {name: count - before[name] for name, count in samples.shares(end).items()}
            else:
                counts = {next(iter(self.corpora)): end - phase.first_sample}
            found.append(
                {
                    name: Reading(
                        count * phase.context,
                        count / self._packed(name, phase.stream, phase.context).samples_per_epoch,
                    )
                    for name, count in counts.items()
                }
            )
        return found

    def check(self, budget: Budget) -> None:
        """Check how much a run reads of each corpus.

        Raises:
            UserError: the text is shorter than a context, or a corpus is read more often than ``max_epochs`` allows.
        """
        self.streams(budget)
        if not self._config.data.sources:
            return
        for name, reading in total(self.read(budget)).items():
            most = self._config.data.sources[name].max_epochs
            if most is not None and reading.epochs > most * (1.0 + 1e-9):
                raise UserError(
                    f"data.sources.{name}.max_epochs={most:g}: the run would read {name} {reading.epochs:.3g} times "
                    f"({reading.tokens:,} tokens, and it has {len(self.corpora[name].train):,}): give it a smaller "
                    "weight, the run fewer tokens, or raise max_epochs"
                )

    def first_documents(self, budget: Budget, step: int) -> list[FirstDocument]:
        """Return where each sample of the step after ``step`` steps begins.

        Raises:
            UserError: the run has fewer steps.
        """
        if not 0 <= step < budget.total_steps:
            raise UserError(f"step={step} must be at least 0 and below {budget.total_steps}, the steps of the run")
        stream, first = budget.samples_at(step)
        samples, count = self.streams(budget)[stream], budget.at(step).batch_size
        name = next(iter(self.corpora))
        places = [(name, number) for number in range(first, first + count)]
        if isinstance(samples, Mixture):
            places = [(place.name, place.number) for place in samples.places(first, count)]
        packed = {name: self._packed(name, stream, budget.at(step).context) for name in self.corpora}
        found = []
        for name, number in places:
            corpus, start = self.corpora[name], packed[name].start(number)
            beginning = corpus.train.window(start, min(_BEGINNING, budget.at(step).context))
            # A token may hold a part of a character.
            text = corpus.tokenizer.decode(beginning.tolist()).strip("\N{REPLACEMENT CHARACTER}")
            found.append(FirstDocument(name, corpus.document_at(start), text))
        return found


def total(phases: Sequence[Mapping[str, Reading]]) -> dict[str, Reading]:
    """Return what all phases together read of each corpus."""
    found: dict[str, Reading] = {}
    for phase in phases:
        for name, reading in phase.items():
            before = found.get(name, Reading(0, 0.0))
            found[name] = Reading(before.tokens + reading.tokens, before.epochs + reading.epochs)
    return found
