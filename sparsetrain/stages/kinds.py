"""The kinds of stage that a pipeline has, and which settings each takes from it."""

from __future__ import annotations

import dataclasses

from sparsetrain.stages.config import AdaptConfig, FinetuneConfig, PretrainConfig, PromptConfig, RunConfig, StageConfig
from sparsetrain.stages.evaluate_config import EvaluateConfig

KINDS: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "adapt": AdaptConfig,
    "finetune": FinetuneConfig,
    "prompt": PromptConfig,
    "evaluate": EvaluateConfig,
}
"""Kinds of stage, each with its configuration."""

OWN = ("optimizer", "schedule", "budget", "loop")
"""Sections that a pipeline gives only to its pre-training; the other kinds use their own defaults."""

PLACED = ("init_from", "run_dir", "runs_dir", "device", "threads", "force", "draw")
"""Settings that neither a stage nor an arm can set: the pipeline sets them."""

RUN_SETTINGS = {each.name for each in dataclasses.fields(RunConfig)} | {"task"}
"""Settings that a stage takes from the pipeline unless its entry sets them."""


def known_settings(kind: type[StageConfig]) -> set[str]:
    """Return the settings of a kind of stage that the pipeline does not set itself."""
    return {each.name for each in dataclasses.fields(kind)} - set(PLACED)
