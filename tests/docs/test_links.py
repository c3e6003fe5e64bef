"""Links of every page: files and anchors of the repository exist, and the site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

import sparsetrain as st

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "experiments/**/*.md", "logs/*.md", "tests/data/**/*.md")
    for path in ROOT.glob(pattern)
)
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]*)\)")


def links(page: Path) -> list[tuple[str, str, str]]:
    """Return (``!`` of an image, text, target) of the links of a page, code left out."""
    return LINK.findall(CODE.sub("`", (ROOT / page).read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        plain = LINK.sub(r"\2", heading).replace("`", "").lower()
        kept = "".join(c for c in plain if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    dead = []
    for _, _, target in links(page):
        path, _, anchor = target.partition("#")
        if ":" in path:
            assert re.match(r"https://[\w.-]+/", target), target
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or ROOT not in file.resolve().parents or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_images_of_a_page_have_a_text(page: Path) -> None:
    assert [target for image, text, target in links(page) if image and not text.strip()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] not in ("logs", "tests")], ids=str)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    """A word in capitals stands for a name of the reader's."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:sparsetrain|conf|tests|docs|experiments|logs)/[\w./-]+)`", text)
    assert [path for path in named if not re.search("[A-Z]{3}", path) and not (ROOT / path).exists()] == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One *two* `x=3`, four\n\n[a](b.md) ![](c.png) `[d](e)`\n")
    assert anchors(page) == {"one-two-x3-four"}
    assert LINK.findall(CODE.sub("`", page.read_text())) == [("", "a", "b.md"), ("!", "", "c.png")]


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: sparsetrain\.(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(st.__all__)


def test_the_navigation_has_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Reads `mkdocs.yml`, which names a function of Python."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    named = set(re.findall(r"'([^']+\.md)'", str(settings["nav"])))
    named |= {line.removeprefix("/") for line in settings["not_in_nav"].split()}
    pages = {str(page).removeprefix("docs/") for page in PAGES if page.parts[0] != "tests"}
    assert named == pages


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in st.__all__:
        assert f'id="sparsetrain.{name}' in page, name
    assert (tmp_path / "site" / "experiments" / "demo" / "figure.png").is_file()
