"""A user's own directories of configuration: their groups and experiments count like the library's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from shell import Shell

from sparsetrain.cli import folders, multirun
from sparsetrain.cli.compose import groups
from sparsetrain.cli.multirun import points
from sparsetrain.cli.overrides import parse
from sparsetrain.cli.resolve import load
from sparsetrain.cli.verbs import with_settings
from sparsetrain.errors import UserError

HEAD = "# @package _global_\n"
FILES = {
    "model/small.yaml": "defaults: [tiny]\nn_layers: 1\n",
    "sparsity/moving.yaml": "defaults: [rigl]\nsparsity: 0.5\nevolution: {every: 1, stop: 1.0}\n",
    "schedule/flat/long.yaml": "name: constant\n",
    "task/short.yaml": "name: pubmedqa\nn_train: 3\n",
    "pipeline/one.yaml": "stages: [{name: pretrain}]\n",
    "hardware/laptop.yaml": f"{HEAD}budget: {{batch_size: 2}}\n",
    "hardware/server.yaml": f"{HEAD}budget: {{batch_size: 8}}\n",
    "budget/short.yaml": "steps: 5\n",
    "budget/wide.yaml": "batch_size: 8\n",
    "hydra/launcher/two.yaml": "defaults: [joblib]\nn_jobs: 2\n",
    "experiment/rates.yaml": f"""{HEAD}
defaults:
  - override /model: small
  - override /sparsity: moving
  - override /hydra/launcher: joblib
parameterization: {{base_width: 16}}
budget: {{steps: 2}}
hydra:
  launcher: {{n_jobs: 1}}
  sweeper: {{params: {{optimizer.lr: "choice(1e-3,2e-3)"}}}}
""",
    "experiment/at_home.yaml": f"{HEAD}defaults: [/hardware: laptop]\nseed: 7\n",
    "experiment/grid.yaml": f"{HEAD}hydra: {{sweeper: {{params: {{hardware: 'laptop,server'}}}}}}\n",
    "experiment/plain.yaml": f"\n{HEAD}# A comment.\nseed: 9\n",
}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def mine(shell: Shell) -> Path:
    return write(shell.home / "mine", FILES)


def composed(shell: Shell, *words: str) -> dict[str, Any]:
    status, out, err = shell.run(*words, "--cfg", "job")
    assert (status, err) == (0, "")
    found: dict[str, Any] = yaml.safe_load(out)
    return found


def listed(help_text: str) -> dict[str, list[str]]:
    """Return the choices of groups that a help page lists."""
    text = re.sub(r",\n +", ", ", help_text.partition("groups (group=choice):\n")[2].partition("\n\n")[0])
    return {row.split()[0]: row.split(maxsplit=1)[1].split(", ") for row in text.splitlines() if "*" not in row[:5]}


def test_help_marks_the_choices_of_ones_own(shell: Shell, mine: Path) -> None:
    status, out, err = shell.run("pretrain", "--help", "--config-dir", "mine")
    assert (status, err) == (0, "")
    own, usual = listed(out), listed(shell.run("pretrain", "--help")[1])
    assert own["hardware"] == ["laptop*", "server*", "null"]
    assert own["schedule"] == sorted([*usual["schedule"], "flat/long*"])
    for name in usual:
        assert [each for each in own[name] if not each.endswith("*")] == usual[name]
    assert "\n  * a file of your own (with --config-dir=mine)\n" in out
    assert "task" not in own  # pretrain has no such group
    assert "*" not in "".join(usual)
    assert "short*" in listed(shell.run("finetune", "--help", "--config-dir", "mine")[1])["task"]


def test_own_choices_count_in_every_place(shell: Shell, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that extends one of the library's, one in a subfolder, a group that the library does not have."""
    found = composed(shell, "pretrain", "--config-dir", "mine", "model=small", "schedule=flat/long", "hardware=laptop")
    usual = composed(shell, "pretrain", "model=tiny", "model.n_layers=1", "schedule.name=constant", "schedule.final=1")
    assert found["model"] == usual["model"]
    assert found["schedule"]["name"] == "constant"
    assert found["budget"]["batch_size"] == 2
    stages = composed(shell, "pipeline", "--config-dir=mine", "pipeline=one")["pipeline"]["stages"]
    assert stages == [{"name": "pretrain"}]
    # A typed choice replaces that of an experiment, as with the library's groups.
    for words, size in (([], 2), (["hardware=server"], 8)):
        found = composed(shell, "--config-dir", "mine", "pretrain", "experiment=at_home", *words)
        assert (found["budget"]["batch_size"], found["seed"]) == (size, 7)
    assert composed(shell, "pretrain", "--config-dir=mine", "experiment=plain")["seed"] == 9
    # So is a section that has no group in the library.
    for words, sizes in ((["budget=short"], (5, 32)), (["budget=wide", "budget.steps=4"], (4, 8))):
        budget = composed(shell, "pretrain", "--config-dir=mine", *words)["budget"]
        assert (budget["steps"], budget["batch_size"]) == sizes
    (mine / "seed").mkdir()  # without files it is no group
    assert composed(shell, "pretrain", "--config-dir=mine", "seed=3", "budget={steps: 2}")["budget"]["steps"] == 2
    monkeypatch.setenv(folders.VARIABLE, "mine")
    assert load("pretrain", ["hardware=null", "model=small"]).model["n_layers"] == 1
    assert load("finetune", ["task=short", "task.path=x", "init_from=null"]).task.n_train == 3


