"""Checks of overrides before a run: keys, choices and sweep values, each against the configuration of its verb."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsetrain.cli.compose import compose, defaults, flat, groups, own_groups
from sparsetrain.cli.entries import of_other_verbs
from sparsetrain.cli.overrides import (
    OPEN,
    SEARCH_PATH,
    added_folders,
    check_enumerable,
    check_moved,
    choices,
    is_hydras,
    is_open,
    keys_of,
    parse,
)
from sparsetrain.cli.own import check_file, check_names, chosen, is_section, unknown_choice
from sparsetrain.cli.quoting import plain_value, quoted, text_settings
from sparsetrain.cli.refusals import refused
from sparsetrain.cli.schema import schema_of
from sparsetrain.cli.stages import NUMBERED, known_settings, numbered, stage_setting
from sparsetrain.cli.verbs import VERBS
from sparsetrain.errors import UserError, nearest


def as_typed(verb: str, overrides: Iterable[str], sweep: bool = False) -> list[str]:
    """Return the overrides as Hydra must see them: text values in quotes (see `quoting.quoted`), groups never null.

    Hydra removes a group with ``~group``, so ``group=null`` becomes that.
    """
    leaves = flat(defaults(verb))
    given = chosen(verb, overrides)
    # Hydra has a mark for settings that no schema names.
    sections = tuple(f"{section}={{" for section in OPEN)
    given = [f"++{override}" if is_open(override) or override.startswith(sections) else override for override in given]
    for key in keys_of(given):
        check_moved(key)
    return quoted(numbered(verb, given), text_settings(schema_of(verb)), leaves.__contains__, sweep)


def check(verb: str, overrides: list[str], sweep: bool = False) -> None:
    """Raise `UserError` for the first override whose key or choice does not exist; it suggests the nearest name.

    Several values for one key are an error outside a ``sweep``. In a sweep, each value must have the right type, and
    each choice among the files of a user must compose.
    """
    parsed = parse(overrides)
    added = added_folders(parsed)
    known_groups, own = groups(verb, added), own_groups(verb)
    if added:
        check_names(verb, added)
    for override in parsed:
        check_moved(override.key_or_group)
        check_enumerable(override, override.key_or_group in known_groups)
    tree = _with_optional_groups(verb, parsed, known_groups)
    stages: DictConfig | None = None
    single = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    for override in parsed:
        key = override.key_or_group
        if is_hydras(override):
            continue
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{override.input_line}: several values need a multirun: sparsetrain {verb} -m ...")
        if key in known_groups and not (key in own and is_section(str(override.input_line))):
            for choice in choices(override):
                if choice not in known_groups[key]:
                    raise unknown_choice(key, choice, known_groups[key], tree)
                if choice == "null":
                    raise UserError(f"{override.input_line}: a sweep cannot contain null; leave {key} out instead")
                if check_file(key, choice, tree, added) and override.is_sweep_override():
                    compose(verb, [*single, f"{override.get_key_element()}={choice}"])  # its file may be broken
            continue
        if NUMBERED.fullmatch(key):
            if stages is None:
                stages = _without_stage_settings(verb, parsed)
            _check_stage_setting(*stage_setting(stages, key))
            continue
        if is_open(key):
            continue  # the section checks its settings
        _check_key(verb, key, tree, known_groups)
        value = None if override.is_sweep_override() else plain_value(override.value())
        # Hydra reads `budget=3` as the choice of a file.
        if value is not None and not isinstance(value, dict) and OmegaConf.is_dict(tree.get(key, None)):
            raise UserError(f"{key}={value!r} must be a section of settings")
        if override.is_discrete_sweep() and override.value_type != ValueType.GLOB_CHOICE_SWEEP:
            for value in override.sweep_iterator():
                _check_type(verb, key, plain_value(value), tree)


def _with_optional_groups(verb: str, parsed: Iterable[Override], known_groups: Mapping[str, list[str]]) -> DictConfig:
    """Return the configuration of a verb; a section that is null by default is there if its group is chosen."""
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
    """Return the configuration with the chosen groups, but without the settings of single pipeline stages."""
    kept = [
        str(override.input_line)
        for override in parsed
        if not NUMBERED.fullmatch(override.key_or_group) and not override.is_sweep_override()
    ]
    return compose(verb, kept)


def _check_stage_setting(stage: str, run: str, setting: str) -> None:
    """Raise `UserError` if the verb ``run``, which a pipeline's stage runs, does not have the setting."""
    if setting in ("name", "run", "from", "once", "arms") or run not in VERBS or is_open(setting):
        return
    known = known_settings(defaults(run))
    section = defaults(run).get(setting.partition(".")[0])
    if setting not in known and not (section is None and setting.partition(".")[0] in known):
        place = f"pipeline.stages.{stage}"
        near = nearest(f"{place}.{setting}", [f"{place}.{name}" for name in known])
        hint = of_other_verbs(setting) or near
        raise UserError(f"{place}: {run} has no setting '{setting}'{hint}")


def _check_type(verb: str, key: str, value: Any, tree: DictConfig) -> None:
    """Raise `UserError` for a value of the wrong type, so that a sweep fails before its first point."""
    try:
        OmegaConf.update(copy.deepcopy(tree), key, value)
    except OmegaConfBaseException as error:
        raise refused(error, schema_of(verb)) from None


def _check_key(verb: str, key: str, tree: DictConfig, known_groups: Mapping[str, list[str]]) -> None:
    node: Any = tree
    path = ""
    for part in key.split("."):
        if not OmegaConf.is_dict(node):
            raise UserError(f"{path} is a single value and has no setting {part!r}")
        names = [str(name) for name in node]
        if part not in names:
            # Without a near name on this level, suggest the same name on another one: lr is optimizer.lr.
            full = [f"{path}.{name}" if path else name for name in names]
            hint = nearest(f"{path}.{part}" if path else part, [*full, *known_groups])
            leaves = {leaf.rpartition(".")[2]: leaf for leaf in flat(tree)}
            if part in leaves and (not hint or not path):
                hint = f" (did you mean '{leaves[part]}'?)"
            raise UserError(f"{verb} has no setting '{key}'{hint if part in leaves else of_other_verbs(key) or hint}")
        node, path = node[part], f"{path}.{part}" if path else part
