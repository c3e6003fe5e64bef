"""A user's own groups and files of configuration: how Hydra is to see them, and what makes one unusable."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf

from sparsetrain.cli import folders
from sparsetrain.cli.compose import compose, config_directory, defaults, flat, groups, own_choices, own_groups
from sparsetrain.cli.overrides import searching
from sparsetrain.errors import UserError, nearest
from sparsetrain.reading import parse_yaml, read_bytes, read_text

# What Hydra does not read as text: numbers without leading zeros, and words with a meaning.
_NO_TEXT = re.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d*)?(?:e[-+]?\d+)?|[-+]?inf|nan|true|false|null", re.IGNORECASE)


def chosen(verb: str, overrides: Iterable[str]) -> list[str]:
    """Return the overrides with the choices of groups as Hydra must see them.

    Hydra removes a group with ``~group``, so ``group=null`` becomes that. It adds a group that no file of the verb
    names with ``+group=choice``, so the choice of a user's own group becomes that, unless an experiment made it before.
    """
    overrides = list(overrides)
    searching(overrides, folders.places())  # raises if Hydra's search path is typed too
    check_names(verb)
    known, own = groups(verb), own_groups(verb)
    without = {f"{name}=null": f"~{name}" for name, there in known.items() if "null" in there and name not in own}
    given = [without.get(override, override) for override in overrides]
    typed = {name for name in own if any(text.startswith(f"{name}=") and not is_section(text) for text in given)}
    if not typed:
        return given
    made = _made(verb, given, known)
    nothing = {f"{name}=null" for name in typed - made if "null" in known[name]}
    new = typed - made
    return [f"+{text}" if text.partition("=")[0] in new else text for text in given if text not in nothing]


def is_section(override: str) -> bool:
    """Return whether an override gives the settings of a section, ``budget={steps: 3}``, instead of a choice."""
    return override.partition("=")[2].lstrip().startswith("{")


def _made(verb: str, overrides: Sequence[str], known: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the groups in which the files that overrides name, the first of several, make a choice."""
    first: list[str] = []
    for name, _, values in (text.partition("=") for text in overrides):
        choice = values.split(",")[0]
        if name not in own_groups(verb) and choice in known.get(name, ()):
            first.append(f"{name}={choice}")
    return set(compose(verb, first, hydras=True).hydra.runtime.choices)


def check_names(verb: str, added: Sequence[Path] = ()) -> None:
    """Raise `UserError` if two files have the same group and name, since Hydra would silently read one of them.

    Args:
        added: directories to search besides the user's.
    """
    places = [*folders.places(), *added]
    if not places:
        return
    library = config_directory()
    for file in sorted(path.relative_to(library) for path in library.rglob("*.yaml")):
        for place in places:
            if (place / file).is_file():
                what = f"{file.parent}={file.stem}" if file.parent != Path() else f"a file of the name {file.name}"
                raise UserError(f"{place / file}: the library has {what} too; rename yours")
    settings = {str(name) for name, value in defaults(verb).items() if not OmegaConf.is_dict(value)} - set(groups(verb))
    for place in places:
        for name in settings.intersection(folders.folders_in(place)):
            raise UserError(f"{place / name}: {name} is a setting of {verb}; give the folder another name")
        for group in ("launcher", "sweeper"):
            for name in folders.options_in(place, f"hydra/{group}"):
                if name in hydras(group):
                    raise UserError(
                        f"{place / 'hydra' / group / name}.yaml: Hydra has {group}={name} too; rename yours"
                    )
    first: dict[tuple[str, str], Path] = {}
    names = [*groups(verb), *(f"hydra/{group}" for group in ("launcher", "sweeper"))]
    for place in places:
        for name, choices in own_choices(names, [place]).items():
            for choice in choices:
                if _NO_TEXT.fullmatch(choice):
                    raise UserError(f"{place / name / choice}.yaml: Hydra takes {choice} for a value; rename the file")
                other = first.setdefault((name, choice), place)
                if other != place:
                    raise UserError(
                        f"{place / name / choice}.yaml and {other / name / choice}.yaml: rename one of them"
                    )


def hydras(group: str) -> list[str]:
    """Return the names of Hydra's installed launchers (``launcher``) or sweepers (``sweeper``)."""
    return [name.removesuffix(".yaml") for name in ConfigStore.instance().list(f"hydra/{group}")]


def unknown_choice(group: str, choice: str, known: Sequence[str], tree: DictConfig) -> UserError:
    """Return the error for a choice that a group does not have."""
    for place in folders.places():
        if (file := place / group / f"{choice}.yaml").is_symlink():
            return UserError(f"{group}={choice}: {file} is a link that leads nowhere")
        if (file := place / group / f"{choice}.yml").is_file():
            return UserError(f"{group}={choice}: {file} must end with .yaml")
        if (file := place / f"{choice}.yaml").is_file():
            inside = place.name == group
            need = f"name the directory {place.parent}" if inside else f"it must lie in {place / group}"
            return UserError(f"{group}={choice}: {file}: {need}")
    hint = nearest(choice, known)
    if not hint and f"{group}.{group}" in flat(tree):  # sparsity=0.75
        hint = f" (did you mean '{group}.{group}={choice}'?)"
    return UserError(f"{group}={choice} is not one of {', '.join(known)}{hint}")


def check_file(group: str, choice: str, tree: DictConfig, added: Sequence[Path] = ()) -> bool:
    """Return whether a choice is a file of the user's.

    Raises:
        UserError: it cannot be read, or its settings would lie in a section of the group's name, which no verb has.
    """
    place = own_choices([group], [*folders.places(), *added]).get(group, {}).get(choice)
    if place is None:
        return False
    path = place / group / f"{choice}.yaml"
    if group not in tree:
        text = read_text(path)
        parse_yaml(text, str(path))  # what is wrong with its YAML comes first
        marked = read_bytes(path).startswith(BOM_UTF8)
        try:
            package = ConfigSource._get_header_dict(text[:512])["package"]  # it reads so much of a file
        except ValueError:
            return True  # Hydra's reader says what is wrong
        if package is None or marked:
            need = f"needs the first line '# @package _global_', since no section is named {group}"
            raise UserError(f"{path} {need}" + ("; it begins with a byte-order mark" if marked else ""))
    return True
