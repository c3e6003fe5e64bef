"""From overrides to the dataclass of a verb: paths, lengths, and settings inherited from another run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.compose import compose, plain
from sparsetrain.cli.overrides import keys_of
from sparsetrain.cli.stages import check_entries, prefer_typed_arms
from sparsetrain.cli.verbs import find
from sparsetrain.errors import UserError
from sparsetrain.files import typed_path
from sparsetrain.models.config import ADJUSTABLE
from sparsetrain.optim import LENGTHS
from sparsetrain.runs.identity import value_differences
from sparsetrain.runs.layout import CONFIG, TOKENIZER, stage_directories
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.settings import build
from sparsetrain.stages.config import PATHS, RUNS, RunConfig, paths_in
from sparsetrain.stages.former_cut import keep_former_cut


def load(verb: str, overrides: Iterable[str]) -> Any:
    """Return the configuration of a verb as its dataclass.

    Raises:
        UserError: an unknown key or choice, or a value of the wrong type or out of range; one line.
    """
    given = as_typed(verb, overrides)
    check(verb, given)
    return convert(verb, compose(verb, given), given)


def convert(verb: str, tree: DictConfig, overrides: Iterable[str]) -> Any:
    """Return the dataclass of ``verb`` from a composed tree, with the sections inherited from ``init_from``.

    A directory with runs of an earlier version keeps their cut of plain text, see `keep_former_cut`.
    """
    row, given = find(verb), list(overrides)
    keys = keys_of(given)
    if row.inherits:
        _use_model_of_start(tree, keys)
    values = plain(tree, resolve=True)
    check_entries(values)
    use_paths(values)
    prefer_typed_length(values, keys)
    prefer_typed_arms(values, given)
    if row.inherits and values.get("init_from"):
        inherit(values, row.inherits, keys, row.prunes)
    return keep_former_cut(build(row.kind(), values), keys)


def _use_model_of_start(tree: DictConfig, overridden: Collection[str]) -> None:
    """Give a composed tree the model of ``init_from``, from which interpolations such as that of a base width follow.

    Nothing happens if there is no such run, which `inherit` reports.
    """
    start = OmegaConf.select(tree, "init_from")
    if (
        not isinstance(start, str)
        or "model" not in tree
        or "model" in overridden
        or not (Path(start) / CONFIG).is_file()
    ):
        return
    saved = read_recorded(Path(start), RunConfig).values.get("model")
    for name, value in (saved if isinstance(saved, dict) else {}).items():
        if name in tree.model and f"model.{name}" not in overridden:
            OmegaConf.update(tree, f"model.{name}", value)


def prefer_typed_length(values: dict[str, Any], overridden: Iterable[str]) -> None:
    """Let a typed length, of the run or of a stage, replace a length that a file gives in another unit."""
    typed = set(overridden)
    _prefer_typed_length(values.get("budget"), "budget", typed)
    pipeline = values.get("pipeline")
    stages = pipeline.get("stages") if isinstance(pipeline, dict) else None
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict):
            _prefer_typed_length(stage.get("budget"), f"pipeline.stages.{number}.budget", typed)


def _prefer_typed_length(budget: Any, name: str, overridden: Collection[str]) -> None:
    if not isinstance(budget, dict):
        return
    typed = [length for length in LENGTHS if f"{name}.{length}" in overridden and budget.get(length) is not None]
    phases = budget.get("phases") if f"{name}.phases" in overridden else None
    in_tokens = isinstance(phases, list) and any(
        isinstance(phase, dict) and phase.get("tokens") is not None for phase in phases
    )
    if typed or in_tokens:
        budget |= {length: None for length in LENGTHS if length in budget and length not in typed}


def use_paths(values: dict[str, Any]) -> None:
    """Replace each path in ``values`` by its checked form.

    Raises:
        UserError: a value cannot be a path; the message names the setting.
    """
    for section, name, place in paths_in(values, (*PATHS, *((name,) for name in RUNS))):
        section[name] = str(typed_path(section[name], place))


def inherit(values: dict[str, Any], inherited: Sequence[str], overridden: list[str], prunes: bool = False) -> None:
    """Replace the model, the sparsity and the sections ``inherited`` in ``values`` by those of the run ``init_from``.

    Typed settings of the model that may change after training (`ADJUSTABLE`) stay, unless they are null.

    Args:
        prunes: whether the verb makes a dense model sparse if a setting of ``sparsity`` is overridden.

    Raises:
        UserError: there is no such run, or an ``overridden`` setting would change the shape of its model.
    """
    directory = Path(values["init_from"])
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    recorded = read_recorded(directory, RunConfig)
    saved = recorded.values
    if recorded.kind == "pipeline":
        stages = ", ".join(map(str, stage_directories(directory)))
        raise UserError(f"init_from={directory} is a pipeline; choose one of its stages: {stages}")
    shaped = [section for section in ("model", "sparsity") if section in values]  # an evaluation takes all of the model
    for section in (*shaped, *inherited):
        if not isinstance(saved.get(section), dict):
            raise UserError(f"{directory / CONFIG} is incomplete: it has no section {section}")
    if prunes and _is_dense(saved["sparsity"]) and any(key.split(".")[0] == "sparsity" for key in overridden):
        shaped.remove("sparsity")
    free = {f"model.{name}": name for name in ADJUSTABLE}
    for section in shaped:
        for key in overridden:
            if key == section or key.startswith(f"{section}."):
                changed = value_differences({section: values[section]}, {section: saved[section]}, RunConfig)
                changed = [text for text in changed if text.partition("=")[0] not in free]
                asked = [text for text in changed if key == section or text.startswith(f"{key}=")]
                if asked:
                    raise UserError(f"init_from={directory}: its checkpoint has another shape: {asked[0]}")
        typed = {free[key]: values["model"][free[key]] for key in overridden if section == "model" and key in free}
        values[section] = {**saved[section], **{name: value for name, value in typed.items() if value is not None}}
    for section in inherited:
        if section in overridden:
            continue
        own = {key.partition(".")[2] for key in overridden if key.startswith(f"{section}.")}
        values[section] = {**saved[section], **{key: values[section][key] for key in own}}
    # An adaptation reads the tokenizer of the run itself, since a given one would replace it.
    reads_own = "data" in inherited or "vocabulary" in values
    if not reads_own and values["data"]["tokenizer_path"] is None:
        values["data"]["tokenizer_path"] = str(directory / TOKENIZER)


def _is_dense(section: dict[str, Any]) -> bool:
    """Return whether a recorded section ``sparsity`` leaves every layer dense."""
    return not section.get("sparsity") and section.get("nnz") is None and not section.get("groups")
