"""Arrays out of ``.npz`` files: what numpy wrote, or one line, without an allocation for what is only announced."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.files import load_masks
from sparsetrain.sparsity.patterns.npz import read_npz

GOOD = {"a.row_ptr": [0, 1, 2], "a.col": [0, 1], "a.shape": [2, 2], "a.block": [1, 1]}
HEADER = "{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }"


def array(values: Any) -> bytes:
    """An array as numpy writes it."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


def headed(header: str) -> bytes:
    """Two integers under another header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + array([0, 1])[-16:]


def archive(path: Path, members: dict[str, Any], suffix: str = ".npy") -> Path:
    """A file of arrays, or of the bytes of members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members.items():
            bundle.writestr(f"{name}{suffix}", content if isinstance(content, bytes) else array(content))
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_every_kind_equal_what_numpy_saved(save: Any, tmp_path: Path) -> None:
    """All types of numbers, both orders of bytes and of dimensions, no entry, no dimension, text."""
    arrays = {
        code: np.arange(6).astype(code).reshape(2, 3) for code in ("?", "i1", "u2", "<i4", ">i8", ">f4", "f8", "c16")
    }
    arrays |= {
        "order": np.asfortranarray(arrays["f8"]),
        "none": np.zeros((0, 3)),
        "one": np.array(5),
        "text": np.array(b"csr"),
    }
    save(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert found[name].dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(found[name], expected)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEADER.replace("(2,)", "(((("), "no valid header"),
        (HEADER.replace("(2,)", "2"), "has the shape '2'"),
        (HEADER.replace("(2,)", "(2.0,)"), "has the shape"),
        (HEADER.replace("(2,)", "(True,)"), "has the shape"),
        (HEADER.replace("(2,)", "(-2,)"), "has the shape"),
        (HEADER.replace("(2,)", "(10**12,)"), "no valid header"),
        (HEADER.replace("(2,)", "(1000000000000,)"), "announces 8000000000000 bytes and has 16"),
        (HEADER.replace("(2,)", f"({10**30},)"), "has the shape"),
        (HEADER.replace("(2,)", "(1,)"), "announces 8 bytes and has 16"),
        (HEADER.replace("<i8", "<M8[s]"), "has the type '<M8"),
        (HEADER.replace("<i8", "|O"), "has the type '|O'"),
        (HEADER.replace("<i8", "nonsense"), "has the type 'nonsense'"),
        (HEADER.replace("<i8", "<i7"), "no valid header"),
        (HEADER.replace("<i8", "|a8"), "has the type '|a8'"),
        (HEADER.replace("'<i8'", "[('x', '<i8')]"), "has the type"),
        (HEADER.replace("descr", "other"), "no valid header"),
        ("-" * 900 + "1", "no valid header"),
        ("(" * 2000, "at most 1024 are read"),
        ("[1]", "no valid header"),
    ],
)
def test_a_header_that_announces_something_else_is_one_line(header: str, message: str, tmp_path: Path) -> None:
    """Literals that are none, shapes of no numbers, more or fewer bytes than there are, types that are no numbers."""
    path = archive(tmp_path / "m.npz", {**GOOD, "a.col": headed(header)})
    with pytest.raises(UserError, match=r"m\.npz cannot be read as \.npz: the member 'a\.col\.npy'") as caught:
        load_masks(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.col": b"hello"}, "is not an array"),
        ({"a.col": b"\x93NUMPY\x09\x00" + bytes(9)}, "is not an array"),
        ({"a.col": ["0", "1"]}, "holds text"),
        ({"a.block": [1]}, r"block is torch.int64 \[1\]; two whole numbers are needed"),
        ({"a.block": [3, 1]}, "block 3x1 does not divide"),
        ({"a.block": [0, 0]}, "block 0x0 does not divide"),
        ({"a.row_ptr": 0}, r"row_ptr is torch.int64 \[\]; integers of one dimension"),
        ({"a.row_ptr": [0.0, 1.0, 2.0]}, "row_ptr is torch.float64"),
        ({"a.row_ptr": []}, "row_ptr is torch.float64"),
        ({"a.row_ptr": [0, 1, 2**40]}, "row_ptr runs from 0 to"),
        ({"a.row_ptr": [0, 2, 1]}, "row_ptr runs from 0 to 1"),
        ({"a.col": [0, 2**40]}, "columns go from 0 to 1"),
        ({"a.col": np.array([0, 2**64 - 1], np.uint64)}, "64 bits with a sign"),
        ({"a.shape": [float("nan"), 2.0]}, "shape is torch.float64"),
        ({"a.shape": [2.7, 2.2]}, "shape is torch.float64"),
        ({"a.shape": [2, 2, 2]}, "two whole numbers"),
        ({"a.shape": [2, 2**40]}, "must have sides from 1 to"),
        ({"a.shape": [2**62, 2**62]}, "must have sides from 1 to"),
    ],
)
def test_a_member_of_another_shape_or_type_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """What is no pair of whole numbers is no shape, and text is no array."""
    path = archive(tmp_path / "m.npz", {**GOOD, **change})
    with pytest.raises(UserError, match=message) as caught:
        load_masks(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_shape_the_last_column_bounds_what_is_allocated(tmp_path: Path) -> None:
    """The width of a state_dict is guessed from its indices, which may be anything."""
    path = archive(tmp_path / "m.npz", {"a.row_ptr": [0, 1], "a.col": [2**31 - 2]})
    with pytest.raises(UserError, match="must have sides from 1 to"):
        load_masks(path)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("csc", {"indices": [0, 10**7]}, r"indices has 10000000; it must lie in \[0, 1\]"),
        ("csc", {"indptr": [0, 10**7, 2]}, "indptr decreases at 1"),
        ("csr", {"indptr": [0, 1, 3]}, "indptr runs from 0 to 3"),
        ("csr", {"shape": [2, 2**40]}, "sides from 1 to"),
        ("csr", {"shape": [2.0, 2.0]}, "two whole numbers"),
        ("csr", {"format": np.array(b"ell")}, "format='ell' is not one of"),
        ("csr", {"format": np.array(5)}, "format='5' is not one of"),
        ("csr", {"format": np.array([b"csr", b"csc"])}, "format='' is not one of"),
        ("coo", {}, "needs row"),
    ],
)
def test_indices_of_a_scipy_file_outside_of_its_matrix_are_not_followed(
    form: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Compiled code of scipy would write into memory that is not the matrix's, and end the process."""
    whole = {"format": np.array(form.encode()), "shape": [2, 2], "data": [1, 1], "indices": [0, 1], "indptr": [0, 1, 2]}
    path = archive(tmp_path / "m.npz", {**whole, **change})
    with pytest.raises(UserError, match=message) as caught:
        load_masks(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("container", ["matrix", "array"])
def test_a_file_of_scipy_equals_the_matrix(form: str, container: str, tmp_path: Path) -> None:
    """All formats that `scipy.sparse.save_npz` writes, from matrices and from arrays."""
    matrix = scipy.sparse.random(6, 9, 0.4, random_state=0).asformat(form)
    if container == "array":
        matrix = getattr(scipy.sparse, f"{form}_array")(matrix)
    scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
    assert torch.equal(load_masks(tmp_path / "m.npz")[""].mask(), torch.from_numpy(matrix.toarray() != 0))


def test_an_archive_that_is_none_of_numpys_is_one_line(tmp_path: Path) -> None:
    """Members without a suffix, two of one name, more bytes than the file can stand for, a flipped bit."""
    with pytest.raises(UserError, match=r"the member 'a\.txt' is not an array"):
        load_masks(archive(tmp_path / "m.npz", {"a": b"x"}, ".txt"))
    with pytest.raises(UserError, match=r"its arrays have 80\d{6} bytes; of a file of this size at most"):
        load_masks(archive(tmp_path / "m.npz", {"a": np.zeros(80_000_000, dtype=bool)}))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as bundle:
        bundle.writestr("a.npy", array([1]))
        with pytest.warns(UserWarning, match="Duplicate name"):
            bundle.writestr("a.npy", array([1]))
    with pytest.raises(UserError, match="two members have one name"):
        load_masks(tmp_path / "m.npz")
    path = archive(tmp_path / "m.npz", GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(b"a.col.npy") + 40] ^= 4  # inside of the compressed data
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        load_masks(path)
