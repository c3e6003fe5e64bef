"""The identity of a run: the hash in its directory's name, differences between two runs, and the search for a run.

A run is identified by its kind, by each setting that changes the result and differs from its default, and by the
content of its text, its task and the weights that it starts from. A new setting therefore does not change the identity
of runs that leave it at its default, and moving a text does not either.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of
from sparsetrain.reading import MAX_YAML_BYTES, read_text
from sparsetrain.runs.layout import CONFIG, RESULT, TOKENIZER, TRAIN_IDS
from sparsetrain.runs.origin import MAX_ID_BYTES, Origin
from sparsetrain.runs.recorded import Recorded, complete, entries, read_config, recorded_of
from sparsetrain.settings import settled

# Part of every identity. It stays when a newer format of ``config.yaml`` does not change what identifies a run.
_IDENTITY_FORMAT = 2

# Settings that do not change the result and are not part of the identity.
# The weights of the start and of a donor count by content (`origin.source_key`), not by path.
INCIDENTAL = (
    *("init_from", "donor", "run_dir", "runs_dir", "device", "threads", "draw", "force"),
    *("log_every", "checkpoint_every", "keep_last", "observe"),
)

# Settings of the section data that the corpus does not depend on; the fingerprint of the corpus covers the others.
_BESIDE_CORPUS = ("context", "mixture")

_ABSENT = object()
# An anchor, an alias or a tag: only the strict reader may read a file that contains one.
_REFERENCE = re.compile(r"(?:^|[\s\[{,:-])[&*!]", re.MULTILINE)


def digest(run: Recorded, incidental: Collection[str] = INCIDENTAL) -> str:
    """Return eight hexadecimal digits that identify a run; the settings ``incidental`` do not count."""
    return hashlib.blake2b(_identity(run, incidental).encode(), digest_size=4).hexdigest()


def _number(value: Any) -> Any:
    """Return a plain value in which 1.0 is replaced by 1, since YAML and overrides may give either."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return {str(key): _number(item) for key, item in value.items()}
    return [_number(item) for item in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return json.dumps(_number(value), sort_keys=True, default=str)


def _identity(run: Recorded, incidental: Collection[str] = INCIDENTAL) -> str:
    values = _essential(run.values, run.schema, incidental)
    if _knows_task(run):
        values = _without_task_path(values)
    facts = {name: value for name, value in run.facts.items() if value is not None}
    return _text([_IDENTITY_FORMAT, run.kind, beyond(values, run.schema), facts])


def _essential(values: Mapping[str, Any], schema: type, incidental: Collection[str]) -> dict[str, Any]:
    """Return complete settings without the incidental ones and without data settings that the corpus covers."""
    found: dict[str, Any] = _without(complete(values, schema), incidental)
    if isinstance(found.get("data"), Mapping):
        found["data"] = {key: value for key, value in found["data"].items() if key in _BESIDE_CORPUS}
    pipeline = found.get("pipeline")
    if isinstance(pipeline, Mapping) and isinstance(pipeline.get("stages"), list):
        # The fingerprint of the task is recorded in the stage's own directory; its path is not part of the identity.
        stages = [_without_task_path(stage) if isinstance(stage, Mapping) else stage for stage in pipeline["stages"]]
        found["pipeline"] = {**pipeline, "stages": stages}
    return found


def _without(value: Any, names: Collection[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def beyond(values: Mapping[str, Any], schema: type, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return those settings in ``values`` that differ from their defaults."""
    kind, values = settled(schema, values)
    known = entries(kind)
    if defaults is None or kind is not schema:
        defaults = {**complete({}, kind), **(defaults or {})}
    found: dict[str, Any] = {}
    for key, value in values.items():
        section = known[key].section if key in known else None
        default = defaults.get(key, _ABSENT)
        if section is not None and isinstance(value, Mapping):
            inner = beyond(value, section, default if isinstance(default, Mapping) else None)
            if inner or not isinstance(default, Mapping):
                found[key] = inner
        elif default is _ABSENT or _text(value) != _text(default):
            if section is not None and isinstance(value, list):
                value = [beyond(item, section) if isinstance(item, Mapping) else item for item in value]
            found[key] = value
    return found


def described(run: Recorded) -> dict[str, Any]:
    """Return all settings of a run, with defaults for settings that did not exist then, followed by its facts."""
    return {**complete(run.values, run.schema), **run.facts}


def value_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], schema: type, incidental: Collection[str] = INCIDENTAL
) -> list[str]:
    """Return ``"field=ours (there: theirs)"`` for each setting in which nested plain values differ.

    A missing value counts as the schema's default, and 1 equals 1.0.
    """
    return _compare(_without(complete(ours, schema), incidental), _without(complete(theirs, schema), incidental))


def _compare(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = [*ours, *(key for key in theirs if key not in ours)]
        inner = ((f"{path}.{name}" if path else name, ours.get(name), theirs.get(name)) for name in names)
        return [text for name, one, other in inner for text in _compare(one, other, name)]
    return [] if _text(ours) == _text(theirs) else [f"{path}={ours} (there: {theirs})"]


def differences(ours: Recorded, theirs: Recorded, origin: Origin | None = None) -> list[str]:
    """Return ``"field=ours (there: theirs)"`` for each difference between two runs; an empty list if they are the same.

    Args:
        origin: the origin of ``ours``. If ``theirs`` records no corpus, their tokenizer and ids are compared with it.
    """
    if ours.kind != theirs.kind:
        return [f"kind={ours.kind} (there: {theirs.kind})"]
    one, other = (_essential(run.values, ours.schema, INCIDENTAL) for run in (ours, theirs))
    if not _compares_task_path(ours, theirs):
        one, other = _without_task_path(one), _without_task_path(other)
    found = _compare(one, other)
    if not _same_corpus(ours, theirs, origin):
        named = [text for text in _data_differences(ours, theirs) if text not in found]
        found += named or [f"corpus={ours.facts.get('corpus')} (there: {theirs.facts.get('corpus')})"]
    # Facts that an older version did not record cannot differ.
    known: list[str] = [name for name in ("source", "donor") if name in ours.facts and name in theirs.facts]
    known += ["task_fingerprint"] if _knows_task(ours) and _knows_task(theirs) else []
    return found + [text for name in known for text in _compare(ours.facts[name], theirs.facts[name], name)]


def _knows_task(run: Recorded) -> bool:
    """Whether the content of the run's task is known: older versions did not record it, and its data may be missing."""
    return run.facts.get("task_fingerprint") is not None


def _without_task_path(values: Mapping[str, Any]) -> dict[str, Any]:
    task = values.get("task")
    if not isinstance(task, Mapping):
        return dict(values)
    return {**values, "task": {key: value for key, value in task.items() if key != "path"}}


def _compares_task_path(ours: Recorded, theirs: Recorded) -> bool:
    """Whether the path of a task counts: if the task's content is unknown and the recorded path still exists.

    A null path means a task that is not read from a directory; it counts as existing.
    """
    if _knows_task(ours) and _knows_task(theirs):
        return False
    task = theirs.values.get("task")
    path = task.get("path") if isinstance(task, Mapping) else None
    return path is None or os.path.exists(str(path))


def _same_corpus(ours: Recorded, theirs: Recorded, origin: Origin | None) -> bool:
    if "corpus" in ours.facts and "corpus" in theirs.facts:
        return ours.facts["corpus"] == theirs.facts["corpus"]
    if origin is not None and theirs.directory is not None:
        tokenizer, ids = theirs.directory / TOKENIZER, theirs.directory / TRAIN_IDS
        if tokenizer.exists() and ids.exists():
            seen = set(read_text(ids, MAX_ID_BYTES).split("\n")[:-1])
            return seen == origin.train_ids and sha256_of(tokenizer) == origin.tokenizer.sha256
    return not _data_differences(ours, theirs)


def _data_differences(ours: Recorded, theirs: Recorded) -> list[str]:
    one, other = ({"data": run.values.get("data") or {}} for run in (ours, theirs))
    return value_differences(one, other, ours.schema)


def run_place(runs_dir: Path, prefix: str, ours: Recorded, origin: Origin | None = None) -> Path:
    """Return the directory of a run without ``run_dir``: an existing one in ``runs_dir``, or a name with `digest`."""
    named = runs_dir / f"{prefix}{digest(ours)}"
    return named if named.exists() else find_run(runs_dir, prefix, ours, origin) or named


def find_run(runs_dir: Path, prefix: str, ours: Recorded, origin: Origin | None = None) -> Path | None:
    """Return the directory in ``runs_dir`` that holds the run ``ours``, whatever its name, or None.

    Only runs without a configured ``run_dir`` count. If there are several, a name that begins with ``prefix`` comes
    first, then a finished run, then alphabetical order, so that all processes find the same one.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(runs_dir) if entry.is_dir())
    except OSError:
        return None
    identity = _identity(ours)
    found = []
    for name in names:
        path = runs_dir / name / CONFIG
        try:
            status = path.stat()
        except OSError:
            continue
        there = _scanned(path, status.st_mtime_ns, status.st_size, ours.schema)
        if there is None or there[0].kind != ours.kind:
            continue
        if there[1] == identity or (not _all_known(ours, there[0]) and not differences(ours, there[0], origin)):
            found.append(runs_dir / name)
    found.sort(key=lambda place: (not place.name.startswith(prefix), not (place / RESULT).exists(), place.name))
    return found[0] if found else None


def _all_known(ours: Recorded, theirs: Recorded) -> bool:
    """Whether both record the content of everything that they start from; then only equal identities match."""
    known = all(name in theirs.facts for name in ours.facts)
    return known and ("task" not in ours.values or (_knows_task(ours) and _knows_task(theirs)))


@functools.lru_cache(maxsize=4096)
def _scanned(path: Path, _changed: int, _size: int, schema: type) -> tuple[Recorded, str] | None:
    """Return the record and the identity of the run in a directory, or None if it is no run or has its own name."""
    try:
        text = read_text(path, MAX_YAML_BYTES)
        if _REFERENCE.search(text):
            content = read_config(path.parent)
        else:  # libyaml is ten times as fast
            content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(content, dict) or content.get("run_dir") is not None or "runs_dir" not in content:
            return None
        recorded = recorded_of(content, schema, path.parent)
        return recorded, _identity(recorded)
    except (UserError, yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None  # no run that could be resumed
