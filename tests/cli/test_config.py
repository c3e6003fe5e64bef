"""All files of ``conf/`` compose; an unknown name is reported with the nearest known one; presets match the papers."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from sparsetrain.cli.checks import check
from sparsetrain.cli.compose import compose, config_directory, defaults, groups
from sparsetrain.cli.overrides import is_open
from sparsetrain.cli.resolve import load
from sparsetrain.cli.schema import schema_of
from sparsetrain.cli.verbs import VERBS, with_settings
from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError
from sparsetrain.optim import BudgetConfig, OptimizerConfig, ScheduleConfig
from sparsetrain.parameterization import Parameterization
from sparsetrain.sparsity import EvolutionConfig, SparsityConfig
from sparsetrain.stages.pipeline_config import canonical
from sparsetrain.training.state import LoopConfig

ROOTS = {name: VERBS[name].kind() for name in with_settings()}
CONF = config_directory()
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
# Further overrides that some choices require.
COMPANIONS = {
    "provision": ["hours=1"],
    "export": ["init_from=run", "output=out"],
    "import": ["source=model", "run_dir=run"],
    "predict": ["init_from=run", "input=new.csv", "output=labelled.csv"],
    "data=file": ["data.path=notes.txt"],
    "data=hub": ["data.hub_name=owner/name"],
    "optimizer=sgd": ["parameterization.optimizer=sgd"],
}


INHERITED = ("model", "data", "sparsity", "parameterization")


def verb_of(group: str) -> str:
    """Return a verb that has the group."""
    return next(verb for verb in ROOTS if group in groups(verb))


def command_of(path: Path) -> tuple[str, list[str]]:
    """Return the verb and the overrides of the command in an experiment's header."""
    for line in path.read_text().splitlines():
        match = re.fullmatch(r"# sparsetrain ([\w-]+) (.*)", line)
        if match:
            return match[1], match[2].split()
    raise AssertionError(f"{path} does not begin with its command line")


