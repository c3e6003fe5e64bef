"""Checkpoints: they restore bit for bit, and every kind of damage is refused with its own message."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import FILES, load, save
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.runs import manifest
from sparsetrain.runs.checkpoint import (
    OptimizerTensors,
    checkpoint_name,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    verify_checkpoint,
)

# ------------------------------------------------------------------------------------------------- round trips


def test_round_trip_is_bitwise_and_training_goes_on_as_if_uninterrupted(tmp_path: Path, device: torch.device) -> None:
    def build() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).to(device)
        return network, torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)

    def train(network: nn.Module, updates: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(device)
            updates.zero_grad()
            (network(x) - x).square().mean().backward()
            updates.step()

    model, optimizer = build()
    train(model, optimizer, 0, 5)
    state = {"tokens_seen": 2**60 + 1, "loss": 0.1 + 0.2, "best": float("inf"), "phases": [None, True, "é"]}
    saved = optimizer_tensors(optimizer, model.named_parameters())
    path = save_checkpoint(tmp_path, 5, model.state_dict(), saved, state, keep_last=1)

    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.state, checkpoint.path) == (5, state, path)
    assert checkpoint.model.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.model[name], tensor.cpu())
    resumed, resumed_optimizer = build()
    resumed.load_state_dict(checkpoint.model)
    restore_optimizer(resumed_optimizer, checkpoint.optimizer, resumed.named_parameters())
    train(model, optimizer, 5, 12)
    train(resumed, resumed_optimizer, 5, 12)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert sorted(os.listdir(one)) == sorted(FILES)
    for file in FILES:
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_tensors_of_every_dtype_layout_and_kinship_return_as_they_were(tmp_path: Path) -> None:
    embedding = nn.Parameter(torch.randn(5, 4))
    fused = torch.randn(6, 4)
    tensors: dict[str, Tensor] = {
        "embed": embedding,
        "head": embedding,
        "transposed": torch.randn(3, 5).T,
        "strided": torch.randn(8)[::2],
        "q": fused[:2],
        "kv": fused[2:],
        "fused": fused,
        "fused_transposed": fused.T,
        "expanded": torch.randn(1, 3).expand(4, 3),
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0),
        "scalar": torch.tensor(3.0),
        "flag": torch.tensor([True, False]),
        "index": torch.tensor([2**40, -1]),
        "half": torch.randn(3).to(torch.bfloat16),
        "not_a_number": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    save_checkpoint(tmp_path, 0, tensors, OptimizerTensors({}, []), {}, keep_last=1)
    model = load_checkpoint(tmp_path).model
    assert model.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert model[name].dtype == tensor.dtype
        assert torch.equal(torch.nan_to_num(model[name]), torch.nan_to_num(tensor)), name
    assert model["head"].data_ptr() == model["embed"].data_ptr()
    stored = safetensors.torch.load_file(tmp_path / checkpoint_name(0) / "model.safetensors")
    assert "head" not in stored
    assert {"q", "kv", "fused"} <= stored.keys()


def test_keep_last_removes_older_checkpoints_only(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep_last=2)
    assert list_checkpoints(tmp_path) == ["step-00000030", "step-00000040"]
    save(tmp_path, 35, keep_last=1)  # the run restarted from 30 and continued differently
    assert list_checkpoints(tmp_path) == ["step-00000035", "step-00000040"]
    assert load(tmp_path)[0].step == 35
    save(tmp_path, 100_000_000, keep_last=5)
    assert list_checkpoints(tmp_path)[-1] == "step-100000000"
    assert sorted(os.listdir(tmp_path)) == sorted([*list_checkpoints(tmp_path), "latest"])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, mark=1)
    save(tmp_path, 1, mark=2)
    assert load(tmp_path)[0].state["mark"] == 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


# ----------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A directory with checkpoints 1 and 2, of which 2 is the newest."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def assert_refused(directory: Path, reason: str) -> None:
    """Assert that checkpoint 2 is refused by name, and that checkpoint 1 is loaded instead."""
    checkpoint, refusals = load(directory)
    assert checkpoint.step == 1
    assert len(refusals) == 1
    assert re.fullmatch(f"checkpoint step-00000002 refused: {reason}", refusals[0]), refusals[0]
    with pytest.raises(UserError) as caught:
        verify_checkpoint(directory / checkpoint_name(2))
    assert str(caught.value) == refusals[0]
    with pytest.raises(UserError) as caught:
        load_checkpoint(directory, "step-00000002")
    assert str(caught.value) == refusals[0]


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_refused_and_the_previous_one_used(pair: Path, file: str) -> None:
    path = pair / checkpoint_name(2) / file
    content = path.read_bytes()
    reason = "manifest.json has been changed.*" if file == "manifest.json" else f"{file} does not have the SHA-256.*"
    for position in range(len(content)):
        # One bit per position, a different one each time, and sometimes a whole byte.
        damaged = bytearray(content)
        damaged[position] ^= 0xFF if position % 9 == 8 else 1 << (position % 9)
        path.write_bytes(damaged)
        assert_refused(pair, reason)
    path.write_bytes(content)
    assert load(pair)[0].step == 2


def test_every_other_value_of_a_manifest_byte_is_refused(pair: Path) -> None:
    path = pair / checkpoint_name(2) / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 61):
        for value in range(256):
            damaged = bytearray(content)
            damaged[position] = value
            if damaged != content:
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=r"manifest.json has been changed"):
                    verify_checkpoint(path.parent)


@pytest.mark.parametrize("file", FILES)
def test_truncation_at_every_byte_is_refused_and_the_previous_one_used(pair: Path, file: str) -> None:
    path = pair / checkpoint_name(2) / file
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        wrong_size = f"{file} has {length} bytes, expected {len(content)}"
        assert_refused(pair, "manifest.json has been changed.*" if file == "manifest.json" else wrong_size)
    path.write_bytes(content + b"\n")
    assert_refused(pair, "manifest.json has been changed.*" if file == "manifest.json" else f"{file} has .*")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_unreadable_file_is_refused(pair: Path, file: str) -> None:
    path = pair / checkpoint_name(2) / file
    path.unlink()
    assert_refused(pair, f"{file} is missing")
    path.mkdir()
    assert_refused(pair, f"{file} cannot be read: Is a directory")


def test_files_of_another_checkpoint_are_refused(pair: Path) -> None:
    one, two = pair / checkpoint_name(1), pair / checkpoint_name(2)
    shutil.copy(one / "optimizer.safetensors", two)
    assert_refused(pair, r"optimizer.safetensors does not have the SHA-256 that manifest.json gives")
    shutil.rmtree(two)
    shutil.copytree(one, two)
    assert_refused(pair, r"manifest.json is of step 1")


def test_another_format_is_refused(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 2)
        save(pair, 2)
    assert_refused(pair, "it has format 2, but this version reads format 1")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"step-00000007\n", b"step-2\n", b"\xff\xfe", b"../elsewhere\n", b"step-00000002\n\n", b"x" * 10_000],
)
def test_a_wrong_latest_falls_back_to_the_newest(pair: Path, content: bytes) -> None:
    (pair / "latest").write_bytes(content)
    checkpoint, refusals = load(pair)
    assert (checkpoint.step, refusals) == (2, [])


def test_a_missing_latest_falls_back_to_the_newest(pair: Path) -> None:
    assert (pair / "latest").read_text() == "step-00000002\n"
    (pair / "latest").unlink()
    assert load(pair)[0].step == 2
    (pair / "latest").mkdir()
    assert load(pair)[0].step == 2


def test_every_flipped_byte_of_latest_leaves_a_checkpoint(pair: Path) -> None:
    content = (pair / "latest").read_bytes()
    for position in range(len(content)):
        for mask in (1, 2, 3, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(content)
            damaged[position] ^= mask
            (pair / "latest").write_bytes(damaged)
            checkpoint, refusals = load(pair)
            # If the damaged file names another checkpoint, it is followed; otherwise it is ignored.
            assert checkpoint.step == (1 if damaged == b"step-00000001\n" else 2)
            assert refusals == []


def test_when_all_are_damaged_the_error_names_each(pair: Path) -> None:
    (pair / checkpoint_name(1) / "state.json").unlink()
    (pair / checkpoint_name(2) / "model.safetensors").write_bytes(b"0123456789")
    with pytest.raises(UserError) as caught:
        load(pair)
    assert re.fullmatch(
        r".* has no checkpoint that can be used \(step-00000002 refused: model.safetensors has 10 bytes, "
        r"expected \d+; step-00000001 refused: state.json is missing\)",
        str(caught.value),
    )


def test_a_refusal_is_logged_as_a_warning(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pair / checkpoint_name(2) / "state.json").unlink()
    assert load_checkpoint(pair).step == 1
    line = "checkpoint step-00000002 refused: state.json is missing"
    assert caplog.record_tuples == [("sparsetrain.runs.checkpoint", logging.WARNING, line)]


def test_a_checkpoint_that_is_not_there_is_named(pair: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint='step-00000003' is not in .*step-00000001, step-00000002 \(did"):
        load_checkpoint(pair, "step-00000003")
    for absent in (pair / "nothing", pair / "latest"):
        with pytest.raises(UserError, match=r"has no checkpoint$"):
            load_checkpoint(absent)
        with pytest.raises(UserError, match="which has none"):
            load_checkpoint(absent, "step-00000003")
    with pytest.raises(UserError, match="its name is not like step-00000100"):
        verify_checkpoint(pair / "step-000000001")
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        verify_checkpoint(pair / "step-00000009")
    with pytest.raises(UserError, match="keep_last=0 must be at least 1"):
        save(pair, 3, keep_last=0)
    with pytest.raises(ValueError, match="step=-1"):
        save(pair, -1)


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, {}, OptimizerTensors({}, []), {"generator": object()}, 1)  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []
