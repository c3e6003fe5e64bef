"""Settings of a pipeline's stages by stage name: ``pipeline.stages.finetune.optimizer.lr=1e-3``.

The stages are a list, so Hydra addresses them by number. This module replaces the name by the number before Hydra
reads the override, and checks that the stage has the setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsetrain.cli.compose import compose, flat
from sparsetrain.cli.overrides import check_moved, keys_of, parse
from sparsetrain.cli.quoting import plain_value
from sparsetrain.errors import UserError, nearest

_NAMED = re.compile(r"\+{0,2}pipeline\.stages\.(?P<name>[^.=\s]+)\.(?P<setting>[^=]+)=(?P<value>.*)", re.DOTALL)
_WHOLE = re.compile(r"[+~]{0,2}pipeline\.stages\.(?P<name>[^.=\s]+)(?:=.*)?", re.DOTALL)
ARMS = "pipeline.arms"
NUMBERED = re.compile(r"pipeline\.stages\.(?P<number>[0-9]+)\.(?P<setting>.+)")


def numbered(verb: str, overrides: Iterable[str]) -> list[str]:
    """Return the overrides with stage names replaced by stage numbers.

    An override of ``pipeline.arms`` gets Hydra's prefix ``++``: an arm may use settings that no file mentions.

    Raises:
        UserError: the pipeline has no such stage, or the override replaces a whole stage.
    """
    given = [f"++{text}" if text.startswith(f"{ARMS}={{") else text for text in overrides]
    for text in given if verb == "pipeline" else ():
        if (whole := _WHOLE.fullmatch(text)) is not None:
            raise UserError(
                f"{text}: give a setting of the stage, as in pipeline.stages.{whole['name']}.optimizer.lr=1e-3, or the "
                "whole list, pipeline.stages=[...]"
            )
    if verb != "pipeline" or not any(_NAMED.fullmatch(text) for text in given):
        return given
    rest = [text for text in given if not _NAMED.fullmatch(text) and not _sweeps(text)]
    names = [str(entry.get("name")) for entry in _listed(compose(verb, rest))]
    return [_numbered(text, names) for text in given]


def _sweeps(text: str) -> bool:
    value = text.partition("=")[2]
    return "," in value and not value.startswith(("[", "{", "'", '"'))


def _listed(tree: DictConfig) -> list[Any]:
    stages = OmegaConf.select(tree, "pipeline.stages")
    return [entry for entry in stages or [] if OmegaConf.is_dict(entry)]


def _numbered(text: str, names: list[str]) -> str:
    match = _NAMED.fullmatch(text)
    if match is None or match["name"].isdigit():
        return text
    if match["name"] not in names:
        key = keys_of([text])[0]
        raise UserError(
            f"{key}: pipeline.stages has no stage {match['name']}{nearest(match['name'], names)}; there are "
            f"{', '.join(names)}"
        )
    # `++` because the entry may not have the setting yet.
    return f"++pipeline.stages.{names.index(match['name'])}.{match['setting']}={match['value']}"


def prefer_typed_arms(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Let typed arms replace those of a file; Hydra alone would merge the two."""
    for override in parse([text for text in overrides if keys_of([text]) == [ARMS]]):
        typed, pipeline = override.value(), values.get("pipeline")
        if isinstance(typed, dict) and isinstance(pipeline, dict) and isinstance(pipeline.get("arms"), dict):
            names = {str(plain_value(name)) for name in typed}
            pipeline["arms"] = {name: arm for name, arm in pipeline["arms"].items() if name in names}


def check_entries(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for a renamed setting in the list of stages."""
    pipeline = values.get("pipeline")
    stages = pipeline.get("stages") if isinstance(pipeline, dict) else None
    for entry in stages if isinstance(stages, list) else ():
        for key in _keys(entry) if isinstance(entry, dict) else ():
            check_moved(f"pipeline.stages.{entry.get('name')}.{key}")


def _keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield from _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def stage_setting(tree: DictConfig, key: str) -> tuple[str, str, str]:
    """Return the stage's name, its verb and the setting's name for ``key``, which matches `NUMBERED`.

    Raises:
        UserError: the pipeline has no such stage.
    """
    match = NUMBERED.fullmatch(key)
    assert match is not None
    listed, number = _listed(tree), int(match["number"])
    if number >= len(listed):
        raise UserError(f"{key}: pipeline.stages has {len(listed)} stages, numbered 0 to {len(listed) - 1}")
    entry = listed[number]
    return str(entry.get("name")), str(entry.get("run", entry.get("name"))), match["setting"]


def known_settings(tree: DictConfig) -> set[str]:
    """Return the names of all settings and sections of a composed configuration."""
    names = flat(tree)
    return {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 2)}
