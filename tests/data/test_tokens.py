"""Token files and samples against plain slicing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsetrain.data.tokens import IGNORED, PackedSamples, TokenFile, sequential_windows, token_dtype
from sparsetrain.errors import UserError

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def token_file(folder: Path, count: int, dtype: str = "uint16") -> TokenFile:
    """Return a file of the tokens 0, 1, 2, ..., so that a token equals its position."""
    path = folder / "tokens.bin"
    np.arange(count, dtype=np.dtype(dtype).newbyteorder("<")).tofile(path)
    return TokenFile(path, dtype, count)


@pytest.mark.parametrize(
    ("choice", "vocabulary", "expected"),
    [("auto", 65_536, "uint16"), ("auto", 65_537, "uint32"), ("uint16", 300, "uint16"), ("uint32", 300, "uint32")],
)
def test_dtype_fits_the_vocabulary(choice: str, vocabulary: int, expected: str) -> None:
    assert token_dtype(choice, vocabulary).name == expected


def test_a_vocabulary_too_large_for_a_forced_dtype_is_refused() -> None:
    with pytest.raises(UserError, match="token_dtype=uint16 holds 65536 tokens, the vocabulary has 65537"):
        token_dtype("uint16", 65_537)
    with pytest.raises(UserError, match=r"token_dtype='uint8' is not one of"):
        token_dtype("uint8", 10)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_window_matches_numpy(tmp_path: Path, dtype: str) -> None:
    file = token_file(tmp_path, 1000, dtype)
    assert len(file) == 1000
    assert file.dtype.name == dtype
    window = file.window(990, 10)
    assert window.dtype == torch.int64
    assert window.tolist() == list(range(990, 1000))
    for start, length in ((-1, 2), (991, 10)):
        with pytest.raises(IndexError):
            file.window(start, length)


def test_large_tokens_survive_uint32(tmp_path: Path) -> None:
    np.array([70_000, 4_000_000_000], dtype="<u4").tofile(tmp_path / "t.bin")
    assert TokenFile(tmp_path / "t.bin", "uint32").window(0, 2).tolist() == [70_000, 4_000_000_000]


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, 10).path
    with pytest.raises(UserError, match="has 20 bytes, its manifest says 22"):
        TokenFile(path, "uint16", 11)
    with pytest.raises(UserError, match="no such token file"):
        TokenFile(tmp_path / "none.bin", "uint16")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(UserError, match="holds no tokens"):
        TokenFile(tmp_path / "empty.bin", "uint16")


@shared_folder
@given(count=st.integers(2, 300), context=st.integers(1, 40), seed=st.integers(0, 3))
def test_an_epoch_is_a_shuffle_of_disjoint_windows(tmp_path: Path, count: int, context: int, seed: int) -> None:
    file = token_file(tmp_path, count)
    if count < context + 1:
        with pytest.raises(UserError, match=f"holds {count} tokens, fewer than context \\+ 1 = {context + 1}"):
            PackedSamples(file, context, seed, "train")
        return
    samples = PackedSamples(file, context, seed, "train")
    assert samples.samples_per_epoch == max(1, (count - context) // (context + 1))
    for epoch in range(3):
        batch = samples.batch(epoch * samples.samples_per_epoch, samples.samples_per_epoch)
        assert batch.tokens.shape == batch.targets.shape == (samples.samples_per_epoch, context)
        assert torch.equal(batch.tokens + 1, batch.targets)  # the file has the tokens 0, 1, 2, ...
        rows = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
        assert rows.unique().numel() == rows.numel()
        offsets = rows[:, 0] % (context + 1)
        assert (offsets == offsets[0]).all()
        assert batch.slots is None


def test_samples_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    file = token_file(tmp_path, 500)
    whole = PackedSamples(file, 16, 3, "train").batch(0, 120)
    other = PackedSamples(file, 16, 3, "train")
    for first in (90, 0, 60, 30):
        part = other.batch(first, 30)
        assert torch.equal(part.tokens, whole.tokens[first : first + 30])
        assert torch.equal(part.targets, whole.targets[first : first + 30])


def test_seed_phase_and_epoch_change_the_order(tmp_path: Path) -> None:
    file = token_file(tmp_path, 2000)

    def order(seed: int, phase: str, epoch: int) -> list[int]:
        samples = PackedSamples(file, 9, seed, phase)
        return samples.batch(epoch * samples.samples_per_epoch, samples.samples_per_epoch).tokens[:, 0].tolist()

    orders = [order(0, "a", 0), order(1, "a", 0), order(0, "b", 0), order(0, "a", 1)]
    assert order(0, "a", 0) == orders[0]
    assert len({tuple(places) for places in orders}) == 4
    assert len({places[0] % 10 for places in (order(0, "a", epoch) for epoch in range(30))}) > 5


@shared_folder
@given(count=st.integers(2, 200), context=st.integers(1, 50))
def test_sequential_windows_predict_each_token_once(tmp_path: Path, count: int, context: int) -> None:
    batch = sequential_windows(token_file(tmp_path, count), context)
    counted = batch.targets != IGNORED
    assert batch.targets[counted].tolist() == list(range(1, count))
    assert torch.equal(batch.tokens[counted] + 1, batch.targets[counted])
    assert (batch.tokens[~counted] == 0).all()


def test_limited_windows_are_spread_over_the_file(tmp_path: Path) -> None:
    file = token_file(tmp_path, 1001)
    every = sequential_windows(file, 10)
    some = sequential_windows(file, 10, limit=4)
    assert some.tokens[:, 0].tolist() == [0, 250, 500, 750]
    assert torch.equal(some.targets, every.targets[[0, 25, 50, 75]])
    assert torch.equal(sequential_windows(file, 10, limit=500).tokens, every.tokens)


def test_windows_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 1 token; evaluation needs at least 2"):
        sequential_windows(token_file(tmp_path, 1), 4)
    with pytest.raises(UserError, match="must be at least 1"):
        sequential_windows(token_file(tmp_path, 9), 4, limit=0)
    with pytest.raises(UserError, match="context=0"):
        PackedSamples(token_file(tmp_path, 9), 0, 0, "train")
