"""Every experiment of ``conf/`` in a tiny form: a real sweep of a few points, then the command that collects it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sparsetrain.cli import main
from sparsetrain.config import check, complete, config_directory, options, with_sweep
from sparsetrain.models import Transformer

ROOT = Path(__file__).parents[1]
SMALL = [
    *("schedule.steps=2", "stage.batch_size=2", "stage.eval_sequences=2", "data.context=24", "data.max_documents=60"),
    "threads=1",
]
NARROW = ["model.d_model=32", "parameterization.base_width=32"]
LR = "optimizer.lr=0.001953125,0.0078125"
ONE = ["sparsity.sparsity=0.5", LR]
# What makes each sweep a handful of points of small models; none of it names a setting that the sweep does not have.
TINY: dict[str, list[str]] = {
    "base_tuning": [*NARROW, "model.n_layers=1", "draw=range(0,2)"],
    "supar_lr_transfer": [*NARROW, *ONE],
    "supar_init_transfer": [
        *NARROW,
        "sparsity.sparsity=0.5",
        "model.init_std=0.03125,0.0625",
        "parameterization=supar",
    ],
    "supar_iso_parameter": ["model.d_model=128,160", LR, "parameterization=supar", "model.n_layers=1"],
    "supar_loss_gap": [*NARROW, *ONE, "seed=0", "parameterization=supar"],
    "completep_depth": ["model.n_layers=2,4", LR, "parameterization=completep"],
    "supar_completep": ["model.n_layers=2,3", LR, "parameterization=supar_completep"],
    "dynamic_masks_caveat": [*NARROW, *ONE, "sparsity=static,set", "sparsity.evolution.every=1"],
}
SWEEPS = sorted(TINY)
FOLDERS = sorted({*SWEEPS, "supar_coordinates", "demo"})


def collecting(name: str) -> list[str]:
    """Return the words of the ``sparsetrain sweep`` command in the head of an experiment."""
    text = (config_directory() / "experiment" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^#   sparsetrain (sweep .*)$", text, re.MULTILINE)
    return command.split()


def test_every_experiment_has_a_tiny_form_and_a_folder() -> None:
    others = {"dynamic_masks", "mediswift_pipeline"}
    assert set(options("experiment")) == set(FOLDERS) | others
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/README.md")}
    assert folders == set(FOLDERS) | others | {"kernels"}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_runs_and_its_command_collects_it(
    name: str, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    words = ["pretrain", "-m", f"experiment={name}", f"data.path={notes}", *SMALL, *TINY[name]]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert err == ""
    planned = int(re.findall(r"^sweep: (\d+) points, 0 finished before", out, re.MULTILINE)[0])
    assert f"Launching {planned} jobs" in out
    assert out.count("pretrain: complete") == planned == len(list(tmp_path.glob("runs/*/*/result.json")))
    assert main(collecting(name)) == 0
    out = capfd.readouterr().out
    assert f"{planned} finished runs, 0 of them diverged" in out
    written = {path.name for path in (tmp_path / "experiments" / name).iterdir()}
    assert written == {"results.csv", "figure.png"} | (set() if name == "base_tuning" else {"optima.csv"})


@pytest.mark.parametrize("name", FOLDERS)
def test_the_commands_of_a_readme_are_valid(name: str) -> None:
    text = (ROOT / "experiments" / name / "README.md").read_text().replace("\\\n", "")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    own = [words[2:] for words in commands if words[0] == "sparsetrain" and f"experiment={name}" in words]
    assert own, "the README does not say how to run its experiment"
    for program, verb, *words in commands:
        if program == "python":
            assert (ROOT / verb).is_file()
        elif verb == "sweep":
            assert sorted([verb, *words]) == sorted(collecting(name))
        elif program == "sparsetrain":
            check(verb, complete(word for word in words if word != "-m"), sweep="-m" in words)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_number_of_points_in_a_readme_is_that_of_the_sweep(name: str) -> None:
    said = re.findall(r"# (\d+) points", (ROOT / "experiments" / name / "README.md").read_text())
    parsed = OverridesParser.create().parse_overrides(with_sweep("pretrain", [f"experiment={name}"]))
    sizes = [len(list(override.sweep_string_iterator())) for override in parsed if override.is_sweep_override()]
    assert [int(number) for number in said] == [math.prod(sizes)]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_tiny_form_only_changes_settings_that_the_sweep_has(name: str) -> None:
    whole = {word.partition("=")[0] for word in with_sweep("pretrain", [f"experiment={name}"])}
    small = {word.partition("=")[0] for word in with_sweep("pretrain", [f"experiment={name}", *SMALL, *TINY[name]])}
    assert whole <= small


def test_the_coordinates_experiment_runs(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["coord-check", "experiment=supar_coordinates", f"data.path={notes}", *NARROW, "run_dir=run"]
    words += ["check.seeds=1", "check.steps=1", "check.values=[0,0.5]", "stage.batch_size=2", "data.context=24"]
    assert main(words) == 0
    assert "supar: worst max/min" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())["schemes"]) == {"sp", "mup", "supar"}


def test_a_sweep_that_was_killed_goes_on(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    words = ["pretrain", "-m", "experiment=dynamic_masks_caveat", f"data.path={notes}", *SMALL, *NARROW]
    words += [*ONE, "seed=0,1", "sparsity=static", "sparsity.evolution.every=1"]
    true_loss, calls = Transformer.loss, 0

    def loss(self: Transformer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first step of the second point
            os.kill(os.getpid(), signal.SIGTERM)
        return true_loss(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "loss", loss)
        assert main(words) > 2
    capfd.readouterr()
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "sweep: 4 points, 1 finished before, 3 to run" in out
    assert "as the 1 finished ones" in out
    assert "resuming after step 1 of 2" in out


@pytest.mark.slow
def test_a_sweep_runs_side_by_side_and_a_bad_point_is_one_line(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", "-m", "experiment=supar_lr_transfer", f"data.path={notes}", *SMALL, *NARROW, "seed=0"]
    words += ["sparsity.sparsity=0.5", "optimizer.lr=0.002", "parameterization=supar", "sparsity.backend=masked"]
    words += ["data.max_documents=50,1,60"]
    assert main([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert "data.max_documents=1 is too small" in err
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 2
    # The same points, wherever they were computed.
    assert main(words) == 2
    assert capfd.readouterr().out.count("pretrain: already done") == 2
