"""A registry against a plain dictionary, and its messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import UserError
from sparsetrain.registry import Registry

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
