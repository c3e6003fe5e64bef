"""``sparsetrain flops``: FLOPs, bytes and memory of one step, by kind and by module, without building a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetrain.cost.flop_ledger import check_whole, flops
from sparsetrain.cost.flops import hidden_shapes
from sparsetrain.cost.ledger import ATTENTIONS, PHASES, SPARSITIES, Ledger
from sparsetrain.cost.operations import PRODUCTS
from sparsetrain.cost.run_flops import planned_flops, rule_of_length
from sparsetrain.cost.step_memory import StepMemory, step_memory
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import file_errors, typed_path, write_text
from sparsetrain.models import ModelConfig
from sparsetrain.report.text import byte_size
from sparsetrain.runs.quantized import is_quantized, load_quantized
from sparsetrain.sparsity.evolution.managed import allocated_densities
from sparsetrain.stages.config import RunConfig, model_config
from sparsetrain.stages.generate import load_run
from sparsetrain.stages.masks import sparsity_section
from sparsetrain.stages.plan import vocabulary
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.stages.pretrain import budget_of

FORMATS = ("text", "json")
_STEPS = 1000  # of a run whose length is not given, so that a rule has its updates


@dataclass
class FlopsConfig(RunConfig):
    """Count FLOPs, bytes and memory of a step; the settings of a training say of which.

    A step has ``budget.batch_size`` sequences of ``data.context`` tokens; where masks change their density, it is the
    first one. Where ``init_from`` names a run, its own model is counted, with the nonzeros of its checkpoint.

    Args:
        attention: ``full`` counts every query with every key, ``causal`` with the keys up to its own position.
        zeros: ``skipped`` counts nonzeros, ``counted`` counts zeros too.
        phase: ``training``, ``prefill`` or ``decoding``.
        cached: tokens of each sequence in the cache, for ``phase=decoding``, which then reads one more.
        prompt_tokens: learned vectors of a soft prompt, which lengthen the context.
        recomputation: whether every block computes its forward pass again in the backward pass.
        format: ``text`` or ``json``.
        output: a file to write the JSON to.

    Raises:
        UserError: a setting is out of range.
    """

    attention: str = "full"
    zeros: str = "skipped"
    phase: str = "training"
    cached: int = 0
    prompt_tokens: int = 0
    recomputation: bool = False
    format: str = "text"
    output: str | None = None

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("zeros", self.zeros, SPARSITIES)
        check_choice("phase", self.phase, PHASES)
        check_choice("format", self.format, FORMATS)
        for name in ("cached", "prompt_tokens"):
            check_whole(name, getattr(self, name), 0)
        super().__post_init__()


@dataclass(frozen=True)
class Counted:
    """What was counted: the ledger, the memory of a training step, and the steps of each phase of a run."""

    context: int
    batch: int
    ledger: Ledger
    memory: StepMemory | None
    phases: Sequence[tuple[int, int, Ledger]]
    run: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        phases = [{"context": c, "batch_size": b, "total": one.total} for c, b, one in self.phases]
        return {
            "context": self.context,
            "batch_size": self.batch,
            **self.ledger.as_dict(),
            "memory": None if self.memory is None else self.memory.as_dict(),
            "phases": phases,
            "run": self.run,
        }


def count_flops(config: FlopsConfig) -> None:
    """Print what a step takes, as text or JSON.

    Raises:
        UserError: see `counted`, or the file cannot be written.
    """
    found = counted(config)
    text = json.dumps(found.as_dict(), indent=2, allow_nan=False)
    if config.output is not None:
        path = typed_path(config.output, "output")
        with file_errors(path.parent):
            write_text(path, text + "\n")
    if config.format == "json":
        print(text)
        return
    for line in shown(found):
        print(line)
    sys.stdout.flush()


def counted(config: FlopsConfig) -> Counted:
    """Return what a step of a configuration takes.

    Raises:
        UserError: the model or the run is unusable, or a setting does not suit the phase.
    """
    model, densities = _model(config)
    context, batch = config.data.context, max(size for _, size in config.budget.batch_sizes())
    decoding = config.phase == "decoding"

    def of(tokens: int, sequences: int) -> Ledger:
        return flops(
            model,
            1 if decoding else tokens,
            sequences,
            density=densities,
            attention=config.attention,
            sparsity=config.zeros,
            phase=config.phase,
            cached=config.cached,
            prompt_tokens=config.prompt_tokens,
            recomputation=config.recomputation,
        )

    phases = []
    if config.budget.phases is not None and config.phase == "training":
        for phase in config.budget.phases:
            sizes = phase.context or context, phase.batch_size or batch
            phases.append((*sizes, of(*sizes)))
        context, batch = max((sizes for *sizes, _ in phases), key=lambda pair: pair[0] * pair[1])
    memory = None
    if config.phase == "training":
        memory = step_memory(model, context + config.prompt_tokens, batch, density=densities)
    run = None
    shape = model if isinstance(model, ModelConfig) else None
    if shape is not None and config.budget.length in ("tokens", "steps") and config.phase == "training":
        plan = planned_flops(shape, partial(sparsity_section, config), config.loop.micro_batch_of)
        run = plan(budget_of(config, shape, None))
    return Counted(context, batch, of(context, batch), memory, phases, run)


def _model(config: FlopsConfig) -> tuple[ModelConfig | nn.Module, dict[str, float] | None]:
    """Return the configured model and the densities of its matrices, or the model of a run."""
    if config.init_from is not None:
        directory = typed_path(config.init_from, "init_from")
        if not directory.is_dir():
            raise UserError(f"init_from={config.init_from}: no such run directory")
        return _of_run(directory), None
    _, corpora = Inputs().corpora(config.data)
    model = model_config(config.model, vocabulary(config, corpora))
    section = config.sparsity
    if not section.is_sparse:
        return model, None
    densities = dict(allocated_densities(hidden_shapes(model), section, rule_of_length(section, _STEPS))(0))
    return replace(model, sparsity=0.0), densities or None


def _of_run(directory: Path) -> nn.Module:
    if is_quantized(directory):
        return load_quantized(directory)
    return load_run(directory, torch.device("cpu"))[0]


def shown(found: Counted) -> Iterator[str]:
    """Yield the lines of the answer, none longer than 80 columns."""
    ledger = found.ledger
    what = {"training": "a training step", "prefill": "a prefill", "decoding": "decoding a token"}[ledger.phase]
    yield f"{what}: {found.batch} x {ledger.tokens // found.batch} tokens, {ledger.tokens:,} in all"
    yield ""
    yield _row("kind", "FLOPs", "of total", "bytes moved")
    kinds = [*PRODUCTS, *(kind for kind in ledger.by_kind if kind not in PRODUCTS)]
    for kind in (*kinds, *(kind for kind in ledger.bytes_by_kind if kind not in ledger.by_kind)):
        part = ledger.by_kind.get(kind, 0)
        share = f"{part / ledger.total:.1%}" if ledger.total else ""
        yield _row(kind, f"{part:,}", share, byte_size(ledger.bytes_by_kind.get(kind, 0)))
    yield _row("total: matrix products", f"{ledger.total:,}", "", byte_size(ledger.bytes))
    yield ""
    yield _row("module", "FLOPs", "of total", "")
    for name, part in _classes(ledger).items():
        yield _row(name, f"{part:,}", f"{part / max(1, ledger.total):.1%}", "")
    yield ""
    yield _row("total under other conventions", "FLOPs", "", "")
    for name, total in ledger.totals.items():
        yield _row(name, f"{total:,}", "", "")
    if len(found.phases) > 1:
        yield ""
        yield _row("phase: context x batch size", "FLOPs of a step", "", "")
        for context, batch, one in found.phases:
            yield _row(f"{context} x {batch}", f"{one.total:,}", "", "")
    if found.run is not None:
        yield f"the run: {found.run:.4g} FLOPs"
    yield ""
    yield f"weights as stored: {byte_size(ledger.weight_bytes)}"
    if ledger.cache_bytes:
        yield f"keys and values in the cache: {byte_size(ledger.cache_bytes)}"
    if found.memory is not None:
        parts = (f"{name} {byte_size(size)}" for name, size in found.memory.as_dict().items() if name != "peak")
        yield f"memory of a step: {byte_size(found.memory.peak)} at the peak, in float32 with AdamW"
        yield from (f"  {part}" for part in parts)


def _classes(ledger: Ledger) -> dict[str, int]:
    """Return the total by class of module: the numbers in a name become ``*``."""
    found: dict[str, int] = {}
    for name, part in ledger.by_module.items():
        key = ".".join("*" if piece.isdigit() else piece for piece in name.split("."))
        found[key] = found.get(key, 0) + part
    return found


def _row(name: str, number: str, share: str, size: str) -> str:
    return f"{name:<32} {number:>24} {share:>8} {size:>12}".rstrip()
