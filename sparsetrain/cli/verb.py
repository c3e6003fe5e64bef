"""A row of the table of verbs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

GROUPS = {
    "data": "prepare text",
    "train": "train a model",
    "use": "use a trained model",
    "measure": "measure and compare",
    "plan": "plan a run before it starts",
    "other": "other",
}
"""Groups of verbs with their headings, in the order of help."""

COMMON = (
    *("task.name", "task.path", "data.path", "model.d_model", "model.n_layers", "sparsity.sparsity"),
    *("optimizer.lr", "budget.steps", "budget.tokens", "budget.epochs", "budget.batch_size", "seed", "run_dir"),
)
"""Settings that most commands give."""


def named(place: str) -> Any:
    """Return the object that ``"package.module:name"`` names; this imports the module."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Verb:
    """One verb. Functions and classes are given as ``"package.module:name"``, so that the table imports no module.

    Args:
        about: one line of help, which is best at most 66 characters long.
        run: the function to call, with the dataclass of the settings or, for a verb with a ``parser``, the parsed
            arguments. It may return an exit status, or a `stages.RunResult`, which is then summarised.
        examples: commands that work.
        configuration: the dataclass of the settings; ``conf/VERB.yaml`` completes its defaults.
        parser: for a verb without settings, a function that adds its arguments to an ``ArgumentParser``.
        inherits: sections of settings that the verb takes from the run ``init_from`` unless they are given.
        prunes: whether settings of ``sparsity`` make a dense model of ``init_from`` sparse.
        cost: a function that estimates the cost of a multirun from its points; it is printed before the first point.
        together: whether the function takes the list of all points of a sweep; commas then need no ``-m``.
        group: one of `GROUPS`, under which help lists the verb.
        usage: the arguments in the usage line; None for ``[key=value ...]``, or what the ``parser`` says.
        first: settings that most of its commands give, which help shows first, before those of `COMMON`.
    """

    about: str
    run: str
    examples: Sequence[str]
    configuration: str | None = None
    parser: str | None = None
    inherits: Sequence[str] = ()
    prunes: bool = False
    cost: str | None = None
    together: bool = False
    group: str = "other"
    usage: str | None = None
    first: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.configuration is None) == (self.parser is None):
            raise ValueError("a verb has either a configuration or a parser")

    @property
    def most_used(self) -> list[str]:
        """The settings that help shows first, in this order, as far as the verb has them."""
        return list(dict.fromkeys((*self.first, *COMMON)))

    def kind(self) -> type:
        """Return the dataclass of the settings."""
        assert self.configuration is not None
        found: type = named(self.configuration)
        return found

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments to ``parser``; for a verb without settings."""
        assert self.parser is not None
        add: Callable[[argparse.ArgumentParser], None] = named(self.parser)
        add(parser)
