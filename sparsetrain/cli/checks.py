"""Whether overrides name settings and choices that there are, with values of the right type."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsetrain.cli.compose import compose, defaults, flat, groups, one_line, options, schema_of
from sparsetrain.cli.overrides import (
    SEARCH_PATH,
    added_folders,
    check_enumerable,
    check_moved,
    choices,
    is_hydras,
    keys_of,
    parse,
)
from sparsetrain.cli.quoting import plain_value, quoted, text_settings
from sparsetrain.cli.stages import NUMBERED, known_settings, numbered, stage_setting
from sparsetrain.cli.verbs import VERBS
from sparsetrain.errors import UserError, nearest


def as_typed(verb: str, overrides: Iterable[str], sweep: bool = False) -> list[str]:
    """Return overrides for Hydra in which text stands as it was typed, see `quoting.quoted`, and no group is null.

    Hydra has another word for a group of which nothing is chosen.
    """
    leaves = flat(defaults(verb))
    without = {f"{name}=null": f"~{name}" for name, there in groups(verb).items() if "null" in there}
    given = [without.get(override, override) for override in overrides]
    for key in keys_of(given):
        check_moved(key)
    return quoted(numbered(verb, given), text_settings(schema_of(verb)), leaves.__contains__, sweep)


def check(verb: str, overrides: list[str], sweep: bool = False) -> None:
    """Raise `UserError` for the first override whose key or choice does not exist, naming the nearest that does.

    Several values for one key are wrong too, unless for a ``sweep``; there each must be of the right type.
    """
    parsed = parse(overrides)
    added = added_folders(parsed)
    known_groups = groups(verb, added)
    for override in parsed:
        check_moved(override.key_or_group)
        check_enumerable(override, override.key_or_group in known_groups)
    tree = _with_optional_groups(verb, parsed, known_groups)
    stages: DictConfig | None = None
    for override in parsed:
        key = override.key_or_group
        if is_hydras(override):
            continue
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{override.input_line}: several values need a multirun, sparsetrain {verb} -m ...")
        if key in known_groups:
            for choice in choices(override):
                if choice not in known_groups[key]:
                    hint = nearest(choice, known_groups[key])
                    if not hint and f"{key}.{key}" in flat(tree):  # sparsity=0.75
                        hint = f" (did you mean '{key}.{key}={choice}'?)"
                    raise UserError(f"{key}={choice} is not one of {', '.join(known_groups[key])}{hint}")
                if choice == "null":
                    raise UserError(f"{override.input_line}: null is no point of a sweep; leave {key} out instead")
                for folder in added:
                    if choice in options(key, folder) and choice in options(key):
                        raise UserError(f"{key}={choice}: the library has one of this name; rename that in {folder}")
            continue
        if NUMBERED.fullmatch(key):
            if stages is None:
                stages = _without_stage_settings(verb, parsed)
            _check_stage_setting(*stage_setting(stages, key))
            continue
        _check_key(verb, key, tree, known_groups)
        if override.is_discrete_sweep() and override.value_type != ValueType.GLOB_CHOICE_SWEEP:
            for value in override.sweep_iterator():
                _check_type(key, plain_value(value), tree)


def _with_optional_groups(verb: str, parsed: Iterable[Override], known_groups: Mapping[str, list[str]]) -> DictConfig:
    """Return the configuration of a verb with those sections that are null unless a group is chosen for them."""
    tree = defaults(verb)
    chosen = [
        f"{override.key_or_group}={choice}"
        for override in parsed
        if override.key_or_group in known_groups
        for choice in choices(override)[:1]
        if choice in set(known_groups[override.key_or_group]) - {"null"} and tree.get(override.key_or_group, 0) is None
    ]
    search = [str(override.input_line) for override in parsed if override.key_or_group == SEARCH_PATH]
    return compose(verb, chosen + search) if chosen else tree


def _without_stage_settings(verb: str, parsed: Iterable[Override]) -> DictConfig:
    """Return the configuration with the groups that are chosen and without what is set in stages of a pipeline."""
    words = [
        str(override.input_line)
        for override in parsed
        if not NUMBERED.fullmatch(override.key_or_group) and not override.is_sweep_override()
    ]
    return compose(verb, words)


def _check_stage_setting(stage: str, run: str, setting: str) -> None:
    """Raise `UserError` for a setting that a stage of a pipeline, which runs the verb ``run``, does not have."""
    if setting in ("name", "run", "from", "once", "arms") or run not in VERBS:
        return
    known = known_settings(defaults(run))
    section = defaults(run).get(setting.partition(".")[0])
    if setting not in known and not (section is None and setting.partition(".")[0] in known):
        place = f"pipeline.stages.{stage}"
        hint = nearest(f"{place}.{setting}", [f"{place}.{name}" for name in known])
        raise UserError(f"{place}: {run} has no setting '{setting}'{hint}")


def _check_type(key: str, value: Any, tree: DictConfig) -> None:
    """Raise `UserError` for a value of the wrong type: a sweep is refused before its first point, not in the middle."""
    try:
        OmegaConf.update(copy.deepcopy(tree), key, value)
    except OmegaConfBaseException as error:
        raise UserError(f"{key}={value}: {one_line(error)}") from None


def _check_key(verb: str, key: str, tree: DictConfig, known_groups: Mapping[str, list[str]]) -> None:
    node: Any = tree
    path = ""
    for part in key.split("."):
        if not OmegaConf.is_dict(node):
            raise UserError(f"{path} has no part {part!r}: it is a single value")
        names = [str(name) for name in node]
        if part not in names:
            # A name from another level helps more than none: lr is optimizer.lr.
            full = [f"{path}.{name}" if path else name for name in names]
            hint = nearest(f"{path}.{part}" if path else part, [*full, *known_groups])
            leaves = {leaf.rpartition(".")[2]: leaf for leaf in flat(tree)}
            if not hint and part in leaves:
                hint = f" (did you mean '{leaves[part]}'?)"
            raise UserError(f"{verb} has no setting '{key}'{hint}")
        node, path = node[part], f"{path}.{part}" if path else part
