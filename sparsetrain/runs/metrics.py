"""``metrics.jsonl``: one JSON object per line, in the order of the steps, without duplicate lines."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sparsetrain.files import file_errors, write_text
from sparsetrain.reading import read_json_lines
from sparsetrain.shapes import Count

# Entries that depend on the clock and the machine; all others are equal in all runs with the same seed.
TIMED = ("seconds", "tokens_per_second", "flops_per_second")
MAX_BYTES = 1 << 30


class Record(TypedDict):
    """A line of metrics; further entries are allowed. Losses are in nats."""

    step: Count
    tokens: NotRequired[Count | None]
    loss: NotRequired[float | None]
    val_loss: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    lr: NotRequired[float | None]
    density: NotRequired[float | None]
    target_density: NotRequired[float | None]
    itop_rate: NotRequired[float | None]
    mask_overlap: NotRequired[float | None]


class MetricsLog:
    """Appends records to a file. For a resumed run, it first removes the records after the checkpoint."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []
        self._directory = path.parent
        write_text(path, "".join(_line(record) for record in kept))
        with file_errors(self._directory):
            # Unbuffered, so that closing the file does not try again to write a record that failed.
            self._stream = path.open("ab", buffering=0)

    def write(self, **record: Any) -> None:
        """Append one record.

        Raises:
            UserError: the disk is full.
        """
        line = _line(record).encode()
        with file_errors(self._directory):
            if self._stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Force all records to the disk; called before a checkpoint that relies on them."""
        with file_errors(self._directory):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without a last line that a kill cut short.

    Raises:
        UserError: there is no such file, or a line is not a `Record`; the message gives its number.
    """
    return read_json_lines(path, Record, cut=True, max_bytes=MAX_BYTES)
