"""Text generation with a trained run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparsetrain.cost.footprint import Workload
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import SoftPrompt, Transformer
from sparsetrain.models.config import ROPE_SCALINGS
from sparsetrain.runs.layout import CONFIG, TOKENIZER, stage_directories
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.runs.quantized import is_quantized, load_quantized
from sparsetrain.runs.recorded import Recorded, entries, read_recorded
from sparsetrain.runs.weights import read_weights
from sparsetrain.settings import build
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.stages.config import RunConfig, model_config
from sparsetrain.stages.memory import check_memory, memory_errors
from sparsetrain.stages.stage import restored_model
from sparsetrain.stages.task_form import cued, run_form
from sparsetrain.training.state import DEVICES, resolve_device

MODEL_SECTIONS = ("model", "sparsity", "parameterization", "seed")
"""The settings of a run that its model depends on."""
_SHOWN = 8  # most runs of a pipeline in an error


@dataclass
class Adjusted:
    """Settings of a model that may differ from those it was trained with; null keeps the run's.

    Args:
        positions_scale: factor of the positions, or ``dynamic``, for more tokens than the run was trained with.
        rope_scaling: what RoPE does with the factor: ``linear``, ``ntk`` or ``yarn``.
    """

    positions_scale: float | str | None = None
    rope_scaling: str | None = None

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            check_choice("rope_scaling", self.rope_scaling, ROPE_SCALINGS)


@dataclass
class GenerateConfig:
    """Continue a text with the model of a run.

    Args:
        init_from: the run directory, or a directory that ``sparsetrain quantize`` wrote.
        model: settings of its model that may be changed.
        prompt: the text to continue; for a run on a task, the text that its template asks about.
        cue: put the prompt into the template of the run's task, if it has one, so that the answer is generated.
        columns: for a task whose template has several columns, the texts of the others, ``{question: ...}``.
        max_new_tokens: maximum number of new tokens; generation also ends at the end-of-text token.
        temperature: sampling temperature; 0 takes the most likely token.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least this.
        soft_prompt: use the run's soft prompt, if it has one: after the text, or before it if it was trained there.
        seed: seed of the sampling.
        device: where to compute: auto takes a GPU if there is one.
        force: run even if the estimated memory exceeds the free memory; the option ``--force`` sets it.
    """

    init_from: str | None = None
    model: Adjusted = field(default_factory=Adjusted)
    prompt: str = ""
    cue: bool = True
    columns: dict[str, str] | None = None
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    soft_prompt: bool = True
    seed: int = 0
    device: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        if self.init_from is None:
            raise UserError("init_from is missing: the run directory to generate from, init_from=RUN_DIR")


def run_config(directory: Path) -> RunConfig:
    """Return the settings of a run that runs of all kinds have in common.

    Raises:
        UserError: the directory holds no run, or an evaluation.
    """
    recorded = _recorded(directory)
    config = build(
        RunConfig, {key: recorded.values[key] for key in RunConfig.__dataclass_fields__ & recorded.values.keys()}
    )
    if recorded.kind == "adapt":  # its settings say how its tokenizer was made, and its directory has it
        config.data = replace(config.data, tokenizer_path=str(directory / TOKENIZER))
    return config


def model_settings(directory: Path) -> RunConfig:
    """Return the settings of a run that its model depends on, with the others at their defaults.

    A plugin that the run was trained with, such as a source of text, is therefore not needed to use the model.

    Raises:
        UserError: as `run_config`.
    """
    values = _recorded(directory).values
    _check_sections(directory, values)
    found = {key: values[key] for key in MODEL_SECTIONS if key in values}
    if isinstance(found.get("sparsity"), Mapping):
        found["sparsity"] = {key: value for key, value in found["sparsity"].items() if key != "evolution"}
    return build(RunConfig, found)


def _check_sections(directory: Path, values: Mapping[str, Any]) -> None:
    """Raise `UserError` if a section of settings is none: the file is damaged, whether or not the model needs it."""
    for name, entry in entries(RunConfig).items():
        if entry.section is not None and not isinstance(values.get(name, {}), Mapping):
            raise UserError(f"{directory / CONFIG}: {name}={values[name]!r:.60} must be a section of settings")
    evolution = values.get("sparsity", {}).get("evolution", {})
    if not isinstance(evolution, Mapping):
        raise UserError(f"{directory / CONFIG}: sparsity.evolution={evolution!r:.60} must be a section of settings")


def _recorded(directory: Path) -> Recorded:
    if not (directory / CONFIG).exists() and (found := stage_directories(directory)):
        names = ", ".join(str(path.relative_to(directory)) for path in found[:_SHOWN])
        raise UserError(f"{directory} is a pipeline, which has several models; give one of its runs: {names}")
    recorded = read_recorded(directory, RunConfig)
    if recorded.kind == "evaluate":
        measured = recorded.values.get("init_from")
        raise UserError(
            f"{directory} is an evaluation, which has no weights; give the run that it measured, {measured}"
        )
    return recorded


def adjusted(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return settings whose model has the ``changes`` that are not None.

    Raises:
        UserError: the model refuses one.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(config, model={**config.model, **changes}) if changes else config


def load_run(
    directory: Path, device: torch.device, changes: Mapping[str, Any] | None = None
) -> tuple[Transformer, SoftPrompt | None]:
    """Return the model of a run, with the sparse layers of its checkpoint, and its soft prompt or None.

    Args:
        changes: fields of `Adjusted` to change in the model; None, and a field that is None, keep the run's.

    Raises:
        UserError: there is no such run, or its model refuses a change.
    """
    config = adjusted(model_settings(directory), changes or {})
    weights = read_weights(directory)
    prompt = None
    if weights.prompt is not None:
        front = read_recorded(directory, RunConfig).values.get("position") == "front"
        prompt = SoftPrompt.from_embeddings(weights.prompt, front=front).to(device)
    model = restored_model(config, weights, run_tokenizer(directory).vocab_size, device, directory)
    return model.eval(), prompt


def generate(config: GenerateConfig) -> str:
    """Return the prompt, in the template of the run's task if it has one, followed by its continuation.

    Raises:
        UserError: there is no such run, a setting is out of range, or the template needs other columns.
    """
    assert config.init_from is not None
    directory = Path(config.init_from)
    device = resolve_device(config.device)
    changes = {name: value for name, value in asdict(config.model).items() if value is not None}
    quantized = load_quantized(directory) if is_quantized(directory) else None
    if quantized is None:
        saved, tokenizer = adjusted(model_settings(directory), changes), run_tokenizer(directory)
        shape, sparsity = model_config(saved.model, tokenizer.vocab_size), saved.sparsity
    else:
        # It holds less than the dense model that is counted here.
        quantized.config = replace(quantized.config, **changes)
        tokenizer, shape, sparsity = run_tokenizer(directory), quantized.config, SparsityConfig()
    ids = tokenizer.encode(_asked(config, directory)) or [tokenizer.eos_id]
    length = len(ids) + max(0, config.max_new_tokens)
    plan = sparsity if sparsity.is_sparse else None
    workload = Workload(shape, plan, evaluated=1, context=len(ids), cached=length)
    what = f"generation with max_new_tokens={config.max_new_tokens} behind {len(ids)} tokens"
    check_memory(workload, what, {"cached": "prompt and max_new_tokens together"}, device, config.force)
    with memory_errors("this generation"):
        model, prompt = load_run(directory, device, changes) if quantized is None else (quantized.to(device), None)
        tokens = model.generate(
            torch.tensor([ids], device=device),
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            stop_token=tokenizer.eos_id,
            generator=torch.Generator(device).manual_seed(config.seed),
            prompt=prompt if config.soft_prompt else None,
        )
    return tokenizer.decode(tokens[0].tolist())


def _asked(config: GenerateConfig, directory: Path) -> str:
    form = run_form(directory) if config.cue else None
    if form is not None:
        return cued(form, config.prompt, config.columns or {})
    if config.columns:
        why = "cue=false" if not config.cue else f"{directory} has no task"
        raise UserError(f"columns={config.columns}: {why}, so that there is no template to put them into")
    return config.prompt
