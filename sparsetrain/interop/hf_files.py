"""Directories of Hugging Face as they lie on the disk, or on the hub: settings and tensors, without pickles."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of, typed_path
from sparsetrain.reading import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.npz", "*.model", "*.txt")


class _Index(TypedDict):
    weight_map: dict[str, str]
    metadata: NotRequired[dict[str, Any]]


def source_directory(source: str, revision: str | None = None) -> Path:
    """Return the directory of a model: that on the disk, else what the hub has under the name.

    Raises:
        UserError: there is no such directory, or the hub cannot be reached or has no such model.
    """
    path = typed_path(source, "source")
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"source={source} is a file; give the directory that holds config.json and model.safetensors")
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"source={source}: no such directory, nor a name OWNER/NAME of the Hugging Face hub")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"source={source}: no such directory, and for the Hugging Face hub huggingface_hub is missing: pip install "
            "'sparsetrain[hf]'"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # of the network, the hub or the disk; each library below has its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source={source}: no such directory, and the Hugging Face hub did not give it: {reason[:200]}"
        ) from None


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises:
        UserError: it is missing or no JSON object.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"source={directory}: it has no {CONFIG}")
    found: dict[str, Any] = read_json(directory / CONFIG, dict, finite=False)
    return found


def weight_files(directory: Path) -> list[Path]:
    """Return the files of the weights, sorted.

    Raises:
        UserError: there are none that can be read.
    """
    if (directory / INDEX).is_file():
        index: _Index = read_json(directory / INDEX, _Index)
        names = sorted(set(index["weight_map"].values()))
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise UserError(f"{directory / INDEX}: {name!r:.80} is no .safetensors file of the directory")
            if not (directory / name).is_file():
                raise UserError(f"source={directory}: the file {name} of {INDEX} is missing")
        return [directory / name for name in names]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in directory.glob(ending))
    if pickles:
        raise UserError(
            f"source={directory}: {pickles[0]} is a pickle, which can run any code and is never read; save the model "
            f"as {WEIGHTS} (transformers: model.save_pretrained(DIR))"
        )
    raise UserError(f"source={directory}: it has no {WEIGHTS}")


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Return all tensors in float32, by name.

    Raises:
        UserError: a file is damaged, two files have one tensor, or one holds something else than floating point.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = safetensors.torch.load_file(file)
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} cannot be read as .safetensors: {reason[:200]}") from None
        for name, tensor in tensors.items():
            if name in found:
                raise UserError(f"{file}: the tensor {name!r:.80} is in another file too")
            found[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def digest_of(files: list[Path], settings: Mapping[str, Any]) -> str:
    """Return a hash of the weights and of the settings, which names an imported model."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        digest.update(sha256_of(file).encode())
    return f"huggingface-{digest.hexdigest()[:16]}"
