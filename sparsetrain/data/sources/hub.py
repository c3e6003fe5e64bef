"""The source ``hub``: data sets of the Hugging Face hub, through the `datasets` library (extra ``hf``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from sparsetrain.data.sources.base import Document, Fields, Source
from sparsetrain.data.sources.registry import SourceConfig, register_source
from sparsetrain.errors import UserError


def load_rows(
    name: str, config: str | None, split: str | None, otherwise: str = "give a local file as data.path"
) -> Any:
    """Return a split of a hub data set as a sequence of dicts, or all by name; `datasets` has a cache of its own.

    Args:
        name: the data set, ``OWNER/DATASET``.
        config: its configuration; None is the default one.
        split: its split; None is a mapping of all splits.
        otherwise: advice for use without the hub, which ends an error's line.

    Raises:
        UserError: `datasets` is not installed, or the data set cannot be loaded.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"the hub data set {name} needs datasets: pip install 'sparsetrain[hf]', or {otherwise}"
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, the network's and the file system's errors
        lines = str(error).splitlines()
        reason = lines[0].rstrip(".")[:200] if lines else type(error).__name__
        raise UserError(
            f"cannot load the hub data set {name} (config {config}, split {split}): {reason}; "
            f"check name and network, or {otherwise}"
        ) from error


class HubDataset(Source):
    """The documents of one split of a hub data set."""

    def __init__(self, hub_name: str, config: str | None, split: str, fields: Fields | None = None) -> None:
        self.hub_name = hub_name
        self.config = config
        self.split = split
        self.fields = fields or Fields()
        self.licence = f"see https://huggingface.co/datasets/{hub_name}"
        self._rows: Any = None

    def identity(self) -> dict[str, object]:
        """Return the names that select the data. A later change of the data set on the hub does not show here."""
        return {
            "hub_name": self.hub_name,
            "hub_config": self.config,
            "hub_split": self.split,
            **self.fields.identity(),
        }

    def open(self, report: Callable[[float], None]) -> None:
        """Download the data set unless `datasets` has it in its cache; raises `UserError` if it cannot be loaded."""
        self._loaded()
        report(1.0)

    def documents(self) -> Iterator[Document]:
        """Yield the rows with text; raises `UserError` if the field is missing or holds no text."""
        for number, row in enumerate(self._loaded(), start=1):
            document = self.fields.document(row, f"hub data set {self.hub_name}, row {number}")
            if document is not None:
                yield document

    def note(self) -> dict[str, object]:
        """Return the fingerprint that `datasets` computed for the rows."""
        return {"fingerprint": getattr(self._loaded(), "_fingerprint", "")}

    def size_estimate(self) -> int:
        """Return the size that the data set declares, in bytes, or 0."""
        return int(getattr(self._loaded(), "dataset_size", 0) or 0)

    def _loaded(self) -> Any:
        if self._rows is None:
            self._rows = load_rows(self.hub_name, self.config, self.split)
        return self._rows


@register_source("hub", needs={"hub_name": "OWNER/DATASET"})
def _hub(config: SourceConfig) -> HubDataset:
    assert config.hub_name is not None  # `SourceConfig` checks the needs
    return HubDataset(config.hub_name, config.hub_config, config.hub_split, config.fields)
