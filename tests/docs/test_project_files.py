"""Files that other programs read: citation, hooks, the hosted workflow, and the arguments that docstrings name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsetrain as st

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_has_what_the_format_requires() -> None:
    """The required keys of the Citation File Format 1.2.0, and the version of the package."""
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == st.__version__
    for entry in [citation, *citation["references"]]:
        assert all({"name"} <= set(author) or {"family-names"} <= set(author) for author in entry["authors"])
        assert entry["title"]
    assert [entry["type"] for entry in citation["references"]] == ["article"] * len(citation["references"])


def test_hooks_have_the_ruff_of_the_constraints() -> None:
    (pinned,) = re.findall(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = {hook["id"]: repo["rev"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert hooks["ruff-check"] == hooks["ruff-format"] == f"v{pinned}"
    assert "end-of-file-fixer" in hooks


def test_the_hosted_workflow_runs_the_check_of_a_clone() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    steps = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert ".ci/run" in steps["check"]
    assert "make docs" in steps["docs"]
    assert "make coverage" in steps["coverage"]
    versions = [
        step["with"]["python-version"] for job in jobs.values() for step in job["steps"] if "python" in str(step)
    ]
    assert set(versions) <= {"3.11"}
    assert versions


def test_the_changelog_has_the_version_of_the_package() -> None:
    assert f"\n## [{st.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def documented() -> dict[str, Any]:
    """Return the public names that are classes or functions, and the public methods of the classes, by name."""
    found: dict[str, Any] = {name: getattr(st, name) for name in st.__all__ if callable(getattr(st, name))}
    for name, thing in list(found.items()):
        if inspect.isclass(thing):
            members = inspect.getmembers(thing, inspect.isroutine)
            ours = [
                (n, m) for n, m in members if n[0] != "_" and getattr(m, "__module__", "").startswith("sparsetrain")
            ]
            found |= {f"{name}.{member}": method for member, method in ours}
    return found


@pytest.mark.parametrize("name", documented())
def test_a_docstring_names_only_arguments_that_there_are(name: str) -> None:
    thing = documented()[name]
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return
    section = re.search(r"^Args:\n((?: +.*\n|\n)*)", (inspect.getdoc(thing) or "") + "\n", re.MULTILINE)
    entries = re.findall(r"^    (\w[\w, *]*):", section[1], re.MULTILINE) if section else []
    named = {argument.strip(" *") for entry in entries for argument in entry.split(",")}
    fields = set(getattr(thing, "__dataclass_fields__", {}))
    assert named - set(inspect.signature(thing).parameters) - fields == set()
