"""The source ``python``, on a small library made here, and its split by package."""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path

import pytest

from sparsetrain.data import DataConfig, Document, prepare
from sparsetrain.data.division import divide
from sparsetrain.data.sources.python import PythonFiles
from sparsetrain.data.split import split_of
from sparsetrain.errors import UserError

NAMES = [f"package{number}" for number in range(40)]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of forty packages of three files each, with an installed package inside."""
    place = tmp_path / "lib"
    for name in NAMES:
        for file in ("__init__", "deep/one", "deep/two"):
            path = place / name / f"{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {name} {file}\n" + f"VALUE_{name} = 1\n" * 20)
    (place / "alone.py").write_text("x = 1\n" * 50)
    (place / "package0" / "__init__.py").write_text("")
    (place / "package1" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    (place / "package1" / "marked.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    (place / "package1" / "two\nlines.py").write_text("x = 1\n")
    other = place / "site-packages" / "other_thing"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('a source imports nothing')\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *rest: str(place))
    monkeypatch.setattr(sys, "path", [str(place), str(place / "site-packages"), *sys.path])
    return place


def test_files_are_documents_and_what_is_no_text_is_counted(library: Path) -> None:
    source = PythonFiles([])
    found = {document.id: document for document in source.documents()}
    paths = {path.relative_to(library).as_posix() for path in library.rglob("*.py")}
    left_out = {"package0/__init__.py", "package1/latin.py", "package1/two\nlines.py"}
    assert found.keys() == paths - left_out - {"site-packages/other_thing/__init__.py"}
    assert list(found) == sorted(found)
    assert found["package1/marked.py"].text == "x = 1\ny = 2\n"
    assert found["package2/deep/one.py"].text == (library / "package2/deep/one.py").read_text()
    assert (found["package2/deep/one.py"].group, found["alone.py"].group) == ("package2", "alone")
    note = source.note()
    assert note["counts"] == {"files": len(found) + 2, "not_utf8": 1, "empty": 1}
    assert note["packages"] == {}


def test_files_of_a_package_share_a_split(library: Path) -> None:
    config = DataConfig(name="python", packages=["other_thing"], tokenizer="bytes", validation_fraction=0.3)
    corpus = prepare(config, progress=False)
    train = {name.partition("/")[0].removesuffix(".py") for name in corpus.train_ids()}
    expected = {name for name in [*NAMES, "alone", "other_thing"] if split_of(name, 0.3, 0.0) == "train"}
    assert train == expected
    assert 0 < len(train) < len(NAMES)
    held = corpus.manifest["splits"]["validation"]["documents"]
    assert held == sum(1 for document in PythonFiles(["other_thing"]).documents() if document.group not in train)
    assert "Python Software Foundation" in corpus.manifest["licence"]


def test_another_file_makes_another_corpus(library: Path) -> None:
    first = PythonFiles([]).identity()
    assert PythonFiles([]).identity() == first
    assert PythonFiles(["other_thing"]).identity() != first
    (library / "alone.py").write_text("x = 2\n" * 50)
    changed = PythonFiles([]).identity()
    assert changed != first
    (library / "alone.py").rename(library / "renamed.py")
    assert PythonFiles([]).identity() != changed


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        (["no_such_package"], "^data.packages: no package 'no_such_package' is installed"),
        (["a.b"], r"^data.packages: no package 'a\.b' is installed"),
        (["jinja"], r"no package 'jinja' is installed \(did you mean 'jinja2'\?\)"),
        (["package3"], "^data.packages: package3 is in the standard library, which is read in any case"),
    ],
)
def test_a_package_that_cannot_be_read_is_one_line(library: Path, packages: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PythonFiles(packages)


def test_the_library_of_this_python_and_an_installed_package_are_found() -> None:
    source = PythonFiles(["jinja2"])
    found = dict(source._files)
    assert {"ast.py", "json/decoder.py", "jinja2/environment.py"} <= found.keys()
    assert found["ast.py"] == Path(ast.__file__)
    assert not any("site-packages" in name for name in found)


class Grouped:
    """Documents of a few groups."""

    long_documents = False

    def __init__(self, groups: list[str | None]) -> None:
        self.groups = groups

    def documents(self) -> list[Document]:
        return [Document(str(number), "text " * 100, group=group) for number, group in enumerate(self.groups)]


def test_only_a_group_replaces_the_id() -> None:
    plain = divide(Grouped([None] * 60), "here", None, 0.3, 0.2).splits  # type: ignore[arg-type]
    assert plain == [split_of(str(number), 0.3, 0.2) for number in range(60)]
    mixed = divide(Grouped([None] * 30 + ["a", "b", "c"] * 10), "here", None, 0.3, 0.2).splits  # type: ignore[arg-type]
    assert mixed[:30] == plain[:30]
    assert mixed[30:] == [split_of(name, 0.3, 0.2) for name in "abc"] * 10
    # A subset is drawn by the ids, whatever the groups.
    few = divide(Grouped(list("abcdef") * 10), "here", 20, 0.3, 0.0).splits  # type: ignore[arg-type]
    assert [split is None for split in few] == [
        split is None
        for split in divide(Grouped([None] * 60), "here", 20, 0.3, 0.0).splits  # type: ignore[arg-type]
    ]
    with pytest.raises(UserError, match=r"1 distinct documents, or groups of them, .* needs at least 2"):
        divide(Grouped(["a"] * 9), "here", None, 0.3, 0.0)  # type: ignore[arg-type]
