"""Masks in files: ``.npz`` and safetensors, written here or by other libraries.

Written are, for each layer NAME, ``NAME.row_ptr``, ``NAME.col``, ``NAME.shape`` and ``NAME.block``: the pattern itself,
a few bytes a weight. A packed file has ``NAME.bits`` in place of the first two: uint8 ``[out, ceil(in / 8)]``, one bit
an element, as `numpy.packbits` writes it. Read are these; a model's ``state_dict`` with sparse layers; boolean
matrices; weight matrices, of which the entries other than zero count; and what ``scipy.sparse.save_npz`` writes.
"""

from __future__ import annotations

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
from sparsetrain.sparsity.patterns.foreign import check_sides, pattern_of_arrays
from sparsetrain.sparsity.patterns.npz import read_npz
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

SUFFIXES = (".npz", ".safetensors")
_SCIPY = {"format", "shape"}
_BITS = ".bits"


def save_masks(path: Path | str, patterns: Mapping[str, SparsityPattern], packed: bool = False) -> None:
    """Write patterns by layer name to a ``.npz`` or ``.safetensors`` file, whole or not at all.

    Args:
        packed: one bit for each element of a matrix, which is smaller for densities above 1/32.

    Raises:
        UserError: another suffix, no pattern, or a file that cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    if not patterns:
        raise UserError(f"{path}: there is no mask to save")
    tensors: dict[str, Tensor] = {}
    for name, pattern in patterns.items():
        if packed:
            tensors[f"{name}.bits"] = torch.from_numpy(np.packbits(pattern.mask().cpu().numpy(), axis=1))
        else:
            tensors[f"{name}.row_ptr"], tensors[f"{name}.col"] = pattern.row_ptr.cpu(), pattern.col.cpu()
        tensors[f"{name}.shape"] = torch.tensor(pattern.shape)
        tensors[f"{name}.block"] = torch.tensor(pattern.block)
    with whole_file(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as stream:
                arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
                np.savez(stream, **arrays)
        else:
            # A pattern may share its buffers with a layer or another pattern, which the format does not allow.
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
    tensors = _read(path)
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
        return _read_safetensors(path)
    arrays = read_npz(path)
    try:
        if arrays.keys() >= _SCIPY:
            pattern = _of_scipy(arrays)
            return {"row_ptr": pattern.row_ptr, "col": pattern.col, "shape": torch.tensor(pattern.shape)}
        return {name: _tensor(name, array) for name, array in arrays.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file whose header the library compares with its size; small floats as float32."""
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as .safetensors: {reason[:200]}") from None
    small = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.element_size() == 1}
    return {name: tensor.float() if name in small else tensor for name, tensor in tensors.items()}


def _of_scipy(arrays: dict[str, np.ndarray[Any, Any]]) -> SparsityPattern:
    layout = arrays["format"].item() if arrays["format"].size == 1 else ""
    text = layout.decode("latin1") if isinstance(layout, bytes) else str(layout)
    shape = _pair("shape", _tensor("shape", arrays["shape"]))
    if "coords" in arrays and arrays["coords"].shape[:1] == (2,):
        arrays = {**arrays, "row": arrays["coords"][0], "col": arrays["coords"][1]}
    return pattern_of_arrays(text, shape, arrays)


def _tensor(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind in "SU":
        raise UserError(f"{name!r:.60} holds text; numbers are needed")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # which torch hardly computes with
        if array.size and int(array.max()) >= 2**63:
            raise UserError(f"{name!r:.60} has {int(array.max())}; integers must have 64 bits with a sign")
        array = array.astype(np.int64)
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        raise UserError(f"{name!r:.60} has dtype {array.dtype}; at most 64 bits a number are read")
    return torch.from_numpy(array)


def patterns_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, SparsityPattern]:
    """Return the patterns among named tensors; see `load_masks`.

    Raises:
        UserError: indices that describe no matrix, or a side beyond `MAX_MASK_SIDE`.
    """
    layers = {name.rpartition(".")[0]: None for name in tensors if name.rpartition(".")[2] == "row_ptr"}
    found = {}
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        if f"{prefix}col" not in tensors:
            raise UserError(f"layer {layer!r:.60} has row_ptr and no col")
        try:
            found[layer] = _pattern(tensors, prefix, shapes.get(layer))
        except UserError as error:
            raise UserError(f"layer {layer!r:.60}: {error}") from None
    packed = {name for name in tensors if name.endswith(_BITS) and f"{name.removesuffix(_BITS)}.shape" in tensors}
    for name in sorted(packed):
        try:
            found[name.removesuffix(_BITS)] = _unpacked(tensors, name.removesuffix(_BITS))
        except UserError as error:
            raise UserError(f"layer {name.removesuffix(_BITS)!r:.60}: {error}") from None
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if name in packed:
            continue
        if tensor.ndim == 2 and min(tensor.shape) > 0 and layer not in found:
            mask = tensor if tensor.dtype == torch.bool else tensor != 0
            # A dense matrix (an embedding, a head) has no mask.
            if tensor.dtype == torch.bool or not bool(mask.all()):
                found[layer] = SparsityPattern.from_mask(mask)
    return found


def _pattern(tensors: Mapping[str, Tensor], prefix: str, known: tuple[int, int] | None) -> SparsityPattern:
    """Return the pattern whose tensors begin with ``prefix``; ``known`` is its shape, if the tensors do not say it."""
    row_ptr, col = tensors[f"{prefix}row_ptr"], tensors[f"{prefix}col"]
    for name, tensor in (("row_ptr", row_ptr), ("col", col)):
        if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UserError(f"{name} is {tensor.dtype} {list(tensor.shape)}; integers of one dimension are needed")
    blocks = len(row_ptr) - 1
    block = (1, 1)
    if f"{prefix}block" in tensors:
        block = _pair("block", tensors[f"{prefix}block"])
    elif f"{prefix}values" in tensors and known is not None:
        bh = known[0] // max(blocks, 1)
        block = (bh, tensors[f"{prefix}values"].numel() // max(1, col.numel() * bh))
    if f"{prefix}shape" in tensors:
        shape = _pair("shape", tensors[f"{prefix}shape"])
    else:
        shape = known or (blocks * block[0], (int(col.max()) + 1 if col.numel() else 1) * block[1])
    check_sides(shape)
    return SparsityPattern(shape, row_ptr, col, block)


def _unpacked(tensors: Mapping[str, Tensor], layer: str) -> SparsityPattern:
    """Return the pattern of a layer whose elements have a bit each."""
    bits, shape = tensors[f"{layer}{_BITS}"], _pair("shape", tensors[f"{layer}.shape"])
    block = _pair("block", tensors[f"{layer}.block"]) if f"{layer}.block" in tensors else (1, 1)
    check_sides(shape)
    expected = (shape[0], -(-shape[1] // 8))
    if bits.dtype != torch.uint8 or tuple(bits.shape) != expected:
        raise UserError(f"bits is {bits.dtype} {list(bits.shape)}; shape={shape} needs uint8 {list(expected)}")
    mask = np.unpackbits(bits.cpu().numpy(), axis=1)
    if mask[:, shape[1] :].any():
        raise UserError(f"bits has a bit beyond the {shape[1]} columns")
    return SparsityPattern.from_mask(torch.from_numpy(mask[:, : shape[1]].astype(bool)), block)


def _pair(name: str, tensor: Tensor) -> tuple[int, int]:
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    if tuple(tensor.shape) != (2,) or not whole:
        raise UserError(f"{name} is {tensor.dtype} {list(tensor.shape)}; two whole numbers are needed")
    first, second = tensor.tolist()
    return first, second
