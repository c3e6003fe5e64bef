"""The table of verbs: a row and a file add a verb; imports are lazy; messages give the new names of old keys."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import yaml
from fresh import Fresh
from shell import Shell

from sparsetrain.cli import compose
from sparsetrain.cli.arguments import Arguments
from sparsetrain.cli.parsers import parser_of
from sparsetrain.cli.resolve import load
from sparsetrain.cli.verb import Verb, named
from sparsetrain.cli.verbs import VERBS, with_settings
from sparsetrain.errors import UserError


@dataclasses.dataclass
class ToyConfig:
    """Say something.

    Args:
        words: what to say. times: how often.
    """

    words: str = "hello"
    times: int = 1

    def __post_init__(self) -> None:
        if self.times < 1:
            raise UserError(f"times={self.times} must be at least 1")


def say(config: ToyConfig) -> int:
    for _ in range(config.times):
        print(config.words)
    return config.times - 1


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test verb: one row of the table and one file."""
    row = Verb("Say it.", run=f"{__name__}:say", configuration=f"{__name__}:ToyConfig", examples=["sparsetrain toy"])
    monkeypatch.setitem(VERBS, "toy", row)
    tree = tmp_path / "conf"
    shutil.copytree(compose.config_directory(), tree)
    head = ["toy_schema", "launch", "_self_", {"override hydra/job_logging": "none"}]
    (tree / "toy.yaml").write_text(yaml.safe_dump({"defaults": head}))
    monkeypatch.setattr(compose, "config_directory", lambda: tree)


@pytest.mark.usefixtures("toy")
def test_a_row_and_a_file_make_a_verb(shell: Shell) -> None:
    assert "\nother:\n  toy          Say it.\n" in shell.run("--help")[1]
    status, out, err = shell.run("toy", "--help")
    assert (status, err) == (0, "")
    for line in ("usage: sparsetrain toy [key=value ...]", "Say it.", "  sparsetrain toy"):
        assert f"{line}\n" in out
    for name, about in {
        "words = hello  text": "what to say.",
        "times = 1  integer of at least 1": "how often.",
    }.items():
        assert f"  {name}\n      {about}\n" in out  # two entries of one line of the docstring
    assert shell.run("toy", "words=[1], a") == (0, "[1], a\n", "")
    assert shell.run("toy", "times=2") == (1, "hello\nhello\n", "")  # the verb's return value is the status
    status, out, _ = shell.run("toy", "--cfg", "job", "times=2")
    assert (status, yaml.safe_load(out)) == (0, {"words": "hello", "times": 2})
    status, out, err = shell.run("toy", "-m", "times=1,3", "words=a")
    assert (status, err, out.split().count("a")) == (2, "", 4)
    assert "times=0 must be at least 1" in shell.refused("toy", "times=0")
    assert "did you mean 'times'?" in shell.refused("toy", "tmes=0")
    assert "did you mean 'toy'?" in shell.refused("tyo")


def add_asked(parser: ArgumentParser) -> None:
    parser.add_argument("--loud", action="store_true", help="in capitals")
    parser.add_argument("verb", metavar="VERB", help="which verb")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="key=value", help="its settings and options")


def ask(given: Namespace) -> None:
    times = load(given.verb, Arguments.of(given.verb, given.arguments).overrides).times
    print(f"{given.verb} {times}".upper() if given.loud else f"{given.verb} {times}")


