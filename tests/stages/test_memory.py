"""Sizes that exceed the memory: refused in one line before anything is built, forced, or failing in the allocator."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import Fresh
from shell import Shell

from sparsetrain.cost.available import Available
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.stages import memory
from sparsetrain.stages.memory import memory_errors

HUGE = [
    (["budget.batch_size=100000000"], "budget.batch_size=[0-9]+ would fit"),
    (["model.d_model=1048576"], "model.d_model=[0-9]+ would fit"),
    (["model.n_layers=65536", "model.d_model=1024"], "model.d_model=[0-9]+ or model.n_layers=[0-9]+ would fit"),
    (["model.vocab_size=2147483647", "model.d_model=256"], "model.vocab_size=[0-9]+ would fit"),
    (["model.positions=learned", "model.max_context=2147483647", "model.d_model=256"], "model.max_context=[0-9]+"),
    (["model.n_layers=1000000000"], "n_layers=1000000000 is above the limit of 65536: .* memory"),
    (["model.d_model=" + "9" * 30], "d_model=9+ is above .* memory"),
]


def built(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was built")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is built."""
    monkeypatch.setattr(Transformer, "__init__", built)


def scarce(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Pretend that the machine has this much memory."""
    monkeypatch.setattr(memory, "available_memory", lambda *_: Available(size, "available on this machine"))


def told(shell: Shell, *words: str) -> str:
    """Assert that a command is refused in one line, and return it; files in the cache of corpora do not matter."""
    status, out, err = shell.run(*words)
    assert (status, err.count("\n")) == (2, 1), (out, err)
    assert err.startswith("sparsetrain: ")
    return err


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(("words", "said"), HUGE, ids=[entry[0][0][:40] for entry in HUGE])
def test_a_training_that_cannot_fit_is_refused_with_what_would(words: list[str], said: str, shell: Shell) -> None:
    """The message gives the estimate, the available memory, the largest component, and a setting that would fit."""
    line = told(shell, "pretrain", *shell.tiny, *words, "run_dir=run")
    assert re.search(said, line), line
    assert not (shell.home / "run").exists()


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "budget.batch_size=100000000"],
        ["finetune", "model.d_model=1048576"],
        ["pipeline", "pipeline.stages.finetune.budget.batch_size=100000000"],
        ["pipeline", "pipeline.stages.prompt.budget.batch_size=100000000"],
        ["pipeline", "budget.batch_size=100000000"],
        ["coord-check", "check=width", "check.values=[32,1048576]"],
        ["coord-check", "budget.batch_size=100000000"],
    ],
    ids=" ".join,
)
def test_other_trainings_are_refused_too(words: list[str], shell: Shell) -> None:
    """Fine-tuning, all stages of a pipeline before its first arm, and all points of a coordinate check."""
    task = shell.task if words[0] != "coord-check" else []
    line = told(shell, *words[:1], *shell.tiny, *task, *words[1:], "run_dir=run")
    assert "of memory" in line
    assert "--force" in line
    assert not (shell.home / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "what=layers", "shapes=[[1048576,1048576]]"],
        ["bench", "what=layers", "tokens=10000000000"],
        ["bench", "what=model", "gpt.batch=10000000"],
        ["bench", "what=scaling", "scaling.token_counts=[10000000000]"],
        ["tune", "sides=[1048576]"],
        ["tune", "tokens=[10000000000]"],
    ],
    ids=" ".join,
)
def test_measurements_are_refused_before_the_first(words: list[str], shell: Shell) -> None:
    """A layer or a model that does not fit beside a dense one."""
    assert "of memory" in shell.refused(*words)


def test_generation_is_refused_before_the_model_is_read(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of 10^12 tokens take petabytes; a prompt of 10^9 vectors exceeds its rows."""
    shell.trained()
    monkeypatch.setattr(Transformer, "__init__", built)
    line = shell.refused("generate", "init_from=run", "max_new_tokens=1000000000000")
    assert "keys and values" in line
    assert "soft-prompt slots" in told(shell, "prompt", "init_from=run", *shell.task, "n_tokens=1000000000")


def test_a_sweep_goes_on_behind_a_point_that_cannot_fit(shell: Shell) -> None:
    """The point counts as refused and reports the reason itself; the others are trained."""
    status, out, err = shell.run("pretrain", "-m", *shell.tiny, "budget.batch_size=100000000,2", "runs_dir=runs")
    assert (status, err.count("of memory")) == (2, 1)
    assert "1 to run, 1 that cannot run" in out
    assert [json.loads(path.read_text())["status"] for path in shell.home.glob("runs/*/result.json")] == ["complete"]


@pytest.mark.parametrize("word", ["--force", "force=true"])
def test_force_goes_on_with_a_warning_as_the_same_run(word: str, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused run is trained when forced; its directory name does not depend on force."""
    words = ["pretrain", *shell.tiny]
    with monkeypatch.context() as patch:
        scarce(patch, 1000)
        assert "would fit" not in told(shell, *words)
        status, _, err = shell.run(*words, word)
        assert status == 0
        assert err.startswith("warning: training with budget.batch_size=4")
    assert "already done" in shell.run(*words)[1]


def test_what_may_just_fit_is_warned_of_and_done(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload between the certain and the likely footprint is not refused."""
    least = []
    real = memory.check_footprint

    def between(needed: Any, what: str, force: bool, *rest: Any) -> None:
        least.append(needed.least)
        scarce(monkeypatch, needed.least)
        real(needed, what, force, *rest)

    monkeypatch.setattr(memory, "check_footprint", between)
    status, _, err = shell.run("pretrain", *shell.tiny, "run_dir=run")
    assert status == 0
    assert err.startswith("warning: training")
    assert least


def test_data_takes_no_force(shell: Shell) -> None:
    """The memory for reading a corpus does not depend on settings."""
    assert "force" in shell.refused("data", "--force")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_an_allocation_that_fails_is_one_line(error: Exception) -> None:
    """Memory may be gone by then; other errors are not changed."""
    with pytest.raises(UserError, match="this training ran out of memory"), memory_errors("this training"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("this training"):
        raise RuntimeError("shapes differ")


def test_a_forced_run_that_the_system_refuses_is_one_line(fresh: Fresh, shell: Shell) -> None:
    """With 12 GiB of address space, the estimate refuses a batch of terabytes; if forced, the allocator does."""
    words = ["pretrain", *shell.tiny, "budget.batch_size=10000000", "run_dir=run"]
    code = (
        "import resource, sys; from sparsetrain.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({12 << 30}, {12 << 30}))\n"
        f"first = main({words!r}); print('next', file=sys.stderr); assert first == 2\n"
        f"sys.exit(main({[*words, 'loop.accumulation=4', 'model.d_model=65536', '--force']!r}))"
    )
    done = fresh.run(code, cwd=shell.home)
    first, _, second = done.stderr.partition("next\n")
    assert (done.returncode, first.count("\n")) == (2, 1), done.stderr[-500:]
    assert "GiB are" in first
    assert second.splitlines()[-1].startswith("sparsetrain: this training ran out of memory")
    assert "Traceback" not in second
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 12 << 30
    assert not Path(shell.home, "run").exists()
