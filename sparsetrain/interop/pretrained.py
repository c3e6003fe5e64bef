"""``save_pretrained`` and ``from_pretrained`` of transformers, which keep the masks of sparse layers.

`import sparsetrain` wraps the two methods of ``PreTrainedModel`` when transformers is imported, before or after it. A
model without sparse layers, and a directory without ``sparsity_config``, are left to the wrapped method alone. What is
written has the form of `sparsetrain.interop.mask_file`, so plain transformers reads it as a dense model.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.interop.mask_file import MASK_FILE, SECTION, read_masks, write_masks
from sparsetrain.sparsity import sparsify
from sparsetrain.sparsity.layers.dense_state import dense_state
from sparsetrain.sparsity.layers.foreign import matrix_of
from sparsetrain.sparsity.layers.surgery import linear_layers, sparse_layers
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def keep_masks(modeling: ModuleType) -> None:
    """Wrap both methods of ``transformers.modeling_utils.PreTrainedModel``; the second call does nothing."""
    kind = modeling.PreTrainedModel
    wrap(kind, "save_pretrained", _saving)
    wrap(kind, "from_pretrained", _loading)


def wrap(kind: type | ModuleType, name: str, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method or a function of ``kind`` by ``wrapping(function)``, once; without it nothing happens."""
    held = vars(kind).get(name)
    special = type(held) if isinstance(held, classmethod | staticmethod) else None
    function = held.__func__ if isinstance(held, classmethod | staticmethod) else held
    if function is None or hasattr(function, "_keeps_masks"):
        return
    wrapped = functools.wraps(function)(wrapping(function))
    wrapped._keeps_masks = True  # type: ignore[attr-defined]  # a mark, so that it is wrapped once
    setattr(kind, name, wrapped if special is None else special(wrapped))


# -- out ---------------------------------------------------------------------------------------------------------------


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(save)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        directory = Path(given["save_directory"])
        # With an adapter of peft, only the adapter is written.
        if getattr(self, "_hf_peft_config_loaded", False) or directory.is_file():
            return save(*call.args, **call.kwargs)
        writes = given.get("is_main_process", True)
        masks = {name: layer.pattern for name, layer in sparse_layers(self)}
        if not masks:
            _forget(self, directory if writes else None)
            return save(*call.args, **call.kwargs)
        if given.get("distributed_checkpoint"):
            raise UserError("save_pretrained: distributed_checkpoint=True cannot hold masks; leave it out")
        given["state_dict"] = dense_state(self, given.get("state_dict"))
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            self.config.sparsity_config = _section(self, directory, masks)
        push = given.pop("push_to_hub", False)
        result = save(*call.args, **call.kwargs)
        if push:  # again and with the masks, because the wrapped method sends only what it has written
            options = given.get("kwargs", {})
            self.push_to_hub(options.pop("repo_id", directory.name), token=given.get("token"), **options)
        return result

    return save_pretrained


def _section(model: Any, directory: Path, masks: Mapping[str, SparsityPattern]) -> dict[str, Any]:
    zeros = sum(pattern.shape[0] * pattern.shape[1] - pattern.nnz for pattern in masks.values())
    known = getattr(model.config, SECTION, None)
    pattern = known.get("pattern") if isinstance(known, dict) else None
    return write_masks(directory, masks, sum(p.numel() for p in model.parameters()) + zeros, pattern)


def _forget(model: Any, directory: Path | None) -> None:
    """Take the section of masks that a dense model no longer has out of its configuration, and out of a directory."""
    if _mask_file(model) is not None:
        del model.config.sparsity_config
        if directory is not None:
            (directory / MASK_FILE).unlink(missing_ok=True)


def _mask_file(model: Any) -> str | None:
    section = getattr(getattr(model, "config", None), SECTION, None)
    name = section.get("mask_file") if isinstance(section, dict) else None
    return name if isinstance(name, str) else None


# -- in ----------------------------------------------------------------------------------------------------------------


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if kwargs.get(key) is not None}
        found = load(cls, pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if _mask_file(model) is not None and pretrained_model_name_or_path is not None:
            _make_sparse(model, pretrained_model_name_or_path, hub)
        return found

    return from_pretrained


def _make_sparse(model: Any, source: str | os.PathLike[str], hub: Mapping[str, Any]) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        _stays_dense(source, "its layers are inside an adapter: load the base first, then the adapter into it")
        return
    directory = _directory(source, str(_mask_file(model)), hub)
    if directory is None:
        _stays_dense(source, f"config.json names {_mask_file(model)}, which is not there")
        return
    masks = read_masks(directory, {SECTION: model.config.sparsity_config})
    linears = linear_layers(model)
    masks, lost = by_names(masks, linears, getattr(model, "base_model_prefix", ""))
    if lost:
        warnings.warn(
            f"{source}: the model has no layer {lost[0]} ({len(lost)} of the masks are left out)", stacklevel=4
        )
    for name, pattern in masks.items():
        weight = matrix_of(linears[name])
        if weight is None or tuple(weight.shape) != pattern.shape:
            _stays_dense(source, f"layer {name} is not the matrix {list(pattern.shape)} of its mask")
            return
        if not weight.is_meta and int(weight.count_nonzero()) != int(pattern.gather(weight.detach()).count_nonzero()):
            _stays_dense(source, f"the masks are not those of the weights: layer {name} has weights outside its mask")
            return
    if not masks:
        return
    try:
        with warnings.catch_warnings():  # the masks are not new, so outputs without a weight are not either
            warnings.filterwarnings("ignore", ".* outputs of a SparseLinear")
            sparsify(model, masks=masks)
    except UserError as error:  # such as hooks of accelerate, or quantized weights
        _stays_dense(source, str(error))


def _stays_dense(source: object, reason: str) -> None:
    warnings.warn(f"{source}: the model stays dense, {reason}", stacklevel=5)


def by_names(
    masks: Mapping[str, SparsityPattern], layers: Mapping[str, nn.Module], prefix: str
) -> tuple[dict[str, SparsityPattern], list[str]]:
    """Return masks by the names of ``layers``, and the names of the masks that belong to none of them.

    A model with a head has the layers of the model without one, under the name ``prefix``.
    """
    found, lost = {}, []
    for name, mask in masks.items():
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        place = next((candidate for candidate in names if candidate in layers), None)
        if place is None:
            lost.append(name)
        else:
            found[place] = mask
    return found, lost


def _directory(source: str | os.PathLike[str], name: str, hub: Mapping[str, Any]) -> Path | None:
    """Return the local directory that holds the file ``name`` of a model, None if there is none."""
    local = Path(source) / hub.get("subfolder", "")
    if local.is_dir():
        return local if (local / name).is_file() else None
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(str(source), name, **hub, **quiet)
    return None if path is None else Path(path).parent
