"""Help of a verb: every setting once, with its default, type, choices and meaning, from the code that checks it."""

from __future__ import annotations

import re

import pytest
from shell import Shell

from sparsetrain.cli.allowed import joined
from sparsetrain.cli.compose import defaults, flat, groups
from sparsetrain.cli.entries import places
from sparsetrain.cli.help import describe, sections
from sparsetrain.cli.meanings import about
from sparsetrain.cli.schema import union
from sparsetrain.cli.verbs import with_settings
from sparsetrain.data.tasks.registry import TASKS
from sparsetrain.models.config import MLPS, POSITIONS
from sparsetrain.optim import SCHEDULES
from sparsetrain.parameterization.rules import SCHEMES
from sparsetrain.sparsity import EvolutionConfig
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.stages.config import FINETUNE_MODES


@pytest.mark.parametrize("verb", with_settings())
def test_help_lists_every_group_and_setting_and_explains_them(verb: str) -> None:
    lines = describe(verb).splitlines()
    assert all(len(line) <= 80 or len(line.split()) <= 2 for line in lines)
    text = re.sub(r",\n {8,}", ", ", "\n".join(lines))  # long lists span several lines
    for group, choices in groups(verb).items():
        assert re.search(rf"^  {group} +{re.escape(', '.join(choices))}$", text, re.MULTILINE)
    found = sections(verb)
    shown = re.findall(r"^  ([\w.\[\]-]+) = ", text, re.MULTILINE)
    assert sorted(shown) == sorted(setting.name for section in found for setting in section.settings)
    rules = {f"sparsity.evolution.{name}" for name in union(EvolutionConfig)}
    lists = ("pipeline.arms.", "data.sources.", "budget.batch_size.")
    assert {name for name in flat(defaults(verb)) if not name.startswith(lists)} <= {*shown, *rules}
    assert "any value" not in text, "the field needs metadata with a type"
    for section in found:
        assert about(section.kind), section
        for setting in section.settings:
            assert setting.meaning, f"{section.kind.__name__}: {setting.key} has no line in Args"


def said_by(verb: str, name: str) -> str:
    found = sections(verb)
    setting = next(each for section in found for each in section.settings if each.name == name)
    return setting.type(places(found))


def test_help_knows_what_the_checks_allow() -> None:
    """Help shows the choices and ranges that the errors name, although nothing lists them twice."""
    for name, choices in {
        "model.mlp": MLPS,
        "model.positions": POSITIONS,
        "schedule.name": list(SCHEDULES),
        "sparsity.evolution.rule": list(RULES),
        "task.name": sorted(TASKS),
        "mode": FINETUNE_MODES,
        "parameterization.scheme": list(SCHEMES),
        "budget.wd_rule": ("none", "tau"),
    }.items():
        assert said_by("finetune", name) == f"text: {joined(choices)}"
    assert said_by("generate", "model.rope_scaling") == "text: linear, ntk, yarn or null"
    assert said_by("coord-check", "check.schemes") == f"list of texts: {joined(SCHEMES)}"
    for name, text in {
        "optimizer.lr": "number above 0",
        "optimizer.beta2": "number in [0, 1)",
        "threads": "integer of at least 1 or null",
        "data.key_values.marks": "integer from 1 to 12",
        "sparsity.evolution.start": "number in [0, 1]",
        "model.positions_scale": "number of at least 1 or text",
        "budget.phases[].share": "number in (0, 1] or null",
        "budget.phases": "list of sections budget.phases[] or null",
        "init_from": "path or null",
    }.items():
        assert said_by("finetune", name) == text


def test_help_of_a_topic_says_all_about_it(shell: Shell) -> None:
    first = "model.positions_scale = 1.0  number of at least 1 or text\n      factor s, at least 1, by which ALiBi"
    status, out, err = shell.run("pretrain", "--help", "model.positions_scale")
    assert (status, err) == (0, "")
    assert f"  {first}" in out
    assert "stay bit for bit the same." in " ".join(out.split())  # the last words of its entry
    assert "model.mlp" not in out
    out = shell.run("pretrain", "--help", "sparsity", "budget.phases")[1]
    assert "matching entry of groups gives its sparsity" in " ".join(out.split())
    for name in ("sparsity.evolution.curve", "sparsity.groups[].match", "budget.phases[].share"):
        assert f"  {name} = " in out
    every = shell.run("pretrain", "--help", "all")[1]
    assert all(f"  {setting.name} = " in every for section in sections("pretrain") for setting in section.settings)
    assert "no section or setting 'modle' (did you mean 'model'?)" in shell.refused("pretrain", "--help", "modle")
    assert "(did you mean 'optimizer.lr'?)" in shell.refused("pretrain", "--help", "lr")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrain n_tokens=8", "pretrain has no setting 'n_tokens'; it is one of prompt"),
        ("pretrain task.name=pubmedqa", "'task.name'; it is one of data, finetune, prompt, pipeline"),
        ("pretrain +mode=sparse", "pretrain has no setting 'mode'; it is one of finetune, prompt"),
        ("finetune lengths=[1]", "finetune has no setting 'lengths'; it is one of evaluate"),
        ("pretrain vocabulary.k=3", "pretrain has no setting 'vocabulary.k'; it is one of adapt"),
        ("pretrain steps=3", "pretrain has no setting 'steps' (did you mean 'budget.steps'?)"),  # one of its own
        ("pretrain init_form=x", "pretrain has no setting 'init_form' (did you mean 'init_from'?)"),
        ("pretrain experiment=demo", "In 'experiment/demo': task is no setting; it is one of data, finetune, prompt"),
        (
            "pipeline pipeline.stages.finetune.n_tokens=3",
            "pipeline.stages.finetune: finetune has no setting 'n_tokens'; it is one of prompt",
        ),
        (
            "pipeline pipeline.stages=[{name:pretrain,n_tokens:3}]",
            "pipeline.stages[0].n_tokens is not a setting of pretrain; it is one of prompt",
        ),
    ],
)
def test_an_error_names_the_verb_that_has_the_setting(shell: Shell, words: str, said: str) -> None:
    assert said in shell.refused(*words.split())
