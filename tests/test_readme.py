"""The README's commands and its Python run as they stand, on a smaller model and corpus."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import sparsetrain as st
from sparsetrain.cli import main
from sparsetrain.cli.resolve import load
from sparsetrain.cli.verbs import VERBS
from sparsetrain.data.sources.wheel import Wheel

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes a command of the README small; it changes no key that the command itself sets.
SMALL = {
    "data": ["data.vocab_size=300"],
    "pretrain": [
        *("model=tiny", "parameterization.base_width=32", "data.vocab_size=300", "data.context=64"),
        *("budget.batch_size=2", "runs_dir=runs"),
    ],
    "finetune": ["task.n_train=20", "task.n_validation=10", "task.n_test=10", "budget.steps=3", "budget.batch_size=4"],
    "generate": ["max_new_tokens=5"],
    "report": [],
    "sweep": [],
    "bench": [
        *("shapes=[[32,48]]", "tokens=64", "gpt.d_model=32", "scaling.shape=[32,32]"),
        "repeats=1",
    ],
    "tune": ["threads=[1]", "sides=[64]", "tokens=[16]", "repeats=1"],
    "coord-check": [
        *("model=tiny", "parameterization.base_width=32", "data.tokenizer=bytes", "data.context=24"),
        *("budget.batch_size=2", "check.steps=1", "check.values=[0,0.5]"),
    ],
    "mask": [],
}
SMALL["prompt"] = SMALL["finetune"]
SMALL["pipeline"] = [
    *SMALL["pretrain"],
    *("task.n_train=20", "task.n_validation=10", "task.n_test=10"),
    *(f"pipeline.stages.{stage}.budget.steps=3" for stage in ("finetune", "prompt", "scratch")),
    "budget.steps=3",
]


def test_the_phases_of_the_readme_are_a_budget() -> None:
    (said,) = re.findall(r"'(budget\.phases=\[.*?\])'", README)
    phases = load("pretrain", [said]).budget.phases
    assert phases is not None
    assert [phase.context for phase in phases] == [64, 128]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("sparsetrain ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_every_verb_has_a_command_in_the_readme() -> None:
    assert {command[0] for command in commands()} == {"plan", *SMALL} == set(VERBS)


def test_commands_of_the_recipe_run(
    small_medline: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = ""
    for verb, *words in commands():
        words = [run_dir if word == "RUN_DIR" else word.replace("RUN_DIR", run_dir) for word in words]
        words = [re.sub(r"(budget\.tokens)=.*", r"\1=384", word) for word in words]
        small = SMALL[words[0] if verb == "plan" else verb]
        if verb == "pretrain" and not any(word.startswith("budget.") for word in words):
            words.append("budget.steps=2")
        status = main([verb, *words, *small])
        output = capsys.readouterr()
        assert status == 0, f"{verb} {words}: {output.err}"
        if verb == "pretrain" and not run_dir:
            run_dir = re.findall(r"run directory: (\S+)", output.out)[0]


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    own_model, evolving, transfer = blocks("python")
    scope: dict[str, object] = {}
    exec(own_model, scope)
    assert "density=0.25" in capsys.readouterr().out
    exec(evolving, scope)
    assert "'itop_rate': 0.3" in capsys.readouterr().out
    config = {"n_layers": 2, "n_heads": 2, "vocab_size": 50, "seed": 0}
    for name, width in (("my_model", 512), ("my_small_model", 256)):
        scope[name] = st.Transformer(st.ModelConfig(d_model=width, **config)).blocks
    exec(transfer, scope)
    optimizer = torch.optim.AdamW(scope["groups"])  # type: ignore[arg-type]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(scope["my_model"].parameters()))  # type: ignore[attr-defined]
