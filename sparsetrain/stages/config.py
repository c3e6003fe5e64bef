"""The configuration of a run: strict sections, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.models import ModelConfig
from sparsetrain.models.new_rows import DONOR_METHODS, METHODS
from sparsetrain.optim import BudgetConfig, OptimizerConfig, ScheduleConfig
from sparsetrain.parameterization import Parameterization
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import Recorded
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.sparsity.backends.base import check_backend
from sparsetrain.sparsity.config import STATIC
from sparsetrain.training.noise_scale import NOISE_SCALE, NOISE_SCALE_ALL, OBSERVERS
from sparsetrain.training.state import DEVICES, LoopConfig

PATHS = (
    *(("data", "path"), ("data", "tokenizer_path"), ("data", "sources", "*", "path"), ("task", "path")),
    ("vocabulary", "donor"),
)
RUNS = ("init_from", "run_dir", "runs_dir")  # paths of runs


class StageConfig(Protocol):
    """The settings that every stage has, also one that trains nothing."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    seed: int
    init_from: str | None
    run_dir: str | None
    runs_dir: str
    device: str
    threads: int | None
    force: bool


TRAINABLE = ("prompt", "both")
FINETUNE_MODES = ("dense", "sparse")
ADAPTED = ("all", "embeddings", "new_rows", "blocks")
PROMPT_INITS = ("words", "random")
PROMPT_POSITIONS = ("between", "front")


@dataclass
class RunConfig:
    """The settings that every training verb has.

    Args:
        model: fields of `ModelConfig`; a null ``vocab_size`` takes the tokenizer's. ``model.sparsity`` must not be set,
            since the section ``sparsity`` sets it.
        data: the text and the tokenizer.
        sparsity: the masks and their evolution.
        parameterization: scales of initial weights and learning rates over model sizes.
        optimizer: the optimizer.
        schedule: the learning-rate schedule.
        budget: the length, batch size and phases of the run.
        loop: evaluation, checkpoints, precision and other settings of the training loop.
        observe: an observer, such as ``noise_scale``, or a list of observers; they do not change the result, except
            that ``noise_scale_all`` changes the rounding of gradients.
        seed: seed of everything without a seed of its own.
        data_seed: seed of the order of the samples; null takes ``seed``.
        init_from: a run directory, whose model, tokenizer and weights the run starts from.
        run_dir: directory of the run; null for a directory below ``runs_dir`` that is named by the configuration.
        runs_dir: the parent of unnamed run directories.
        device: where to compute; auto takes a GPU if there is one.
        threads: threads of torch on the CPU; null leaves torch's choice.
        draw: number of a point of a random search, which determines settings of the form ``${draw:...}``.
        force: start even if the estimated memory is not available; ``--force`` sets it.
    """

    model: dict[str, Any] = field(default_factory=dict, metadata={"section": ModelConfig})
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    parameterization: Parameterization = field(default_factory=Parameterization)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    observe: Any = field(default=None, metadata={"type": "text, list of texts or null"})
    seed: int = 0
    data_seed: int | None = None
    init_from: str | None = None
    run_dir: str | None = None
    runs_dir: str = "runs"
    device: str = "auto"
    threads: int | None = None
    draw: int | None = None
    force: bool = False

    EPOCHS: ClassVar[float] = 1.0
    """The length of a run whose budget gives none."""

    def __post_init__(self) -> None:
        if self.budget.led is not None and self.budget.open:
            raise UserError("budget.tokens is missing: with budget.batch_size led by gns the length is in tokens")
        self.budget = self.budget.with_epochs(self.EPOCHS)
        self._check_micro_batches()
        for index, phase in enumerate(self.budget.phases or []):
            self.data.check_mixture(f"budget.phases[{index}].mixture", phase.mixture)
        if self.budget.led is not None and self.sparsity.evolution.rule != STATIC:
            raise UserError(
                f"sparsity.evolution.rule={self.sparsity.evolution.rule} acts at fractions of the steps, whose number "
                "is unknown with budget.batch_size led by gns; it takes rule=static"
            )
        check_choice("device", self.device, DEVICES)
        if not isinstance(self.observe, str | list | None):
            raise UserError(f"observe={self.observe} must be the name of an observer, or a list of names")
        for name in self.observers():
            OBSERVERS.check(name)
        if len(set(self.observers())) < len(self.observers()):
            raise UserError(f"observe={self.observe} names an observer twice")
        if {NOISE_SCALE, NOISE_SCALE_ALL} <= set(self.observers()):
            raise UserError(f"observe={self.observe}: {NOISE_SCALE_ALL} measures what {NOISE_SCALE} does; name one")
        if {NOISE_SCALE, NOISE_SCALE_ALL} & set(self.observers()):
            for name, size in self.budget.batch_sizes():
                if size < 2:
                    raise UserError(f"{name}={size} must be at least 2: the noise scale is the difference of examples")
        check_backend(self.sparsity.backend, "sparsity.backend")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads} must be at least 1")
        if self.model.get("sparsity"):
            raise UserError(f"model.sparsity={self.model['sparsity']}: set sparsity.sparsity instead")
        shape = model_config(self.model, self.model.get("vocab_size") or 1)
        self.parameterization.check_width(shape.d_model, "model.d_model")
        self.parameterization.check_optimizer(self.optimizer.name)

    def _check_micro_batches(self) -> None:
        unit, changing = self.loop.micro_batch or self.loop.accumulation, self.budget.changing
        by = f"loop.{'accumulation' if self.loop.micro_batch is None else 'micro_batch'}={unit}"
        for name, size in self.budget.batch_sizes():
            if size % unit:
                hint = "" if changing is None else f"; budget.batch_size.multiple={unit} keeps all sizes divisible"
                raise UserError(f"{name}={size} is not divisible by {by}{hint}")
        if self.budget.led is not None and self.budget.led.multiple % unit:
            raise UserError(f"budget.batch_size.multiple={self.budget.led.multiple} is not divisible by {by}")

    def observers(self) -> list[str]:
        """Return the names of the observers, with the one that a batch size led by the noise scale needs."""
        named = [self.observe] if isinstance(self.observe, str) else list(self.observe or [])
        lead = self.budget.led is not None and not {NOISE_SCALE, NOISE_SCALE_ALL} & set(named)
        return [*named, NOISE_SCALE] if lead else named

    @property
    def samples_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed


