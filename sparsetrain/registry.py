"""What can be chosen by name in a configuration: one kind of registry for rules, patterns, schedules, backends, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, overload

from sparsetrain import plugins
from sparsetrain.errors import UserError, check_choice

T = TypeVar("T")
# A name stands in YAML, on a command line and in the names of directories.
_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)


class Registry(Generic[T]):
    """Things of one kind by name, in the order of their registration.

    ```python
    TASKS: Registry[Loader] = Registry("task", "task.name")
    TASKS.register("letters", load_letters)

    @TASKS.register("digits")
    def load_digits(config): ...

    TASKS["letters"](config)
    ```

    Args:
        kind: what the things are, as messages call it: ``"task"``.
        field: the configuration key that holds such a name: ``"task.name"``.
    """

    def __init__(self, kind: str, field: str) -> None:
        self.kind, self.field = kind, field
        self._things: dict[str, T] = {}

    @overload
    def register(self, name: str, *, replace: bool = False) -> Callable[[T], T]: ...

    @overload
    def register(self, name: str, thing: T, *, replace: bool = False) -> T: ...

    def register(self, name: str, thing: T | None = None, *, replace: bool = False) -> T | Callable[[T], T]:
        """Make ``thing`` available as ``name``; without ``thing``, return a decorator that does so.

        Args:
            name: ASCII letters, digits, ``_``, ``-`` and ``.``, the first one a letter.
            thing: what the name stands for. To register the same object again has no effect.
            replace: take the place of another thing of that name.

        Returns:
            ``thing``, or the decorator, which returns what it decorates.

        Raises:
            UserError: the name is malformed, or it stands for another thing already.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{self.kind} name {name!r} is malformed: use ASCII letters, digits, '_', '-' and '.', a letter first"
            )
        if thing is None:
            return lambda decorated: self.register(name, decorated, replace=replace)
        if not replace and self._things.get(name, thing) is not thing:
            raise UserError(f"{self.kind} name {name!r} is taken; registered are {', '.join(self._things)}")
        self._things[name] = thing
        return thing

    def unregister(self, name: str) -> T:
        """Take ``name`` out and return what it stood for; an unknown name raises `UserError`, see `check`."""
        self.check(name)
        return self._things.pop(name)

    def check(self, name: str, prefix: str = "") -> None:
        """Raise `UserError` with the registered names, and the nearest one, unless ``name`` is one of them.

        Args:
            name: the name that a configuration gives.
            prefix: what precedes the key in that configuration, such as ``"stages[2]."``.
        """
        if name not in self:
            check_choice(prefix + self.field, name, self._things)

    def names(self) -> tuple[str, ...]:
        """Return the registered names."""
        return tuple(self._things)

    def things(self) -> tuple[tuple[str, T], ...]:
        """Return the names and what they stand for."""
        return tuple(self._things.items())

    def __getitem__(self, name: str) -> T:
        """Return what ``name`` stands for; an unknown name raises `UserError`, see `check`."""
        # Every sparse layer asks in every step, so a known name costs little more than in a dictionary.
        if not isinstance(name, str) or name not in self._things:
            self.check(name)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        """Whether ``name`` is registered, after plugins were loaded if need be.

        A process that a launcher started has loaded none before.
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
