"""Errors of Hydra and OmegaConf as one line: the setting by its dotted name, its value, and what is allowed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    ConfigTypeError,
    OmegaConfBaseException,
    ValidationError,
)

from sparsetrain.cli import folders
from sparsetrain.cli.entries import of_other_verbs
from sparsetrain.cli.overrides import moved_within
from sparsetrain.cli.schema import WITH_ALTERNATIVES, alternatives
from sparsetrain.cli.sources import FileConfigSource
from sparsetrain.errors import UserError, nearest
from sparsetrain.shapes import refused as refused_by_shape

# These find the unknown key or group in a message of Hydra or OmegaConf, which may have several lines.
_UNKNOWN = (
    re.compile(r"Key '[^']*' not in .*?full_key: (\S+)", re.DOTALL),
    re.compile(r"Could not override '([^']+)'"),
)
_FILE = re.compile(r"In '[^']*': ")
# OmegaConf gives these errors no key, but the class of the section.
_OVERRIDE = re.compile(r"(?:Could not override '|Error merging override )([\w.]+)")
_NO_SECTION = re.compile(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)")
# It names neither key nor value, and the override is the one that was given.
_OTHER_FORM = re.compile(r"(?:Error merging override (.+?): )?Cannot merge (Dict|List)Config with ")
_UNFOUND = re.compile(r"Could not (?:find|load) 'hydra/(launcher|sweeper)/([^']+)'")
_EXTRAS = {"joblib": "sweep", "submitit": "slurm"}  # the packages of launchers
_FORMS = {"Dict": ("a section of settings", "a list"), "List": ("a list", "a section of settings")}


def refused(error: BaseException, root: type) -> UserError:
    """Return an error of Hydra or OmegaConf as one line; for a renamed key it says only the new name.

    Args:
        error: the error.
        root: the schema of the configuration that was composed.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, RecursionError):
        return UserError(f"{FileConfigSource.latest}: its defaults list leads back to the file itself")
    line = one_line(error)
    if (unfound := _UNFOUND.search(line)) is not None:
        return _no_plugin(*unfound.groups())
    file = found[0] if (found := _FILE.match(line)) else ""
    if (mixed := _OTHER_FORM.search(line)) is not None:
        there, needed = _FORMS[mixed[2]]
        return UserError(f"{file}{mixed[1] or 'a setting'} has {there} where {needed} is needed")
    for pattern in _UNKNOWN:
        unknown = pattern.search(str(error))
        new = moved_within(unknown[1]) if unknown else None
        if new is not None:
            return UserError(file + new)
    # Of the errors that OmegaConf raises for one setting, the outermost one knows its place.
    cause = next((cause for cause in _chain(error) if isinstance(cause, OmegaConfBaseException)), None)
    override = _OVERRIDE.search(" ".join(map(str, _chain(error))))
    said = None if cause is None else _said(cause, root, override[1] if override else None)
    return UserError(line if said is None else file + said)


def _no_plugin(kind: str, name: str) -> UserError:
    """Return the error for a launcher or a sweeper of Hydra that is neither installed nor a file of the user's."""
    group = f"hydra/{kind}"
    known = {found.removesuffix(".yaml") for found in ConfigStore.instance().list(group)}
    known |= {choice for place in folders.places() for choice in folders.options_in(place, group)}
    extra = next((extra for start, extra in _EXTRAS.items() if name.startswith(start)), None)
    hint = f"; pip install 'sparsetrain[{extra}]' adds it" if extra and kind == "launcher" else nearest(name, known)
    return UserError(f"{group}={name} is not one of {', '.join(sorted(known))}{hint}")


