"""Plugins: files, modules and entry points that register something, and errors about broken ones."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

import pytest

from sparsetrain import plugins
from sparsetrain.cli import main
from sparsetrain.data.tasks.registry import TASKS
from sparsetrain.errors import UserError

TOY = """
from dataclasses import dataclass
import sparsetrain
from sparsetrain.data import Example, Task

@dataclass  # looks its module up
class Toy:
    answer: "str" = " a"

@sparsetrain.register_task({name!r})
def load(config):
    split = [Example(str(n), f"{{n}} is", 0) for n in range(4)]
    return Task({name!r}, ("a",), (Toy().answer,), split, split, split)
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")  # restores the variable after the test
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(TASKS, "_things", dict(TASKS._things))


def test_an_unknown_name_is_looked_for_in_the_plugins_that_the_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that a launcher starts has not imported the plugin yet."""
    (tmp_path / "toy_of_variable.py").write_text(TOY.format(name="toy_file"))
    (tmp_path / "toy_module.py").write_text(TOY.format(name="toy_module"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"task\.name='toy_file' is not one of"):
        TASKS.check("toy_file")
    plugins.name([str(tmp_path / "toy_of_variable.py"), "toy_module"])
    plugins.name(["toy_module"])
    assert os.environ[plugins.VARIABLE].split(os.pathsep) == [str(tmp_path / "toy_of_variable.py"), "toy_module"]
    assert TASKS["toy_file"] is not TASKS["toy_module"]


def test_the_entry_points_of_installed_packages_count_and_a_broken_one_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "toy_installed.py").write_text(TOY.format(name="toy_installed"))
    (tmp_path / "toy_broken.py").write_text("import sparsetrain\nsparsetrain.no_such_name\n")
    about = tmp_path / "toy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[sparsetrain.plugins]\nbroken = toy_broken\ntoy = toy_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [entry.name for entry in metadata.entry_points(group=plugins.GROUP)] == ["broken", "toy"]
    TASKS.check("toy_installed")
    assert re.fullmatch(r"plugin broken = toy_broken: AttributeError: .*\(toy_broken.py, line 2\)", caplog.messages[-1])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' (bad_plugin.py, line 1)"),
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax (bad_plugin.py, line 2)\n"),
        ("x = 1\nraise SystemExit(0)", "SystemExit: 0 (bad_plugin.py, line 2)\n"),
        ("raise SystemExit", "SystemExit (bad_plugin.py, line 1)\n"),
        ("import sys\nsys.exit('no\\nmore')", "SystemExit: no more (bad_plugin.py, line 2)\n"),
        (
            "import json\njson.loads('[')",
            "JSONDecodeError: Expecting value: line 1 column 2 (char 1) (bad_plugin.py, line 2)",
        ),
        ("import sparsetrain\nsparsetrain.register_task('pubmedqa', print)", "task name 'pubmedqa' is taken"),
    ],
)
def test_a_broken_plugin_is_refused_in_one_line(
    text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad_plugin.py"
    path.write_text(text)
    assert main(["report", "nowhere", f"--plugin={path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sparsetrain: plugin {path}: ")
    assert line in error
    assert error.count("\n") == 1


def test_what_is_no_plugin_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "math.py").write_text("")
    for arguments, line in {
        ("--plugin",): "--plugin needs a value: a Python file or a module",
        ("--plugin", "nowhere.py"): "--plugin=nowhere.py: no such file",
        ("--plugin", ""): "--plugin='' is empty; give a Python file or a module",
        ("--plugin=",): "--plugin='' is empty; give a Python file or a module",
        ("--plugin", "no_such_module"): "ModuleNotFoundError: No module named 'no_such_module'\n",
        ("--plugin", str(tmp_path / "math.py")): "a module named 'math' is imported already; give the file",
    }.items():
        assert main(["report", "nowhere", *arguments]) == 2
        assert line in capsys.readouterr().err


def test_a_missing_file_of_the_variable_and_an_interrupt_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "gone.py")
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err == "sparsetrain: plugin gone.py: no such file\n"
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "interrupted.py"))
    assert main(["report", "nowhere"]) == 130


def test_a_verb_with_settings_takes_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy_of_command.py").write_text(TOY.format(name="toy_command"))
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--plugin", "toy_of_command.py", "task.name=toy_comand"]) == 2
    assert capsys.readouterr().err.endswith("toy_command (did you mean 'toy_command'?)\n")
