"""``report.html``: one file that holds everything, loads nothing, and reads well on a phone, in the dark and aloud."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from sparsetrain.files import write_text
from sparsetrain.report import plots
from sparsetrain.report.findings import cautions, findings
from sparsetrain.report.plots import Picture, pictures
from sparsetrain.report.schema import Report
from sparsetrain.report.style import PAGE_STYLE
from sparsetrain.report.tables import Sheet, cost, flops, masks, memory, results
from sparsetrain.report.text import byte_size, clean, duration, flatten

_FORMULA = "F = 6 · [ Σ nnz(hidden matrices) + V·d + 2·L·T·d ]   FLOPs per training token"

THEMED = {"ink": plots.INK, "rule": plots.RULE, "muted": plots.MUTED} | {
    f"series-{index}": colour for index, colour in enumerate(plots.SERIES)
}
"""Colours of the figures that become variables of the page, so that they follow its theme."""

_ALWAYS_LIMITS = (
    "FLOPs are counted by a formula: what a machine would do that skips every zero, not how long anything took.",
    "An interval covers the sampling of test examples, not the choice of a seed: another seed may move it further.",
)


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
    figures = {picture.name: picture for picture in pictures(report)}
    title = "sparsetrain report" + (f": {task}" if (task := _task_name(report)) else "")
    sections = [
        _section("What was found", _findings(report), _table(results(report)), _figures(figures, "accuracy")),
        _section(
            "Training curves", _figures(figures, "loss-pretrain", "bits-per-byte", "loss-finetune", "loss-prompt")
        ),
        _section(
            "Cost",
            _table(cost(report)),
            f"<p>Total wall time of the pipeline, measured: {escape(duration(report['seconds']))}.</p>",
        ),
        _section(
            "FLOPs by term",
            _figures(figures, "flops"),
            _table(flops(report)),
            f'<p class="formula">{escape(_FORMULA)}</p>',
            "<p>nnz: stored weights; V: vocabulary; d: model width; L: layers; T: context. Attention is counted dense "
            "and non-causal. Norms, softmax, the embedding look-up and the optimizer are left out.</p>",
        ),
        _section("Masks", _table(masks(report))),
        _section("Memory", _figures(figures, "bytes"), _table(memory(report)), _peak(report)),
        _section("What this does not show", _list([*report.get("limits", []), *_ALWAYS_LIMITS])),
        _section("What was run", _provenance(report)),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Nothing may be fetched, whatever a name in the report says.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_subtitle(report)}</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    """Return a section, or nothing if it would be a heading alone."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _subtitle(report: Report) -> str:
    arms = len(report["arms"])
    parts = [f"{arms} arm{'s' if arms > 1 else ''}", duration(report["seconds"])]
    if report["commit"]:
        parts.append(f"commit {clean(report['commit'])[:12]}")
    if isinstance(machine := report.get("machine"), str):
        parts.append(clean(machine))
    return f"<p>{escape(' · '.join(parts))}</p>"


def _findings(report: Report) -> str:
    warnings = cautions(report)
    block = f'<div class="caution" role="note"><h3>Read with care</h3>{_list(warnings)}</div>' if warnings else ""
    return _list(findings(report)) + block


def _table(sheet: Sheet) -> str:
    if not sheet.rows:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    lines = []
    for first, *others in sheet.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    note = f'<p class="note">{escape(sheet.note)}</p>' if sheet.note else ""
    title = escape(sheet.title)
    # A region that scrolls must be reachable by keyboard, and then needs a name.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{note}"
    )


def _figures(figures: Mapping[str, Picture], *names: str) -> str:
    shown = ""
    for picture in (figures[name] for name in names if name in figures):
        caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
        shown += f"<figure>{_inline(picture)}{caption}</figure>"
    return f'<div class="figures">{shown}</div>' if shown else ""


def _inline(picture: Picture) -> str:
    """Return the SVG for inside a page: identifiers of its own, colours that follow the theme, a spoken description."""
    svg = picture.svg.decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match.group()}{picture.name}-", svg)
    for name, colour in THEMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    label = escape(picture.alt)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _peak(report: Report) -> str:
    if any("bytes" in arm for arm in report["arms"]):
        return ""  # the table's note says it
    return f"<p>Peak resident memory of the whole process: {escape(byte_size(report['peak_rss_bytes']))}.</p>"


def _provenance(report: Report) -> str:
    run = {"commit": report["commit"] or "not known"}
    if isinstance(machine := report.get("machine"), str):
        run["machine"] = machine
    blocks = []
    if "command" in report:
        blocks.append(f'<pre tabindex="0"><code>{escape(_printable(report["command"]))}</code></pre>')
    blocks.append(_definitions("Run", run))
    groups: list[tuple[str, Any]] = [
        ("Machine", report.get("machine")),
        ("Data", report.get("data")),
        ("Task", report.get("task")),
        ("Model", report.get("model")),
        ("Settings", report.get("settings")),
    ]
    blocks += [_definitions(name, group) for name, group in groups if isinstance(group, Mapping)]
    return "\n".join(blocks)


def _definitions(title: str, mapping: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in flatten(mapping))
    return f"<h3>{escape(title)}</h3>\n<dl>{rows}</dl>" if rows else ""


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(clean(sentence))}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _printable(command: str) -> str:
    """Return a command with its line breaks, each line made safe."""
    return "\n".join(clean(line) for line in command.splitlines())


def _task_name(report: Report) -> str:
    task = report.get("task", "")
    if isinstance(task, str):
        return clean(task)
    return clean(task.get("name", ""))
