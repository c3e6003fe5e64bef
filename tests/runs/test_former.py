"""Settings that format 1 recorded in another shape: fixed pipeline stages, and densities over time."""

from __future__ import annotations

from typing import Any

import pytest

from sparsetrain.cli.resolve import load
from sparsetrain.runs.identity import differences
from sparsetrain.runs.recorded import Recorded, recorded_of
from sparsetrain.stages import PipelineConfig, PretrainConfig
from sparsetrain.stages.config import as_plain

LENGTH = {"steps": None, "tokens": None}
LOOP = {"accumulation": 1, "precision": "auto", "log_every": 10, "eval_sequences": 256, "checkpoint_every": 200}


def old_section(epochs: int, eval_every: int, **more: Any) -> dict[str, Any]:
    return {
        "optimizer": {"name": "adamw", "lr": 0.001, "weight_decay": 0.1, "clip": 1.0},
        "schedule": {"name": "linear_to_zero", "warmup": 0.1, "warmup_steps": None, "final": None, **LENGTH},
        "stage": {**LOOP, "batch_size": 16, "epochs": epochs, "flops": None, "eval_every": eval_every},
        **more,
    }


@pytest.mark.parametrize("words", [[], ["experiment=demo"]])
def test_a_pipeline_of_format_1_is_the_same_list_of_stages(words: list[str], tmp_path: Any) -> None:
    config = load("pipeline", words)
    ours = Recorded("pipeline", PipelineConfig, as_plain(config), {"corpus": "c", "source": None})
    old = {key: value for key, value in as_plain(config).items() if key not in ("budget", "loop", "pipeline")}
    epochs, eval_every = (6, 0) if words else (5, 100)
    old["schedule"] = {**old["schedule"], "steps": None, "tokens": config.budget.tokens}
    old["schedule"].pop("segments")
    loop = as_plain(config)["loop"]
    old["stage"] = {**loop, "batch_size": config.budget.batch_size, "epochs": 1, "flops": None}
    prompt = old_section(epochs, eval_every, start="pretrain", n_tokens=8, init="words", train="both")
    old["pipeline"] = {
        "sparsities": None,
        "scratch": True,
        "finetune": old_section(epochs, eval_every, mode="dense"),
        "prompt": {**prompt, "words": "the answer to the question is"},
    }
    theirs = recorded_of({**old, "corpus": "c", "source": None}, PipelineConfig, tmp_path)
    assert differences(ours, theirs) == []
    for key, value in (("n_tokens", 9), ("train", "prompt"), ("start", "finetune")):
        changed = {**old, "pipeline": {**old["pipeline"], "prompt": {**prompt, key: value}}}
        assert differences(ours, recorded_of({**changed, "corpus": "c", "source": None}, PipelineConfig, tmp_path))


def test_densities_of_format_1_are_phases_of_the_budget(tmp_path: Any) -> None:
    config = load("pretrain", ["sparsity=vspdf", "budget.steps=40"])
    ours = Recorded("pretrain", PretrainConfig, as_plain(config), {"corpus": "c", "source": None})
    old = {key: value for key, value in as_plain(config).items() if key not in ("budget", "loop")}
    old["schedule"] = {**old["schedule"], "steps": 40, "tokens": None}
    old["stage"] = {**as_plain(config)["loop"], "batch_size": config.budget.batch_size, "epochs": 1, "flops": None}
    phases = [{"at": 0.5, "sparsity": 0.5}, {"at": 0.9, "sparsity": 0.0}]
    old["sparsity"] = {
        **old["sparsity"],
        "evolution": {**old["sparsity"]["evolution"], "rule": "vspdf", "phases": phases},
    }
    theirs = recorded_of({**old, "corpus": "c", "source": None}, PretrainConfig, tmp_path)
    assert differences(ours, theirs) == []
    phases[0]["at"] = 0.4
    assert differences(ours, recorded_of({**old, "corpus": "c", "source": None}, PretrainConfig, tmp_path))