@dataclass
class PretrainConfig(RunConfig):
    """Train on text, from scratch or from the weights of ``init_from``.

    A run ``init_from`` with masks keeps them. A dense one becomes sparse before the first step if settings of
    ``sparsity`` are given; ``sparsity.pattern=magnitude`` keeps its largest weights.

    Args:
        reported_share: share of the validation text, by whole documents from its end, that only ``reported_loss`` at
            the end reads. Settings that are chosen by the loss on the rest are then compared on other text.
    """

    reported_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.reported_share < 1.0:
            raise UserError(f"reported_share={self.reported_share} is outside [0, 1)")


@dataclass
class VocabularyConfig:
    """The tokens that an adaptation adds, and the first values of their rows.

    Args:
        n_tokens: tokens that are learned on the training text of ``corpus`` and added; 0 keeps the tokenizer.
        corpus: name of that corpus; null takes the last of ``data.sources``. The text of the others stays split as
            before.
        method: first values of the new rows, see `sparsetrain.extend_embeddings`.
        donor: directory of a run whose tokenizer knows the new tokens; ``similarity``, ``omp`` and ``least_squares``
            need it.
        k: tokens that a row is combined from; null means 10 for ``similarity`` and 64 for ``omp``.
        multiple_of: the number of rows is rounded up to a multiple of this.

    Raises:
        UserError: a number is out of range, the method is unknown, or a donor is missing or not used.
    """

    SECTION: ClassVar[str] = "vocabulary"  # in messages

    n_tokens: int = 0
    corpus: str | None = None
    method: str = "subword_mean"
    donor: str | None = None
    k: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.n_tokens < 0:
            raise UserError(f"vocabulary.n_tokens={self.n_tokens} must be at least 0")
        check_choice("vocabulary.method", self.method, METHODS)
        if self.donor is None and self.method in DONOR_METHODS:
            raise UserError(f"vocabulary.method={self.method} needs vocabulary.donor, the directory of a run")
        if self.donor is not None and self.method not in DONOR_METHODS:
            raise UserError(
                f"vocabulary.donor={self.donor}: method={self.method} uses no donor; these do: "
                f"{', '.join(DONOR_METHODS)}"
            )
        for name, value in (("k", self.k), ("multiple_of", self.multiple_of)):
            if value is not None and value < 1:
                raise UserError(f"vocabulary.{name}={value} must be at least 1")


