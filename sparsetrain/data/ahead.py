"""Reading ahead: a thread reads the next items while the caller works on the one before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

_WAIT = 0.1  # seconds after which the thread looks whether the caller has gone


def read_ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield ``items`` in their order, while a thread reads up to ``depth`` more.

    An error of ``items`` is raised here, after the items before it. The thread ends with the iterator, also if the
    caller stops early: the caller must then close it, or let go of it.

    Args:
        items: what to read. Only the thread uses it.
        depth: items that wait at most, at least 1; as many more are held in memory.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    gone = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not gone.is_set():
            try:
                waiting.put(entry, timeout=_WAIT)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
        except BaseException as error:
            put((None, error, True))
        else:
            put((None, None, True))

    reader = threading.Thread(target=read, name="read ahead", daemon=True)
    reader.start()
    try:
        while True:
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        gone.set()
        reader.join()
