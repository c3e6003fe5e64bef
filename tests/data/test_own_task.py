"""A user's own task: a registered function, and a file of the group ``task``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparsetrain as st
from sparsetrain.data import TASKS, Example, Task, TaskConfig, find_task, load_task, take
from sparsetrain.errors import UserError


def parity(config: TaskConfig) -> Task:
    numbers = [Example(f"{n}/0", f"{n} is", n % 2) for n in range(100)]
    return Task(
        name="parity",
        labels=("even", "odd"),
        answers=(" even", " odd"),
        train=take(numbers[:60], config.n_train, config.seed),
        validation=take(numbers[60:80], config.n_validation, config.seed),
        test=take(numbers[80:], config.n_test, config.seed),
    )


@pytest.fixture
def own_task() -> Iterator[None]:
    st.register_task("parity")(parity)
    yield
    TASKS.unregister("parity")


def test_it_is_a_file_of_the_group_task(shell: Any, own_task: None, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "task"
    folder.mkdir(parents=True)
    (folder / "parity.yaml").write_text("name: parity\nn_test: 12\n")
    shell.trained()
    words = ["init_from=run", "--config-dir", str(folder.parent), "budget.steps=2", "budget.batch_size=4"]
    status, _, err = shell.run("finetune", *words, "task=parity", "run_dir=tuned")
    assert status == 0, err
    result = json.loads(Path("tuned/result.json").read_text())
    assert (result["task"], result["n_train"], result["n_test"]) == ("parity", 60, 12)
    assert result["majority"] == load_task(TaskConfig("parity", n_test=12)).majority()
    status, out, err = shell.run("data", *shell.tiny[1:2], shell.tiny[-1], *words[1:3], "task=parity")
    assert status == 0, err
    assert "have different kinds of ids" in " ".join(out.split())
    line = shell.refused("finetune", *words, "task=parity", "task.name=parit", "run_dir=other")
    assert "task.name='parit' is not one of file, hub, pubmedqa, section_roles, parity (did you mean 'parity'?)" in line
    assert "task parity takes no path" in shell.refused("finetune", *words, "task=parity", "task.path=x")


def test_a_plan_loads_no_task_that_would_be_downloaded(own_task: None) -> None:
    asked = []
    st.register_task("far", lambda config: replace(parity(config), name="far"), is_local=lambda config: bool(asked))
    try:
        assert find_task(TaskConfig("far")) is None
        asked.append(True)
        found = find_task(TaskConfig("far"))
        assert found is not None
        assert found.name == "far"
    finally:
        TASKS.unregister("far")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": ("even",)}, "task parity: 1 labels and 2 answers"),
        ({"answers": (" even",)}, "task parity: 2 labels and 1 answers"),
        ({"validation": []}, "task parity: no validation example"),
        (
            {"test": [Example("1", "1 is", 2)]},
            "task parity: example '1' has label 2; it must be at least 0 and below 2",
        ),
        ({"name": "parite"}, "task.name=parity: its loader returned a task of another name, 'parite'"),
    ],
)
def test_a_task_that_cannot_be_used_is_one_line(changes: dict[str, Any], said: str) -> None:
    st.register_task("parity", lambda config: replace(parity(config), **changes))
    try:
        with pytest.raises(UserError) as caught:
            load_task(TaskConfig("parity"))
        assert str(caught.value).startswith(said)
    finally:
        TASKS.unregister("parity")


def test_a_taken_name_is_refused_and_the_same_task_again_is_not(own_task: None) -> None:
    st.register_task("parity", parity)
    with pytest.raises(
        UserError, match=r"^task name 'parity' is taken; registered are file, hub, pubmedqa, section_roles, parity$"
    ):
        st.register_task("parity", lambda config: parity(config))
    assert TASKS["parity"].load is parity
