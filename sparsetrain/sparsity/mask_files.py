"""Masks in files: ``.npz`` and safetensors, of one's own or of others.

Written are, for each layer NAME, ``NAME.row_ptr``, ``NAME.col``, ``NAME.shape`` and ``NAME.block``: the pattern itself,
a few bytes a weight. Read are these; a model's ``state_dict`` with sparse layers; boolean matrices; weight matrices, of
which the entries other than zero count; and what ``scipy.sparse.save_npz`` writes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.files import whole_file
from sparsetrain.sparsity.init import given_pattern
from sparsetrain.sparsity.pattern import SparsityPattern

SUFFIXES = (".npz", ".safetensors")
_SCIPY = {"format", "shape"}


def save_masks(path: Path | str, patterns: Mapping[str, SparsityPattern]) -> None:
    """Write patterns by layer name to a ``.npz`` or ``.safetensors`` file, whole or not at all.

    Raises:
        UserError: another suffix, no pattern, or a file that cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    if not patterns:
        raise UserError(f"{path}: there is no mask to save")
    tensors: dict[str, Tensor] = {}
    for name, pattern in patterns.items():
        tensors[f"{name}.row_ptr"], tensors[f"{name}.col"] = pattern.row_ptr.cpu(), pattern.col.cpu()
        tensors[f"{name}.shape"] = torch.tensor(pattern.shape)
        tensors[f"{name}.block"] = torch.tensor(pattern.block)
    with whole_file(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as stream:
                arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
                np.savez(stream, **arrays)
        else:
            # A pattern may share its buffers with a layer or another pattern; the format wants tensors of their own.
            safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary)


def load_masks(path: Path | str, shapes: Mapping[str, tuple[int, int]] | None = None) -> dict[str, SparsityPattern]:
    """Return the patterns of a file by layer name; for `sparsify(model, masks=...)` or to look at.

    Args:
        path: a ``.npz`` or ``.safetensors`` file, of any kind named above. A scipy matrix has no name: it is called "".
        shapes: (out_features, in_features) by layer name, for a ``state_dict``, which does not hold the number of
            inputs; without it, a layer is taken to end at the last input that has a weight.

    Raises:
        UserError: no such file, another format, a damaged file, or nothing in it that is a mask.
    """
    path = Path(path)
    _check_suffix(path)
    try:
        tensors = _read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from None
    try:
        found = patterns_of(tensors, shapes or {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not found:
        raise UserError(f"{path} holds no mask: neither row_ptr and col, nor a matrix")
    return found


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: masks are kept in {' or '.join(SUFFIXES)} files")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with np.load(path, allow_pickle=False) as archive:
        if set(archive.files) >= _SCIPY:
            from scipy import sparse

            pattern = given_pattern(sparse.load_npz(path))
            return {"row_ptr": pattern.row_ptr, "col": pattern.col, "shape": torch.tensor(pattern.shape)}
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def patterns_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, SparsityPattern]:
    """Return the patterns among named tensors; see `load_masks`.

    Raises:
        UserError: indices that describe no matrix.
    """
    layers = {name.rpartition(".")[0]: None for name in tensors if name.rpartition(".")[2] == "row_ptr"}
    found = {}
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        row_ptr, col = tensors[f"{prefix}row_ptr"], tensors.get(f"{prefix}col")
        if col is None:
            raise UserError(f"layer '{layer}' has row_ptr and no col")
        blocks = len(row_ptr) - 1
        block = (1, 1)
        if f"{prefix}block" in tensors:
            block = _pair(tensors[f"{prefix}block"])
        elif f"{prefix}values" in tensors and layer in shapes:
            bh = shapes[layer][0] // max(blocks, 1)
            block = (bh, tensors[f"{prefix}values"].numel() // max(1, col.numel() * bh))
        if f"{prefix}shape" in tensors:
            shape = _pair(tensors[f"{prefix}shape"])
        else:
            shape = shapes.get(layer, (blocks * block[0], (int(col.max()) + 1 if col.numel() else 1) * block[1]))
        try:
            found[layer] = SparsityPattern(shape, row_ptr, col, block)
        except UserError as error:
            raise UserError(f"layer '{layer}': {error}") from None
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and min(tensor.shape) > 0 and layer not in found:
            mask = tensor if tensor.dtype == torch.bool else tensor != 0
            # A dense matrix (an embedding, a head) has no mask to speak of.
            if tensor.dtype == torch.bool or not bool(mask.all()):
                found[layer] = SparsityPattern.from_mask(mask)
    return found


def _pair(tensor: Tensor) -> tuple[int, int]:
    first, second = (int(side) for side in tensor.reshape(-1)[:2])
    return first, second
