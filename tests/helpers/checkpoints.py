"""Tiny checkpoints for tests, and a check that the parts of a checkpoint belong together."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from sparsetrain.runs.checkpoint import (
    Checkpoint,
    OptimizerTensors,
    load_checkpoint,
    save_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def save(directory: Path, step: int, keep_last: int = 3, mark: int = 0) -> Path:
    """Save a tiny checkpoint; ``mark`` distinguishes two checkpoints of the same step."""
    model = {"weight": torch.full((2, 2), float(step)), "bias": torch.full((2,), float(mark))}
    optimizer = OptimizerTensors({"weight.exp_avg": torch.full((2, 2), float(step))}, [{"options": {"lr": 0.1}}])
    return save_checkpoint(directory, step, model, optimizer, {"step": step, "mark": mark}, keep_last)


def check(checkpoint: Checkpoint) -> Checkpoint:
    """Assert that the parts of a checkpoint from `save` belong together."""
    step, mark = checkpoint.step, checkpoint.state["mark"]
    assert checkpoint.state["step"] == step
    assert torch.equal(checkpoint.model["weight"], torch.full((2, 2), float(step)))
    assert torch.equal(checkpoint.model["bias"], torch.full((2,), float(mark)))  # type: ignore[arg-type]
    assert torch.equal(checkpoint.optimizer.tensors["weight.exp_avg"], torch.full((2, 2), float(step)))
    return checkpoint


def load(directory: Path) -> tuple[Checkpoint, list[str]]:
    """Return the newest usable checkpoint and the warnings about refused ones."""
    refusals: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: refusals.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sparsetrain.runs.checkpoint")
    logger.addHandler(handler)
    try:
        return check(load_checkpoint(directory)), refusals
    finally:
        logger.removeHandler(handler)
