"""The configuration of a run: strict sections, checked before anything starts, and what identifies a run."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.models import ModelConfig
from sparsetrain.optim import OptimizerConfig, ScheduleConfig
from sparsetrain.parameterization import Parameterization
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.sparsity.ops import backend_names
from sparsetrain.sparsity.spec import check_sparsity
from sparsetrain.training.state import DEVICES, LoopConfig

T = TypeVar("T")

# What does not change the result, and so does not make another run of it.
# What a run starts from counts by its content, `run.source_key`, not by its path.
INCIDENTAL = (
    *("init_from", "run_dir", "runs_dir", "device", "threads", "draw", "force"),
    *("log_every", "checkpoint_every", "keep_last"),
)

# Settings that came after runs had been made. At these values they say what a run without them did, and so are not part
# of what identifies it.
LATER: dict[str, Any] = {"sparsity.evolution.grown_moments": "zero"}

PATHS = (("data", "path"), ("data", "tokenizer_path"), ("task", "path"))
RUNS = ("init_from", "run_dir", "runs_dir")  # paths of runs

TRAINABLE = ("prompt", "both")
PROMPT_STARTS = ("pretrain", "finetune")
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

    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    parameterization: Parameterization = field(default_factory=Parameterization)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stage: LoopConfig = field(default_factory=LoopConfig)
    seed: int = 0
    data_seed: int | None = None
    init_from: str | None = None
    run_dir: str | None = None
    runs_dir: str = "runs"
    device: str = "auto"
    threads: int | None = None
    draw: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
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

    task: TaskConfig = field(default_factory=TaskConfig)
    mode: str = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, FINETUNE_MODES)


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
        _check_prompt(self)


@dataclass
class FinetuneSection:
    """Fine-tuning inside a pipeline."""

    mode: str = "dense"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stage: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_choice("pipeline.finetune.mode", self.mode, FINETUNE_MODES)


@dataclass
class PromptSection:
    """The soft prompt inside a pipeline; ``start`` names the stage whose model it starts from."""

    start: str = "pretrain"
    n_tokens: int = 8
    init: str = "words"
    words: str = "the answer to the question is"
    train: str = "both"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stage: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_choice("pipeline.prompt.start", self.start, PROMPT_STARTS)
        _check_prompt(self, "pipeline.prompt.")


def _check_prompt(settings: PromptConfig | PromptSection, path: str = "") -> None:
    check_choice(f"{path}train", settings.train, TRAINABLE)
    check_choice(f"{path}init", settings.init, PROMPT_INITS)
    if settings.n_tokens < 1:
        raise UserError(f"{path}n_tokens={settings.n_tokens} must be at least 1")
    if settings.init == "words" and not settings.words.strip():
        raise UserError(f"{path}words={settings.words!r} is empty; init=words needs some")


@dataclass
class PipelineSection:
    """Which arms and stages a pipeline has.

    Args:
        sparsities: one arm each; null for a dense arm and one of ``sparsity.sparsity``.
        finetune, prompt: settings of the two stages; null leaves the prompt out.
        scratch: also fine-tune a dense model from scratch, as the control.
    """

    sparsities: list[float] | None = None
    finetune: FinetuneSection = field(default_factory=FinetuneSection)
    prompt: PromptSection | None = field(default_factory=PromptSection)
    scratch: bool = True


@dataclass
class PipelineConfig(RunConfig):
    """Pre-train, fine-tune and soft-prompt at several sparsities, and report what that cost and saved.

    The sections at the top (``optimizer``, ``schedule``, ``stage``) are those of pre-training.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    pipeline: PipelineSection = field(default_factory=PipelineSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is not None:
            raise UserError(f"init_from={self.init_from}: a pipeline pre-trains its own models; use finetune or prompt")
        arms = self.arms
        for sparsity in arms:
            check_sparsity(sparsity, "pipeline.sparsities")
        if not arms or len(set(arms)) != len(arms):
            raise UserError(f"pipeline.sparsities={arms} must name at least one sparsity, and none twice")

    @property
    def arms(self) -> list[float]:
        """The sparsity of each arm."""
        if self.pipeline.sparsities is not None:
            return self.pipeline.sparsities
        return [0.0, self.sparsity.sparsity] if self.sparsity.sparsity > 0 else [0.0]


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


def total_steps(config: RunConfig, samples_per_epoch: int) -> int:
    """Return the number of updates of a run: the schedule's, or as many as ``stage.epochs`` take.

    Raises:
        UserError: the configuration says neither.
    """
    batch = config.stage.batch_size
    if config.schedule.steps is not None or config.schedule.tokens is not None:
        return config.schedule.total_steps(batch * config.data.context)
    if config.stage.flops is not None:
        raise UserError(f"stage.flops={config.stage.flops:g} is the length of a pre-training; set stage.epochs here")
    if config.stage.epochs is None:
        raise UserError("how long to train is open: set schedule.steps, schedule.tokens or stage.epochs")
    return max(1, round(config.stage.epochs * samples_per_epoch / batch))


def as_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values, in the order of its fields.

    This is what is saved with a run, so the paths of files are absolute: they must mean the same from elsewhere.
    """
    plain = asdict(config)
    for section, name in PATHS:
        if plain.get(section) and plain[section].get(name) is not None:
            plain[section][name] = os.path.abspath(os.path.expanduser(plain[section][name]))
    return plain


def fingerprint(config: RunConfig, corpus: str, source: str | None = None) -> str:
    """Return eight hexadecimal digits of what the result depends on: configuration, corpus, weights to start from."""
    content = _essential(as_plain(config))
    content["data"] = {"corpus": corpus, "context": config.data.context, "source": source}
    text = json.dumps([type(config).__name__, content], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _essential(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        return {
            key: _essential(item, f"{path}{key}.")
            for key, item in value.items()
            if key not in INCIDENTAL and not (f"{path}{key}" in LATER and item == LATER[f"{path}{key}"])
        }
    if isinstance(value, list):
        return [_essential(item, path) for item in value]
    return value


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Return ``"field=ours (there: theirs)"`` for every essential field in which two plain configurations differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in INCIDENTAL:
                inner = f"{path}.{key}" if path else key
                otherwise = LATER.get(inner)
                found += differences(ours.get(key, otherwise), theirs.get(key, otherwise), inner)
        return found
    return [] if ours == theirs else [f"{path}={ours} (there: {theirs})"]


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Return the dataclass ``kind`` from nested plain values.

    Raises:
        UserError: a key that ``kind`` does not have, or a value that it refuses.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}{key} is no setting{nearest(str(key), known)}")
        arguments[str(key)] = _convert(hints[key], value, f"{path}{key}.")
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
    target = next((arm for arm in arms if is_dataclass(arm)), None)
    if value is None and type(None) in arms:
        return None
    if target is None:
        if not _fits(value, hint):
            kind = str(getattr(hint, "__name__", hint)) if get_origin(hint) is None else str(hint)
            raise UserError(f"{path.removesuffix('.')}={reprlib.repr(value)} must be {_KINDS.get(kind, kind)}")
        return list(value) if isinstance(value, (list, tuple)) else value
    assert isinstance(target, type)
    listed = any(get_origin(arm) is list for arm in arms)
    if listed and isinstance(value, (list, tuple)):
        return [_section(target, item, path) for item in value]
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
