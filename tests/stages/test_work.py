"""The work of runs, as their directories tell it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import constant_machine
import pytest
from rich.console import Console

from sparsetrain.cost.run_time import predicted
from sparsetrain.errors import UserError
from sparsetrain.runs.result import RunResult
from sparsetrain.settings import build
from sparsetrain.stages import AdaptConfig, FinetuneConfig, PretrainConfig, PromptConfig, adapt, finetune, pretrain
from sparsetrain.stages import prompt as learn_prompt
from sparsetrain.stages.config import as_plain
from sparsetrain.stages.predicted import work_of

Configure = Callable[..., Any]
QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def skips_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as here would get the backend masked, which computes with zeros."""
    monkeypatch.setattr("sparsetrain.sparsity.backends.auto.FALLBACK", "csr")


def seconds_of(run: RunResult) -> float:
    """Where only products take time, they are the run's own FLOPs by formula."""
    flops: float = run["flops"]["total"]
    return flops / constant_machine.RATE


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity.sparsity": 0.0},
        {"sparsity.evolution": {"rule": "rigl", "every": 4}, "loop.accumulation": 2},
        {"sparsity.evolution": {"rule": "gmp", "every": 4}, "budget": {"epochs": 0.1, "batch_size": 4}},
        {"budget.phases": [{"share": 0.5, "context": 32}, {"share": 0.5, "density": 1.0}]},
        {"budget": {"flops": 4e8, "batch_size": 4}},
    ],
    ids=["dense", "rigl", "gmp in epochs", "phases", "flops"],
)
def test_a_pretraining_takes_the_time_of_its_flops(
    changes: dict[str, Any], configure: Configure, tmp_path: Path
) -> None:
    run = pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), QUIET)
    found = predicted(work_of(tmp_path / "run"), constant_machine.machine())
    assert found.seconds == pytest.approx(seconds_of(run), rel=1e-6)
    assert (found.steps, found.tokens) == (run["steps"], run["tokens"])


def test_what_starts_from_a_run_has_its_densities(
    configure: Configure, trained: Callable[..., Path], tmp_path: Path
) -> None:
    machine = constant_machine.machine()
    start = str(trained())
    more = pretrain(configure(PretrainConfig, init_from=start, run_dir=tmp_path / "more"), QUIET)
    assert predicted(work_of(tmp_path / "more"), machine).seconds == pytest.approx(seconds_of(more), rel=1e-6)
    plain = as_plain(configure(PretrainConfig, init_from=start))
    adapted = adapt(build(AdaptConfig, plain | {"run_dir": str(tmp_path / "adapted")}), QUIET)
    assert predicted(work_of(tmp_path / "adapted"), machine).seconds == pytest.approx(seconds_of(adapted), rel=1e-6)
    changes = {"new_blocks": 1, "train": "blocks", "run_dir": str(tmp_path / "blocks")}
    blocks = adapt(build(AdaptConfig, plain | changes), QUIET)
    # The formula counts all gradients; those of the frozen weights, and what is below the new block, are not computed.
    assert predicted(work_of(tmp_path / "blocks"), machine).seconds < 0.8 * seconds_of(blocks)


def test_tasks(configure: Configure, trained: Callable[..., Path], tmp_path: Path) -> None:
    machine, start = constant_machine.machine(), str(trained())
    found = {}
    for mode in ("dense", "sparse"):
        run = finetune(configure(FinetuneConfig, {"mode": mode}, init_from=start, run_dir=tmp_path / mode), QUIET)
        work = work_of(tmp_path / mode)
        found[mode] = predicted(work, machine)
        assert found[mode].tokens == pytest.approx(run["tokens"], rel=0.05)  # rows are rounded to their mean
        # The formula takes every row to be as long as the context, which only attention depends on.
        linear = run["flops"]["total"] - run["flops"]["attention"]
        assert linear < 1.05 * found[mode].seconds * constant_machine.RATE < 1.1 * run["flops"]["total"]
    assert found["sparse"].seconds < found["dense"].seconds
    learn_prompt(configure(PromptConfig, {"n_tokens": 3}, init_from=start, run_dir=tmp_path / "prompt"), QUIET)
    work = work_of(tmp_path / "prompt")
    assert (work.prompt_tokens, work.trained) == (3, ())
    assert predicted(work, machine).seconds < found["sparse"].seconds


def test_a_directory_without_a_complete_training_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        work_of(tmp_path)
    (tmp_path / "config.yaml").write_bytes((trained() / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="is not complete"):
        work_of(tmp_path)
