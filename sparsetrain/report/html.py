"""``report.html``: a self-contained page that loads nothing, for phones, dark themes and screen readers too."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, TemplateSyntaxError
from markupsafe import Markup

import sparsetrain.report.sections  # noqa: F401  # registers the library's own sections
from sparsetrain.errors import UserError, described
from sparsetrain.files import write_text
from sparsetrain.report import plots
from sparsetrain.report.plots import Picture, pictures
from sparsetrain.report.registry import TEMPLATES, Section, sections
from sparsetrain.report.schema import Report
from sparsetrain.report.text import byte_size, clean, duration, flatten

THEMED = {"ink": plots.INK, "rule": plots.RULE, "muted": plots.MUTED} | {
    f"series-{index}": colour for index, colour in enumerate(plots.SERIES)
}
"""Colours of the figures that become CSS variables of the page, so that figures follow its theme."""


Failed = Callable[[UserError], object]


def write_html(report: Report, path: Path, failed: Failed | None = None) -> None:
    """Write the page of ``report`` to ``path`` atomically.

    Args:
        report: as accepted by `sparsetrain.report.schema.validate_report`.
        path: the file, which is replaced if it exists; a missing directory is created.
        failed: see `render_html`.

    Raises:
        UserError: a section fails, the disk is full, or the directory cannot be written; an existing page is left
            unchanged.
    """
    write_text(path, render_html(report, failed))


def render_html(report: Report, failed: Failed | None = None) -> str:
    """Return the page of ``report`` as text; the same report gives the same text.

    Args:
        report: as accepted by `sparsetrain.report.schema.validate_report`.
        failed: called with the error of each section that fails, which the page then omits.

    Raises:
        UserError: a section or its template fails, and ``failed`` is None. The message names the section and the line.
    """
    environment = _environment()
    shared = {"report": report, "pictures": {picture.name: picture for picture in pictures(report)}}
    bodies = []
    for name, section in sections():
        try:
            body = _body(environment, section, report, shared)
        except (Exception, SystemExit) as error:
            said = described(error)
            if isinstance(error, TemplateSyntaxError):  # Python did not run the template, so the traceback lacks it
                place = f"({Path(str(error.filename)).name}, line {error.lineno})"
                said = f"{type(error).__name__}: {error.message} {place}"
            line = f"report section {name!r}: {said}"
            if failed is None:
                raise UserError(line) from error
            failed(UserError(line))
            continue
        # A section whose template renders to nothing would be a heading without content.
        if body:
            bodies.append((section.title, Markup(body)))
    page = environment.get_template("page.html.j2")
    return page.render(report=report, task=_task_name(report), sections=bodies)


def _body(environment: Environment, section: Section, report: Report, shared: Mapping[str, Any]) -> str:
    template = environment.get_template(str(section.template))
    content = section.content(report)
    if not isinstance(content, Mapping):
        raise UserError(f"its function returned {content!r}; it must return the template's variables by name")
    return template.render(**shared, **content).strip()


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"byte_size": byte_size, "clean": clean, "duration": duration, "flatten": flatten}
    environment.filters |= {"inline": _inline}
    return environment


def _template(name: str) -> tuple[str, str, None]:
    """Return the text of a template and the name of its file, which errors show."""
    path = TEMPLATES / name
    return path.read_text("utf-8"), str(path), None


def _inline(picture: Picture) -> Markup:
    """Return the SVG for a page, with unique identifiers, colours of the theme and a description for screen readers."""
    svg = picture.svg.decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match.group()}{picture.name}-", svg)
    for name, colour in THEMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(picture.alt), 1))


def _task_name(report: Report) -> str:
    task = report.get("task", "")
    return clean(task if isinstance(task, str) else task.get("name", ""))
