"""Directories of finished runs that nothing has trained."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import yaml

from sparsetrain.cli.resolve import load
from sparsetrain.stages.config import as_plain


@functools.cache
def composed(*words: str) -> dict[str, Any]:
    """Return a configuration of the command line."""
    return as_plain(load("pretrain", ["model=tiny", "parameterization.base_width=16", *words]))


def write_run(place: Path, words: list[str], **result: Any) -> Path:
    """Write the directory of a finished run of ``words`` without training it."""
    single = {word: word.split("=")[0].split(".") for word in words}  # composing takes long, so values are set
    config = copy.deepcopy(composed(*(word for word, path in single.items() if len(path) == 1)))
    for word, path in single.items():
        if len(path) == 2:
            assert path[1] in config[path[0]]
            config[path[0]][path[1]] = yaml.safe_load(word.partition("=")[2])
    plain = {**config, "corpus": "corpus-0", "source": None}
    directory = place / f"run-{len(list(place.glob('*')))}"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(plain))
    if result is not None:
        values = {
            "stage": "pretrain",
            "status": "complete",
            "parameterization": config["parameterization"]["scheme"],
            "sparsity": config["sparsity"]["sparsity"],
            "width": 32,
            "depth": 2,
            "lr": config["optimizer"]["lr"],
            "seed": config["seed"],
            "steps": 3,
            "commit": "abc",
            "tokens": 9,
            "seconds": 1.0,
            "precision": "fp32",
            "flops": {"total": 1.0},
            "loss_last": 2.0,
            **result,
        }
        (directory / "result.json").write_text(json.dumps(values))
    return directory
