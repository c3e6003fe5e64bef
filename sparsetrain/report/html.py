"""``report.html``: one file that holds everything, loads nothing, and reads well on a phone, in the dark and aloud."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import sparsetrain.report.sections  # noqa: F401  # registers the library's own
from sparsetrain.files import write_text
from sparsetrain.report import plots
from sparsetrain.report.plots import Picture, pictures
from sparsetrain.report.registry import TEMPLATES, sections
from sparsetrain.report.schema import Report
from sparsetrain.report.text import byte_size, clean, duration, flatten

THEMED = {"ink": plots.INK, "rule": plots.RULE, "muted": plots.MUTED} | {
    f"series-{index}": colour for index, colour in enumerate(plots.SERIES)
}
"""Colours of the figures that become variables of the page, so that they follow its theme."""


def write_html(report: Report, path: Path) -> None:
    """Write the page of ``report`` to ``path``, whole or not at all.

    Args:
        report: as accepted by `sparsetrain.report.schema.validate_report`.
        path: replaced if it exists; its directory is made if it does not.

    Raises:
        UserError: the disk is full or the directory cannot be written; a page that was there before is untouched.
    """
    write_text(path, render_html(report))


def render_html(report: Report) -> str:
    """Return the page of ``report`` as text; the same report gives the same text."""
    environment = _environment()
    shared = {"report": report, "pictures": {picture.name: picture for picture in pictures(report)}}
    bodies = []
    for section in sections():
        template = environment.get_template(str(section.template))
        # A section whose template renders to nothing would be a heading alone.
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
    """Return the SVG for inside a page: identifiers of its own, colours that follow the theme, a spoken description."""
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
