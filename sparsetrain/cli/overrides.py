"""Overrides (``key=value``): how Hydra parses them, which sweeps are allowed, and which keys were renamed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep, ValueType
from hydra.errors import OverrideParseException

from sparsetrain.cli.quoting import without_interpolation
from sparsetrain.errors import UserError
from sparsetrain.runs.recorded import RENAMED

OPEN = ("sparsity.options", "data.sources", "data.mixture", "task.answers", "task.hub_splits", "columns")
"""Sections whose settings no schema names."""
SEARCH_PATH = "hydra.searchpath"  # Hydra's setting for more directories of configurations

# Renamed settings, sections and groups: {old: new}. A renamed section renames everything in it.
MOVED: dict[str, str] = {
    **RENAMED,
    **{
        f"pipeline.{stage}.{old}": f"pipeline.stages.{stage}.{new}"
        for stage in ("finetune", "prompt")
        for old, new in RENAMED.items()
    },
    "pipeline.prompt.start": "pipeline.stages.prompt.from",
    "pipeline.finetune": "pipeline.stages.finetune",
    "pipeline.prompt": "pipeline.stages.prompt",
    "pipeline.sparsities": "pipeline.arms, as in pipeline.arms={sparsity.sparsity:[0,0.75]}",
    "pipeline.scratch": "pipeline.stages, in which the stage named scratch may be left out",
}
# Messages for old sections that were split, so that one new name does not describe them.
_WHOLE = {
    "stage": "loop, and budget for its epochs, flops and batch_size; each verb has defaults of its own there",
    "pipeline.finetune": "the entry named finetune in the list pipeline.stages",
    "pipeline.prompt": "the entry named prompt in the list pipeline.stages, which may be left out",
}
_OF_STAGE = re.compile(r"(pipeline\.stages\.[^.]+\.)(.+)")

_MOST_VALUES = 10_000  # in one range


def is_open(key: str) -> bool:
    """Whether no schema names a setting, because a section of `OPEN` holds it."""
    return key.startswith(tuple(f"{section}." for section in OPEN))


def moved(key: str) -> str | None:
    """Return the new name of a renamed setting, section or group, or None if ``key`` was not renamed."""
    if key in _WHOLE:
        return _WHOLE[key]
    if (stage := _OF_STAGE.fullmatch(key)) is not None:
        new = moved(stage[2])
        return new and stage[1] + new
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        new = MOVED.get(".".join(parts[:length]))
        if new is not None:
            return ".".join([new, *parts[length:]])
    return None


def check_moved(key: str) -> None:
    """Raise `UserError` if ``key`` was renamed; the message gives the new name."""
    new = moved(key)
    if new is not None:
        raise UserError(f"{key} is now {new}")


def moved_within(key: str) -> str | None:
    """Return ``"old is now new"`` for a key or section found in a file, for each renamed key in it; None if none."""
    new = moved(key)
    found = {key: new} if new else {old: new for old, new in MOVED.items() if old.startswith(f"{key}.")}
    return "; ".join(f"{old} is now {new}" for old, new in found.items()) or None


def parse(overrides: Iterable[str]) -> list[Override]:
    """Return the overrides as Hydra reads them.

    Raises:
        UserError: Hydra cannot parse one of them.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(f"cannot read the override: {'; '.join(str(error).splitlines()[:2])}") from None


def is_hydras(override: Override) -> bool:
    """Return whether an override sets one of Hydra's own settings."""
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def check_enumerable(override: Override, group: bool) -> None:
    """Raise `UserError` for a sweep that has no finite list of values, or an implausibly long one.

    Args:
        group: whether the key names a configuration group, whose files a ``glob`` can match.
    """
    if override.value_type == ValueType.INTERVAL_SWEEP:
        raise UserError(f"{override.input_line}: an interval has no list of values; use choice(...) or range(...)")
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP and not group:
        raise UserError(f"{override.input_line}: glob matches only the choices of a group; use choice(...)")
    span = override.value()
    if isinstance(span, RangeSweep):
        ends = [float(end or 0) for end in (span.start, span.stop, span.step)]
        if not all(map(math.isfinite, ends)) or ends[2] == 0 or abs((ends[1] - ends[0]) / ends[2]) > _MOST_VALUES:
            raise UserError(
                f"{override.input_line} must have finite ends, a step other than 0, and at most {_MOST_VALUES:,} values"
            )


def keys_of(overrides: Iterable[str]) -> list[str]:
    """Return the keys of overrides, without the prefixes ``+``, ``++`` and ``~``."""
    return [text.split("=", 1)[0].lstrip("+~") for text in overrides]


def searching(overrides: Iterable[str], places: Iterable[Path]) -> list[str]:
    """Return the overrides and one more, which makes Hydra search directories of configurations.

    Raises:
        UserError: an override sets Hydra's search path itself, of which Hydra reads only one.
    """
    given, searched = list(overrides), [without_interpolation(f"file://{place}") for place in places]
    if not searched:
        return given
    if SEARCH_PATH in keys_of(given):
        raise UserError(f"{SEARCH_PATH}: name all directories with --config-dir instead")
    quoted = [QuotedString(place, Quote.single).with_quotes() for place in searched]
    return [*given, f"{SEARCH_PATH}=[{','.join(quoted)}]"]


def added_folders(parsed: Iterable[Override]) -> list[Path]:
    """Return the directories of configurations that the overrides add."""
    given = next((override.value() for override in parsed if override.key_or_group == SEARCH_PATH), None)
    places = [str(place) for place in given] if isinstance(given, list) else []
    return [Path(place.removeprefix("file://")) for place in places if "://" not in place.removeprefix("file://")]


def choices(override: Override) -> list[str]:
    """Return the options of a group that an override names; none for a glob, whose matches exist by definition."""
    if override.is_delete() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    if override.is_sweep_override():
        return [value.strip() for value in override.sweep_string_iterator()]
    return ["null" if override.value() is None else str(override.value())]
