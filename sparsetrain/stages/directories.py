"""Which directory a run goes to."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.runs.identity import run_place
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import Recorded
from sparsetrain.stages.config import RunConfig, model_config
from sparsetrain.stages.masks import starts_sparse


def run_directory(run: Recorded, config: RunConfig, origin: Origin | None) -> Path:
    """Return the directory that the configuration names, or one below ``runs_dir`` named after what it is.

    A run that was begun there under another name, by a version with other settings, keeps its directory.

    Args:
        run: what identifies it. origin: as `sparsetrain.runs.identity.run_place` takes it.
    """
    if config.run_dir is not None:
        return Path(config.run_dir)
    model = model_config(config.model, 1)
    prefix = f"{run.kind}-d{model.d_model}-L{model.n_layers}-{_masks(config)}-lr{config.optimizer.lr:g}"
    return run_place(Path(config.runs_dir), f"{prefix}-seed{config.seed}-", run, origin)


def _masks(config: RunConfig) -> str:
    rule = config.sparsity.evolution.rule
    changes = any(density is not None for density in config.budget.densities)
    return f"s{starts_sparse(config):g}" + ("-phases" if changes else "" if rule == "static" else f"-{rule}")
