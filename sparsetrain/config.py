"""Hydra configurations: found, checked against strict schemas, and turned into the stages' dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sparsetrain
from sparsetrain.bench import BenchConfig
from sparsetrain.data import DataConfig, TaskConfig
from sparsetrain.errors import UserError, nearest
from sparsetrain.inherited import inherit, use_paths
from sparsetrain.models import ModelConfig
from sparsetrain.overrides import (
    SEARCH_PATH,
    added_folders,
    check_enumerable,
    complete,
    parse,
    plain_value,
    quoted,
    text_settings,
    with_interpolation,
)
from sparsetrain.stages import (
    CoordinatesConfig,
    FinetuneConfig,
    GenerateConfig,
    PipelineConfig,
    PretrainConfig,
    PromptConfig,
    TuneConfig,
)
from sparsetrain.stages.config import build
from sparsetrain.stages.resolvers import register_resolvers


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
    "tune": TuneConfig,
    "bench": BenchConfig,
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
    parsed = parse(given)
    params = OmegaConf.to_container(_hydras(verb, parsed).sweeper).get("params") or {}  # type: ignore[union-attr]
    keys = {override.key_or_group for override in parsed}
    added = as_typed(verb, [f"{key}={value}" for key, value in params.items() if key not in keys], sweep=True)
    return [*added, *given, "hydra.sweeper.params=null"] if params else given


def launches_processes(verb: str, overrides: Iterable[str]) -> bool:
    """Return whether the launcher of a multirun has processes of its own for the points."""
    return not str(_hydras(verb, parse(overrides)).launcher.get("_target_")).endswith(".BasicLauncher")


def _hydras(verb: str, parsed: Iterable[Override]) -> DictConfig:
    """Return Hydra's own settings of a multirun."""
    single = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    tree: DictConfig = _load(verb, [*single, "hydra.mode=MULTIRUN"], hydra=True).hydra
    return tree


def points(verb: str, overrides: Iterable[str]) -> Iterator[Any | None]:
    """Yield the configuration of every point of a multirun, or None for one that is refused."""
    parsed = [o for o in parse(overrides) if not _is_hydras(o) or o.key_or_group == SEARCH_PATH]
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


def groups(verb: str, folders: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Return the configuration groups of a verb and the options of each, null among them where it is the default.

    Args:
        folders: directories that were added to the library's own.
    """
    members = yaml.safe_load((config_directory() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    entries = [next(iter(entry.items())) for entry in members if isinstance(entry, dict)]
    added = list(folders)
    return {
        name: sorted({*options(name), *(option for folder in added for option in options(name, folder))})
        + ([] if default else ["null"])
        for name, default in entries
        if not name.startswith("override")
    }


def options(group: str, folder: Path | None = None) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in ((folder or config_directory()) / group).glob("*.yaml"))


def check(verb: str, overrides: list[str], sweep: bool = False) -> None:
    """Raise `UserError` for the first override whose key or choice does not exist, naming the nearest that does.

    Several values for one key are wrong too, unless for a ``sweep``; there each must be of the right type.
    """
    parsed = parse(overrides)
    added = added_folders(parsed)
    known_groups = groups(verb, added)
    for override in parsed:
        check_enumerable(override, override.key_or_group in known_groups)
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
                for folder in added:
                    if choice in options(key, folder) and choice in options(key):
                        raise UserError(f"{key}={choice}: the library has one of this name; rename that in {folder}")
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
        for choice in _choices(override)[:1]
        if choice in known_groups[override.key_or_group] and tree.get(override.key_or_group, 0) is None
    ]
    search = [str(override.input_line) for override in parsed if override.key_or_group == SEARCH_PATH]
    return _load(verb, chosen + search) if chosen else tree


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
    given = complete(as_typed(verb, overrides))
    check(verb, given)
    return convert(verb, _load(verb, given), given)


def as_typed(verb: str, overrides: Iterable[str], sweep: bool = False) -> list[str]:
    """Return overrides for Hydra in which text stands as it was typed; see `overrides.quoted`."""
    leaves = flat(defaults(verb))
    return quoted(overrides, text_settings(_schema(ROOTS[verb])), leaves.__contains__, sweep)


@functools.cache
def defaults(verb: str) -> DictConfig:
    """Return the configuration of a verb without any override, not to be changed."""
    return _load(verb, [])


def as_file(verb: str, overrides: list[str], resolve: bool) -> dict[str, Any]:
    """Return the configuration as a file would hold it, but text as it was typed; ``resolve`` the interpolations."""
    try:
        plain = OmegaConf.to_container(_load(verb, overrides), resolve=resolve)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    assert isinstance(plain, dict)
    settings = text_settings(_schema(ROOTS[verb]))
    for key in {text.partition("=")[0].lstrip("+") for text in overrides} & settings.keys():
        *sections, name = key.split(".")
        section: Any = functools.reduce(dict.__getitem__, sections, plain)
        if not resolve and isinstance(section[name], str):
            section[name] = with_interpolation(section[name])
    return {str(key): value for key, value in plain.items()}


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
    parts = [str(getattr(error, "full_key", None) or "")]
    cause: BaseException | None = error
    while cause is not None:
        said = (str(cause).splitlines() or [""])[0]
        parts.append(said.removeprefix("UserError raised while resolving interpolation: "))
        cause = cause.__cause__
    return ": ".join(dict.fromkeys(filter(None, parts)))


def convert(verb: str, tree: DictConfig, overrides: Iterable[str]) -> Any:
    """Return the dataclass of ``verb`` from a composed tree, with what it takes over from ``init_from``."""
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    use_paths(values)
    if verb in ("pretrain", "finetune", "prompt") and values.get("init_from"):
        inherit(verb, values, [text.split("=", 1)[0].lstrip("+") for text in overrides])
    return build(ROOTS[verb], values)


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
