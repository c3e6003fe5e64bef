"""A fuzzer for readers of files: seeded mutations of a valid file, each read in this process.

A `Reader` makes and reads a valid file. `fuzz` mutates the file many times. Each mutated file must be read, or refused
by a `UserError` of one line, within five seconds of processor time and one gigabyte of address space. If the reader has
an independent parser, both must read the same values.

``SPARSETRAIN_FUZZ`` is the number of inputs for each reader (``make fuzz`` sets 10,000). A failure prints the seed and
keeps the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import Mutation

from sparsetrain.errors import UserError

INPUTS = int(os.environ.get("SPARSETRAIN_FUZZ", "40"))
SECONDS = 5
ROOM = 1 << 30


@dataclass(frozen=True)
class Reader:
    """A reader of files, with everything that fuzzing it needs.

    Args:
        name: the name of the reader in the name of the test.
        make: writes valid files into an empty directory and returns the path of the file to mutate.
        read: reads the directory and returns plain values: numbers, text, lists and mappings.
        mutations: changes of the bytes, of which one or several random ones are applied.
        expected: an independent parser of the bytes; if it raises, the reader must refuse the file.
        sealed: whether the file has a checksum, so that the reader must return the original values or refuse.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    mutations: tuple[Mutation, ...]
    expected: Callable[[bytes], Any] | None = None
    sealed: bool = False


class TooSlowError(BaseException):
    """The time limit has passed; as a `BaseException`, it is not caught by readers."""


def fuzz(reader: Reader, directory: Path, inputs: int = INPUTS) -> None:
    """Read ``inputs`` mutated files.

    Raises:
        AssertionError: a reader raised another exception than a `UserError` of one line, returned wrong data, or was
            too slow; the message has the seed of the input.
    """
    pristine = directory / "pristine"
    pristine.mkdir()
    name = reader.make(pristine).relative_to(pristine)
    content = (pristine / name).read_bytes()
    original = repr(reader.read(pristine))
    if reader.expected is not None:
        assert original == repr(reader.expected(content))
    place = directory / "mutated"
    for seed in range(inputs):
        draw = random.Random(f"{reader.name} {seed}")
        changed = content
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            changed = draw.choice(reader.mutations)(changed, draw)
        if not place.exists():  # a reader may have removed or added files
            shutil.copytree(pristine, place)
        (place / name).write_bytes(changed)
        refusal = None
        try:
            with _bounds():
                found = repr(reader.read(place))
        except UserError as error:
            refusal = str(error)
        except (Exception, TooSlowError) as error:
            raise AssertionError(f"{reader.name}, seed {seed} ({place / name}): {error!r}") from error
        if refusal is not None:
            assert changed != content, f"{reader.name}, seed {seed}: the valid file is refused: {refusal}"
            assert "\n" not in refusal, f"{reader.name}, seed {seed}: {refusal!r} is more than a line"
            assert len(refusal) < 2000, f"{reader.name}, seed {seed}: a line of {len(refusal)} letters"
        elif reader.sealed:
            assert found == original, f"{reader.name}, seed {seed} ({place / name}): changed data was taken"
        elif reader.expected is not None:
            _compare(reader, seed, changed, found)
        shutil.rmtree(place)


def _compare(reader: Reader, seed: int, changed: bytes, found: str) -> None:
    try:
        expected = repr(reader.expected(changed) if reader.expected else None)
    except Exception as error:
        raise AssertionError(f"{reader.name}, seed {seed}: taken as {found:.200}, and it is none: {error!r}") from error
    assert found == expected, f"{reader.name}, seed {seed}: taken as {found:.200}, and it is {expected:.200}"


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """Limit the processor time and the memory of the block."""

    def late(*_: Any) -> None:
        raise TooSlowError

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, late)
    started = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)
    if time.process_time() - started > SECONDS:  # compiled code is not interrupted by a signal
        raise TooSlowError


# ------------------------------------------------------------------------------------------ parsers of others


def strict_json(content: bytes) -> Any:
    """Return the standard library's result, but refuse NaN, duplicate names and lone surrogates, which JSON lacks."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a name occurs twice"
        return dict(pairs)

    def none(text: str) -> Any:
        raise ValueError(text)

    value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=none)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def strict_csv(content: bytes) -> list[dict[str, str]]:
    """Return the standard library's result, but refuse rows whose number of cells differs from the header's."""
    rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    header = next(rows)
    return [dict(zip(header, row, strict=True)) for row in rows if row]
