"""The memory check: estimate, before anything is built, whether a workload fits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from sparsetrain.cost.available import Available, available_memory
from sparsetrain.cost.fitting import what_fits
from sparsetrain.cost.footprint import Footprint, Part, Workload
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig
from sparsetrain.report.text import byte_size
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.stages.config import RunConfig, model_config
from sparsetrain.training.state import resolve_device, resolve_precision

_log = logging.getLogger(__name__)

Fitting = Callable[[int], list[str]]
"""Returns the settings that would fit into a number of bytes."""

_SCALE = 1 << 100  # largest size to print: a configuration can ask for integers of any length


def training_workload(
    config: RunConfig,
    model: ModelConfig,
    sparsity: SparsityConfig | None,
    *,
    batch_size: int,
    context: int,
    evaluated: int = 0,
    cached: int = 0,
    trained: bool = True,
    whole_logits: bool = False,
    prompt_tokens: int = 0,
) -> Workload:
    """Return the workload of a training; see `sparsetrain.cost.footprint.Workload` for the other arguments.

    Args:
        sparsity: which layers are sparse; None for a dense model.
        batch_size: sequences per step.
        context: tokens per sequence.
        evaluated: sequences per evaluation batch, at most.
    """
    optimizer = config.optimizer
    return Workload(
        model,
        sparsity if sparsity is not None and sparsity.is_sparse else None,
        batch_size=batch_size,
        micro_batch=config.loop.micro_batch_of(batch_size),
        context=context,
        evaluated=evaluated,
        cached=cached,
        moments=2 if optimizer.name == "adamw" else int(optimizer.momentum > 0),
        trained=trained,
        half=resolve_precision(config.loop.precision, resolve_device(config.device))[0] is not None,
        whole_logits=whole_logits,
        prompt_tokens=prompt_tokens,
    )


def adjustable(config: RunConfig, prefix: str = "", **more: str) -> dict[str, str]:
    """Return the settings of a training that could be reduced, by their names in `what_fits`, with their keys.

    A run that starts from another run has its model, so only the batch and the context can be reduced.

    Args:
        prefix: prefix of the keys of ``budget`` and ``loop``, for a stage of a pipeline.
        more: further settings.
    """
    known = {
        "batch_size": f"{prefix}budget.batch_size",
        "accumulation": f"{prefix}loop.accumulation",
        "context": "data.context",
    }
    if config.loop.micro_batch is not None:  # neither of these changes what is in memory at a time
        del known["batch_size"], known["accumulation"]
    if config.init_from is None:
        vocabulary = "data.vocab_size" if config.model.get("vocab_size") is None else "model.vocab_size"
        known |= {"d_model": "model.d_model", "n_layers": "model.n_layers", "vocab_size": vocabulary}
        if model_config(config.model, 1).positions == "learned":
            known["max_context"] = "model.max_context"
    return known | more


def check_memory(
    workload: Workload, what: str, knobs: Mapping[str, str], device: torch.device | None = None, force: bool = False
) -> None:
    """Raise `UserError` if a workload certainly does not fit into memory.

    If it may just fit, or is forced, log a warning instead.

    Args:
        what: the workload in words, with the settings that determine its size, for the message.
        knobs: settings that could be reduced, as in `what_fits`.
        device: the device of the training; None for the CPU.
        force: only warn.

    Raises:
        UserError: its smallest footprint exceeds the memory of the device; or its weights alone exceed the memory of
            the CPU, where every model is built.
    """
    footprint = workload.footprint()
    places = [(footprint, None)] if device is None or device.type == "cpu" else []
    if not places:
        built = Workload(workload.model, workload.sparsity).footprint()
        places = [(built, None), (footprint, device)]  # type: ignore[list-item]
    for needed, place in places:
        check_footprint(needed, what, force, place, lambda size: what_fits(workload, size, knobs))


def memory_fits(workload: Workload, device: torch.device) -> bool:
    """Return whether `check_memory` accepts a workload."""
    on_device = device if device.type != "cpu" else None
    built = Workload(workload.model, workload.sparsity).footprint().least <= available_memory().bytes
    return built and workload.footprint().least <= available_memory(on_device).bytes


def check_footprint(
    needed: Footprint, what: str, force: bool, device: torch.device | None = None, fitting: Fitting | None = None
) -> None:
    """Raise `UserError` if a footprint is certainly too large, as `check_memory` does for a workload.

    Args:
        fitting: returns the settings that would fit into a number of bytes, for the message.
    """
    there = available_memory(device)
    if needed.likely > there.bytes:
        gc.collect()  # free the tensors of an earlier run in this process
        if device is not None:
            torch.cuda.empty_cache()
        there = available_memory(device)
    if needed.likely <= there.bytes:
        return
    line = describe(needed, what, there)
    if needed.least > there.bytes and not force:
        found = fitting(there.bytes) if fitting is not None else []
        advice = f"; {' or '.join(found)} would fit" if found else ""
        raise UserError(f"{line}{advice}; --force runs it anyway")
    _log.warning("%s", line)


def describe(needed: Footprint, what: str, there: Available) -> str:
    """Return the estimate, its largest component and the available memory, as a clause."""
    main = needed.main
    return (
        f"{what} needs about {_shown(max(needed.likely, needed.least))} of memory, "
        f"{_shown(main.likely)} of it for {main.name}; {_shown(there.bytes)} are {there.limit}"
    )


def _shown(size: int) -> str:
    return byte_size(float(min(size, _SCALE)))


def footprint_of(least: Mapping[str, int]) -> Footprint:
    """Return the footprint of tensors that exist at the same time, from their bytes by purpose."""
    return Footprint(tuple(Part(name, size, size) for name, size in least.items()), sum(least.values()))


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn a failed allocation into a `UserError`: the run may be forced, or the memory used meanwhile."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).split("\n")[0]
        words = ("can't allocate memory", "not enough memory", "out of memory", "size calculation overflowed")
        if not isinstance(error, MemoryError) and not any(word in text.lower() for word in words):
            raise
        raise UserError(f"{what} ran out of memory: {text or 'an allocation failed'}") from None
