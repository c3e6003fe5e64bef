"""Settings of format 1 in another shape: fixed pipeline stages, densities over time, settings of all rules."""

from __future__ import annotations

from typing import Any

import pytest

from sparsetrain.cli.resolve import load
from sparsetrain.runs.identity import differences, digest
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


# The section of evolution as every run recorded it before it had the settings of one rule alone.
ALL_RULES = {
    "rule": "static",
    "every": 100,
    "start": 0.0,
    "stop": 0.75,
    "drop_fraction": 0.3,
    "drop_schedule": "cosine",
    "initial_sparsity": 0.0,
    "curve": "cubic",
    "phases": [],
    "grow": "random",
    "accumulation": "last",
    "grown_scale": 0.0,
    "protect_rows": False,
    "grown_moments": "zero",
}


@pytest.mark.parametrize(
    ("words", "evolution", "expected"),
    [
        # Digests that the version before gave to the same words.
        (["sparsity=static"], {}, "2eb331ff"),
        (["sparsity=rigl", "sparsity.evolution.every=25"], {"rule": "rigl", "every": 25}, "6923e17f"),
        (["sparsity=gmp"], {"rule": "gmp", "start": 0.1}, "b15dd1ac"),
        (["sparsity=static", "sparsity.evolution.grow=gradient"], {"grow": "gradient"}, "df71e14d"),
    ],
)
def test_a_run_that_recorded_the_settings_of_all_rules_is_the_same_run(
    tmp_path: Any, words: list[str], evolution: dict[str, Any], expected: str
) -> None:
    config = load("pretrain", [*words, "budget.steps=40"])
    facts = {"corpus": "c", "source": None}
    ours = Recorded("pretrain", PretrainConfig, as_plain(config), facts)
    old = {"format": 2, "kind": "pretrain", **as_plain(config), **facts}
    old["sparsity"] = {**old["sparsity"], "evolution": {**ALL_RULES, **evolution}}
    theirs = recorded_of(old, PretrainConfig, tmp_path)
    assert differences(ours, theirs) == []
    assert digest(ours) == digest(theirs) == expected
    # What another rule would have done made no difference to the run.
    other = {"curve": "linear"} if "gmp" not in words[0] else {"drop_fraction": 0.5}
    old["sparsity"]["evolution"].update(other)
    assert digest(recorded_of(old, PretrainConfig, tmp_path)) == expected
    old["sparsity"]["evolution"].update({"protect_rows": True})
    assert digest(recorded_of(old, PretrainConfig, tmp_path)) != expected
