"""Files of the cache are complete or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sparsetrain import cache
from sparsetrain.errors import UserError


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "a"))
    assert cache.cache_directory() == tmp_path / "a"
    monkeypatch.delenv("SPARSETRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.cache_directory() == tmp_path / "b" / "sparsetrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache.cache_directory() == tmp_path / "c" / ".cache" / "sparsetrain"


def test_whole_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "file"
    with cache.whole_file(target) as temporary:
        temporary.write_text("all of it")
        assert not target.exists()
    assert target.read_text() == "all of it"
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_directory_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "directory"

    def build() -> None:
        with cache.whole_directory(target) as temporary:
            (temporary / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert list(target.parent.iterdir()) == []


def test_the_second_builder_of_a_directory_finds_the_first(tmp_path: Path) -> None:
    target = tmp_path / "directory"
    with cache.whole_directory(target) as slow:
        (slow / "who").write_text("slow")
        with cache.whole_directory(target) as fast:
            (fast / "who").write_text("fast")
    assert (target / "who").read_text() == "fast"
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    target = tmp_path / "sub" / "directory"

    def build() -> None:
        with cache.whole_directory(target, needed_bytes=42_000_000) as temporary:
            (temporary / "file").write_text("x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on .*sub: needs about 42 MB; .*SPARSETRAIN_CACHE") as caught:
        build()
    assert "\n" not in str(caught.value)
    assert list(target.parent.iterdir()) == []


def test_other_errors_of_the_disk_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"), cache.file_errors(tmp_path, 0):
        raise OSError(errno.EIO, "Input/output error")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write to .*SPARSETRAIN_CACHE"), cache.file_errors(tmp_path, 0):
        raise PermissionError(errno.EACCES, "Permission denied")
