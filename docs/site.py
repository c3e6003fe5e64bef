"""Hooks of MkDocs: the site has pages from all over the repository, and links that work on GitHub work in it.

A link in a Markdown file is relative to that file in the repository. On the site ``docs/`` is the root, and every other
file keeps its path: ``docs/kernels.md`` becomes ``kernels.md``, ``experiments/demo/README.md`` stays what it is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "experiments/**/*.md", "logs/*.md")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s#]*)(?=[)\s#])")


def outside() -> list[Path]:
    """Return the pages of the site that are not in ``docs/``."""
    return sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern))


def links(text: str) -> list[str]:
    """Return what the Markdown ``text`` links to in the repository, relative to its file and without anchors."""
    prose = "".join(CODE.split(text)[::2])
    return [unquote(target) for target in LINK.findall(prose) if target and ":" not in target]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside of ``docs/``, and each file of the repository that a page links to."""
    pages = outside()
    linked = {
        page.parent / target for page in [*ROOT.glob("docs/**/*.md"), *pages] for target in links(page.read_text())
    }
    targets = {Path(posixpath.normpath(path)) for path in linked}
    for path in sorted({*pages, *(path for path in targets if path.is_file())}):
        if ROOT / "docs" not in path.parents:
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between files of the site."""
    here = page.file.src_uri
    in_docs = page.file.generated_by is None

    def moved(match: re.Match[str]) -> str:
        target = match[1]
        if not target or ":" in target:
            return target
        folder = posixpath.dirname(f"docs/{here}" if in_docs else here)
        path = posixpath.normpath(posixpath.join(folder, target))
        path = path.removeprefix("docs/")
        return posixpath.relpath(path, posixpath.dirname(here) or ".")

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)