@dataclass
class AdaptConfig(PretrainConfig):
    """Adapt a trained model to the text of another language (arXiv 2407.12869).

    ``model`` is that of ``init_from``, and so is the tokenizer: ``data.tokenizer`` does not count. A given
    ``data.tokenizer_path`` replaces it: rows of tokens that both have are kept.

    Args:
        vocabulary: the tokens that are added, and the first values of their rows.
        train: ``all``; ``embeddings``, the embedding and an untied head; ``new_rows``, their rows of new tokens; or
            ``blocks``, the new blocks. All but ``all`` keep the masks.
        new_blocks: blocks that are added (LLaMA Pro, arXiv 2401.02415): copies of blocks spread evenly over the depth,
            each behind its original, with output projections of zero, so that the function stays the same at first.
    """

    # Weights that were trained on other text need a smaller learning rate than new ones.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    train: str = "all"
    new_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("train", self.train, ADAPTED)
        names = list(self.data.members())
        if self.vocabulary.corpus is not None:
            check_choice("vocabulary.corpus", self.vocabulary.corpus, names)
        replaced = self.data.tokenizer_path is not None
        if replaced and self.vocabulary.n_tokens:
            raise UserError(
                f"vocabulary.n_tokens={self.vocabulary.n_tokens} cannot be combined with data.tokenizer_path="
                f"{self.data.tokenizer_path}, which replaces the tokenizer"
            )
        if not replaced and not self.vocabulary.n_tokens:
            if self.train == "new_rows":
                raise UserError("train=new_rows needs new tokens: vocabulary.n_tokens=0 adds none")
            if self.vocabulary.donor is not None:
                raise UserError(
                    f"vocabulary.donor={self.vocabulary.donor} is not used: vocabulary.n_tokens=0 adds no token"
                )
        if self.train == "new_rows" and NOISE_SCALE_ALL in self.observers():
            raise UserError(f"observe={self.observe}: {NOISE_SCALE_ALL} measures whole matrices, not train=new_rows")
        layers = model_config(self.model, self.model.get("vocab_size") or 1).n_layers
        if not 0 <= self.new_blocks <= layers:
            raise UserError(f"new_blocks={self.new_blocks} must be at least 0 and at most {layers}, the model's blocks")
        if self.train == "blocks" and not self.new_blocks:
            raise UserError("train=blocks needs new blocks: new_blocks=0 adds none")
        if self.new_blocks and self.parameterization.uses_depth:
            raise UserError(
                f"new_blocks={self.new_blocks} would change what the old blocks compute: parameterization "
                f"{self.parameterization.scheme} multiplies each branch by a power of the depth"
            )

    @property
    def learned_on(self) -> str:
        """The name of the corpus on which tokens are learned."""
        return self.vocabulary.corpus or list(self.data.members())[-1]


