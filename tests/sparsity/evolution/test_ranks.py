"""Two ranks under DDP against one process with the whole batch: the same masks at every step, and the same weights."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fresh import Fresh

SCRIPT = Path(__file__).with_name("ddp_masks.py")


@dataclass
class Rank:
    """What a process has written, and how it ended."""

    results: dict[str, Any]
    status: int
    errors: str


@pytest.fixture(scope="module")
def ranks(fresh: Fresh, tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    """Both ranks, after all rules: starting a process takes longer than what it trains."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"rank{rank}.json" for rank in range(2)]
    processes = []
    for rank, out in enumerate(outs):
        words = [str(word) for word in (rank, len(outs), folder / "rendezvous", out)]
        processes.append(fresh.start(SCRIPT, *words))
    ended = [process.wait(120) for process in processes]
    for rank, out in zip(ended, outs, strict=True):
        assert out.exists(), rank.stderr
    return [
        Rank(json.loads(out.read_text()), rank.returncode, rank.stderr) for rank, out in zip(ended, outs, strict=True)
    ]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The file that the ranks run, for one process here that sees the whole batch."""
    spec = importlib.util.spec_from_file_location("ddp_masks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rule", ["set", "rigl", "gmp"])
def test_ranks_arrive_at_the_masks_of_one_process(rule: str, ranks: list[Rank], script: ModuleType) -> None:
    one, other = (rank.results[rule] for rank in ranks)
    whole = script.train(rule)
    assert one == other
    assert one["hashes"] == whole["hashes"]
    assert len(set(one["hashes"])) >= 4
    for ours, theirs in zip(one["values"], whole["values"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0.0, atol=1e-10)
    # Built once, and again whenever sizes changed.
    assert one["builds"] == (4 if rule == "gmp" else 1)


@pytest.mark.parametrize("name", ["without a seed", "masks of each, wrapped", "one-sided"])
def test_ranks_compute_the_same_function_with_the_same_masks(name: str, ranks: list[Rank], script: ModuleType) -> None:
    one, other = (rank.results[name] for rank in ranks)
    assert one == other
    if name == "one-sided":
        assert one == script.one_sided(None)


def test_a_step_that_one_rank_skips_is_counted_by_none(ranks: list[Rank]) -> None:
    assert [rank.results["uneven"] for rank in ranks] == [[1, 1, 2, 2]] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other seeds", "UserError: seed=1 on rank 1 and seed=0 on rank 0: masks and growth would differ"),
        ("one seed", "UserError: seed=3 on rank 1 and seed=None on rank 0: masks and growth would differ"),
        ("masks of each", "RuntimeError: the masks of rank {} differ from those of other ranks"),
        ("sharded state", "UserError: ZeroRedundancyOptimizer keeps the state of each weight on one rank only"),
        ("without on_resize", "UserError: GMP changes the sizes of weights, for which DDP keeps buffers: give"),
    ],
)
def test_all_ranks_are_told_what_they_disagree_on(name: str, message: str, ranks: list[Rank]) -> None:
    for index, rank in enumerate(ranks):
        assert rank.results[name].startswith(message.format(index))
        assert rank.status == 0, rank.errors
