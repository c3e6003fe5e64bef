"""The configuration of a run: strict sections, checked before anything starts."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError, check_choice, nearest, within
from sparsetrain.models import ModelConfig
from sparsetrain.optim import BudgetConfig, OptimizerConfig, ScheduleConfig
from sparsetrain.parameterization import Parameterization
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import Recorded, settled
from sparsetrain.shapes import INT64, refused
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.sparsity.backends.base import check_backend
from sparsetrain.sparsity.config import STATIC
from sparsetrain.training.noise_scale import NOISE_SCALE, NOISE_SCALE_ALL, OBSERVERS
from sparsetrain.training.state import DEVICES, LoopConfig

T = TypeVar("T")

PATHS = (("data", "path"), ("data", "tokenizer_path"), ("task", "path"))
RUNS = ("init_from", "run_dir", "runs_dir")  # paths of runs

TRAINABLE = ("prompt", "both")
FINETUNE_MODES = ("dense", "sparse")
PROMPT_INITS = ("words", "random")


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
        device: auto, cpu or cuda.
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
    observe: Any = None  # a name, or a list of names
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
    """Train on text, from scratch or from the weights of ``init_from``."""


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
            for name in ("context", "density"):
                if getattr(phase, name) is not None:
                    raise UserError(
                        f"budget.phases[{index}].{name}={getattr(phase, name)}: the phases of a task may differ only "
                        "in batch_size and schedule"
                    )


@dataclass
class PromptConfig(FinetuneConfig):
    """Learn a soft prompt for a labelled task.

    Args:
        n_tokens: number of learned vectors between source and answer.
        init: ``words`` copies the embeddings of ``words``, repeated or cut to ``n_tokens``; ``random`` draws them.
        words: the text for ``init=words``.
        train: ``prompt`` freezes the model and its masks; ``both`` also trains the model, in the ``mode`` of
            fine-tuning.
    """

    n_tokens: int = 8
    init: str = "words"
    words: str = "the answer to the question is"
    train: str = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("train", self.train, TRAINABLE)
        check_choice("init", self.init, PROMPT_INITS)
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
    for section, name in PATHS:
        if plain.get(section) and plain[section].get(name) is not None:
            plain[section][name] = os.path.abspath(os.path.expanduser(plain[section][name]))
    return plain


def identify(verb: str, config: RunConfig, origin: Origin, facts: Mapping[str, str | None] | None = None) -> Recorded:
    """Return the record that identifies a run, for its directory; ``facts`` are added to the facts of the origin."""
    return Recorded(verb, type(config), as_plain(config), {**origin.facts, **(facts or {})})


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Return the dataclass ``kind`` from nested plain values.

    Sections are built here, since msgspec ignores unknown keys of a dataclass and cannot choose its class by a value;
    msgspec checks and converts all other values.

    Raises:
        UserError: a key is unknown or missing, or a value is refused; the message names the setting.
    """
    kind, values = settled(kind, values)
    hints, known = _hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known and not hasattr(kind, "settle"):  # a class with `settle` checks its own keys
            raise UserError(f"{path}{key} is no setting{nearest(str(key), known)}")
        arguments[str(key)] = _converted(hints.get(key, Any), value, f"{path}{key}")
    for name, entry in known.items():
        if name not in arguments and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{path}{name} is missing")
    try:
        return kind(**arguments)
    except UserError as error:
        # A section of several places names the first of them, and one that is also used alone only its own field.
        if (usual := getattr(kind, "SECTION", None)) is not None and str(error).startswith(usual):
            raise within(path.removesuffix("."), usual, error) from None
        named = re.match(r"(\w+)=", str(error))
        raise (UserError(f"{path}{error}") if named and named[1] in known else error) from None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _converted(hint: Any, value: Any, place: str) -> Any:
    """Return ``value`` converted to a type hint; ``place`` is the name of the setting.

    Raises:
        UserError: ``value`` does not have the type of the hint.
    """
    for arm in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if is_dataclass(arm):
            assert isinstance(arm, type)
            if isinstance(value, arm):
                return value
            if isinstance(value, Mapping):
                return build(arm, value, f"{place}.")
        elif get_origin(arm) is list and is_dataclass(item := get_args(arm)[0]) and isinstance(value, list | tuple):
            return [_converted(item, inner, f"{place}[{index}]") for index, inner in enumerate(value)]
    bounded = _bounded(hint)
    try:
        return msgspec.convert(value, bounded)
    except msgspec.ValidationError as error:
        raise refused(error, value, bounded, place=place, mapping="a section of settings") from None


@functools.cache
def _bounded(hint: Any) -> Any:
    """Return a type hint whose integers must fit into 64 bits, as numbers of steps and tokens must on disk."""
    if hint is int:
        return Annotated[int, Meta(ge=-INT64, le=INT64)]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_bounded, get_args(hint)))]  # noqa: UP007  # the number of arms is not known here
    if get_origin(hint) is list:
        return list[_bounded(get_args(hint)[0])]  # type: ignore[misc]
    return hint