@dataclass
class FinetuneConfig(RunConfig):
    """Train on a labelled task.

    Args:
        task: the task.
        mode: ``dense`` makes every sparse layer of ``init_from`` dense and trains its zeros; ``sparse`` keeps its mask.
    """

    # Pre-trained weights need a smaller learning rate than new ones.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(batch_size=16))
    task: TaskConfig = field(default_factory=TaskConfig)
    mode: str = "dense"

    EPOCHS: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, FINETUNE_MODES)
        if self.budget.changing is not None:
            raise UserError("budget.batch_size must be a number in a training on a task; its phases may have their own")
        for index, phase in enumerate(self.budget.phases or []):
            for name in ("context", "density", "mixture"):
                if getattr(phase, name) is not None:
                    raise UserError(
                        f"budget.phases[{index}].{name}={getattr(phase, name)}: the phases of a task may differ only "
                        "in batch_size and schedule"
                    )


@dataclass
class PromptConfig(FinetuneConfig):
    """Learn a soft prompt for a labelled task.

    Args:
        n_tokens: number of learned vectors.
        position: ``between`` source and answer, or in ``front`` of the source, as in peft.
        init: ``words`` copies the embeddings of ``words``, repeated or cut to ``n_tokens``; ``random`` draws them.
        words: the text for ``init=words``.
        train: ``prompt`` freezes the model and its masks; ``both`` also trains the model, in the ``mode`` of
            fine-tuning.
    """

    n_tokens: int = 8
    position: str = "between"
    init: str = "words"
    words: str = "the answer to the question is"
    train: str = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("train", self.train, TRAINABLE)
        check_choice("init", self.init, PROMPT_INITS)
        check_choice("position", self.position, PROMPT_POSITIONS)
        if self.n_tokens < 1:
            raise UserError(f"n_tokens={self.n_tokens} must be at least 1")
        if self.init == "words" and not self.words.strip():
            raise UserError(f"words={self.words!r} is empty; init=words needs some")


def model_config(section: Mapping[str, Any], vocab_size: int, seed: int | None = None) -> ModelConfig:
    """Return the `ModelConfig` of a ``model`` section; ``vocab_size`` and ``seed`` fill in missing fields.

    Raises:
        UserError: a field is unknown, missing or invalid, or the vocabulary is smaller than ``vocab_size``.
    """
    known = {f.name for f in fields(ModelConfig)}
    for key in section:
        if key not in known:
            raise UserError(f"model.{key} is no field of a model{nearest(key, known)}")
    values = {key: value for key, value in section.items() if value is not None}
    given = values.get("vocab_size")
    if given is not None and given < vocab_size:
        raise UserError(f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size}")
    values["vocab_size"] = given or vocab_size
    if seed is not None:
        values.setdefault("seed", seed)
    for name in ("d_model", "n_layers", "n_heads"):
        if name not in values:
            raise UserError(f"model.{name} is missing; choose a preset (model=demo) or set it")
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"model: {error}") from None


def as_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values, in the order of its fields.

    A run saves it, so the paths of files are made absolute: they must stay valid in another working directory.
    """
    plain = asdict(config)
    for section, name, _ in paths_in(plain, PATHS):
        section[name] = os.path.abspath(os.path.expanduser(section[name]))
    return plain


def paths_in(values: Mapping[str, Any], places: Iterable[Sequence[str]]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield the paths in nested plain values: the section that holds one, its key there, and its dotted name.

    Args:
        places: names of sections and of the path; ``*`` is every section.
    """
    for place in places:
        found: list[tuple[Any, tuple[str, ...]]] = [(values, ())]
        for part in place[:-1]:
            inner = [(section, names) for section, names in found if isinstance(section, Mapping)]
            found = [
                (section[key], (*names, str(key)))
                for section, names in inner
                for key in (section if part == "*" else [part])
                if key in section
            ]
        for section, names in found:
            if isinstance(section, dict) and section.get(place[-1]) is not None:
                yield section, place[-1], ".".join((*names, place[-1]))


def identify(verb: str, config: StageConfig, origin: Origin, facts: Mapping[str, str | None] | None = None) -> Recorded:
    """Return the record that identifies a run, for its directory; ``facts`` are added to the facts of the origin."""
    return Recorded(verb, type(config), as_plain(config), {**origin.facts, **(facts or {})})
