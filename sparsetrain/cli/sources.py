"""Hydra's readers: of files, whose errors are one line that names the file and the place, and of schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source, structured_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsetrain.errors import UserError, single_line
from sparsetrain.reading import read_yaml


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of files with other errors. Hydra requires that it has the name of the class that it replaces."""

    latest: Path | None = None
    """The file that was read last: if defaults lists form a circle, this file closes it."""

    def is_group(self, config_path: str) -> bool:
        """Return whether a folder is a group: a folder without files of configuration may be named as a setting is."""
        place = Path(self.path) / config_path
        has_files = any(any(place.glob(inside)) for inside in ("*.yaml", "*/*.yaml"))
        return super().is_group(config_path) and (has_files or not config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the content of a file.

        Raises:
            UserError: it cannot be read, is not valid YAML, has a malformed header, or holds no mapping.
        """
        path = FileConfigSource.latest = Path(self.path) / self._normalize_file_name(config_path)
        try:
            found = super().load_config(config_path)
        except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError, ValueError) as error:
            read_yaml(path)  # raises for everything but the first lines, in which Hydra looks for a package
            raise UserError(f"{path}: {single_line(error)}") from None
        if not OmegaConf.is_dict(found.config):
            read_yaml(path, dict)
        return found


class StructuredConfigSource(structured_config_source.StructuredConfigSource):
    """Hydra's source of schemas, which is its own copy. Hydra requires that it has the name of the class it replaces.

    Hydra copies its list of sources for each configuration that it composes, so that it can replace the list. A copy of
    this source would copy all schemas too, which takes a quarter of the time, although nothing changes a source and
    each schema is copied when it is read.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredConfigSource:
        return self


def use() -> None:
    """Make Hydra read files and schemas with the sources of this module."""
    Plugins.instance()  # registers Hydra's own sources
    SourcesRegistry.instance().types |= {"file": FileConfigSource, "structured": StructuredConfigSource}