@pytest.mark.usefixtures("toy")
def test_a_verb_may_take_another_with_its_settings_and_options(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Verb("Ask.", run=f"{__name__}:ask", parser=f"{__name__}:add_asked", examples=["sparsetrain ask toy"])
    monkeypatch.setitem(VERBS, "ask", row)
    (shell.home / "mine").mkdir()
    assert shell.run("ask", "toy", "--config-dir", "mine", "times=3") == (0, "toy 3\n", "")
    assert shell.run("ask", "--loud", "toy") == (0, "TOY 1\n", "")
    assert "ask has no option '--lod' (did you mean '--loud'?)" in shell.refused("ask", "--lod", "toy")
    assert "no option '--config-dri'" in shell.refused("ask", "toy", "--config-dri=mine")
    assert "required: VERB" in shell.refused("ask")


def test_every_name_in_the_table_exists() -> None:
    for name, verb in VERBS.items():
        assert callable(named(verb.run))
        assert verb.cost is None or callable(named(verb.cost))
        if name in with_settings():
            sections = {entry.name for entry in dataclasses.fields(verb.kind())}
            assert sections >= {*verb.inherits}
        else:
            assert parser_of(name).format_help().startswith(f"usage: sparsetrain {name}")
            assert max(map(len, parser_of(name).described().splitlines())) <= 80


def test_help_of_a_verb_that_takes_paths_describes_each_option(shell: Shell) -> None:
    for verb in VERBS.keys() - with_settings():
        out = shell.run(verb, "--help")[1]
        for parser in (parser_of(verb), *parser_of(verb).subparsers.values()):
            actions = [action for action in parser._actions if not action.choices]
            assert all(action.help and action.help.split()[0] in out for action in actions)
            assert all(option in out for action in actions for option in action.option_strings)
    assert "picture=FILE" in shell.run("mask", "inspect", "--help")[1]


def test_help_imports_nothing_that_takes_long(fresh: Fresh) -> None:
    code = "import sys; from sparsetrain.cli import main; main(['--help']); main(['sweep', '--help'])\n"
    code += "print([name for name in ('hydra', 'rich', 'matplotlib', 'scipy', 'numba') if name in sys.modules])"
    done = fresh.run(code)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_verb_has_settings_or_words() -> None:
    for both in ({}, {"configuration": "a:B", "parser": "a:b"}):
        with pytest.raises(ValueError, match="either"):
            Verb("", run="a:b", examples=[], **both)


# Renamed keys.


STEPS = "schedule.steps is now budget.steps"
OLD = {
    "pretrain": {
        **dict.fromkeys(["schedule.steps=3", "+schedule.steps=3", "++schedule.steps=1,2", "~schedule.steps"], STEPS),
        "schedule.tokens=300": "schedule.tokens is now budget.tokens",
        "stage.batch_size=3": "stage.batch_size is now budget.batch_size",
        "stage.epochs=3": "stage.epochs is now budget.epochs",
        "stage.flops=3e9": "stage.flops is now budget.flops",
        "stage.log_every=3": "stage.log_every is now loop.log_every",  # renamed with its section
        "stage=finetune": "stage is now loop, and budget for its epochs, flops and batch_size",
    },
    "pipeline": {
        "pipeline.sparsities=[0,0.5]": "pipeline.sparsities is now pipeline.arms, as in pipeline.arms={spar",
        "pipeline.scratch=false": "pipeline.scratch is now pipeline.stages, in which the stage named scratch may be",
        "pipeline.prompt=null": "pipeline.prompt is now the entry named prompt in the list pipeline.stages",
        "pipeline.finetune.mode=sparse": "pipeline.finetune.mode is now pipeline.stages.finetune.mode",
        "pipeline.finetune.stage.epochs=1": "stage.epochs is now pipeline.stages.finetune.budget.epochs",
        "pipeline.prompt.schedule.steps=3": "schedule.steps is now pipeline.stages.prompt.budget.steps",
        "pipeline.prompt.start=finetune": "pipeline.prompt.start is now pipeline.stages.prompt.from",
        "pipeline.stages.prompt.stage.log_every=1": "log_every is now pipeline.stages.prompt.loop.log_every",
        "pipeline.stages=[{name: pretrain, stage: {batch_size: 3}}]": "now pipeline.stages.pretrain.budget.batch_size",
    },
}


@pytest.mark.parametrize("verb", OLD)
def test_an_old_key_is_named_with_the_new_one(verb: str, shell: Shell) -> None:
    for override, said in OLD[verb].items():
        line = shell.refused(verb, *(["-m"] if "1,2" in override else []), override)
        assert said in line


def test_old_keys_in_files_are_named_with_the_new_ones(shell: Shell) -> None:
    """In a user's own experiment, for a single run and a sweep."""
    folder = shell.home / "mine" / "experiment"
    folder.mkdir(parents=True)
    for content, said in [
        ("schedule: {steps: 3}\nstage: {batch_size: 3}", STEPS),
        ("stage: {batch_size: 3}", "stage is now loop, and budget for its epochs, flops and batch_size"),
        ("defaults: [override /stage: finetune]", "stage is now loop, and budget"),
        ("pipeline: {sparsities: [0.0, 0.5]}", "pipeline.sparsities is now pipeline.arms, as in"),
        ("pipeline: {prompt: null}", "pipeline.prompt is now the entry named prompt in the list pipeline.stages"),
        ("pipeline: {finetune: {stage: {epochs: 1}}}", "pipeline.finetune is now the entry named finetune in the list"),
        ("hydra: {sweeper: {params: {schedule.steps: '1,2'}}}", STEPS),
        ("lenth: {steps: 3}", "lenth is no setting"),
    ]:
        (folder / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
        mode = ["-m"] if "sweeper" in content or "schedule" in content else []
        line = shell.refused("pipeline", *mode, "--config-dir", "mine", *shell.tiny, "experiment=mine")
        place = "" if "sweeper" in content else "In 'experiment/mine': "
        assert line.startswith(f"sparsetrain: {place}{said}")
        assert line.endswith(" (with --config-dir=mine)\n")


def test_a_stage_as_a_whole_cannot_be_set(shell: Shell) -> None:
    for override in ("pipeline.stages.prompt=null", "~pipeline.stages.prompt"):
        line = shell.refused("pipeline", override)
        assert f"{override}: give a setting of the stage" in line
        assert "pipeline.stages=[...]" in line


def test_nothing_of_an_optional_group_may_be_said(shell: Shell) -> None:
    assert load("data", ["task=null"]).task is None
    assert load("data", ["task=pubmedqa", "task.path=x"]).task.name == "pubmedqa"
    assert load("pretrain", ["experiment=null"]) == load("pretrain", [])
    assert "a sweep cannot contain null" in shell.refused("data", "-m", "task=null,pubmedqa")
