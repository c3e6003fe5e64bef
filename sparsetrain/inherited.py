"""What happens to the values of a configuration before its dataclass is built: paths, and what it takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.files import typed_path
from sparsetrain.stages.config import PATHS, RUNS, differences
from sparsetrain.stages.run import TOKENIZER, read_config


def use_paths(values: dict[str, Any]) -> None:
    """Put each path that was typed into the form that is used.

    Raises:
        UserError: one that cannot be a path; it names the setting.
    """
    for *sections, name in (*PATHS, *((name,) for name in RUNS)):
        section: Any = values
        for part in sections:
            section = section.get(part)
        if section and section.get(name) is not None:
            section[name] = str(typed_path(section[name], ".".join((*sections, name))))


def inherit(verb: str, values: dict[str, Any], overridden: list[str]) -> None:
    """Take model, parameterization, masks and (but for pre-training) data from the run that is started from."""
    directory = Path(values["init_from"])
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    saved = read_config(directory)
    if "pipeline" in saved:
        stages = sorted(str(path.parent) for path in directory.glob("*/*/config.yaml"))
        raise UserError(f"init_from={directory} is a pipeline; choose one of its stages: {', '.join(stages)}")
    for section in ("model", "sparsity"):
        for key in overridden:
            if key == section or key.startswith(f"{section}."):
                changed = differences(values[section], saved[section], section)
                asked = [text for text in changed if key == section or text.startswith(f"{key}=")]
                if asked:
                    raise UserError(f"init_from={directory}: its checkpoint has another shape: {asked[0]}")
        values[section] = saved[section]
    inherited = ["parameterization"] if verb == "pretrain" else ["parameterization", "data"]
    for section in inherited:
        if section in overridden:
            continue
        own = {key.partition(".")[2] for key in overridden if key.startswith(f"{section}.")}
        values[section] = {**saved[section], **{key: values[section][key] for key in own}}
    if verb == "pretrain" and values["data"]["tokenizer_path"] is None:
        values["data"]["tokenizer_path"] = str(directory / TOKENIZER)
