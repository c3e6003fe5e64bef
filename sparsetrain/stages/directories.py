"""The directory that a run is written to."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.runs.identity import run_place
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import Recorded
from sparsetrain.stages.config import RunConfig, StageConfig, model_config
from sparsetrain.stages.masks import starts_sparse


def run_directory(run: Recorded, config: StageConfig, origin: Origin | None) -> Path:
    """Return the configured ``run_dir``, or a directory below ``runs_dir`` that is named after the configuration.

    A run that an earlier version started there under another name keeps its directory.

    Args:
        run: the recorded configuration that identifies the run.
        origin: see `sparsetrain.runs.identity.run_place`.
    """
    if config.run_dir is not None:
        return Path(config.run_dir)
    prefix = f"{run.kind}-{_about(config)}-seed{config.seed}-"
    return run_place(Path(config.runs_dir), prefix, run, origin)


def _about(config: StageConfig) -> str:
    """Return what a name says about a run: its model and training, or of an evaluation the run that it is of."""
    if not isinstance(config, RunConfig):
        return Path(config.init_from or "").absolute().name
    model = model_config(config.model, 1)
    return f"d{model.d_model}-L{model.n_layers}-{_masks(config)}-lr{config.optimizer.lr:g}"


def _masks(config: RunConfig) -> str:
    rule = config.sparsity.evolution.rule
    changes = any(density is not None for density in config.budget.densities)
    return f"s{starts_sparse(config):g}" + ("-phases" if changes else "" if rule == "static" else f"-{rule}")
