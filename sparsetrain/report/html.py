"""``report.html``: a self-contained page that loads nothing, for phones, dark themes and screen readers too."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import sparsetrain.report.sections  # noqa: F401  # registers the library's own sections
from sparsetrain.files import write_text
from sparsetrain.report import plots
from sparsetrain.report.plots import Picture, pictures
from sparsetrain.report.registry import TEMPLATES, sections
from sparsetrain.report.schema import Report
from sparsetrain.report.text import byte_size, clean, duration, flatten

THEMED = {"ink": plots.INK, "rule": plots.RULE, "muted": plots.MUTED} | {
    f"series-{index}": colour for index, colour in enumerate(plots.SERIES)
}
"""Colours of the figures that become CSS variables of the page, so that figures follow its theme."""


def write_html(report: Report, path: Path) -> None:
    """Write the page of ``report`` to ``path`` atomically.

    Args:
        report: as accepted by `sparsetrain.report.schema.validate_report`.
        path: the file, which is replaced if it exists; a missing directory is created.

    Raises:
        UserError: the disk is full or the directory cannot be written; an existing page is left unchanged.
    """
    write_text(path, render_html(report))


def render_html(report: Report) -> str:
    """Return the page of ``report`` as text; the same report gives the same text."""
    environment = _environment()
    shared = {"report": report, "pictures": {picture.name: picture for picture in pictures(report)}}
    bodies = []
    for section in sections():
        template = environment.get_template(str(section.template))
        # A section whose template renders to nothing would be a heading without content.
        if body := template.render(**shared, **section.content(report)).strip():
            bodies.append((section.title, Markup(body)))
    page = environment.get_template("page.html.j2")
    return page.render(report=report, task=_task_name(report), sections=bodies)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(lambda name: (TEMPLATES / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"byte_size": byte_size, "clean": clean, "duration": duration, "flatten": flatten}
    environment.filters |= {"inline": _inline}
    return environment


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
