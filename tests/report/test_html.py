"""The page is well formed, loads nothing, escapes everything, and is written atomically."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.report import html, register_section, registry
from sparsetrain.report.html import render_html, write_html
from sparsetrain.report.schema import validate_report
from sparsetrain.report.show import show_run

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """A strict parser, which requires tags to close in order and records what the tests check."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def page(report_json: str) -> Page:
    return Page(render_html(validate_report(json.loads(report_json))))


def test_sections_are_all_there_under_one_heading(page: Page) -> None:
    headings = re.findall(
        r"(What was found|Training curves|Cost|FLOPs by term|Memory|What this does not show|What was run)", page.text
    )
    assert list(dict.fromkeys(headings)) == [
        "What was found",
        "Training curves",
        "Cost",
        "FLOPs by term",
        "Memory",
        "What this does not show",
        "What was run",
    ]
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_nothing_is_loaded(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name in LOADING:
                assert (value or "").startswith("#"), (tag, name, value)
            assert not re.search(r"url\((?!#)|@import", value or "")
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_identifiers_are_unique_and_every_reference_has_one(page: Page) -> None:
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    used = {v[1:] for _, a in page.tags for k, v in a.items() if k.endswith("href") and v}
    used |= {match for _, a in page.tags for v in a.values() for match in re.findall(r"url\(#([^)]+)\)", v or "")}
    assert used <= set(identifiers)


def test_tables_have_captions_and_scoped_headers(page: Page) -> None:
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") == 4
    assert {a.get("scope") for tag, a in page.tags if tag == "th"} == {"col", "row"}
    regions = [a for _, a in page.tags if a.get("role") == "region"]
    assert all(a["aria-label"] and a["tabindex"] == "0" for a in regions)


def test_every_figure_says_in_words_what_it_shows(page: Page) -> None:
    figures = [a for tag, a in page.tags if tag == "svg"]
    assert len(figures) == 6
    for attributes in figures:
        assert attributes["role"] == "img"
        assert "dense" in (attributes["aria-label"] or "")


def test_page_fits_phones_and_dark_screens(page: Page) -> None:
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert "prefers-color-scheme: dark" in page.text
    defined = set(re.findall(r"(--[a-z0-9-]+):", page.text))
    used = {m for _, a in page.tags for v in a.values() for m in re.findall(r"var\((--[a-z0-9-]+)\)", v or "")}
    assert {"--ink", "--series-0", "--series-2"} <= used <= defined


def test_provenance_and_limits_are_told(page: Page) -> None:
    for part in (
        "sparsetrain pipeline experiment=demo seed=0",
        "0123456789abcdef0123456789abcdef01234567",
        "read in place, not redistributed",
        "optimizer.weight_decay",
        "One seed: the spread over seeds was not measured.",
        "not how long anything took",
        "a reduction by the formula is not a speed-up here",
        "Σ nnz(hidden matrices) + V·d + 2·L·T·d",
    ):
        assert part in page.text


def test_same_report_gives_the_same_page(content: dict[str, Any]) -> None:
    report = validate_report(content)
    assert render_html(report) == render_html(report)


@settings(max_examples=6)
@given(
    text=st.text(max_size=30),
    mark=st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=y>', "&lt;", "]]>"]),
)
def test_hostile_strings_everywhere_stay_text(report_json: str, text: str, mark: str) -> None:
    content = json.loads(report_json)
    hostile = mark + text
    arm = content["arms"][0]
    content["arms"] = [arm]
    arm["name"] = hostile
    arm["curves"]["pretrain"] = arm["curves"]["pretrain"][::100]
    arm["finetune"]["task"] = hostile
    arm["bytes"] = {hostile: 5.0}
    arm["seconds"] = {hostile: 5.0}
    content |= {
        "command": hostile,
        "commit": hostile,
        "machine": hostile,
        "task": {"name": hostile, hostile: hostile},
        "model": {hostile: hostile},
        "data": {"licence": hostile},
        "settings": {hostile: {hostile: [hostile]}},
        "limits": [hostile],
    }
    rendered = render_html(validate_report(content))
    rendered.encode()
    page = Page(rendered)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert mark in page.text


def test_smallest_report_is_a_page(content: dict[str, Any]) -> None:
    arm = content["arms"][0]
    required = ("name", "sparsity", "density", "train_flops", "pretrain")
    smallest = {"arms": [{key: arm[key] for key in required}], "scratch": None, "majority": None, "commit": None}
    smallest |= {"peak_rss_bytes": 1, "seconds": 0.0, "overlap_train_test": 0}
    page = Page(render_html(validate_report(smallest)))
    assert "svg" not in [tag for tag, _ in page.tags]
    assert "not known" in page.text


TOY = """
from pathlib import Path
from sparsetrain.report import register_section

@register_section("energy", "Energy", 45, Path(__file__).with_name("energy.html.j2"))
def energy(report):
    return {"joules": 300 * report["seconds"], "note": "<at 300 W>" if report["commit"] else ""}
"""
TOY_TEMPLATE = """{% from "macros.html.j2" import bullets %}
{% if note %}<p>{{ joules | round | int }} J {{ note }}</p>{{ bullets([note]) }}{% endif %}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The template of a section that is added in two files."""
    html._environment.cache_clear()  # it keeps the templates
    monkeypatch.setattr(registry.SECTIONS, "_things", dict(registry.SECTIONS._things))
    (tmp_path / "energy.py").write_text(TOY)
    (tmp_path / "energy.html.j2").write_text(TOY_TEMPLATE)
    spec = importlib.util.spec_from_file_location("energy", tmp_path / "energy.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return tmp_path / "energy.html.j2"


def test_a_section_is_added_in_two_files(content: dict[str, Any], toy: Path) -> None:
    rendered = render_html(validate_report(content))
    assert "<h2>Energy</h2>\n<p>693120 J &lt;at 300 W&gt;</p><ul>\n<li>&lt;at 300 W&gt;</li>" in rendered
    titles = re.findall("<h2>(.*)</h2>", rendered)
    assert titles[titles.index("FLOPs by term") + 1] == "Energy"
    assert titles[titles.index("Energy") + 1] == "Memory"
    assert "Energy" not in render_html(validate_report(content | {"commit": None}))  # a heading alone


def test_a_section_that_cannot_be_added_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="report section name 'energy' is taken; registered are found, curves, cost"):
        register_section("energy", "Energy again", 1, toy)(dict)
    with pytest.raises(UserError, match=r"template='none.j2' of the report section 'mass' must be a file"):
        register_section("mass", "Mass", 1, "none.j2")


FAILING = {
    "{{ power }}": "UndefinedError: 'power' is undefined (energy.html.j2, line 1)",
    "<p>\n{% if %}": "TemplateSyntaxError: Expected an expression, got 'end of statement block' (energy.html.j2, line "
    "2)",
    "{{ note }}\n{{ note.x.y }}": "UndefinedError: 'str object' has no attribute 'x' (energy.html.j2, line 2)",
    '{% include "none.j2" %}': "FileNotFoundError: ",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_one_line_and_the_page_can_do_without_it(
    content: dict[str, Any], toy: Path, template: str
) -> None:
    report = validate_report(content)
    without = re.sub(r"(?s)<section>\n<h2>Energy.*?</section>\n", "", render_html(report))
    html._environment.cache_clear()
    toy.write_text(template)
    with pytest.raises(UserError) as error:
        render_html(report)
    assert str(error.value).startswith(f"report section 'energy': {FAILING[template]}")
    assert "\n" not in str(error.value)
    told: list[UserError] = []
    assert render_html(report, told.append) == without
    assert [str(each) for each in told] == [str(error.value)]


def _exits(report: Any) -> dict[str, Any]:
    raise SystemExit("bye\nbye")


def _refuses(report: Any) -> dict[str, Any]:
    raise UserError("no power")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda report: {"x": report["nope"]}, r"KeyError: 'nope' \(test_html\.py, line \d+\)"),
        (lambda report: None, "its function returned None; it must return the template's variables by name"),
        (lambda report: {"report": 1}, r"TypeError: .*'report' \(html\.py, line \d+\)"),
        (_exits, r"SystemExit: bye bye \(test_html\.py, line \d+\)"),
        (_refuses, "no power"),
    ],
)
def test_a_section_that_fails_is_one_line(content: dict[str, Any], toy: Path, function: Any, said: str) -> None:
    register_section("energy", "Energy", 45, toy, replace=True)(function)
    with pytest.raises(UserError, match=f"^report section 'energy': {said}$"):
        render_html(validate_report(content))


def test_a_failing_section_leaves_the_old_page(content: dict[str, Any], toy: Path, tmp_path: Path) -> None:
    register_section("energy", "Energy", 45, toy, replace=True)(_refuses)
    page = tmp_path / "report.html"
    page.write_text("old")
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^report section 'energy': no power$"):
        show_run(tmp_path, Console(quiet=True))
    assert page.read_text() == "old"


def test_leakage_is_a_visible_note(content: dict[str, Any]) -> None:
    content["overlap_train_test"] = 3
    page = Page(render_html(validate_report(content)))
    assert [a for _, a in page.tags if a.get("role") == "note"]
    assert "3 test examples also occur in the training text" in page.text


def test_file_is_written_whole_readable_and_alone(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    report = validate_report(content)
    write_html(report, path)
    assert path.read_text(encoding="utf-8") == render_html(report)
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_page(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="no space left on"):
        write_html(validate_report(content), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_directory_that_cannot_be_made_is_one_line(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        write_html(validate_report(content), tmp_path / "file" / "report.html")
