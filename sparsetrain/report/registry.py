"""The registry of the page's sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.registry import Registry
from sparsetrain.report.schema import Report

TEMPLATES = Path(__file__).with_name("templates")

Content = Callable[[Report], Mapping[str, Any]]


@dataclass(frozen=True)
class Section:
    """The registry's entry of a section of ``report.html``; `register_section` explains the fields."""

    title: str
    position: float
    template: Path
    content: Content


SECTIONS: Registry[Section] = Registry("report section", "section", {"content": ("report",)})


def register_section(
    name: str, title: str, position: float, template: str | Path, *, replace: bool = False
) -> Callable[[Content], Content]:
    """Return a decorator that adds a section to the page of every report.

    The decorated function takes a `Report` and returns the variables of the template, by name. The template also has
    the variables ``report`` and ``pictures``, a mapping from names of figures to `sparsetrain.report.plots.Picture`. It
    may import the macros of ``templates/macros.html.j2``. All text is escaped, and an undefined variable is an error.
    If the template renders to nothing, the page omits the section and its heading. If the function or the template
    fails, a pipeline logs it and writes the page without the section; ``sparsetrain report`` raises the error.

    Args:
        name: the name of the section in the registry.
        title: the heading in the page.
        position: sections are ordered by this number. The library's own have 10, 20, ..., 80.
        template: a Jinja template, as an absolute path or relative to the ``templates`` of this package.
        replace: replace another section with this name.

    Raises:
        UserError: the name is malformed or taken, the template does not exist, or the function does not take one
            argument.
    """
    place = TEMPLATES / template
    if not place.is_file():
        raise UserError(f"template={str(template)!r} of the report section {name!r} must be a file")

    def register(content: Content) -> Content:
        SECTIONS.register(name, Section(title, position, place, content), replace=replace)
        return content

    return register


def sections() -> list[tuple[str, Section]]:
    """Return the names and the entries of the registered sections in the order of the page."""
    return sorted(SECTIONS.things(), key=lambda entry: entry[1].position)
