"""``metrics.jsonl`` after resuming, after kills in the middle of a line, and on a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.runs.metrics import MetricsLog, read_metrics


def write(path: Path, steps: list[int], last_step: int = -1) -> None:
    log = MetricsLog(path, last_step)
    for step in steps:
        log.write(step=step, loss=1.5)
    log.sync()
    log.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_resumed_log_drops_what_lies_behind_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 1, 2, 3, 4])
    write(path, [3, 4, 5], last_step=2)
    assert steps(path) == [0, 1, 2, 3, 4, 5]


def test_a_run_that_starts_anew_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 1])
    write(path, [0])
    assert steps(path) == [0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 60))
def test_a_log_cut_short_at_any_byte_is_read_and_continued(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 1, 2])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    whole = steps(path)
    assert whole == [0, 1, 2][: len(whole)]
    write(path, [1, 2], last_step=0)
    assert steps(path) == ([0, 1, 2] if whole else [1, 2])
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not valid JSON"):
        read_metrics(path)


def test_a_missing_file_and_one_of_other_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.jsonl"):
        read_metrics(tmp_path / "nothing.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"step": 0}\n\xff\n')
    with pytest.raises(UserError, match=r"b\.jsonl is not UTF-8 at byte 12"):
        read_metrics(tmp_path / "b.jsonl")


@pytest.mark.parametrize("failure", ["error", "short"])
def test_a_full_disk_is_one_line(tmp_path: Path, failure: str) -> None:
    class Full:
        def write(self, line: bytes) -> int:
            if failure == "short":
                return len(line) - 1
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.close()
    stream: Any = Full()
    log._stream = stream
    with pytest.raises(UserError, match=r"no space left on .*; free some and run the same command again"):
        log.write(step=1)


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write(step=1, loss=float("nan"))
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
