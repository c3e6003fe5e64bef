"""Machine files: every number has a source; what a file gets wrong is said in one line; a user's own file works."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsetrain.cost import hardware
from sparsetrain.cost.hardware import KINDS, Machine, shipped
from sparsetrain.errors import UserError

FOLDER = Path(hardware.__file__).parent / "machines"
NAMES = ("a100", "b200", "cs2", "cs3", "emerald_rapids", "h100", "h200", "zen4")

Place = tuple[str | int, ...]


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))


def facts(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of everything in a file that states numbers or a property of the machine."""
    if isinstance(value, dict):
        if {"value", "values", "skips"} & set(value):
            yield place
            return
        for key, each in value.items():
            if key != "sources":
                yield from facts(each, (*place, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from facts(each, (*place, index))


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def refused(content: Any) -> str:
    with pytest.raises(UserError) as caught:
        Machine.from_document(content, "mine", "mine.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("mine.yaml")
    return message


def test_the_shipped_machines_are_those_of_the_documentation() -> None:
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_stands_in_a_fact(name: str) -> None:
    """What is no fact is a name, a label, a count of devices, or the side of a block."""
    content = document(name)
    places = list(facts(content))

    def loose(value: Any, place: Place = ()) -> Iterator[Place]:
        if place in places or (place and place[0] == "sources"):
            return
        if isinstance(value, dict):
            for key, each in value.items():
                yield from loose(each, (*place, key))
        elif isinstance(value, list):
            for index, each in enumerate(value):
                yield from loose(each, (*place, index))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield place

    assert [place for place in loose(content) if place[-1] != "devices"] == []
    assert len(places) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_number_without_a_source_is_refused_at_every_place(name: str) -> None:
    content = document(name)
    Machine.from_document(copy.deepcopy(content), name, "mine.yaml")
    for place in facts(content):
        for changes in ({"source": None}, {"source": "nowhere"}, {"source": ""}, {"kind": None}, {"kind": "guessed"}):
            other = copy.deepcopy(content)
            for key, value in changes.items():
                entry = at(other, place)
                if value is None:
                    del entry[key]
                else:
                    entry[key] = value
            refused(other)


@pytest.mark.parametrize("name", NAMES)
def test_every_source_has_a_title_and_a_date_and_is_used(name: str) -> None:
    content = document(name)
    for key in content["sources"]:
        for field in ("title", "date"):
            other = copy.deepcopy(content)
            other["sources"][key][field] = " "
            assert f"source={key!r}" in refused(other)


@pytest.mark.parametrize("name", NAMES)
def test_an_assumption_says_that_it_is_one(name: str) -> None:
    content = document(name)
    for place in facts(content):
        fact = at(content, place)
        assert fact["kind"] in KINDS
        title = content["sources"][fact["source"]]["title"]
        assert (fact["kind"] == "assumed") == title.startswith("assumed: "), (place, title)


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_has_power_a_price_a_spread_and_a_level_that_holds_the_model(name: str) -> None:
    machine = Machine.load(name)
    assert machine.power is not None
    assert machine.price is not None
    assert machine.spread is not None
    bandwidths = [level.bandwidth.value for level in machine.memory]
    assert bandwidths == sorted(bandwidths, reverse=True)
    assert machine.peak_rate("float32") <= machine.peak_rate("bfloat16")


def test_figures_of_the_vendors() -> None:
    """A100 and H100: NVIDIA's data sheets; CS-2: 40 GB on the wafer, 7.5 PFLOP/s dense."""
    a100, h100, cs2 = (Machine.load(name) for name in ("a100", "h100", "cs2"))
    assert a100.peak_rate("bfloat16") == pytest.approx(312e12)
    assert a100.memory[-1].bandwidth.value == pytest.approx(2.039e12)
    assert h100.peak_rate("bfloat16") == pytest.approx(989e12)
    assert h100.links[0].bandwidth.value == pytest.approx(450e9)
    assert cs2.memory[0].size.value == pytest.approx(40e9)
    assert cs2.peak_rate("float16") == pytest.approx(7.5e15)
    assert [Machine.load(name).skips for name in ("b200", "cs3")] == ["2:4", "unstructured"]


def test_a_file_of_the_user_is_loaded_by_its_path(tmp_path: Path) -> None:
    content = document("h100")
    content["label"], content["price"]["value"] = "my H100", "1.25 USD/h"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    machine = Machine.load(path)
    assert (machine.name, machine.label) == ("mine", "my H100")
    assert machine.price is not None
    assert machine.price.value == 1.25
    machine.save(tmp_path / "again.yaml")
    assert Machine.load(tmp_path / "again.yaml").peak == machine.peak


def test_the_file_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "machine.md"
    example = page.read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "rented.yaml"
    path.write_text(example, "utf-8")
    assert Machine.load(path).label == "my rented H100"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("price", "value"), "-2 USD/h", "price='-2 USD/h'"),
        (("price", "value"), "nan USD/h", "price='nan USD/h'"),
        (("price", "value"), "2 EUR/h", "unknown unit 'EUR/h'"),
        (("peak", "bfloat16", "value"), "989 TOPS", "unknown unit 'TOPS'"),
        (("peak", "bfloat16", "value"), "0 TFLOP/s", "peak.bfloat16"),
        (("peak", "bfloat16", "value"), 989, "peak"),
        (("memory", 0, "bandwidth", "value"), "3.35 TB", "memory[0].bandwidth"),
        (("links", 0, "efficiency", "value"), 1.5, "at most 1"),
        (("links", 0, "devices"), 1, "links[0].devices"),
        (("overlap", "value"), float("nan"), "overlap"),
        (("spread", "value"), -0.1, "spread=-0.1"),
        (("zeros", "skips"), "all", "skips"),
        (("efficiency", "default", "values"), -0.5, "efficiency.default"),
        (("efficiency", "default", "values"), float("nan"), "efficiency.default"),
        (("prise",), {"value": "1 USD/h"}, "did you mean 'price'"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_place(place: Place, value: Any, said: str) -> None:
    content = document("h100")
    at(content, place[:-1])[place[-1]] = value
    assert said in refused(content)


def test_an_unknown_machine_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"machine='h10' is not one of a100, .*\(did you mean 'h100'\?\)$"):
        Machine.load("h10")
    with pytest.raises(UserError, match=r"^machine=nowhere.yaml: there is no such file$"):
        Machine.load("nowhere.yaml")
    with pytest.raises(UserError, match=r"dtype='int3': h100 has a peak rate for float32, .* only"):
        Machine.load("h100").peak_rate("int3")
