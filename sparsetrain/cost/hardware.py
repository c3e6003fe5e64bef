"""Machines: what they can compute, move and hold, what they cost, and where each number comes from.

A machine is a YAML file. Each number in it is a fact with a unit, a kind (``datasheet``, ``measured`` or ``assumed``)
and a source, which the file lists with its date. The shipped machines lie in ``cost/machines``; a user's own file is
given by its path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from sparsetrain import files
from sparsetrain.cache import cache_directory
from sparsetrain.cost import units
from sparsetrain.cost.curves import Curve
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.machine import machine_key
from sparsetrain.reading import parse_yaml, read_yaml

THIS = "this"
KINDS = ("datasheet", "measured", "assumed")
SKIPS = ("none", "2:4", "block", "unstructured")
EXECUTIONS = ("resident", "streamed")


class _Fact(TypedDict):
    value: str
    kind: str
    source: str


class _Number(TypedDict):
    value: float
    kind: str
    source: str


class _Source(TypedDict):
    title: str
    date: str


class _Level(TypedDict):
    name: str
    size: _Fact
    bandwidth: _Fact
    latency: NotRequired[_Fact]


class _Link(TypedDict):
    name: str
    devices: int
    bandwidth: _Fact
    latency: _Fact
    efficiency: NotRequired[_Number]


class _Curve(TypedDict):
    axes: NotRequired[dict[str, list[float]]]
    values: Any
    kind: str
    source: str


class _Zeros(TypedDict):
    skips: str
    kind: str
    source: str
    block: NotRequired[int]


class _File(TypedDict):
    label: str
    sources: dict[str, _Source]
    peak: dict[str, _Fact]
    memory: list[_Level]
    zeros: _Zeros
    efficiency: dict[str, _Curve]
    execution: NotRequired[str]
    roofline: NotRequired[bool]
    launch: NotRequired[_Fact]
    links: NotRequired[list[_Link]]
    power: NotRequired[_Fact]
    price: NotRequired[_Fact]
    spread: NotRequired[_Number]
    overlap: NotRequired[_Number]
    included: NotRequired[list[str]]


@dataclass(frozen=True)
class Fact:
    """A number in base units (FLOP/s, bytes/s, bytes, seconds, watts, USD/h), its kind, and its source."""

    value: float
    kind: str
    source: str
    date: str


@dataclass(frozen=True)
class Level:
    """A memory level: size in bytes, bandwidth in bytes/s, latency in seconds."""

    name: str
    size: Fact
    bandwidth: Fact
    latency: Fact | None = None


@dataclass(frozen=True)
class Link:
    """A network among ``devices`` machines: bandwidth in bytes/s per machine and direction, latency in seconds.

    Args:
        efficiency: fraction of the bandwidth that collectives reach; None is all of it.
    """

    name: str
    devices: int
    bandwidth: Fact
    latency: Fact
    efficiency: Fact | None = None

    @property
    def rate(self) -> float:
        """The bytes/s that collectives reach."""
        return self.bandwidth.value * (1.0 if self.efficiency is None else self.efficiency.value)


@dataclass(frozen=True)
class Efficiency:
    """A fraction of the peak rate (products) or of the memory bandwidth (all else) over sizes, with its source."""

    curve: Curve
    kind: str
    source: str
    date: str


@dataclass(frozen=True)
class Machine:
    """A machine that a training step can be simulated on.

    Args:
        name: what it is loaded by.
        label: its full name.
        peak: dense FLOP/s by dtype.
        memory: levels, nearest to the arithmetic first; the last one holds the model.
        skips: which zeros cost no time: ``none``, ``2:4``, ``block`` (of ``block`` x ``block``) or ``unstructured``.
        efficiency: by operation, from the most to the least specific name: ``linear.csr.forward``, ``linear.forward``,
            ``linear``, ``default``. A name may begin with a dtype: ``bfloat16.linear``.
        execution: ``resident`` weights, or weights that are ``streamed`` to the machine layer by layer.
        roofline: whether moving the operands can take longer than an operation's efficiency says; False if the
            efficiencies are those of whole operations, measured.
        launch: seconds before an operation starts.
        power: watts in training. price: USD per hour.
        spread: standard deviation of the logarithm of measured over predicted time.
        overlap: share of the communication of data parallelism that computation can hide.
        included: kinds of operations whose time another one's efficiency contains.
        block: side of the blocks of zeros that are skipped.
    """

    name: str
    label: str
    peak: Mapping[str, Fact]
    memory: tuple[Level, ...]
    skips: str
    efficiency: Mapping[str, Efficiency]
    execution: str = "resident"
    roofline: bool = True
    launch: Fact | None = None
    links: tuple[Link, ...] = ()
    power: Fact | None = None
    price: Fact | None = None
    spread: Fact | None = None
    overlap: Fact | None = None
    included: tuple[str, ...] = ()
    block: int = 1
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, name: str | Path) -> Machine:
        """Return a machine by its name or from a YAML file.

        Args:
            name: a shipped machine, ``this`` (the machine at hand, as `calibrate` measured it), or a path.

        Raises:
            UserError: there is no such machine, ``this`` was never calibrated, or the file is not valid.
        """
        text = str(name)
        if text == THIS:
            path = calibrated_path()
            if not path.exists():
                raise UserError("machine=this: this machine was not measured yet; run: sparsetrain calibrate")
            return cls.from_document(read_yaml(path), THIS, str(path))
        if text in shipped():
            content = (resources.files("sparsetrain.cost") / "machines" / f"{text}.yaml").read_text(encoding="utf-8")
            return cls.from_document(parse_yaml(content, f"{text}.yaml"), text, f"{text}.yaml")
        path = Path(text)
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise UserError(f"machine={text}: there is no such file")
            return cls.from_document(read_yaml(path), path.stem, text)
        known = [*shipped(), THIS]
        raise UserError(f"machine={text!r} is not one of {', '.join(known)}, or a .yaml file{nearest(text, known)}")

    @classmethod
    def from_document(cls, document: Any, name: str, where: str) -> Machine:
        """Return a machine from the content of its file.

        Args:
            document: the content. name: what the machine is called. where: the file, for messages.

        Raises:
            UserError: a field is missing or unknown, or has a bad value; the line names it.
        """
        return _Reader(document, where).machine(name)

    @property
    def streamed(self) -> bool:
        """Whether weights stream to the machine layer by layer."""
        return self.execution == EXECUTIONS[1]

    def save(self, path: Path) -> None:
        """Write the machine's file."""
        import yaml

        text = yaml.safe_dump(dict(self.document), sort_keys=False, allow_unicode=True, width=1 << 16)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)

    def curve_of(self, kind: str, phase: str, backend: str = "", dtype: str = "") -> Curve | None:
        """Return the most specific efficiency of an operation, or None if the file has none, not even a default."""
        names = [f"{kind}.{backend}.{phase}", f"{kind}.{backend}", f"{kind}.{phase}", kind, "default"]
        for prefix in (f"{dtype}.", ""):
            for name in names:
                if (found := self.efficiency.get(prefix + name)) is not None:
                    return found.curve
        return None

    def has_backend(self, kind: str, backend: str) -> bool:
        """Return whether the file has an efficiency for a backend of its own, not only for the operation."""
        own = f"{kind}.{backend}"
        return any(f".{own}." in f".{name}." for name in self.efficiency)

    def peak_rate(self, dtype: str) -> float:
        """Return the dense FLOP/s in a dtype.

        Raises:
            UserError: the machine's file has no rate for it.
        """
        if dtype not in self.peak:
            raise UserError(f"dtype={dtype!r}: {self.name} has a peak rate for {', '.join(self.peak)} only")
        return self.peak[dtype].value


