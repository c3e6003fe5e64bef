"""Estimates of a sweep before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import constant_machine
import pytest
from rich.console import Console

from sparsetrain.cli.main import main
from sparsetrain.cli.resolve import load
from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.data import prepare_corpora
from sparsetrain.report.text import duration
from sparsetrain.stages import estimate, pretrain
from sparsetrain.stages.config import model_config
from sparsetrain.stages.estimate import estimate as estimated
from sparsetrain.stages.estimate import sweep_cost
from sparsetrain.stages.plan import plan_of


def tiny(notes: Path, *more: str) -> Any:
    words = [
        *("model=tiny", "parameterization.base_width=16", f"data.path={notes}", "data.tokenizer=bytes"),
        *("data.context=32", "budget.batch_size=2", "budget.steps=3", "loop.eval_sequences=2"),
    ]
    return load("pretrain", [*words, *more])


def test_cost_counts_what_is_done_and_adds_the_formula_for_the_rest(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: Console
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [tiny(notes, f"sparsity.sparsity={sparsity}") for sparsity in (0.0, 0.5, 0.75)]
    prepared: list[Any] = []
    monkeypatch.setattr(
        estimate, "prepare_corpora", lambda *words, **more: (prepared.append(words), prepare_corpora(*words, **more))[1]
    )
    before = sweep_cost([*configs, None], screen)
    assert len(prepared) == 1  # three points share one text
    shape = model_config(configs[0].model, 257)
    tokens = 3 * 2 * 32
    formula = [tokens * training_flops_per_token(shape, density, 32).total for density in (1.0, 0.5, 0.25)]
    assert (before.points, before.done, before.refused, before.measured) == (4, 0, 1, 0)
    assert before.flops == pytest.approx(sum(formula))
    assert before.dense_flops == pytest.approx(3 * formula[0])
    assert "4 points, 0 already finished, 3 to run, 1 that cannot run" in before.describe()
    assert "very roughly" in before.describe()
    assert before.describe().endswith("; sparsetrain calibrate gives a time with a band")
    result = pretrain(configs[1], screen)
    after = sweep_cost([*configs, None], screen)
    assert (after.done, after.measured) == (1, 1)
    assert after.flops == pytest.approx(formula[0] + formula[2])
    assert after.rate == pytest.approx(formula[0] / result["seconds"])
    assert "measured on 1 finished point" in after.describe()
    assert sweep_cost([configs[1]], screen).describe() == "sweep: 1 point, 1 already finished, 0 to run"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


BASIS = f"90 % band, training steps alone, as calibrated on {constant_machine.DATE}"


@pytest.mark.usefixtures("empty_cache")
def test_a_calibrated_machine_predicts_each_phase_and_a_band(
    notes: Path, capsys: pytest.CaptureFixture[str], screen: Console
) -> None:
    config = tiny(notes, "budget.steps=6")
    prepare_corpora(config.data)
    words = [f"{key}={value}" for key, value in (("data.path", notes), ("data.tokenizer", "bytes"))]
    words += ["model=tiny", "parameterization.base_width=16", "budget.batch_size=2", "loop.eval_sequences=2"]
    words += ["budget.phases=[{share: 0.5, context: 32}, {share: 0.5, context: 64}]", "budget.tokens=24576"]
    assert main(["plan", "pretrain", *words]) == 0
    rough = capsys.readouterr().out
    assert "\n      sparsetrain calibrate gives a time with a band\n" in rough
    assert "predicted time" not in rough
    constant_machine.calibrate()
    assert main(["plan", "pretrain", *words]) == 0
    out = capsys.readouterr().out
    run = plan_of(load("pretrain", words)).runs[0]
    times = [phase.flops / constant_machine.RATE for phase in run.phases]
    lines = out.splitlines()
    titles = next(line for line in lines if line.lstrip().startswith("phase"))
    assert titles.endswith("FLOPs  predicted time")
    assert max(map(len, lines[1:5])) <= 100
    table = [line.rsplit("  ", 1)[1].strip() for line in lines[lines.index(titles) + 1 :][:3]]
    assert table == [duration(each) for each in (*times, sum(times))]
    band = [sum(times) / 1.17879, sum(times) * 1.17879]
    clause = f"time: about {duration(sum(times))} [{duration(band[0])} to {duration(band[1])}], {BASIS}"
    assert clause in lines
    assert "sparsetrain calibrate" not in out
    # In a sweep, the times of all points and their bands add up.
    assert main(["plan", "pretrain", "-m", *words, "seed=0,1"]) == 0
    ends = [duration(2 * each) for each in (sum(times), *band)]
    assert f"time: about {ends[0]} [{ends[1]} to {ends[2]}] for the rest, {BASIS}" in capsys.readouterr().out
    described = sweep_cost([load("pretrain", [*words, f"seed={seed}"]) for seed in (0, 1)], screen).describe()
    assert described.endswith(f"; about {ends[0]} [{ends[1]} to {ends[2]}] in sequence, {BASIS}")


@pytest.mark.usefixtures("empty_cache")
def test_a_calibration_predicts_only_what_it_measured(notes: Path) -> None:
    constant_machine.calibrate()
    prepare_corpora(tiny(notes).data)
    known, unknown = tiny(notes), tiny(notes, "loop.precision=bf16")
    runs = {id(config): plan_of(config).runs[0] for config in (known, unknown)}
    assert estimated([(known, runs[id(known)])]).bands
    found = estimated([(unknown, runs[id(unknown)])])
    assert (found.bands, found.hint) == ((), "")  # another calibration would not help
    assert found.basis.startswith("very roughly")
    assert estimated([(known, runs[id(known)]), (unknown, runs[id(unknown)])]).basis == found.basis


@pytest.mark.usefixtures("empty_cache")
def test_the_rest_of_a_stopped_run(notes: Path) -> None:
    constant_machine.calibrate()
    config = tiny(notes, "budget.steps=8")
    prepare_corpora(config.data)
    run = plan_of(config).runs[0]
    whole, rest = (estimated([(config, replace(run, steps_done=done))]).seconds[0] for done in (0, 6))
    assert whole == pytest.approx(run.flops / constant_machine.RATE, rel=1e-6)
    assert rest == pytest.approx(run.flops / 4 / constant_machine.RATE, rel=1e-6)
