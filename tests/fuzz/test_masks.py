"""Masks from mutated files: patterns that numpy, scipy and safetensors read from the same bytes, or one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.sparse
import torch
from fuzzing import Reader, fuzz
from mutations import BYTES, safetensors_header, zip_members
from torch import nn

from sparsetrain import seeds
from sparsetrain.sparsity import SparseLinear, SparsityPattern
from sparsetrain.sparsity.patterns.draw import block_pattern, random_pattern
from sparsetrain.sparsity.patterns.files import load_masks, save_masks


def patterns(place: Path) -> Any:
    """The masks of the one file there, as plain values that say everything."""
    (path,) = place.iterdir()
    found = load_masks(path)
    return {
        name: (pattern.shape, pattern.block, pattern.row_ptr.tolist(), pattern.col.tolist())
        for name, pattern in found.items()
    }


def own(suffix: str, packed: bool = False) -> Any:
    """Two patterns as we save them."""

    def make(directory: Path) -> Path:
        path = directory / f"m{suffix}"
        up, down = (
            random_pattern((6, 9), 0.4, seeds.generator(0)),
            block_pattern((8, 6), 0.5, seeds.generator(1), (2, 3)),
        )
        save_masks(path, {"up": up, "down": down}, packed)
        return path

    return make


def scipys(layout: str) -> Any:
    """A matrix as scipy saves it."""

    def make(directory: Path) -> Path:
        path = directory / "m.npz"
        scipy.sparse.save_npz(path, scipy.sparse.random(6, 9, 0.4, random_state=0).asformat(layout))
        return path

    return make


def matrices(directory: Path) -> Path:
    """Boolean masks and weights in numpy's archive."""
    path = directory / "m.npz"
    np.savez(
        path, a=np.eye(5, 7, dtype=bool), b=np.diag([1.0, 2.0, 0.5]), c=np.asfortranarray(np.tri(4, dtype=np.float32))
    )
    return path


def state(directory: Path) -> Path:
    """The state of a model with a sparse and a dense layer."""
    path = directory / "m.safetensors"
    pattern = SparsityPattern.from_mask(torch.ones(8, 6, dtype=torch.bool), (2, 3))
    with torch.random.fork_rng():
        layer = SparseLinear.from_linear(nn.Linear(6, 8), pattern)
        tensors = {f"x.{name}": value for name, value in layer.state_dict().items()}
        safetensors.torch.save_file({**tensors, "y.weight": torch.eye(4), "z": torch.ones(3)}, path)
    return path


def plain(matrix: Any) -> Any:
    """A matrix of scipy's as `patterns` gives a mask."""
    matrix = matrix.tocsr()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return (int(matrix.shape[0]), int(matrix.shape[1])), (1, 1), matrix.indptr.tolist(), matrix.indices.tolist()


def by_numpy(content: bytes) -> Any:
    """The matrices that numpy reads, but not those without a zero, and masks in our format."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    found = {}
    for layer in (name.removesuffix(".row_ptr") for name in arrays if name.endswith(".row_ptr")):
        row_ptr, col = (arrays[f"{layer}.{key}"].tolist() for key in ("row_ptr", "col"))
        block = arrays[f"{layer}.block"].tolist() if f"{layer}.block" in arrays else [1, 1]
        least = [(len(row_ptr) - 1) * block[0], (max(col) + 1) * block[1]]
        shape = arrays[f"{layer}.shape"].tolist() if f"{layer}.shape" in arrays else least
        found[layer] = (tuple(shape), tuple(block), row_ptr, col)
    for name, array in arrays.items():
        if array.ndim == 2 and array.size and (array.dtype == bool or not array.all()):
            found[name] = plain(scipy.sparse.csr_matrix(array))
    return found


def by_scipy(content: bytes) -> Any:
    """What scipy reads. Its compiled code believes the indices: it is asked only after ours has checked them."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        if not {"format", "shape"} <= set(archive.files):
            return by_numpy(content)
    return {"": plain(scipy.sparse.load_npz(io.BytesIO(content)))}


ZIP = (*BYTES, zip_members, zip_members, zip_members)
HEADED = (*BYTES, safetensors_header, safetensors_header)
READERS = [
    Reader("own npz", own(".npz"), patterns, ZIP, by_numpy),
    Reader("packed npz", own(".npz", packed=True), patterns, ZIP),
    Reader("own safetensors", own(".safetensors"), patterns, HEADED),
    *(Reader(f"scipy {form}", scipys(form), patterns, ZIP, by_scipy) for form in ("csr", "csc", "bsr", "coo", "dia")),
    Reader("matrices npz", matrices, patterns, ZIP, by_numpy),
    Reader("state_dict safetensors", state, patterns, HEADED),
]


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_masks_are_read_as_they_are_or_refused(reader: Reader, tmp_path: Path) -> None:
    """No other exception, no end of the process, no memory for what is only announced."""
    fuzz(reader, tmp_path)