def shipped() -> tuple[str, ...]:
    """Return the names of the machines that come with the package."""
    entries = (resources.files("sparsetrain.cost") / "machines").iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml")))


def calibrated_path() -> Path:
    """Return the file of the machine at hand, which `sparsetrain calibrate` writes into the cache."""
    return cache_directory() / "machines" / f"{machine_key()}.yaml"


class _Reader:
    """Reads one file; every message begins with its name."""

    def __init__(self, document: Any, where: str) -> None:
        from sparsetrain.shapes import check

        check(document, _File, where)
        unknown = set(document) - set(_File.__annotations__)
        if unknown:
            first = sorted(unknown)[0]
            raise UserError(f"{where}: {first} is no field of a machine{nearest(first, _File.__annotations__)}")
        self.document, self.where = document, where

    def machine(self, name: str) -> Machine:
        content = self.document
        if not content["peak"] or not content["memory"]:
            raise UserError(f"{self.where}: peak and memory must not be empty")
        zeros = content["zeros"]
        check_choice(f"{self.where}: zeros.skips", zeros["skips"], SKIPS)
        check_choice(f"{self.where}: execution", content.get("execution", EXECUTIONS[0]), EXECUTIONS)
        self._source(zeros, "zeros")
        if (zeros["skips"] == "block") != ("block" in zeros):
            raise UserError(f"{self.where}: zeros.block is given exactly if zeros.skips is block")
        links = [self._link(entry, f"links[{index}]") for index, entry in enumerate(content.get("links", []))]
        levels = [self._level(entry, f"memory[{index}]") for index, entry in enumerate(content["memory"])]
        return Machine(
            name=name,
            label=content["label"],
            peak={key: self._fact(each, units.FLOP_RATE, f"peak.{key}") for key, each in content["peak"].items()},
            memory=tuple(levels),
            skips=zeros["skips"],
            efficiency={
                key: self._efficiency(each, f"efficiency.{key}") for key, each in content["efficiency"].items()
            },
            execution=content.get("execution", "resident"),
            roofline=content.get("roofline", True),
            launch=self._optional("launch", units.TIME),
            links=tuple(links),
            power=self._optional("power", units.POWER),
            price=self._optional("price", units.PRICE),
            spread=self._number(content.get("spread"), "spread"),
            overlap=self._number(content.get("overlap"), "overlap", most=1.0),
            included=tuple(content.get("included", [])),
            block=zeros.get("block", 1),
            document=content,
        )

    def _optional(self, name: str, unit: str) -> Fact | None:
        return self._fact(self.document[name], unit, name) if name in self.document else None

    def _level(self, entry: _Level, place: str) -> Level:
        latency = entry.get("latency")
        return Level(
            entry["name"],
            self._fact(entry["size"], units.SIZE, f"{place}.size"),
            self._fact(entry["bandwidth"], units.BANDWIDTH, f"{place}.bandwidth"),
            None if latency is None else self._fact(latency, units.TIME, f"{place}.latency"),
        )

    def _link(self, entry: _Link, place: str) -> Link:
        if entry["devices"] < 2:
            raise UserError(f"{self.where}: {place}.devices={entry['devices']} must be a whole number of at least 2")
        bandwidth = self._fact(entry["bandwidth"], units.BANDWIDTH, f"{place}.bandwidth")
        return Link(
            entry["name"],
            entry["devices"],
            bandwidth,
            self._fact(entry["latency"], units.TIME, f"{place}.latency"),
            self._number(entry.get("efficiency"), f"{place}.efficiency", most=1.0),
        )

    def _fact(self, entry: _Fact, unit: str, place: str) -> Fact:
        return Fact(units.parse(entry["value"], unit, f"{self.where}: {place}"), *self._source(entry, place))

    def _efficiency(self, entry: _Curve, place: str) -> Efficiency:
        try:
            curve = Curve(entry.get("axes", {}), np.asarray(entry["values"], dtype=float))
        except (TypeError, ValueError) as error:
            said = str(error) if isinstance(error, UserError) else "it is no table of numbers"
            raise UserError(f"{self.where}: {place}.values={entry['values']!r:.60}: {said}") from None
        if entry["kind"] != "measured" and float(curve.values.max()) > 1.0:
            raise UserError(f"{self.where}: {place}.values={entry['values']!r:.60} must be at most 1, or measured")
        return Efficiency(curve, *self._source(entry, place))

    def _source(self, entry: Mapping[str, Any], place: str) -> tuple[str, str, str]:
        """Return kind, title and date of an entry's source."""
        check_choice(f"{self.where}: {place}.kind", entry["kind"], KINDS)
        source = self.document["sources"].get(entry["source"])
        if source is None or not source["title"].strip() or not source["date"].strip():
            known = ", ".join(self.document["sources"]) or "none"
            raise UserError(
                f"{self.where}: {place}.source={entry['source']!r} is not one of the file's sources: {known}"
            )
        return entry["kind"], source["title"], source["date"]

    def _number(self, entry: _Number | None, place: str, most: float = math.inf) -> Fact | None:
        """Return a number without a unit that is above 0 and at most ``most``."""
        if entry is None:
            return None
        if not 0.0 < entry["value"] <= most:
            bound = "" if most == math.inf else f" and at most {most:g}"
            raise UserError(f"{self.where}: {place}={entry['value']} must be above 0{bound}")
        return Fact(float(entry["value"]), *self._source(entry, place))
