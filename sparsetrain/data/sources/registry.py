"""The registry of sources, and the settings of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import overload

from sparsetrain.data.sources.base import Fields, Source
from sparsetrain.data.sources.pairs import KeyValuesConfig
from sparsetrain.data.sources.plain_text import separator_of
from sparsetrain.errors import UserError
from sparsetrain.registry import Registry

FILE = "file"  # the source that ``data.path`` implies
PMID = "PMID"  # the kind of id that PubMed's abstracts have, and tasks made from them


@dataclass
class SourceConfig:
    """The documents of a corpus.

    Args:
        name: one of `SOURCES`.
        path: the files for ``file``. It implies ``name=file``, unless the named source takes a path itself.
        hub_name: the data set on the Hugging Face hub, with ``hub_config`` and ``hub_split``.
        hub_config: the configuration of that data set; null takes its default.
        hub_split: the split of that data set.
        text_field: the field of ``.jsonl``, ``.parquet`` and hub rows that holds the text.
        group_field: the field that holds the group of a document; documents of one group share a split. Null for none.
        separator: how a file of plain text is cut: null makes it one document, ``blank_line`` cuts at blank lines, and
            any other text, such as ``\\n\\n`` or ``<|endoftext|>``, stands between documents.
        packages: installed packages whose files the source ``python`` reads beside the standard library.
        key_values: the documents that the source ``key_values`` generates.

    Raises:
        UserError: the name is unknown, or a setting that the source needs is missing.
    """

    name: str = "medline"
    path: str | None = None
    hub_name: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    text_field: str = "text"
    group_field: str | None = None
    separator: str | None = None
    packages: list[str] = field(default_factory=list)
    key_values: KeyValuesConfig = field(default_factory=KeyValuesConfig)

    def __post_init__(self) -> None:
        SOURCES.check(self.name)
        for setting, meaning in SOURCES[self.kind].needs.items():
            if getattr(self, setting) is None:
                raise UserError(f"data.name={self.kind} needs data.{setting}: {meaning}")
        if self.separator is not None:
            separator_of(self.separator)
            if not self._has_text():
                raise UserError(f"data.separator={self.separator!r:.60} needs data.path, the plain text that it cuts")

    def _has_text(self) -> bool:
        return self.path is not None

    @property
    def kind(self) -> str:
        """The name of the source that is read: ``file`` if a path is given and the named source takes none."""
        return FILE if self.path is not None and not SOURCES[self.name].takes_path else self.name

    @property
    def fields(self) -> Fields:
        """The fields of a row that become a document."""
        return Fields(self.text_field, self.group_field)

    def source(self) -> Source:
        """Return the source; raises `UserError` if it cannot be read."""
        return SOURCES[self.kind].make(self)


Factory = Callable[[SourceConfig], Source]


@dataclass(frozen=True)
class SourceKind:
    """The registry's entry of a source; `register_source` explains the fields."""

    make: Factory
    needs: Mapping[str, str] = field(default_factory=dict)
    takes_path: bool = False
    test_fraction: float = 0.0
    ids: str | None = None


SOURCES: Registry[SourceKind] = Registry("source", "data.name", {"make": ("config",)})
"""The names that ``data.name`` accepts."""


@overload
def register_source(
    name: str,
    *,
    needs: Mapping[str, str] | None = None,
    takes_path: bool = False,
    test_fraction: float = 0.0,
    ids: str | None = None,
) -> Callable[[Factory], Factory]: ...


@overload
def register_source(
    name: str,
    factory: Factory,
    *,
    needs: Mapping[str, str] | None = None,
    takes_path: bool = False,
    test_fraction: float = 0.0,
    ids: str | None = None,
) -> Factory: ...


def register_source(
    name: str,
    factory: Factory | None = None,
    *,
    needs: Mapping[str, str] | None = None,
    takes_path: bool = False,
    test_fraction: float = 0.0,
    ids: str | None = None,
) -> Factory | Callable[[Factory], Factory]:
    """Make a source of documents available as ``data.name=NAME``; without ``factory``, return a decorator.

    ```python
    from sparsetrain.data import Document, Source

    class Letters(Source):
        def identity(self):
            return {"version": 1}  # another number makes another corpus

        def documents(self):
            for letter in "abcdefghij":
                yield Document(id=letter, text=letter * 100)

    sparsetrain.register_source("letters", lambda config: Letters())
    ```

    Args:
        name: the name, see `Registry.register`.
        factory: maps the ``data`` section of the configuration, a `SourceConfig`, to the source. It must be fast:
            `Source.open` and `Source.documents` do slow work. It raises `UserError` if a file cannot be read.
        needs: the settings of `SourceConfig` that must be given, each with its meaning for the error.
        takes_path: whether the source itself reads ``data.path``, which otherwise implies ``data.name=file``. It is
            implied if ``needs`` has ``path``.
        test_fraction: the share of documents held out for tests of tasks if ``data.test_fraction`` is null.
        ids: the kind of id of the documents, such as ``"PMID"``. The overlap of a task's test documents with the
            training text is known only if the task has the same ``ids``.

    Returns:
        ``factory``, or the decorator, which returns the decorated function.

    Raises:
        UserError: the name is malformed or taken, or ``factory`` is no function of one argument.
    """
    if factory is None:
        return lambda decorated: register_source(
            name, decorated, needs=needs, takes_path=takes_path, test_fraction=test_fraction, ids=ids
        )
    needed = dict(needs or {})
    kind = SourceKind(factory, needed, takes_path or "path" in needed, test_fraction, ids)
    SOURCES.register(name, kind, replace=name in SOURCES.names() and SOURCES[name] == kind)
    return factory
