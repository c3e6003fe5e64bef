"""The configuration of an evaluation, and what it asks of a trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.data import Corpora, DataConfig
from sparsetrain.data.sources.pairs import MARKS, check_marks
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import ModelConfig
from sparsetrain.models.config import DYNAMIC
from sparsetrain.stages.config import RunConfig, model_config
from sparsetrain.training.probes import KINDS, NEEDLE, PROBES, RETRIEVAL, probes
from sparsetrain.training.state import DEVICES

_STRETCHED = ("alibi", "rope")  # positions with a scale
_USUAL = (0.5, 1.0, 1.25, 2.0, 4.0)  # lengths, over the trained length


@dataclass
class EvaluateConfig:
    """Measure a trained model at several context lengths and on probes; nothing is trained.

    The trained length is ``model.max_context`` of the run, from which ``positions_scale=dynamic`` stretches, or the
    longest context of its phases if the run does not set it.

    Args:
        init_from: the run directory.
        data: the text, whose validation part is read; null takes the run's own. The tokenizer is the run's, and
            ``context`` does not count.
        lengths: tokens that a pass reads before its last target; null takes 1/2, 1, 5/4, 2 and 4 times the trained
            length, as far as the text and learned positions reach. The trained length is always added.
        scales: factors of the positions of ALiBi or RoPE, each a number of at least 1 or ``dynamic``; null takes the
            run's own and, where positions have a scale, ``dynamic``.
        width: targets at the end of each pass.
        blocks: largest number of passes of each length.
        probes: kinds of probes: ``retrieval`` (the value of a key in a list), ``needle`` (a number in filler), and
            ``title`` (the own title of a document among four, for texts with titles).
        sizes: bytes of a probe with its answer; null takes, for each kind, the largest power of two that fits into the
            trained length, and twice that. Beyond the trained length a kind is asked only if at least half of its
            probes within it are answered rightly.
        n_probes: number of probes of each kind and size; of titles, at most the held-out documents that fit.
        marks: letters of a key, and digits of a value, in ``retrieval``.
        seed: seed of the probes.
        run_dir: directory of the results; null for a directory below ``runs_dir`` that is named by the configuration.
        runs_dir: the parent of unnamed directories.
        device: where to compute; auto takes a GPU if there is one.
        threads: threads of torch on the CPU; null leaves torch's choice.
        force: start even if the estimated memory is not available; ``--force`` sets it.

    Raises:
        UserError: a setting is out of range.
    """

    init_from: str | None = None
    data: DataConfig | None = None
    lengths: Any = field(default=None, metadata={"type": "list of integers, or null"})
    scales: Any = field(default=None, metadata={"type": "list of numbers and dynamic, or null"})
    width: int = 32
    blocks: int = 64
    probes: list[str] = field(default_factory=lambda: [RETRIEVAL, NEEDLE])
    sizes: Any = field(default=None, metadata={"type": "list of integers, or null"})
    n_probes: int = 200
    marks: int = MARKS
    seed: int = 0
    run_dir: str | None = None
    runs_dir: str = "runs"
    device: str = "auto"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        for name in ("width", "blocks", "n_probes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads} must be at least 1")
        check_marks(self.marks)
        for name in ("lengths", "sizes"):
            _check_counts(name, getattr(self, name))
        for length in self.lengths or []:
            if length < self.width:
                raise UserError(f"lengths: {length} is shorter than width={self.width}, the targets of a pass")
        if not isinstance(self.scales, list | tuple | None) or (self.scales is not None and not self.scales):
            raise UserError(f"scales={self.scales} must be a list of factors, such as [1, {DYNAMIC}]")
        for scale in self.scales or []:
            number = isinstance(scale, int | float) and not isinstance(scale, bool) and 1.0 <= scale < math.inf
            if scale != DYNAMIC and not number:
                raise UserError(f"scales: {scale} is neither a number of at least 1 nor {DYNAMIC}")
        for kind in self.probes:
            check_choice("probes", kind, KINDS)
            for size in self.sizes or () if kind in PROBES else ():
                try:
                    probes(kind, size, 1, self.seed, self.marks)
                except UserError as error:
                    raise UserError(f"sizes: {kind}: {error}") from None
        for name, listed in (("lengths", self.lengths), ("scales", self.scales), ("probes", self.probes)):
            if listed is not None and len(set(listed)) < len(listed):
                raise UserError(f"{name}={list(listed)} names a value twice")

    def scales_of(self, model: ModelConfig) -> list[float | str]:
        """Return the scales for a model.

        Raises:
            UserError: its positions have no scale.
        """
        own, stretched = model.positions_scale, model.positions in _STRETCHED
        if self.scales is None:
            return list(dict.fromkeys([own, DYNAMIC] if stretched else [own]))
        for scale in self.scales:
            if scale != 1 and not stretched:
                raise UserError(
                    f"scales: {scale} needs positions=alibi or rope; the run has positions={model.positions}"
                )
        return list(self.scales)

    def lengths_of(self, model: ModelConfig, trained: int, texts: dict[str, int] | None) -> list[int]:
        """Return the lengths for a model, in ascending order.

        Args:
            trained: the trained length.
            texts: validation tokens of each corpus; None if they are not known yet.

        Raises:
            UserError: a length is longer than a text or the learned positions, or the trained length below ``width``.
        """
        if trained < self.width:
            raise UserError(f"width={self.width} is more than the trained length of {trained} tokens")
        room = (
            {f"the validation text of {name} with its {tokens} tokens": tokens for name, tokens in texts.items()}
            if (texts is not None)
            else {}
        )
        most = {what: tokens - 1 for what, tokens in room.items()}
        if model.positions == "learned":
            most["the learned positions of the model"] = model.max_context
        if self.lengths is None:
            fitting = [int(trained * share) for share in _USUAL]
            given = [n for n in fitting if n >= self.width and all(n <= limit for limit in most.values())]
        else:
            given = [int(length) for length in self.lengths]
        for length in (*given, trained):
            for what, limit in most.items():
                if length > limit:
                    raise UserError(f"lengths: a pass of {length} tokens is longer than {what}; at most {limit} fit")
        return sorted({*given, trained})


def check_evaluation(
    config: EvaluateConfig, run: RunConfig, corpora: Corpora | None
) -> tuple[list[float | str], list[int]]:
    """Return the scales and the lengths of an evaluation of a run, which need not exist yet.

    Args:
        config: the settings.
        run: those of the run.
        corpora: the text; None if it is not known yet.

    Raises:
        UserError: a scale or a length does not fit the model or the text.
    """
    shape = model_config(run.model, 1 if corpora is None else corpora.tokenizer.vocab_size)
    texts = None if corpora is None else {name: len(corpus.validation) for name, corpus in corpora.items()}
    return config.scales_of(shape), config.lengths_of(shape, trained_length(run), texts)


def trained_length(run: RunConfig) -> int:
    """Return the tokens in the longest training sequence of a run: its ``max_context``, else its longest context."""
    given = run.model.get("max_context")
    return int(given) if given is not None else max(_contexts(run))


def last_context(run: RunConfig) -> int:
    """Return the context of the last phase of a run, at which its loss was measured."""
    phases = run.budget.phases
    own = phases[-1].context if phases else None
    return run.data.context if own is None else own


def scale_name(scale: float | str) -> str:
    """Return a scale as tables name it."""
    return scale if isinstance(scale, str) else f"{scale:g}"


def _contexts(run: RunConfig) -> Sequence[int]:
    return list(run.budget.named("context", "data.context", run.data.context).values())


def _check_counts(name: str, given: Any) -> None:
    if given is None:
        return
    whole = isinstance(given, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    if not whole or not given or min(given) < 1:
        raise UserError(f"{name}={given} must be a list of positive whole numbers")
