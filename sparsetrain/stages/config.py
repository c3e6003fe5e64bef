"""The configuration of a run: strict sections, checked before anything starts."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.models import ModelConfig
from sparsetrain.optim import BudgetConfig, OptimizerConfig, ScheduleConfig
from sparsetrain.parameterization import Parameterization
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import Recorded, settled
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.sparsity.backends.base import backend_names
from sparsetrain.training.state import DEVICES, LoopConfig

T = TypeVar("T")

PATHS = (("data", "path"), ("data", "tokenizer_path"), ("task", "path"))
RUNS = ("init_from", "run_dir", "runs_dir")  # paths of runs

TRAINABLE = ("prompt", "both")
FINETUNE_MODES = ("dense", "sparse")
PROMPT_INITS = ("words", "random")


@dataclass
class RunConfig:
    """What every verb that trains has in common.

    Args:
        model: fields of `ModelConfig`; ``vocab_size`` may be null, for the tokenizer's. Its ``sparsity`` fields are
            set by the section ``sparsity``.
        seed: of everything that has no seed of its own. data_seed: of the order of the samples.
        init_from: a run directory whose model, tokenizer and weights to start from.
        run_dir: where the run goes; null for a directory below ``runs_dir`` named by the configuration.
        device: auto, cpu or cuda. threads: of torch on the CPU; null leaves torch's choice.
        draw: number of a point of a random search, from which settings of the form ``${draw:...}`` follow.
        force: go on although the memory that the run needs, as estimated, is not there. ``--force`` says the same.
    """

    model: dict[str, Any] = field(default_factory=dict, metadata={"section": ModelConfig})
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    parameterization: Parameterization = field(default_factory=Parameterization)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
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
    """How long a run is whose budget does not say it."""

    def __post_init__(self) -> None:
        self.budget = self.budget.with_epochs(self.EPOCHS)
        self._check_accumulation()
        check_choice("device", self.device, DEVICES)
        check_choice("sparsity.backend", self.sparsity.backend, backend_names())
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads} must be at least 1")
        if self.model.get("sparsity"):
            raise UserError(f"model.sparsity={self.model['sparsity']}: set sparsity.sparsity instead")
        shape = model_config(self.model, self.model.get("vocab_size") or 1)
        self.parameterization.check_width(shape.d_model, "model.d_model")
        self.parameterization.check_optimizer(self.optimizer.name)

    def _check_accumulation(self) -> None:
        for name, size in self.budget.named("batch_size", "budget.batch_size", self.budget.batch_size).items():
            if size % self.loop.accumulation:
                raise UserError(f"{name}={size} is not divisible by loop.accumulation={self.loop.accumulation}")

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
        mode: ``dense`` turns every sparse layer of ``init_from`` into a dense one whose zeros train; ``sparse`` keeps
            the masks.
    """

    # A smaller step from a fresh optimizer.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(batch_size=16))
    task: TaskConfig = field(default_factory=TaskConfig)
    mode: str = "dense"

    EPOCHS: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, FINETUNE_MODES)
        for index, phase in enumerate(self.budget.phases or []):
            for name in ("context", "density"):
                if getattr(phase, name) is not None:
                    raise UserError(
                        f"budget.phases[{index}].{name}={getattr(phase, name)}: on a task it stays as it is; phases "
                        "may differ in batch_size and schedule"
                    )


@dataclass
class PromptConfig(FinetuneConfig):
    """Learn a soft prompt for a labelled task.

    Args:
        n_tokens: number of learned vectors between source and answer.
        init: ``words`` copies the embeddings of ``words``, repeated or cut to ``n_tokens``; ``random`` draws them.
        train: ``prompt`` freezes the model, masks and all; ``both`` trains it along, in the ``mode`` of fine-tuning.
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
    """Return the `ModelConfig` of a ``model`` section, with the vocabulary of the data and a seed if it names none."""
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

    This is what is saved with a run, so the paths of files are absolute: they must mean the same from elsewhere.
    """
    plain = asdict(config)
    for section, name in PATHS:
        if plain.get(section) and plain[section].get(name) is not None:
            plain[section][name] = os.path.abspath(os.path.expanduser(plain[section][name]))
    return plain


def identify(verb: str, config: RunConfig, origin: Origin, facts: Mapping[str, str | None] | None = None) -> Recorded:
    """Return what identifies a run and is recorded in its directory; ``facts`` are those beside the origin's."""
    return Recorded(verb, type(config), as_plain(config), {**origin.facts, **(facts or {})})


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Return the dataclass ``kind`` from nested plain values.

    Raises:
        UserError: a key that ``kind`` does not have, or a value that it refuses.
    """
    kind, values = settled(kind, values)
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known and not hasattr(kind, "settle"):  # which says itself what it has
            raise UserError(f"{path}{key} is no setting{nearest(str(key), known)}")
        arguments[str(key)] = _convert(hints.get(key, Any), value, f"{path}{key}.")
    for name, entry in known.items():
        if name not in arguments and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{path}{name} is missing")
    return kind(**arguments)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Build what a type hint names a dataclass for, alone, in a list, or optional; leave the rest as it is.

    Raises:
        UserError: a value of another type than the hint's: the line names the setting.
    """
    arms = [hint, *getattr(hint, "__args__", ())]
    items = [item for arm in arms if get_origin(arm) is list for item in get_args(arm)]
    target = next((arm for arm in (*arms, *items) if is_dataclass(arm)), None)
    if value is None and type(None) in arms:
        return None
    if target is None:
        if not _fits(value, hint):
            kind = str(getattr(hint, "__name__", hint)) if get_origin(hint) is None else str(hint)
            raise UserError(f"{path.removesuffix('.')}={reprlib.repr(value)} must be {_KINDS.get(kind, kind)}")
        if float in arms and int not in arms and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return list(value) if isinstance(value, (list, tuple)) else value
    assert isinstance(target, type)
    if target in items:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path.removesuffix('.')}={reprlib.repr(value)} must be a list of sections of settings")
        return [
            item if isinstance(item, target) else _section(target, item, f"{path.removesuffix('.')}[{index}].")
            for index, item in enumerate(value)
        ]
    return _section(target, value, path)


def _section(kind: type[T], value: Any, path: str) -> T:
    if not isinstance(value, Mapping):
        raise UserError(f"{path.removesuffix('.')}={reprlib.repr(value)} must be a section of settings")
    return build(kind, value, path)


_KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; how large a number may be, its section says in better words than a shape would."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, arm) for arm in arguments)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
