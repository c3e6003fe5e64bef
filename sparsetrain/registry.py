"""A registry of objects that a configuration names: rules, patterns, schedules, backends, tasks, sources, ..."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, overload

from sparsetrain import plugins
from sparsetrain.errors import UserError, check_choice

T = TypeVar("T")
# A name must be usable in YAML, on a command line and in the name of a directory.
_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)


class Registry(Generic[T]):
    """Objects of one kind by name, in the order of their registration.

    ```python
    TASKS: Registry[Loader] = Registry("task", "task.name")
    TASKS.register("letters", load_letters)

    @TASKS.register("digits")
    def load_digits(config): ...

    TASKS["letters"](config)
    ```

    Args:
        kind: the noun for such an object in messages, for example ``"task"``.
        field: the configuration key that holds such a name, for example ``"task.name"``.
        calls: the functions that an object must have: for each name of an attribute, or for ``""`` if the object is
            itself the function, the positional arguments of a call. A last ``"**options"`` allows keyword-only
            arguments without a default.
    """

    def __init__(self, kind: str, field: str, calls: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.kind, self.field, self.calls = kind, field, dict(calls or {})
        self._things: dict[str, T] = {}

    @overload
    def register(self, name: str, *, replace: bool = False) -> Callable[[T], T]: ...

    @overload
    def register(self, name: str, thing: T, *, replace: bool = False) -> T: ...

    def register(self, name: str, thing: T | None = None, *, replace: bool = False) -> T | Callable[[T], T]:
        """Make ``thing`` available as ``name``; without ``thing``, return a decorator that does so.

        Args:
            name: ASCII letters, digits, ``_``, ``-`` and ``.``, the first one a letter.
            thing: the object. To register the same object again has no effect.
            replace: replace another object with this name.

        Returns:
            ``thing``, or the decorator, which returns the decorated object.

        Raises:
            UserError: the name is malformed, another object has it, or a function of ``thing`` cannot be called.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{self.kind} name {name!r} is malformed: use ASCII letters, digits, '_', '-' and '.', a letter first"
            )
        if thing is None:
            return lambda decorated: self.register(name, decorated, replace=replace)
        for attribute, arguments in self.calls.items():
            self._check_call(name, getattr(thing, attribute) if attribute else thing, attribute, arguments)
        if not replace and self._things.get(name, thing) is not thing:
            raise UserError(f"{self.kind} name {name!r} is taken; registered are {', '.join(self._things)}")
        self._things[name] = thing
        return thing

    def _check_call(self, name: str, function: Any, attribute: str, arguments: tuple[str, ...]) -> None:
        """Raise `UserError` unless ``function`` takes the positional arguments."""
        what = f"{self.kind} {name!r}: {attribute + ' ' if attribute else ''}{function!r}"
        said = f"a function of ({', '.join(arguments)})"
        if not callable(function):
            raise UserError(f"{what} must be {said}")
        with_options = arguments[-1:] == ("**options",)
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return  # a built-in function without a signature
        if with_options:
            kept = [entry for entry in signature.parameters.values() if entry.kind is not entry.KEYWORD_ONLY]
            signature = signature.replace(parameters=kept)
        try:
            signature.bind(*arguments[: -1 if with_options else None])
        except TypeError as error:
            raise UserError(f"{what} must be {said}: {error}") from None

    def unregister(self, name: str) -> T:
        """Remove ``name`` and return its object; an unknown name raises `UserError`, see `check`."""
        self.check(name)
        return self._things.pop(name)

    def check(self, name: str, prefix: str = "") -> None:
        """Raise `UserError`, which lists the registered names and the nearest one, unless ``name`` is registered.

        Args:
            name: the name from a configuration.
            prefix: the path before the key in the configuration, such as ``"stages[2]."``.
        """
        if name not in self:
            check_choice(prefix + self.field, name, self._things)

    def names(self) -> tuple[str, ...]:
        """Return the registered names."""
        return tuple(self._things)

    def things(self) -> tuple[tuple[str, T], ...]:
        """Return the registered names, each with its object."""
        return tuple(self._things.items())

    def __getitem__(self, name: str) -> T:
        """Return the object of ``name``; an unknown name raises `UserError`, see `check`."""
        # Every sparse layer looks up its backend in every step, so a known name must cost no more than a dictionary.
        if not isinstance(name, str) or name not in self._things:
            self.check(name)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        """Return whether ``name`` is registered. An unknown name loads the plugins before the answer is False.

        A process that a launcher started has loaded no plugins until then.
        """
        if not isinstance(name, str):
            return False
        if name not in self._things:
            plugins.load()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {self.field!r}: {', '.join(self._things)})"
