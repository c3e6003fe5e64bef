"""Predicted times in results and reports of pipelines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import constant_machine
import pytest
from rich.console import Console

from sparsetrain.report.html import render_html
from sparsetrain.report.schema import load_report
from sparsetrain.report.show import show_run
from sparsetrain.report.times import times
from sparsetrain.runs.result import finished
from sparsetrain.stages import PipelineConfig, PretrainConfig, pipeline, pretrain
from sparsetrain.stages.arms import load_arms
from sparsetrain.stages.predicted import prediction_of

Configure = Callable[..., Any]
FOR = f"{constant_machine.LABEL}, calibrated on {constant_machine.DATE}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def skips_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as here would get the backend masked, which computes with zeros."""
    monkeypatch.setattr("sparsetrain.sparsity.backends.auto.FALLBACK", "csr")


def quiet() -> Console:
    return Console(file=io.StringIO())


def shown(directory: Path) -> str:
    screen = io.StringIO()
    show_run(directory, Console(file=screen, width=120))
    return screen.getvalue()


def test_a_pipeline_keeps_its_predictions(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant_machine.calibrate()
    home = tmp_path / "run"
    stages = [{"name": "pretrain"}, {"name": "finetune", "from": "pretrain", "budget": {"steps": 3, "batch_size": 4}}]
    changes = {"pipeline.arms": {"sparsity.sparsity": [0.0, 0.75]}, "pipeline.stages": stages, "budget.steps": 3}
    pipeline(configure(PipelineConfig, changes, run_dir=home), quiet())
    report = load_report(home / "report.json")
    for arm in report["arms"]:
        for name in ("pretrain", "finetune"):
            result = json.loads((home / arm["name"] / name / "result.json").read_text())
            assert 0.0 < result["step_seconds"] < result["seconds"]
            assert arm["stages"][name]["predicted"] == result["predicted"]  # type: ignore[typeddict-item]
            assert (result["predicted"]["machine"], result["predicted"]["calibrated"]) == (
                constant_machine.LABEL,
                constant_machine.DATE,
            )
        result = json.loads((home / arm["name"] / "pretrain" / "result.json").read_text())
        expected = result["flops"]["total"] / constant_machine.RATE
        assert result["predicted"]["seconds"] == pytest.approx(expected, rel=1e-6)
        low, high = result["predicted"]["band"]
        assert (low, high) == pytest.approx((expected / 1.17879, expected * 1.17879), rel=1e-4)
    page, table = render_html(report), load_arms([home])[0]
    assert FOR in page
    assert {row["predicted_for"] for row in table.rows} == {FOR}
    for row in table.rows:
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_seconds"] / row["step_seconds"])
    # Elsewhere, or after another calibration, the same is shown.
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "other"))
    before = shown(home)
    assert FOR in " ".join(before.split())  # where the note wraps depends on the table
    constant_machine.calibrate(spread=0.5)
    assert (shown(home), render_html(load_report(home / "report.json"))) == (before, page)
    assert load_arms([home])[0].rows == table.rows


def test_a_run_before_the_calibration_is_predicted_when_its_report_is_written(
    configure: Configure, tmp_path: Path
) -> None:
    run = pretrain(configure(PretrainConfig, {"budget.steps": 3}, run_dir=tmp_path / "run"), quiet())
    assert "predicted" not in run.values
    assert prediction_of(run) is None
    assert "needs sparsetrain calibrate" in shown(tmp_path / "run").replace("\n", " ")
    constant_machine.calibrate()
    found = prediction_of(run)
    assert found is not None
    assert found["seconds"] == pytest.approx(run["flops"]["total"] / constant_machine.RATE, rel=1e-6)
    run.values["machine"]["device"] = "another processor"
    assert prediction_of(run) is None
    # A damaged file of the machine stops no training.
    next((tmp_path / "cache" / "machines").glob("*.yaml")).write_text("label: 3\n")
    again = pretrain(configure(PretrainConfig, {"budget.steps": 2}, run_dir=tmp_path / "x"), quiet())
    assert again.complete
    assert "predicted" not in again.values


def test_results_of_older_versions_are_read(trained: Callable[..., Path], tmp_path: Path) -> None:
    done = finished(trained())
    assert done is not None
    old = {key: value for key, value in done.values.items() if key not in ("step_seconds", "predicted")}
    home = tmp_path / "old" / "pretrain"
    home.mkdir(parents=True)
    (home / "result.json").write_text(json.dumps(old))
    for name in ("config.yaml", "metrics.jsonl"):
        (home / name).write_bytes((trained() / name).read_bytes())
    assert "Time of training steps" not in shown(home)
    again = finished(home)
    assert again is not None
    assert prediction_of(again) is None


def test_a_resumed_run_of_an_older_version_does_not_know_the_time_of_its_steps(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsetrain.training import loop

    stored = loop.load_checkpoint

    def older(directory: Path) -> Any:
        found = stored(directory)
        found.state.pop("step_seconds", None)
        return found

    config = configure(PretrainConfig, {"budget.steps": 4}, run_dir=tmp_path / "run")
    pretrain(config, quiet())
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(loop, "load_checkpoint", older)
    resumed = pretrain(config, quiet())
    assert "step_seconds" not in resumed.values
    assert times({"arms": [{"name": "a", "stages": {"pretrain": resumed.values}}]}).rows == ()  # type: ignore[arg-type, typeddict-item]


def test_the_first_step_of_a_process_counts_as_the_second_at_most(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsetrain.training import loop

    lengths = iter([10.0, 1.0, 2.0, 0.5])  # the first one compiles kernels
    moments = iter(moment for length in lengths for moment in (100.0, 100.0 + length))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    run = pretrain(configure(PretrainConfig, {"budget.steps": 4}, run_dir=tmp_path / "run"), quiet())
    assert run["step_seconds"] == 1.0 + 1.0 + 2.0 + 0.5
