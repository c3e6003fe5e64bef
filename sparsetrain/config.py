"""Hydra configurations: found, checked against strict schemas, and turned into the stages' dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sparsetrain
from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError, nearest
from sparsetrain.models import ModelConfig
from sparsetrain.stages import (
    CoordinatesConfig,
    FinetuneConfig,
    GenerateConfig,
    PipelineConfig,
    PretrainConfig,
    PromptConfig,
)
from sparsetrain.stages.config import build, differences
from sparsetrain.stages.resolvers import register_resolvers
from sparsetrain.stages.run import TOKENIZER, read_config

SCHEDULES = ("schedule", "pipeline.finetune.schedule", "pipeline.prompt.schedule")


@dataclasses.dataclass
class DataVerbConfig:
    """Prepare a corpus."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    task: TaskConfig | None = None


ROOTS: dict[str, type] = {
    "data": DataVerbConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "prompt": PromptConfig,
    "pipeline": PipelineConfig,
    "generate": GenerateConfig,
    "coord-check": CoordinatesConfig,
}


def config_directory() -> Path:
    """Return the Hydra tree: inside the package when it was installed, beside it in a source checkout."""
    package = Path(sparsetrain.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _schema(kind: type) -> type:
    """Return a plain dataclass with the fields of ``kind``, for OmegaConf to check keys and types against.

    The checks of ``kind`` itself run later, when the values are complete; fields without a default become optional.
    """
    hints = get_type_hints(kind)
    members: list[tuple[str, Any, Any]] = []
    for entry in dataclasses.fields(kind):
        hint = ModelConfig if entry.name == "model" else hints[entry.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            hint = _schema(hint)
            members.append((entry.name, hint, dataclasses.field(default_factory=hint)))
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            members.append((entry.name, hint | None, dataclasses.field(default=None)))
        elif entry.default is not dataclasses.MISSING:
            members.append((entry.name, hint, dataclasses.field(default=entry.default)))
        else:
            members.append((entry.name, hint, dataclasses.field(default_factory=entry.default_factory)))
    return dataclasses.make_dataclass(kind.__name__, members)


@functools.cache
def register() -> None:
    """Make the schema of every verb known to Hydra."""
    store = ConfigStore.instance()
    for verb, kind in ROOTS.items():
        store.store(name=f"{verb}_schema", node=_schema(kind))
    register_resolvers()


def with_sweep(verb: str, overrides: Iterable[str]) -> list[str]:
    """Return the overrides of a multirun with those that the experiment's ``hydra.sweeper.params`` add, spelt out.

    One on the command line takes the place of the experiment's; Hydra itself would run every combination of both.
    """
    given = list(overrides)
    parsed = OverridesParser.create().parse_overrides(given)
    single = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    tree = _load(verb, [*single, "hydra.mode=MULTIRUN"], hydra=True)
    params = OmegaConf.to_container(tree.hydra.sweeper).get("params") or {}  # type: ignore[union-attr]
    keys = {override.key_or_group for override in parsed}
    added = [f"{key}={value}" for key, value in params.items() if key not in keys]
    return [*added, *given, "hydra.sweeper.params=null"] if params else given


def points(verb: str, overrides: Iterable[str]) -> Iterator[Any | None]:
    """Yield the configuration of every point of a multirun, or None for one that is refused."""
    parsed = [o for o in OverridesParser.create().parse_overrides(list(overrides)) if not _is_hydras(o)]
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    for words in itertools.product(*choices):
        try:
            yield convert(verb, _load(verb, list(words)), words)  # `check` has seen the whole sweep
        except UserError:
            yield None


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def groups(verb: str) -> dict[str, list[str]]:
    """Return the configuration groups of a verb and the options of each, null among them where it is the default."""
    members = yaml.safe_load((config_directory() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    entries = [next(iter(entry.items())) for entry in members if isinstance(entry, dict)]
    return {
        name: options(name) + ([] if default else ["null"])
        for name, default in entries
        if not name.startswith("override")
    }


def options(group: str) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))


def complete(overrides: Iterable[str]) -> list[str]:
    """Return the overrides, with ``schedule.tokens=null`` added to ``schedule.steps=...`` and the reverse.

    The length of a run can be said in either, and the one on the command line wins.
    """
    given = list(overrides)
    keys = {text.split("=", 1)[0].lstrip("+") for text in given}
    for section in SCHEDULES:
        for said, other in (("steps", "tokens"), ("tokens", "steps")):
            if f"{section}.{said}" in keys and f"{section}.{other}" not in keys:
                given.append(f"{section}.{other}=null")
    return given


def check(verb: str, overrides: list[str], sweep: bool = False) -> None:
    """Raise `UserError` for the first override whose key or choice does not exist, naming the nearest that does.

    Several values for one key are wrong too, unless for a ``sweep``; there each must be of the right type.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(f"cannot read the override: {str(error).splitlines()[0]}") from None
    known_groups = groups(verb)
    tree = _with_optional_groups(verb, parsed, known_groups)
    for override in parsed:
        key = override.key_or_group
        if _is_hydras(override):
            continue
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{override.input_line}: several values need a multirun, sparsetrain {verb} -m ...")
        if key in known_groups:
            for choice in _choices(override):
                if choice not in known_groups[key]:
                    hint = nearest(choice, known_groups[key])
                    if not hint and f"{key}.{key}" in flat(tree):  # sparsity=0.75
                        hint = f" (did you mean '{key}.{key}={choice}'?)"
                    raise UserError(f"{key}={choice} is not one of {', '.join(known_groups[key])}{hint}")
            continue
        _check_key(verb, key, tree, known_groups)
        if override.is_discrete_sweep() and override.value_type != ValueType.GLOB_CHOICE_SWEEP:
            for value in override.sweep_iterator():
                _check_type(key, value, tree)


def _with_optional_groups(verb: str, parsed: Iterable[Override], known_groups: Mapping[str, list[str]]) -> DictConfig:
    """Return the configuration of a verb with those sections that are null unless a group is chosen for them."""
    tree = defaults(verb)
    chosen = [
        f"{override.key_or_group}={choice}"
        for override in parsed
        for choice in _choices(override)[:1]
        if choice in known_groups.get(override.key_or_group, ()) and tree.get(override.key_or_group, 0) is None
    ]
    return _load(verb, chosen) if chosen else tree


def _choices(override: Override) -> list[str]:
    """Return the options of a group that an override names; those that match a glob exist."""
    if override.is_delete() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    if override.is_sweep_override():
        return [value.strip() for value in override.sweep_string_iterator()]
    return ["null" if override.value() is None else str(override.value())]


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


def flat(tree: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Return ``{"optimizer.lr": 0.002, ...}`` for a composed configuration."""
    leaves: dict[str, Any] = {}
    for key in tree:
        name, value = str(key), tree[key]
        if OmegaConf.is_dict(value):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def load(verb: str, overrides: Iterable[str]) -> Any:
    """Return the configuration of a verb as its dataclass.

    Raises:
        UserError: an unknown key or choice, a value of the wrong type or out of range; a single line.
    """
    given = complete(quoted(verb, overrides))
    check(verb, given)
    return convert(verb, _load(verb, given), given)


def quoted(verb: str, overrides: Iterable[str]) -> list[str]:
    """Return the overrides with quotes around the text of settings that hold text.

    Hydra's grammar gives commas, brackets, equals signs and quotes a meaning that they do not have in a sentence or in
    the name of a file. A value that is quoted already, and an interpolation, stay as they are.
    """
    texts = _texts(ROOTS[verb])
    result = []
    for override in overrides:
        key, equals, value = override.partition("=")
        plain = re.fullmatch(r"[\w./:+@%*-]*", value)
        given = value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1
        if equals and key.lstrip("+") in texts and not plain and not given and not value.startswith("${"):
            escaped = value.replace("'", "\\'")
            override = f"{key}='{escaped}'"
        result.append(override)
    return result


def _texts(kind: type, prefix: str = "") -> set[str]:
    """Return the settings of a configuration whose value is text."""
    found = set()
    for name, hint in get_type_hints(kind).items():
        arms = (hint, *getattr(hint, "__args__", ()))
        if str in arms and get_origin(hint) is not list:
            found.add(prefix + name)
        for arm in arms:
            if isinstance(arm, type) and dataclasses.is_dataclass(arm):
                found |= _texts(arm, f"{prefix}{name}.")
    return found


@functools.cache
def defaults(verb: str) -> DictConfig:
    """Return the configuration of a verb without any override, not to be changed."""
    return _load(verb, [])


def _load(verb: str, overrides: list[str], hydra: bool = False) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory().absolute()), version_base="1.3"):
            return compose(verb, overrides, return_hydra_config=hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from None


def one_line(error: BaseException) -> str:
    """Return what Hydra and OmegaConf say in several lines and layers as one line, the innermost cause last."""
    parts = [str(error).splitlines()[0]]
    cause = error.__cause__
    while cause is not None:
        parts.append(str(cause).splitlines()[0])
        cause = cause.__cause__
    return ": ".join(dict.fromkeys(parts))


def convert(verb: str, tree: DictConfig, overrides: Iterable[str]) -> Any:
    """Return the dataclass of ``verb`` from a composed tree, with what it takes over from ``init_from``."""
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    if verb in ("pretrain", "finetune", "prompt") and values.get("init_from"):
        _inherit(verb, values, [text.split("=", 1)[0].lstrip("+") for text in overrides])
    return build(ROOTS[verb], values)


def _inherit(verb: str, values: dict[str, Any], overridden: list[str]) -> None:
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


def describe(verb: str) -> str:
    """Return the groups of a verb with their choices, and every setting with its default and its type."""
    lines = ["groups (group=choice):"]
    for name, choices in groups(verb).items():
        lines += textwrap.wrap(", ".join(choices), 120, initial_indent=f"  {name:18} ", subsequent_indent=" " * 21)
    lines += ["", "settings (key=value) with their defaults:"]
    lines += [f"  {name} = {_shown(value)}" for name, value in flat(defaults(verb)).items()]
    lines += ["", "what the settings mean:"]
    for path, kind in _sections(verb, ROOTS[verb]):
        lines += [f"  {path or verb}:", *(f"    {line}".rstrip() for line in (kind.__doc__ or "").split("\n"))]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if OmegaConf.is_config(value):
        return str(OmegaConf.to_container(value))
    return "null" if value is None else str(value)


def _sections(path: str, kind: type) -> list[tuple[str, type]]:
    """Return the dataclasses of a configuration whose documentation explains its settings, each once."""
    found: dict[type, str] = {kind: path}
    for name, hint in get_type_hints(kind).items():
        for arm in (ModelConfig,) if name == "model" else (hint, *getattr(hint, "__args__", ())):
            if isinstance(arm, type) and dataclasses.is_dataclass(arm):
                for inner_path, inner in _sections(name, arm):
                    found.setdefault(inner, inner_path)
    return [(where, section) for section, where in found.items()]
