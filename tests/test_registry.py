"""A registry against a plain dictionary, and its messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsetrain
from sparsetrain.data import SOURCES, TASKS
from sparsetrain.errors import UserError
from sparsetrain.optim import SCHEDULES, SEGMENTS
from sparsetrain.registry import Registry
from sparsetrain.report import register_section
from sparsetrain.report.registry import SECTIONS
from sparsetrain.sparsity.patterns.spec import PATTERNS

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,3}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, st.integers(0, 3), st.booleans(), st.booleans()), max_size=12))
def test_it_holds_what_a_dictionary_holds_in_the_same_order(calls: list[tuple[str, int, bool, bool]]) -> None:
    registry: Registry[list[int]] = Registry("number", "count.number")
    things = [[number] for number in range(4)]
    expected: dict[str, list[int]] = {}
    for name, number, replace, decorate in calls:
        thing = things[number]
        call = registry.register(name, replace=replace) if decorate else None
        if not replace and name in expected and expected[name] is not thing:
            with pytest.raises(UserError, match="taken"):
                call(thing) if call else registry.register(name, thing)
            continue
        expected[name] = thing
        assert (call(thing) if call else registry.register(name, thing, replace=replace)) is thing
    assert list(registry) == list(registry.names()) == list(expected)
    assert len(registry) == len(expected)
    assert all(name in registry and registry[name] is thing for name, thing in expected.items())
    assert "unknown_name" not in registry
    for name, thing in expected.items():
        assert registry.unregister(name) is thing
        with pytest.raises(UserError, match="is not one of"):
            registry.unregister(name)


def test_an_unknown_name_gives_one_line_with_what_there_is_and_the_nearest() -> None:
    registry: Registry[int] = Registry("task", "task.name")
    registry.register("letters", 1)
    registry.register("digits", 2)
    with pytest.raises(UserError) as error:
        registry["digit"]
    assert str(error.value) == "task.name='digit' is not one of letters, digits (did you mean 'digits'?)"
    with pytest.raises(UserError, match=r"^stages\[2\]\.task\.name='digit' is not one of"):
        registry.check("digit", "stages[2].")


def test_a_taken_name_and_a_malformed_one_raise_in_one_line() -> None:
    registry: Registry[int] = Registry("task", "task.name")
    registry.register("letters", 1)
    with pytest.raises(UserError, match=r"^task name 'letters' is taken; registered are letters$"):
        registry.register("letters", 2)
    for name in ("", "two words", "../letters", "7", "a/b", "a\n", "ä", None, True):
        with pytest.raises(UserError, match=r"^task name .* is malformed: use ASCII letters.*$"):
            registry.register(name, 2)  # type: ignore[arg-type]
    assert registry.names() == ("letters",)


def _maker(spec: Any, shape: Any, density: Any, generator: Any, weight: Any, *, size: int) -> None:
    raise AssertionError("nothing is called at registration")


UNUSABLE: list[tuple[Callable[..., Any], Any, str]] = [
    (sparsetrain.register_pattern, 3, "pattern 'it': make 3 must be a function of (spec, shape, density, generator"),
    (sparsetrain.register_pattern, lambda: 0, "weight, **options): too many positional arguments"),
    (sparsetrain.register_pattern, lambda a, b, c, d, e, f: 0, "weight, **options): missing a required argument: 'f'"),
    (partial(sparsetrain.register_pattern, count=3), _maker, "pattern 'it': count 3 must be a function of (spec, sha"),
    (sparsetrain.register_schedule, 3, "schedule 'it': 3 must be a function of (i, n, start, to)"),
    (sparsetrain.register_schedule, lambda i, n, *, k: 0, "must be a function of (i, n, start, to): "),
    (sparsetrain.register_task, 3, "task 'it': load 3 must be a function of (config)"),
    (
        partial(sparsetrain.register_task, is_local=True),
        print,
        "task 'it': is_local True must be a function of (config",
    ),
    (sparsetrain.register_source, "text", "source 'it': make 'text' must be a function of (config)"),
    (lambda name, it: register_section(name, "It", 1, "sections/cost.html.j2")(it), 3, "report section 'it': content"),
]


@pytest.mark.parametrize(("register", "thing", "said"), UNUSABLE)
def test_what_cannot_be_called_is_refused_when_it_is_registered(
    register: Callable[..., Any], thing: Any, said: str
) -> None:
    with pytest.raises(UserError) as error:
        register("it", thing)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not any("it" in registry.names() for registry in (PATTERNS, SEGMENTS, SCHEDULES, TASKS, SOURCES, SECTIONS))


def test_a_function_with_options_and_a_built_in_one_without_a_signature_are_accepted() -> None:
    registry: Registry[Any] = Registry("thing", "thing.name", {"": ("a", "b", "c", "d", "e", "**options")})
    assert registry.register("maker", _maker) is _maker
    assert registry.register("dict", dict) is dict
    assert registry.names() == ("maker", "dict")
