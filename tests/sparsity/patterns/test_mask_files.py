"""Masks to and from files, ours and those of others; statistics against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import scipy.sparse
import torch
from torch import nn

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_layers, sparsify
from sparsetrain.sparsity.patterns.draw import block_pattern, random_pattern
from sparsetrain.sparsity.patterns.files import load_masks, save_masks
from sparsetrain.sparsity.patterns.statistics import MaskStatistics


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))


def masks() -> dict[str, SparsityPattern]:
    return {
        "blocks.0.up": random_pattern((24, 16), 0.3, seeds.generator(0)),
        "blocks.0.down": block_pattern((16, 24), 0.5, seeds.generator(1), (4, 8)),
    }


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_masks_survive_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"masks{suffix}"
    save_masks(path, masks())
    found = load_masks(path)
    assert found.keys() == masks().keys()
    for name, pattern in masks().items():
        assert found[name].equals(pattern)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_packed_masks_are_the_bits_that_numpy_unpacks(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"masks{suffix}"
    odd = {"odd": random_pattern((5, 19), 0.4, seeds.generator(2))}  # 19 columns leave 5 bits of padding
    save_masks(path, masks() | odd, packed=True)
    arrays = np.load(path) if suffix == ".npz" else safetensors.numpy.load_file(path)
    found = load_masks(path)
    assert found.keys() == (masks() | odd).keys()
    for name, pattern in (masks() | odd).items():
        assert found[name].equals(pattern)
        shape = tuple(arrays[f"{name}.shape"])
        assert np.array_equal(np.unpackbits(arrays[f"{name}.bits"], axis=1, count=shape[1]), pattern.mask().numpy())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_model_gets_the_masks_of_a_file(tmp_path: Path, suffix: str) -> None:
    first = sparsify(model(), 0.5, seed=4)
    path = tmp_path / f"masks{suffix}"
    save_masks(path, {name: layer.pattern for name, layer in sparse_layers(first)})
    second = sparsify(model(), masks=load_masks(path))
    for (name, one), (other_name, other) in zip(sparse_layers(first), sparse_layers(second), strict=True):
        assert name == other_name
        assert one.pattern.equals(other.pattern)


def test_masks_of_a_state_dict_are_found_with_and_without_shapes(tmp_path: Path) -> None:
    layer = SparseLinear.from_linear(nn.Linear(24, 16), masks()["blocks.0.down"])
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"down.{name}": value for name, value in layer.state_dict().items()}, path)
    assert load_masks(path, {"down": (16, 24)})["down"].equals(layer.pattern)
    assert load_masks(path)["down"].nnz <= layer.pattern.nnz  # blocks are not known without the shape


def test_dense_matrices_with_zeros_and_boolean_ones_are_masks(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    weight[1, 2] = 0.0
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a.weight": weight, "head.weight": torch.ones(2, 2), "bias": torch.ones(3)}, path)
    assert list(load_masks(path)) == ["a"]
    assert torch.equal(load_masks(path)["a"].mask(), weight != 0)
    np.savez(tmp_path / "bools.npz", b=np.eye(3, dtype=bool))
    assert load_masks(tmp_path / "bools.npz")["b"].nnz == 3


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_a_scipy_file_is_one_mask_without_a_name(tmp_path: Path, form: str) -> None:
    matrix = scipy.sparse.random(7, 9, 0.3, random_state=0, format=form)
    path = tmp_path / "matrix.npz"
    scipy.sparse.save_npz(path, matrix)
    assert np.array_equal(load_masks(path)[""].mask().numpy(), matrix.toarray() != 0)


def test_files_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"no zip file")
    (tmp_path / "broken.safetensors").write_bytes(b"{")
    np.savez(tmp_path / "empty.npz", numbers=np.arange(3))
    np.savez(tmp_path / "half.npz", **{"a.row_ptr": np.array([0, 1])})
    np.savez(tmp_path / "wrong.npz", **{"a.row_ptr": np.array([0, 2]), "a.col": np.array([1, 1])})
    bits = np.array([[1]], dtype=np.uint8)
    np.savez(tmp_path / "short.npz", **{"a.bits": bits, "a.shape": np.array([1, 9])})
    np.savez(tmp_path / "beyond.npz", **{"a.bits": bits, "a.shape": np.array([1, 7])})
    np.savez(tmp_path / "vast.npz", **{"a.bits": bits, "a.shape": np.array([1, 2**40])})
    np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
    for name, message in [
        ("masks.pt", "masks are kept in .npz or .safetensors files"),
        ("nowhere.npz", "nowhere.npz: no such file"),
        ("broken.npz", "broken.npz cannot be read as .npz"),
        ("broken.safetensors", "broken.safetensors cannot be read as .safetensors"),
        ("empty.npz", "empty.npz holds no mask"),
        ("half.npz", "layer 'a' has row_ptr and no col"),
        ("wrong.npz", "layer 'a': row 0 has columns 1 and then 1"),
        ("short.npz", r"layer 'a': bits is torch.uint8 \[1, 1\]; shape=\(1, 9\) needs uint8 \[1, 2\]"),
        ("beyond.npz", "layer 'a': bits has a bit beyond the 7 columns"),
        ("vast.npz", "layer 'a': shape=.* must have sides from 1"),
        ("object.npz", "object.npz cannot be read as .npz"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_masks(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no mask to save"):
        save_masks(tmp_path / "none.npz", {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"1": torch.ones(2, 2, dtype=torch.bool)}, r"masks\['1'\]: the model has no linear layer of this name"),
        ({"0": torch.ones(16, 24, dtype=torch.bool)}, r"masks\['0'\] has shape \(16, 24\); the layer needs \(24, 16\)"),
        ({"0": torch.zeros(24, 16, dtype=torch.bool)}, "would have no weight at all"),
    ],
)
def test_masks_that_do_not_fit_leave_the_model_alone(given: dict[str, torch.Tensor], message: str) -> None:
    network = model()
    layers = list(network)
    with pytest.raises(UserError, match=message):
        sparsify(network, masks=given)
    assert list(network) == layers


def test_masks_come_alone() -> None:
    with pytest.raises(UserError, match="masks say which layers are sparse"):
        sparsify(model(), 0.5, masks=masks())


@pytest.mark.parametrize("name", list(masks()))
def test_statistics_match_numpy(name: str) -> None:
    pattern = masks()[name]
    mask = pattern.mask().numpy()
    statistics = MaskStatistics.of(pattern)
    for degrees, counts in ((statistics.rows, mask.sum(1)), (statistics.columns, mask.sum(0))):
        assert (degrees.least, degrees.most, degrees.dead) == (counts.min(), counts.max(), (counts == 0).sum())
        assert degrees.mean == pytest.approx(counts.mean())
        assert degrees.std == pytest.approx(counts.std())
    assert (statistics.nnz, statistics.density) == (mask.sum(), pytest.approx(mask.mean()))