def test_every_verb_with_settings_takes_them(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(folders.VARIABLE, "mine")
    for verb in with_settings():
        found = groups(verb)
        assert found["hardware"] == ["laptop", "server", "null"]
        assert "small" in found.get("model", ["small"])
        assert "rates" in found.get("experiment", ["rates"])


def test_several_directories_in_any_place_of_the_line(
    shell: Shell, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the verb and before it, twice, in the home directory, by the variable, through links, named twice."""
    other = write(tmp_path / "away" / "conf", {"model/wide.yaml": "defaults: [small]\nd_model: 96\n"})
    monkeypatch.setenv("HOME", str(tmp_path / "away"))
    os.symlink(other, shell.home / "link")
    (shell.home / "linked").mkdir()
    os.symlink(other / "model", shell.home / "linked" / "model")
    for words in (
        ["pretrain", "--config-dir", "mine", "--config-dir=~/conf", "model=wide"],
        ["-cd", "mine", "pretrain", "model=wide", "--config-dir", str(other)],
        ["--config-dir=link", "pretrain", "--config-dir", "./mine", "model=wide", "--config-dir=~/conf"],
        ["pretrain", "model=wide", "--config-dir=linked", "--config-dir=mine"],
    ):
        found = composed(shell, *words)["model"]
        assert (found["d_model"], found["n_layers"]) == (96, 1)
    monkeypatch.setenv(folders.VARIABLE, os.pathsep.join(["mine", "", str(other)]))
    assert composed(shell, "pretrain", "model=wide", "--config-dir", "mine")["model"]["d_model"] == 96
    line = shell.refused("plan", "pretrain", "model=wid")
    assert f"did you mean 'wide'?) (with SPARSETRAIN_CONF=mine:{other})" in line
    assert folders.places() == [mine, other]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-dir", "nowhere"], "--config-dir=nowhere: no such directory\n"),
        (["--config-dir="], "--config-dir is empty; it must be a path\n"),
        (["-cd"], "-cd needs a value: a directory\n"),
        (["--config-dir", "~nosuchuser/x"], "--config-dir=~nosuchuser/x: there is no such user\n"),
        (["--config-dir=mine/model/small.yaml"], "is a file; name the directory that holds the folders"),
        (["--config-dir=mine/model", "model=small"], "small.yaml: name the directory "),
        (["--config-dir=mine", "model=low"], "low.yml must end with .yaml"),
        (["--config-dir=mine", "model=out"], "out.yaml: it must lie in "),
        (["--config-dir=mine", "model=smal"], "small, tiny (did you mean 'small'?) (with --config-dir=mine)\n"),
        (["--config-dir=mine", "hardware=lapto"], "is not one of laptop, server, null (did you mean 'laptop'?)"),
        (["--config-dir=mine", "budget=null"], "budget=null is not one of short, wide"),
        (["--config-dir=mine", "hardwar=laptop"], "has no setting 'hardwar' (did you mean 'hardware'?)"),
        (["--config-dir=mine", "experiment=bare"], "bare.yaml needs the first line '# @package _global_'"),
        (["--config-dir=mine", "experiment=below"], "below.yaml needs the first line '# @package _global_'"),
        (["--config-dir=mine", "experiment=marked"], "named experiment; it begins with a byte-order mark"),
        (["--config-dir=mine", "experiment=broken"], "broken.yaml is a link that leads nowhere"),
        (["--config-dir=mine", "room=one"], "one.yaml needs the first line '# @package _global_'"),
        (["--config-dir=mine", "experiment=tab"], "tab.yaml, line 2 is not valid YAML: found character"),
        (["--config-dir=mine", "hydra.searchpath=[a]"], "hydra.searchpath: name all directories with --config-dir"),
        (["--config-dir=mine", "-m", "experiment=plain,rates"], "rates sets hydra.launcher, which counts only if it"),
        (["--config-dir=mine", "-m", "experiment=grid,plain"], "grid sets hydra.sweeper.params.hardware, which"),
        (["--config-dir=mine", "hydra/launcher=tow"], "is not one of basic, joblib, two (did you mean 'two'?)"),
        (["--config-dir=mine", "experiment=cluster"], "pip install 'sparsetrain[slurm]' adds it"),
        (["--config-dir=mine", "--cfg", "hydra", "-m"], "--cfg and -m: give one of them"),
    ],
)
def test_what_cannot_be_used_is_one_line(shell: Shell, mine: Path, words: list[str], said: str) -> None:
    more = {
        "model/low.yml": "",
        "out.yaml": "",
        "experiment/bare.yaml": "seed: 3\n",
        "experiment/below.yaml": f"# A comment.\n{HEAD}seed: 3\n",
        "experiment/marked.yaml": f"\ufeff{HEAD}seed: 3\n",
        "room/one.yaml": "seed: 3\n",
        "experiment/tab.yaml": "a:\n\tb: 1\n",
        "experiment/cluster.yaml": f"{HEAD}defaults: [override /hydra/launcher: submitit_slurm]\n",
    }
    write(mine, more)
    (mine / "experiment" / "broken.yaml").symlink_to("nowhere.yaml")
    assert said in shell.refused("pretrain", *words)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model/demo.yaml", "the library has model=demo too; rename yours"),
        ("seed/mine.yaml", "/seed: seed is a setting of pretrain; give the folder another name"),
        ("experiment/1.yaml", "/experiment/1.yaml: Hydra takes 1 for a value; rename the file"),
        ("pretrain.yaml", "the library has a file of the name pretrain.yaml too; rename yours"),
        ("hydra/launcher/joblib.yaml", "Hydra has launcher=joblib too; rename yours"),
        ("experiment/plain.yaml", "other/experiment/plain.yaml and"),
    ],
)
def test_a_name_that_cannot_count_is_refused(shell: Shell, mine: Path, name: str, said: str) -> None:
    """Of two files of one name Hydra would silently read one; others it would not find."""
    write(shell.home / "other", {name: f"{HEAD}seed: 1\n"})
    line = shell.refused("plan", "pretrain", "--config-dir=mine", "--config-dir=other")
    assert said in line
    assert f"{shell.home / 'other'}/" in line


def test_a_directory_that_may_not_be_read_is_one_line(
    shell: Shell, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.listdir

    def refuse(place: Path) -> list[str]:
        if place == mine:
            raise PermissionError(13, "Permission denied")
        return whole(place)

    monkeypatch.setattr(os, "listdir", refuse)
    assert shell.refused("pretrain", "--config-dir=mine") == "sparsetrain: --config-dir=mine: Permission denied\n"


def test_the_variable_matters_only_to_verbs_with_settings(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(folders.VARIABLE, "nowhere")
    assert shell.refused("plan", "pretrain") == "sparsetrain: SPARSETRAIN_CONF=nowhere: no such directory\n"
    assert shell.refused("pretrain", "--help") == "sparsetrain: SPARSETRAIN_CONF=nowhere: no such directory\n"
    assert "SPARSETRAIN_CONF" not in shell.refused("report", "run")
    assert shell.run("--help")[0] == 0


def test_a_sweep_over_own_groups(shell: Shell, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of an experiment's sweeper, and typed ones; ``plan`` and the run see the same points."""
    monkeypatch.setenv(folders.VARIABLE, "mine")
    for words in (["experiment=grid"], ["experiment=plain", "hardware=laptop,server"]):
        given = multirun.as_typed("pretrain", words, sweep=True)
        swept = multirun.with_sweep("pretrain", given)
        multirun.check("pretrain", swept, sweep=True)
        assert [found.budget.batch_size for found in points("pretrain", swept) if found] == [2, 8]
    status, out, err = shell.run("plan", "pretrain", "-m", *shell.tiny[:-1], "experiment=grid", "hardware=laptop")
    assert (status, out.splitlines()[0], err) == (0, "points: 1", "")
    assert not multirun.launches_processes("pretrain", ["experiment=rates"])
    assert multirun.launches_processes("pretrain", ["experiment=rates", "hydra.launcher.n_jobs=2"])
    assert multirun._hydras("pretrain", parse(["hydra/launcher=two"])).launcher.n_jobs == 2


def test_an_own_experiment_is_swept_summarised_and_read_without_its_file(shell: Shell, mine: Path) -> None:
    """Its runs hold all of their settings: they resume, and later stages begin, when the directory is gone."""
    common = [word for word in shell.tiny if not word.startswith(("model=", "parameter", "budget.steps"))]
    words = ["pretrain", *common, "--config-dir", "mine", "experiment=rates"]
    status, _, err = shell.run("-cd", "mine", "pretrain", "-m", *common, "experiment=rates")
    assert (status, err) == (0, "")
    runs = sorted((shell.home / "runs").glob("pretrain-*"))
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert [result["status"] for result in results] == ["complete"] * 2
    assert {yaml.safe_load((run / "config.yaml").read_text())["model"]["n_layers"] for run in runs} == {1}
    assert shell.run("sweep", "runs", "--out", "swept")[0] == 0
    assert len((shell.home / "swept" / "results.csv").read_text().splitlines()) == 3
    assert shell.run("pretrain", *words[1:], "run_dir=run", "model.d_model=32")[0] == 0
    (shell.home / "mine").rename(shell.home / "gone")
    typed = ["model=tiny", "model.n_layers=1", "sparsity=rigl", "sparsity.sparsity=0.5", "sparsity.evolution.every=1"]
    typed += ["sparsity.evolution.stop=1.0", "parameterization.base_width=16", "budget.steps=2"]
    status, out, _ = shell.run("pretrain", *common, *typed, "run_dir=run")
    assert (status, "already done" in out) == (0, True)
    status, out, err = shell.run("generate", "init_from=run", "max_new_tokens=1")
    assert (status, err) == (0, "")
    assert shell.run("report", "run", "--config-dir", "gone")[0] == 0
    assert "--config-dir=mine: no such directory" in shell.refused("report", "run", "--config-dir", "mine")


def test_outside_of_a_command_only_the_variable_counts(shell: Shell, mine: Path) -> None:
    assert shell.run("pretrain", "--config-dir", "mine", "--cfg", "job")[0] == 0
    assert folders.places() == []
    with pytest.raises(UserError, match="model=small is not one of"):
        load("pretrain", ["model=small"])
