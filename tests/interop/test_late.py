"""Another library is told of sparse layers when it is imported, and not before."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparsetrain.interop import installed, late
from sparsetrain.interop.late import when_imported


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported."""
    (tmp_path / "some_library").mkdir()
    (tmp_path / "some_library" / "__init__.py").write_text("")
    (tmp_path / "some_library" / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(late._finder, "actions", dict(late._finder.actions))
    for name in ("some_library", "some_library.inner"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return "some_library.inner"


def change(module: ModuleType) -> None:
    module.value += 1


def test_a_module_that_is_imported_later_is_changed_after_its_execution(library: str) -> None:
    when_imported(library, change)
    assert library not in sys.modules
    module = importlib.import_module(library)
    assert module.value == 2
    assert type(module.__spec__.loader).__module__ == "_frozen_importlib_external"  # nothing is left behind
    assert importlib.reload(module).value == 2


def test_a_module_that_is_there_is_changed_now(library: str) -> None:
    module = importlib.import_module(library)
    when_imported(library, change)
    assert module.value == 2


def test_a_module_that_does_not_exist_is_not_found(library: str) -> None:
    when_imported("some_library.missing", change)
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module("some_library.missing")


def test_a_library_of_another_version_is_imported_all_the_same(library: str) -> None:
    def unfit(module: ModuleType) -> None:
        module.missing.change()

    when_imported(library, installed._guarded(unfit))
    with pytest.warns(UserWarning, match=r"does not fit this version of some_library.inner: .*'missing'"):
        assert importlib.import_module(library).value == 1
