"""The task ``file``: rows with labels in a user's CSV, JSON lines or Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsetrain.data.split import Split
from sparsetrain.data.tables import Table, open_table
from sparsetrain.data.tasks.base import Task
from sparsetrain.data.tasks.labelled_rows import Rows, task_of
from sparsetrain.data.tasks.registry import OF_TABLES, TaskConfig, register_task
from sparsetrain.errors import UserError

_last: list[tuple[str, Task]] = []
"""The task that was read last, which the stages of a pipeline share."""


@register_task("file", takes_path=True, settings=OF_TABLES)
def load(config: TaskConfig) -> Task:
    """Return the task of the rows of ``config.path``, see `task_of`.

    Raises:
        UserError: the file cannot be read or used.
    """
    if config.path is None:
        raise UserError("task.path is missing: task=file reads a .csv, .tsv, .jsonl or .parquet file, task.path=FILE")
    table = open_table(config.path, "task.path")
    status = table.path.stat()
    key = repr((config, table.path.absolute(), status.st_mtime_ns, status.st_size, status.st_ino))
    if not _last or _last[0][0] != key:
        _last.clear()  # before another one is in memory
        _last.append((key, task_of(config, Rows(str(table.path), table.columns, _rows(table), table.where))))
    return _last[0][1]


def _rows(table: Table) -> Iterator[tuple[int, Mapping[str, Any], Split | None]]:
    for number, row in table.rows():
        yield number, row, None
