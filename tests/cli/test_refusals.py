"""Settings and files of a user that cannot be used: one line with the dotted name or the file, and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shell import Shell

from sparsetrain.cli.resolve import load
from sparsetrain.cli.sources import FileConfigSource
from sparsetrain.errors import UserError

BROKEN: dict[str, tuple[str | bytes, str]] = {
    "open": ("sparsity: [", "{path}, line 1 is not valid YAML: expected the node content"),
    "tab": ("evolution:\n\tevery: 2\n", "{path}, line 2 is not valid YAML: found character '\\t'"),
    "bytes": (b"\xff\xfe", "{path} is not UTF-8 at byte 0"),
    "list": ("- 1\n- 2\n", "{path} holds [1, 2], which must be a mapping"),
    "twice": ("sparsity: 0\nsparsity: 1\n", "{path}, line 2: 'sparsity' occurs twice"),
    "tag": ("!!python/object:os.system {}", "{path}, line 1: the tag"),
    "alias": ("options: &a [*a]", "{path}, line 1: the alias 'a' refers to a value that contains it"),
    "deep": (f"deep: {'[' * 3000}{']' * 3000}", "{path}, line 1 nests values more than 100 deep"),
    "name": ("null: 2", "{path}: the name None must be text"),
    "package": ("# @package a b\nsparsity: 0.5\n", "{path}: Too many components in '@package a b'"),
    "circle": ("defaults: [circle]\n", "{path}: its defaults list leads back to the file itself"),
    "defaults": ("defaults: 3\n", "Invalid defaults list in 'sparsity/defaults', defaults must be a list"),
    "keys": ("defaults: [{a: 1, b: 2}]\n", "In sparsity/keys: Too many keys in default item"),
    "absent": ("defaults: [nothere]\n", "In 'sparsity/absent': Could not load 'sparsity/nothere'"),
    "type": (
        "evolution: {rule: rigl, every: two}",
        "In 'sparsity/type': sparsity.evolution.every='two' must be a whole number or null",
    ),
    "key": ("evolutoin: {every: 2}", "sparsity.evolutoin is no setting (did you mean 'evolution'?)"),
    "nothing": ("evolution: null", "In 'sparsity/nothing': sparsity.evolution=None must be a section of settings"),
    "section": ("# @package _global_\nbudget: 3\n", "In 'sparsity/section': budget=3 must be a section of settings"),
    "entry": ("groups: [{match: a, sparsity: x}]", "sparsity.groups: sparsity='x' must be a number"),
    "mapping": ("sparsity: {a: 1}", "sparsity.sparsity={{'a': 1}} must be a number"),
}


def folder_of(shell: Shell, name: str) -> tuple[Path, str]:
    """Write a broken file; return the directory of configurations, and the message to expect."""
    text, said = BROKEN[name]
    path = shell.home / "mine" / "sparsity" / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path.parents[1], said.format(path=path)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_a_user_is_one_line_that_names_it(shell: Shell, name: str) -> None:
    folder, said = folder_of(shell, name)
    line = shell.refused("pretrain", *shell.tiny, "--config-dir", str(folder), f"sparsity={name}")
    assert said in line
    assert all(word not in line for word in ("Config'", "Integer", "Float", "str'", "subclass"))


@pytest.mark.parametrize("name", ["open", "circle", "defaults"])
def test_a_sweep_and_a_question_refuse_a_broken_file_before_they_begin(shell: Shell, name: str) -> None:
    folder, said = folder_of(shell, name)
    words = ["pretrain", *shell.tiny, "--config-dir", str(folder)]
    assert said in shell.refused(*words, "-m", f"sparsity=dense,{name}")
    assert said in shell.refused(*words, "--info", "defaults", f"sparsity={name}")


def test_a_file_that_may_not_be_read_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = folder_of(shell, "key")
    path, whole = folder / "sparsity" / "key.yaml", Path.open

    def opened(self: Path, *words: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(self, *words)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(FileConfigSource.__base__, "load_config", refused)
    with pytest.raises(UserError, match=f"^cannot read {path}: Permission denied$"):
        FileConfigSource("test", str(folder)).load_config("sparsity/key")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1.5", "seed=1.5 must be a whole number"),
        ("seed=true", "seed=True must be a whole number"),
        ("seed=???", "seed is missing"),
        ("model.d_model=???", "model.d_model is missing"),
        ("budget=3", "budget=3 must be a section of settings"),
        ("budget={step: 3}", "budget.step is no setting (did you mean 'steps'?)"),
        ("budget.phases=[{share: 1, schedule: {warmup: z}}]", "budget.phases: schedule.warmup='z' must be a number or"),
        ("budget.steps=9223372036854775808", "budget.steps=9223372036854775808 must be a whole number of at most 92"),
        ("budget.phases=[{tokens: 9223372036854775808}]", "budget.phases[0].tokens=9223372036854775808 must be"),
        ("sparsity.block=[99999999999999999999,1]", "sparsity.block[0]=99999999999999999999 must be a whole number of"),
        ("schedule.segments=3", "schedule.segments=3 must be a list or null"),
        ("schedule.segments=[3]", "schedule.segments[0]=3 must be a section of settings"),
        ("schedule.segments=[{shap: linear}]", "schedule.segments: shap is no setting (did you mean 'shape'?)"),
        (
            "optimizer.schedules.beta1=[{shape: foo}]",
            "optimizer.schedules.beta1[0]: shape='foo' is not one of warmup, linear",
        ),
        (
            "optimizer.schedules.beta1={to: 1}",
            "optimizer.schedules.beta1={to: 1} has a section of settings where a li",
        ),
        (
            "budget.phases=[{share: 1, schedule: {warmup: 20}}]",
            "budget.phases[0].schedule.warmup=20.0 must be a fract",
        ),
        (
            "optimizer.schedules.beta1=[{shap: linear}]",
            "optimizer.schedules.beta1: shap is no setting (did you mean 'shape'?)",
        ),
        (
            "budget.phases=[{share: 1.0, schedule: {nam: cosine}}]",
            "budget.phases: schedule.nam is no setting (did you mean 'name'?)",
        ),
        ("schedule.segments=[{to: 0}]", "schedule.segments[0].shape is missing"),
        ("sparsity.groups=[{match: a}]", "sparsity.groups[0].sparsity is missing"),
        ("sparsity.sparsity=nan", "sparsity.sparsity=nan must be a number in [0, 1)"),
        ("sparsity.block=[a,b]", "sparsity.block[0]='a' must be a whole number"),
        ("sparsity.options=3", "sparsity.options=3 must be a section of settings"),
        ("sparsity.evolution=3", "sparsity.evolution=3 must be a section of settings"),
        ("optimizer.lr=null", "optimizer.lr=None must be a number"),
        ("~optimizer.lr", "optimizer.lr cannot be deleted; give it another value"),
        ("run_dir=[a]", "run_dir=[a] must be a path, not a list or a mapping; for a path of this name write run_dir="),
        ("data.path={a: 1}", "data.path={a: 1} must be a path, not a list or a mapping"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_line_with_its_dotted_name(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load("pretrain", [override])
    said = str(caught.value)
    assert said.startswith(line)
    assert "\n" not in said


def test_a_path_may_look_like_a_list_if_it_is_quoted() -> None:
    assert load("pretrain", ["run_dir='[a]'"]).run_dir == "[a]"
