"""Two ranks under DDP against one process with the whole batch: the same masks at every step, and the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_masks.py")


def start(rule: str, rank: int, world: int, folder: Path, *seed: int) -> subprocess.Popen[str]:
    words = [rule, rank, world, folder / "rendezvous", folder / f"rank{rank}of{world}.json", *seed]
    command = [sys.executable, str(SCRIPT), *(str(word) for word in words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str], rank: int, world: int, folder: Path) -> dict[str, Any]:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads((folder / f"rank{rank}of{world}.json").read_text())


@pytest.mark.parametrize("rule", ["set", "rigl", "gmp"])
def test_ranks_arrive_at_the_masks_of_one_process(rule: str, tmp_path: Path) -> None:
    ranks = [start(rule, rank, 2, tmp_path) for rank in range(2)]
    alone = start(rule, 0, 1, tmp_path)
    one, other = (result(process, rank, 2, tmp_path) for rank, process in enumerate(ranks))
    whole = result(alone, 0, 1, tmp_path)
    assert one == other
    assert one["hashes"] == whole["hashes"]
    assert len(set(one["hashes"])) >= 4
    for ours, theirs in zip(one["values"], whole["values"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0.0, atol=1e-10)
    # Built once, and again whenever sizes changed.
    assert one["builds"] == (4 if rule == "gmp" else 1)


def test_ranks_with_other_seeds_are_caught(tmp_path: Path) -> None:
    ranks = [start("set", rank, 2, tmp_path, rank) for rank in range(2)]
    for rank, process in enumerate(ranks):
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        # Whichever notices first; the other finds its peer gone or the shapes of gradients different.
        assert "differ from those of other ranks" in errors or "RuntimeError" in errors, rank
