"""The work of a run, for `sparsetrain.cost.run_time.predicted`: its steps, and how they are computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sparsetrain.cost.hardware import THIS, Machine, calibrated_path
from sparsetrain.cost.run_flops import RunFlops, Stretch
from sparsetrain.cost.run_time import RunWork, predicted
from sparsetrain.cost.simulate import Estimate
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.new_blocks import added
from sparsetrain.optim.budget import Budget
from sparsetrain.stages.config import AdaptConfig, PromptConfig, RunConfig
from sparsetrain.training.state import resolve_device, resolve_precision

VOCABULARY = ("embed.", "head.")
"""Beginnings of the names of the matrices with a row per token."""


def work_on_text(config: RunConfig, ledger: RunFlops, backends: Collection[str] = ()) -> RunWork:
    """Return the work of a pre-training or an adaptation.

    Args:
        config: its settings.
        ledger: its model, budget, and masks over time.
        backends: of its sparse layers, if they were chosen.
    """
    model, steps = ledger.config, ledger.budget.total_steps
    trained = _adapted(config, model) if isinstance(config, AdaptConfig) else None
    stretches = list(ledger.stretches(0, steps))
    return RunWork(
        model, stretches, grows_by_gradient=ledger.rule.needs_gradient, trained=trained, **_computed(config, backends)
    )


def work_on_task(
    config: RunConfig,
    model: ModelConfig,
    budget: Budget,
    tokens: Sequence[int],
    densities: Mapping[str, float],
    backends: Collection[str] = (),
) -> RunWork:
    """Return the work of a training on a task, whose rows are as long as their text.

    Args:
        config: its settings. model: its model. budget: its phases.
        tokens: tokens of the rows of each phase, with padding and soft prompt. Each row counts as one of mean length.
        densities: of each sparse layer, by name.
        backends: of its sparse layers, if they were chosen.
    """
    micro = config.loop.micro_batch_of
    stretches = []
    for phase, count in zip(budget.phases, tokens, strict=True):
        size = phase.batch_size
        row = max(1, round(count / (phase.steps * size)))
        stretches.append(Stretch(phase.steps, row, size, micro(size), densities))
    prompt, trained = 0, None
    if isinstance(config, PromptConfig):
        prompt, trained = config.n_tokens, () if config.train == "prompt" else None
    return RunWork(model, stretches, trained=trained, prompt_tokens=prompt, **_computed(config, backends))


def _adapted(config: AdaptConfig, model: ModelConfig) -> tuple[str, ...] | None:
    """Return beginnings of the names of parameters that an adaptation trains; None is every one."""
    if config.train == "all":
        return None
    if config.train == "blocks":
        places = added(model.n_layers - config.new_blocks, config.new_blocks)
        return tuple(f"blocks.{place}." for place in places)
    return VOCABULARY


def _computed(config: RunConfig, backends: Collection[str]) -> dict[str, Any]:
    """Return how products are computed, and what of that is not known to the prediction."""
    autocast, _ = resolve_precision(config.loop.precision, resolve_device(config.device))
    backend = next(iter(backends)) if len(set(backends)) == 1 else config.sparsity.backend
    notes = []
    if config.optimizer.name != "adamw":
        notes.append(f"The update of the weights counts as that of AdamW, not of {config.optimizer.name}.")
    if config.observers():
        notes.append(f"What is observed is not counted: {', '.join(config.observers())}.")
    return {
        "dtype": "float32" if autocast is None else str(autocast).removeprefix("torch."),
        "backend": None if backend == "auto" or len(set(backends)) > 1 else backend,
        "threads": config.threads,
        "notes": tuple(notes),
    }


def this_machine() -> Machine | None:
    """Return the machine at hand, or None if it was never calibrated.

    Raises:
        UserError: its file is damaged.
    """
    return Machine.load(THIS) if calibrated_path().is_file() else None


def calibrated_on(machine: Machine) -> str:
    """Return the date of a machine's measurement, as its file has it."""
    return machine.memory[-1].bandwidth.date


def predicted_on(machine: Machine, config: RunConfig, work: RunWork) -> Estimate | None:
    """Return what a run takes on the machine at hand, or None if its calibration does not know.

    It knows runs on the processor, in a dtype and with a backend that it measured.
    """
    try:
        return predicted(work, machine) if resolve_device(config.device).type == "cpu" else None
    except UserError:
        return None


def prediction(config: RunConfig, work: RunWork) -> dict[str, Any]:
    """Return the entry ``predicted`` of a run's result, or nothing if this machine is not calibrated for the run."""
    try:
        machine = this_machine()
    except UserError:  # a training that is done must not fail for a damaged file
        return {}
    found = None if machine is None else predicted_on(machine, config, work)
    if machine is None or found is None:
        return {}
    entry = {"machine": machine.label, "calibrated": calibrated_on(machine), "seconds": found.seconds}
    return {"predicted": {**entry, "band": list(found.band), "notes": list(found.notes)}}
