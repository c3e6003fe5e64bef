"""The cut of plain text in runs of an earlier version, which their commands keep, so that they are found and resumed.

Before format 3 of ``config.yaml``, blank lines cut plain text, and no setting said so. The same command would mean
another text today. A command whose directory has such a run of its text therefore gets the cut of that time, and says
so. A typed ``data.separator`` goes before.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsetrain.data import DataConfig, find_corpora
from sparsetrain.data.sources.plain_text import BLANK_LINE
from sparsetrain.errors import UserError
from sparsetrain.runs.layout import CONFIG
from sparsetrain.runs.recorded import read_config
from sparsetrain.screen import say

_LATER = re.compile(r"format: ([3-9]|\d\d)")
_ROWS = (".jsonl", ".parquet")


def keep_former_cut(config: Any, typed: Collection[str]) -> Any:
    """Return the settings of a verb, cut by blank lines if its directory has an earlier run of its text.

    Args:
        config: the dataclass of a verb; one that reads no text or writes no run is returned as it is.
        typed: the keys that the user gave.
    """
    data = getattr(config, "data", None)
    if not isinstance(data, DataConfig) or not hasattr(config, "runs_dir"):
        return config
    if any(key.rpartition(".")[2] == "separator" for key in typed):
        return config
    former = _cut_by_blank_lines(data)
    if former == data:
        return config
    if config.run_dir is not None:
        place = Path(config.run_dir)
        found = place if _is_former(place / CONFIG) else None
    else:
        found = _former_run(Path(config.runs_dir), former)
    if found is None:
        return config
    _say_once(f"{found}: an earlier version made it, so that blank lines cut its text (data.separator={BLANK_LINE})")
    return replace(config, data=former)


def _cut_by_blank_lines(data: DataConfig) -> DataConfig:
    def cut(source: Any) -> Any:
        plain = source.path is not None and source.separator is None and not source.path.lower().endswith(_ROWS)
        return replace(source, separator=BLANK_LINE) if plain else source

    sources = {name: cut(source) for name, source in data.sources.items()} if data.sources else data.sources
    return replace(cut(data), sources=sources)


def _former_run(runs_dir: Path, former: DataConfig) -> Path | None:
    """Return a run of an earlier version in ``runs_dir`` on the text ``former``."""
    places = list(_former_places(runs_dir))
    if not places:
        return None
    try:
        key = find_corpora(former)[0]
    except UserError:
        return None  # whoever reads the text reports it
    names = _names(former.path, [source.path for source in (former.sources or {}).values()])
    for place in places:
        try:
            content = read_config(place)
        except UserError:
            continue
        data = content.get("data")
        if "corpus" in content:
            same = content["corpus"] == key
        else:  # the first versions did not record it
            same = isinstance(data, dict) and _names(data.get("path"), []) == names
        if same:
            return place
    return None


def _names(path: object, others: list[str | None]) -> list[str]:
    return [os.path.basename(each) for each in (path, *others) if isinstance(each, str)]


def _former_places(runs_dir: Path) -> Iterator[Path]:
    try:
        names = sorted(entry.name for entry in os.scandir(runs_dir) if entry.is_dir())
    except OSError:
        return
    for name in names:
        if _is_former(runs_dir / name / CONFIG):
            yield runs_dir / name


def _is_former(path: Path) -> bool:
    """Whether a file is a configuration of a format before 3, as far as its first line tells."""
    try:
        with path.open("rb") as stream:
            return _LATER.match(stream.read(16).decode(errors="replace")) is None
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def _say_once(line: str) -> None:
    say(Console(), line)