@pytest.mark.parametrize("name", [str(name) for name in FILES])
def test_every_file_composes_and_builds_its_dataclass(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(name)
    monkeypatch.setenv("PUBMEDQA_DIR", "questions")
    if path.parent.name == "experiment":
        verb, overrides = command_of(CONF / path)
        overrides = [re.sub(",.*", "", word) for word in overrides]  # the first point of a sweep
        assert f"experiment={path.stem}" in overrides
    elif path.parent == Path():
        if path.stem == "launch":  # Hydra's own settings, which every verb includes
            assert yaml.safe_load((CONF / path).read_text())
            return
        verb, overrides = path.stem, COMPANIONS.get(path.stem, [])
    else:
        group = path.parent.name
        choice = f"{group}={path.stem}"
        verb, overrides = verb_of(group), [choice, *COMPANIONS.get(choice, [])]
    if verb in ("generate", "prompt"):
        run = tmp_path / "run"
        run.mkdir()
        saved = {name: OmegaConf.to_container(defaults("pretrain")[name], resolve=True) for name in INHERITED}
        (run / "config.yaml").write_text(yaml.safe_dump(saved))
        overrides = [f"init_from={run}"]
    assert isinstance(load(verb, [item for item in overrides if item != "-m"]), ROOTS[verb])


# A file sets the setting that it is named after, even if that is the default of the dataclass.
NAMESAKES = {
    *("check/sparsity: axis", "data/medline: name", "optimizer/adamw: name", "optimizer/adamw_finetune: name"),
    *("parameterization/sp: scheme", "preset/full: what", "sparsity/dense: sparsity", "sparsity/static: pattern"),
    *("task/section_roles: name", "recipe/btlm: model.positions"),
}


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dicts, by dotted name."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, item in tree.items() for name, value in leaves(item, f"{prefix}{key}.").items()}


@functools.cache
def defaults_of(verb: str) -> dict[str, Any]:
    """Return the settings of a verb with only the defaults of its dataclasses."""
    return leaves(OmegaConf.to_container(OmegaConf.structured(schema_of(verb))))


def repeated(path: Path) -> set[str]:
    """Return the settings in a file that equal the dataclass's defaults, with and without this file."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / path))
    assert isinstance(content, dict)
    chosen = [next(iter(entry.items())) for entry in content.pop("defaults", [])]
    content.pop("hydra", None)
    content.pop("pipeline", None)  # a list of stages, tested separately
    group = path.parent.name
    everywhere = "# @package _global_" in (CONF / path).read_text()
    own = leaves(content) if everywhere else leaves(content, f"{group}.")
    own = {name: value for name, value in own.items() if not is_open(name)}  # names of the user's have no default
    verbs = [command_of(CONF / path)[0]] if group == "experiment" else [v for v in ROOTS if group in groups(v)]
    # A section may be null in one verb until it is chosen, and have defaults in another.
    verb, plain = next(found for found in ((v, defaults_of(v)) for v in verbs) if own.keys() <= found[1].keys())
    around = plain
    if group == "experiment":
        around = leaves(OmegaConf.to_container(compose(verb, [f"{name.split('/')[1]}={to}" for name, to in chosen])))
    return {name for name, value in own.items() if value == plain[name] == around[name]}


@pytest.mark.parametrize("name", [str(name) for name in FILES if name.parent.name not in ("", "pipeline")])
def test_a_file_says_what_differs_from_the_dataclasses(name: str) -> None:
    path = Path(name)
    found = repeated(path)
    said = {f"{path.with_suffix('')}: {key.removeprefix(f'{path.parent.name}.')}" for key in found}
    assert said <= NAMESAKES


def stages_in(path: Path) -> list[dict[str, Any]]:
    """Return the stages that a file lists."""
    content = yaml.safe_load((CONF / path).read_text())
    found: list[dict[str, Any]] = (content if path.parent.name == "pipeline" else content.get("pipeline", {})).get(
        "stages"
    )
    return found


@pytest.mark.parametrize("name", [str(name) for name in FILES if "stages:" in (CONF / name).read_text()])
def test_stages_of_a_pipeline_say_what_differs_from_their_verbs(name: str) -> None:
    listed = stages_in(Path(name))
    assert canonical({"stages": listed})["stages"] == listed


def test_a_stage_that_repeats_a_default_is_found() -> None:
    stage = {"name": "finetune", "budget": {"epochs": 5, "batch_size": 8}, "mode": "dense", "optimizer": {"lr": 1e-3}}
    assert canonical({"stages": [stage]})["stages"] == [{"name": "finetune", "budget": {"batch_size": 8}}]


def test_a_setting_that_repeats_its_default_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CONF", tmp_path)
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("name: sgd\nclip: 1.0\neps: 1e-8\nlr: 0.5\n")
    assert repeated(Path("optimizer/mine.yaml")) == {"optimizer.clip", "optimizer.eps"}


def test_no_verb_and_no_file_is_left_out() -> None:
    verbs = {path.stem for path in FILES if path.parent == Path()} - {"launch"}
    assert verbs == set(ROOTS)
    folders = {path.parent.name for path in FILES if path.parent != Path()}
    assert folders == {name for verb in ROOTS for name in groups(verb)}


@pytest.mark.parametrize(
    ("verb", "override", "wrong", "right"),
    [
        ("pretrain", "sed=1", "sed", "seed"),
        ("pretrain", "modle.d_model=64", "modle", "model"),
        ("pretrain", "model.d_modle=64", "d_modle", "model.d_model"),
        ("pretrain", "optimizer.lrr=1", "lrr", "optimizer.lr"),
        ("pretrain", "lr=1", "lr", "optimizer.lr"),
        ("pretrain", "budget.step=1", "budget.step", "budget.steps"),
        ("pretrain", "budget.phases=[{share: 1, contxt: 8}]", "contxt", "context"),
        ("pretrain", "sparsity.sparsiti=0.5", "sparsiti", "sparsity.sparsity"),
        ("pipeline", "pipeline.stages.finetune.optimizer.lrs=1", "lrs", "pipeline.stages.finetune.optimizer.lr"),
        ("pipeline", "pipeline.stages.promt.n_tokens=3", "promt", "prompt"),
        ("pipeline", "pipeline.stages=[{name: pretrain, lop: {log_every: 1}}]", "lop", "loop"),
        ("pipeline", "pipeline.stages=[{name: a, run: pretain}]", "pretain", "pretrain"),
        ("pipeline", "pipeline.arms={sparsty.sparsity:[0]}", "sparsty", "sparsity"),
        ("finetune", "task.n_trian=3", "n_trian", "task.n_train"),
        ("generate", "temprature=1", "temprature", "temperature"),
        ("pretrain", "model=dmo", "dmo", "demo"),
        ("pretrain", "model=tiny,dmo", "dmo", "demo"),  # as in a sweep
        ("pretrain", "schedule=cosin", "cosin", "cosine"),
        ("finetune", "task=pubmedq", "pubmedq", "pubmedqa"),
        ("pipeline", "experiment=dmeo", "dmeo", "demo"),
        ("pretrain", "optmizer=adamw", "optmizer", "optimizer"),
        ("pretrain", "model.mlp=gleu", "gleu", "gelu"),
        ("pretrain", "model.norm=layernrom", "layernrom", "layernorm"),
        ("pretrain", "model.positions=alibbi", "alibbi", "alibi"),
        ("pretrain", "schedule.name=linear_to_zer", "linear_to_zer", "linear_to_zero"),
        ("pretrain", "parameterization.scheme=supr", "supr", "supar"),
        ("pretrain", "data.name=medlin", "medlin", "medline"),
        ("pretrain", "device=cdua", "cdua", "cuda"),
        ("pretrain", "loop.precision=bf61", "bf61", "bf16"),
        ("pretrain", "sparsity.pattern=randm", "randm", "random"),
        ("pretrain", "sparsity.backend=maskd", "maskd", "masked"),
        ("finetune", "mode=dens", "dens", "dense"),
        ("pipeline", "pipeline.stages.prompt.from=pretrian", "pretrian", "pretrain"),
        ("pretrain", "sparsity=0.75", "0.75", "sparsity.sparsity=0.75"),
    ],
)
def test_a_misspelt_word_is_named_beside_the_nearest(verb: str, override: str, wrong: str, right: str) -> None:
    with pytest.raises(UserError) as caught:
        check(verb, [override], sweep=True) if override.startswith("model=tiny,") else load(verb, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert wrong in message
    assert f"did you mean '{right}'?" in message


@pytest.mark.parametrize(
    ("verb", "override", "parts"),
    [
        ("pretrain", "model.d_model=wide", ["model.d_model='wide' must be a whole number"]),
        ("pretrain", "optimizer.lr=fast", ["optimizer.lr='fast' must be a number"]),
        ("pretrain", "model.bias=perhaps", ["model.bias='perhaps' must be true or false"]),
        ("pretrain", "optimizer=null", ["optimizer=null", "adamw"]),
        ("pretrain", "optimizer.lr=null", ["optimizer.lr"]),
        ("pretrain", "seed=1.5", ["seed", "1.5"]),
        ("pretrain", "sparsity.groups=3", ["sparsity.groups"]),
        ("pretrain", "seed.more=1", ["seed", "single value"]),
        ("pretrain", "optimizer.lr=1e-3,2e-3", ["optimizer.lr=1e-3,2e-3", "sparsetrain pretrain -m"]),
        ("pretrain", "model.d_model=[1", ["[1"]),
        ("pretrain", "seed", ["seed"]),
    ],
)
def test_a_value_of_another_type_is_named(verb: str, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(verb, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


OUT_OF_RANGE: list[tuple[type, dict[str, Any]]] = [
    *[(OptimizerConfig, {name: -1.0}) for name in ("lr", "weight_decay", "eps", "clip", "beta1", "momentum")],
    *[(OptimizerConfig, {name: float("nan")}) for name in ("lr", "weight_decay", "eps", "clip", "beta1", "beta2")],
    *[(OptimizerConfig, {name: float("inf")}) for name in ("lr", "weight_decay", "eps", "clip")],
    *[(OptimizerConfig, {name: 1.0}) for name in ("beta1", "beta2", "momentum")],
    (OptimizerConfig, {"name": "adam"}),
    *[(BudgetConfig, {name: 0}) for name in ("steps", "tokens", "epochs", "flops", "batch_size")],
    *[(BudgetConfig, {name: float("nan")}) for name in ("epochs", "flops")],
    (ScheduleConfig, {"warmup": 1.0}),
    (ScheduleConfig, {"warmup_steps": -1}),
    (ScheduleConfig, {"final": 0.5}),
    (ScheduleConfig, {"name": "cosine", "final": 1.5}),
    (SparsityConfig, {"sparsity": 1.0}),
    (SparsityConfig, {"sparsity": -0.1}),
    (SparsityConfig, {"sparsity": float("nan")}),
    *[(LoopConfig, {name: 0}) for name in ("accumulation", "keep_last", "eval_sequences")],
    *[(LoopConfig, {name: -1}) for name in ("log_every", "eval_every", "checkpoint_every")],
    *[(TaskConfig, {name: 0}) for name in ("n_train", "n_validation", "n_test")],
    (TaskConfig, {"path": "x"}),
    (DataConfig, {"context": 0}),
    (DataConfig, {"vocab_size": 100}),
    (DataConfig, {"max_documents": 1}),
    (DataConfig, {"validation_fraction": 1.5}),
    (DataConfig, {"vocab_size": 70_000, "token_dtype": "uint16"}),
    (Parameterization, {"alpha": 2.0}),
    (Parameterization, {"base_density": 0.0}),
    (Parameterization, {"alpha_in": 0.0}),
    (Parameterization, {"alpha_out": -1.0}),
    (Parameterization, {"embedding_lr_multiplier": 0.0}),
]


@pytest.mark.parametrize(("kind", "fields"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_named_with_what_is_allowed(kind: type, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        kind(**fields)
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(value) in message for name, value in fields.items() if name != "name" or len(fields) == 1)
    assert any(name in message for name in fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity.sparsity=1", "sparsity=1.0"),
        ("sparsity.sparsity=-0.25", "sparsity=-0.25"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("threads=0", "threads=0 must be at least 1"),
        ("model.sparsity=0.5", "set sparsity.sparsity instead"),
        ("model.d_model=130", "d_model=130 is not divisible by n_heads=4"),
        ("model.n_kv_heads=3", "n_heads=4 is not divisible by n_kv_heads=3"),
        ("~model", "model.d_model is missing; choose a preset"),
        ("data=hub", "data.name=hub needs data.hub_name"),
        ("data=file", "data.name=file needs data.path"),
        ("sparsity.groups=[{match: '*',sparsity: 2}]", "2"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load("pretrain", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_steps_and_tokens_of_the_command_line_win_over_those_of_an_experiment() -> None:
    config = load("pipeline", ["experiment=demo", "budget.steps=7"])
    assert (config.budget.steps, config.budget.tokens) == (7, None)
    config = load("pretrain", ["budget.tokens=700"])
    assert (config.budget.steps, config.budget.tokens) == (None, 700)
    with pytest.raises(UserError, match=r"budget\.steps=1 and budget\.tokens=1: a run has one length"):
        load("pretrain", ["budget.steps=1", "budget.tokens=1"])


def test_groups_of_layers_can_be_given_on_the_command_line() -> None:
    config = load("pretrain", ["sparsity.groups=[{match: '*attn*', sparsity: 0.5},{match: '*mlp*', sparsity: 0}]"])
    assert [(group.match, group.sparsity) for group in config.sparsity.groups] == [("*attn*", 0.5), ("*mlp*", 0.0)]


def test_a_pipeline_without_prompts_composes() -> None:
    config = load("pipeline", ["pipeline.stages=[{name: pretrain},{name: finetune,from: pretrain}]"])
    assert [stage.name for stage in config.stages] == ["pretrain", "finetune"]


def test_defaults_are_not_changed_by_checks() -> None:
    before = str(defaults("pretrain"))
    check("pretrain", ["optimizer.lr=1e-3,2e-3"], sweep=True)
    assert str(defaults("pretrain")) == before


@pytest.mark.parametrize("verb", sorted(ROOTS))
def test_a_schema_that_goes_to_another_process_and_back_is_the_same(verb: str) -> None:
    """A launcher pickles it; a copy that differed would change the schemas of this process."""
    for kind in (schema_of(verb), *(entry.type for entry in dataclasses.fields(schema_of(verb)))):
        if dataclasses.is_dataclass(kind):
            assert pickle.loads(pickle.dumps(kind)) is kind


# Presets.


def test_completep_by_its_name_has_its_eps_rule() -> None:
    words = ["parameterization.scheme=completep", "parameterization.base_layers=4"]
    assert load("pretrain", words).parameterization.eps_rule == "table"
    assert load("pretrain", []).parameterization.eps_rule == "fixed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # A rule that takes the place of another leaves nothing of the other's file behind.
        (["sparsity=gmp", "sparsity.evolution.rule=static"], EvolutionConfig()),
        (["sparsity=rigl", "sparsity.evolution.every=50"], EvolutionConfig("rigl", every=50)),
        (["sparsity=rigl", "sparsity.evolution.every=null"], EvolutionConfig("rigl")),
        # An experiment's setting serves the rules that have it.
        (["experiment=dynamic_masks"], EvolutionConfig()),
        (["experiment=dynamic_masks", "sparsity=set"], EvolutionConfig("set", every=25)),
    ],
)
def test_a_section_has_the_settings_of_its_rule_and_no_others(words: list[str], expected: EvolutionConfig) -> None:
    found = load("pretrain", words).sparsity.evolution
    assert found == expected
    assert type(found) is type(expected)