def _said(cause: OmegaConfBaseException, root: type, given: str | None) -> str | None:
    """Return the line for an error of OmegaConf about one setting, or None for an error of another kind.

    Args:
        given: the setting that an override gave, or None if the value is from a file.
    """
    if (section := _NO_SECTION.match(str(cause))) is not None:
        place = _likeliest(_places(root, lambda kind: kind.__name__ == section[1]), given) or section[1]
        return f"{place}={section[2]} must be a section of settings"
    kind, key = cause.object_type, str(cause.key)
    place = _place(cause, root, given)
    if isinstance(cause, ConfigKeyError) and dataclasses.is_dataclass(kind):
        known = [entry.name for entry in dataclasses.fields(kind)]
        if not (near := nearest(key, known)) and kind.__name__ in WITH_ALTERNATIVES:
            names = ", ".join(alternatives(WITH_ALTERNATIVES[kind.__name__]))
            near = f": none of {names} has this setting; --plugin FILE.py loads others"
        return f"{place} is no setting{of_other_verbs(place) or near}"
    if isinstance(cause, ConfigTypeError) and "deletion" in str(cause):
        return f"{place} cannot be deleted; give it another value"
    hint = _hint(cause) if isinstance(cause, ValidationError) else None
    if isinstance(cause, ValidationError) and cause.key is None:  # a whole section that is null
        return f"{place}=None must be a section of settings"
    if hint is None:
        return None
    return str(_must(hint, cause.value, place))


def _place(cause: OmegaConfBaseException, root: type, given: str | None) -> str:
    """Return the dotted name of a setting; OmegaConf knows it only within an entry of a list."""
    top = cause.parent_node
    while top is not None and top._get_parent() is not None:
        top = top._get_parent()
    name, kind = str(cause.full_key or cause.key), OmegaConf.get_type(top) if top is not None else None
    if kind is None or kind is root:
        return name
    outer = _likeliest(_places(root, lambda other: other is kind), given)
    return name if outer is None else f"{outer}: {name}"


def _likeliest(places: Iterable[str], given: str | None) -> str | None:
    """Return the place that an override may have meant, several as a choice, or None if there is none."""
    found = list(places)
    inside = [place for place in found if given is not None and f"{place}.".startswith(f"{given}.")]
    return " or ".join(inside or found) or None


def _places(root: type, wanted: Callable[[Any], bool], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the sections of a schema, and of its lists of sections, whose class is wanted."""
    for name, hint in get_type_hints(root).items():
        for arm in (hint, *get_args(hint), *(inner for outer in get_args(hint) for inner in get_args(outer))):
            if isinstance(arm, type) and dataclasses.is_dataclass(arm):
                if wanted(arm):
                    yield prefix + name
                yield from _places(arm, wanted, f"{prefix}{name}.")


def _hint(cause: OmegaConfBaseException) -> Any:
    """Return the type of a setting, or None if it is unknown."""
    if isinstance(cause.object_type, type) and dataclasses.is_dataclass(cause.object_type):
        return get_type_hints(cause.object_type).get(str(cause.key))
    lists = [arm for arm in _arms(cause.ref_type) if get_origin(arm) is list]
    return get_args(lists[0])[0] if lists else None


def _must(hint: Any, value: Any, place: str) -> UserError | None:
    """Return the error that `sparsetrain.settings.build` raises for a value of another type."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    shape: Any = Union[tuple(map(_shape, _arms(hint)))]  # noqa: UP007  # the number of arms is not known here
    try:
        # No type allows this value, though a value that OmegaConf refuses may be one that msgspec converts.
        msgspec.convert(object(), shape)
    except msgspec.ValidationError as error:
        return refused_by_shape(error, plain, shape, place=place, mapping="a section of settings")
    return None


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _shape(hint: Any) -> Any:
    """Return a type with the outer form of ``hint``."""
    return dict if dataclasses.is_dataclass(hint) else list if get_origin(hint) is list else hint


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes. Hydra does not always name the cause, which is then the context."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: BaseException) -> str:
    """Return the message of an error of Hydra or OmegaConf and of its causes as one line, innermost cause last."""
    parts = [str(getattr(error, "full_key", None) or "")]
    cause: BaseException | None = error
    while cause is not None:
        first, *more = str(cause).splitlines() or [""]
        # This heading is Hydra's; OmegaConf's message follows in the next line.
        heading = re.fullmatch(r"(In '[^']*': )\w+ raised while composing config:", first)
        said = f"{heading[1]}{more[0]}" if heading and more else first
        parts.append(said.removeprefix("UserError raised while resolving interpolation: "))
        cause = cause.__cause__
    return ": ".join(dict.fromkeys(filter(None, parts)))
