"""`metrics.jsonl`: one JSON object a line, in the order of the steps, never with a line twice."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.files import file_errors, write_text

# Entries that depend on the clock and the machine; all others are the same in every run of the same seed.
TIMED = ("seconds", "tokens_per_second", "flops_per_second")


class MetricsLog:
    """Appends records to a file; a resumed run first drops what lies behind its checkpoint."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []
        self._directory = path.parent
        write_text(path, "".join(_line(record) for record in kept))
        with file_errors(self._directory):
            # Unbuffered, so that a record that could not be written is not tried again when the file is closed.
            self._stream = path.open("ab", buffering=0)

    def write(self, **record: Any) -> None:
        """Append one record.

        Raises:
            UserError: no space left.
        """
        line = _line(record).encode()
        with file_errors(self._directory):
            if self._stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Force everything to the disk, before a checkpoint that relies on it."""
        with file_errors(self._directory):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a last line cut short by a kill is left out.

    Raises:
        UserError: no such file, or a broken line before the last.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no valid JSON") from None
    return records
