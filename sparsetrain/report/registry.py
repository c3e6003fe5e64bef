"""The table of the page's sections, which `register_section` fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.report.schema import Report

TEMPLATES = Path(__file__).with_name("templates")

Content = Callable[[Report], Mapping[str, Any]]


@dataclass(frozen=True)
class Section:
    """One section of ``report.html``, see `register_section`."""

    title: str
    position: float
    template: Path
    content: Content


_SECTIONS: dict[str, Section] = {}


def register_section(title: str, position: float, template: str | Path) -> Callable[[Content], Content]:
    """Return a decorator that adds a section to the page of every report.

    The decorated function takes a `Report` and returns the variables of the template, by name. The template also has
    ``report`` and ``pictures``, which holds a `sparsetrain.report.plots.Picture` for each name of a figure, and may
    import the macros of ``templates/macros.html.j2``. All text is escaped, and an undefined variable is an error. A
    section whose template renders to nothing is left out, heading included.

    Args:
        title: the heading, unique in the page.
        position: sections stand in the order of this number. The library's own stand at 10, 20, ..., 80.
        template: a Jinja template, as a path or relative to the ``templates`` of this package.

    Raises:
        UserError: another section has the title, or there is no such template.
    """
    place = TEMPLATES / template
    if not place.is_file():
        raise UserError(f"template={str(template)!r} of the section {title!r} must be a file")

    def register(content: Content) -> Content:
        if title in _SECTIONS:
            raise UserError(f"title={title!r} is the title of another section of the page")
        _SECTIONS[title] = Section(title, position, place, content)
        return content

    return register


def sections() -> list[Section]:
    """Return the registered sections in the order in which the page shows them."""
    return sorted(_SECTIONS.values(), key=lambda section: section.position)
