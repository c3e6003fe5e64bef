"""Files that appear completely or not at all, and errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsetrain.errors import UserError
from sparsetrain.files import (
    clear_leftovers,
    file_errors,
    read_json,
    sha256_of,
    temporary_directory,
    typed_path,
    whole_directory,
    whole_file,
    write_json,
    write_text,
)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def stop_half_way(path: Path) -> None:
    path.write_text("new", encoding="utf-8")
    raise RuntimeError("half way")


def test_sha256_matches_hashlib(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_file_appears_when_it_is_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            assert not path.exists() or path.read_text(encoding="utf-8") == "first"
        assert path.read_text(encoding="utf-8") == text
    assert names(path.parent) == {"file.txt"}


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(path) as temporary:
        stop_half_way(temporary)
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == {"file.txt"}


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with pytest.raises(RuntimeError, match="half way"), whole_directory(path) as temporary:
        stop_half_way(temporary / "a")
    assert names(tmp_path) == set()
    with whole_directory(path) as temporary:
        (temporary / "a").write_text("x", encoding="utf-8")
        assert not path.exists()
    assert names(tmp_path) == {"made"}
    assert names(path) == {"a"}


def test_of_two_processes_the_first_ones_directory_stays(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with whole_directory(path) as ours:
        (ours / "by").write_text("us", encoding="utf-8")
        with whole_directory(path) as theirs:
            (theirs / "by").write_text("them", encoding="utf-8")
    assert (path / "by").read_text(encoding="utf-8") == "them"
    assert names(tmp_path) == {"made"}


@pytest.mark.parametrize(
    ("number", "needed", "advice", "message"),
    [
        (errno.ENOSPC, 0, "", "no space left on {d}; free some and run the same command again"),
        (errno.EDQUOT, 12_400_000, "", "no space left on {d}: needs about 12 MB; free some and run the same command"),
        (errno.ENOSPC, 1, "set SPARSETRAIN_CACHE", "{d}: needs about 1 MB; free some or set SPARSETRAIN_CACHE"),
        (errno.EACCES, 0, "set X", "cannot write to {d} (Permission denied); set X"),
        (errno.EROFS, 0, "", "cannot write to {d} (Read-only file system)"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_line(
    tmp_path: Path, number: int, needed: int, advice: str, message: str
) -> None:
    with pytest.raises(UserError) as caught, file_errors(tmp_path, needed, advice):
        raise OSError(number, os.strerror(number))
    assert message.format(d=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_os_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"), file_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_place_that_cannot_exist_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot write to /proc"):
        write_text(Path("/proc/nowhere/file"), "x")


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        write_text(tmp_path / "file" / "below", "x")


def test_json_round_trip_refuses_nan_and_garbage(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    write_json(path, {"a": [1, None, 0.1, "ü"]})
    assert read_json(path) == {"a": [1, None, 0.1, "ü"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == {"a": [1, None, 0.1, "ü"]}
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"v\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match=r"cannot read .*absent\.json: No such file"):
        read_json(tmp_path / "absent.json")


def test_what_killed_processes_left_is_removed_and_what_live_ones_write_stays(tmp_path: Path) -> None:
    """The lock distinguishes them: a file and a directory of each kind, and names of other programs."""
    dead = [".a.txt.abcd_123.part", ".b.abcdefg1.part", ".sweep-abcdefgh", ".download.12345678"]
    kept = [".a.txt.part", "a.txt.abcdefgh.part", ".sweep-other", ".lock", ".abcdefgh.part", ".keep"]
    for name in (dead[0], *kept):
        (tmp_path / name).write_text("x")
    for name in dead[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".link.abcdefgh.part").symlink_to(tmp_path / ".keep")
    with (
        whole_file(tmp_path / "c") as file,
        whole_directory(tmp_path / "d") as folder,
        temporary_directory(tmp_path, ".sweep-") as sweep,
    ):
        file.write_text("whole")
        (folder / "file").touch()
        clear_leftovers(tmp_path)
        assert file.exists()
        assert folder.exists()
        assert sweep.exists()
        assert names(tmp_path) == {*kept, ".link.abcdefgh.part", file.name, folder.name, sweep.name}
    assert names(tmp_path) == {*kept, ".link.abcdefgh.part", "c", "d"}
    assert (tmp_path / "c").read_text() == "whole"


def test_writing_a_file_removes_what_was_left_of_the_same_file_alone(tmp_path: Path) -> None:
    for name in (".a.abcdefgh.part", ".b.abcdefgh.part"):
        (tmp_path / name).touch()
    write_text(tmp_path / "a", "x")
    assert names(tmp_path) == {"a", ".b.abcdefgh.part"}


def test_two_that_begin_at_once_do_not_remove_each_others_files(tmp_path: Path) -> None:
    """Threads replace processes here, because a lock belongs to an open file and not to a process."""

    def write(number: int) -> None:
        for turn in range(20):
            with whole_file(tmp_path / f"{number % 2}") as file:
                file.write_text(f"{number} {turn}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert names(tmp_path) == {"0", "1"}


def test_a_typed_path_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("a/b", "a[1].txt", "1.10", " a ", "日本", "*.txt", "."):
        assert typed_path(text, "x") == Path(text)
    assert typed_path("~/a", "x") == tmp_path / "a"
    for text, said in (("", "empty"), ("~nosuchuser", "no such user"), ("a\0", "null byte"), ("x" * 300, "too long")):
        with pytest.raises(UserError, match=rf"^x\b.*{said}"):
            typed_path(text, "x")
