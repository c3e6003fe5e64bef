"""Data-parallel training whose masks evolve: one rank of it, started by `test_ranks.py`, which also imports it.

    python ddp_masks.py RANK WORLD RENDEZVOUS_FILE OUT_FILE

Writes what `train` returns for every rule, and what each of the other functions below does or is told.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st
from sparsetrain import seeds
from sparsetrain.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own module warns of a function of torch
    from torch.distributed.optim import ZeroRedundancyOptimizer

RULES: dict[str, Any] = {
    "set": lambda: st.SET(sparsity=0.7, every=2),
    "rigl": lambda: st.RigL(sparsity=0.7, every=2),
    "gmp": lambda: st.GMP(sparsity=0.7, every=2, stop=6),
}


def train(rule: str, rank: int = 0, world: int = 1, seed: int = 0) -> dict[str, Any]:
    """Return the hash of the masks after every step, the weights at the end, how often the wrapper was built."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()
    builds = 0
    wrapped: nn.Module = model

    def wrap() -> None:
        nonlocal builds, wrapped
        builds += 1
        wrapped = DistributedDataParallel(model) if world > 1 else model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = st.MaskManager(model, RULES[rule](), seed=seed, on_resize=wrap)
        wrap()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        hashes = []
        for step in range(8):
            x = torch.randn(8, 12, generator=seeds.generator(step), dtype=torch.float64)
            x = x.chunk(world)[rank]
            (wrapped(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
            manager.step(optimizer)
            optimizer.zero_grad()
            hashes.append(manager.hash())
    values = [layer.values.detach().tolist() for layer in manager.layers.values()]
    return {"hashes": hashes, "values": values, "builds": builds}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 12, generator=seeds.generator(step, rank), dtype=torch.float64)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def without_a_seed(rank: int) -> Any:
    """Ranks that draw other weights and would draw other masks: what the wrapper of the model sends is the same."""
    model = mlp(rank)
    manager = st.MaskManager(model, st.SET(sparsity=0.7, every=2))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        wrapped(batch(step, rank)).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    return [manager.seed, manager.hash(), float(wrapped(batch(9, 0)).sum())]


def masks_of_each(rank: int, wrap: bool) -> Any:
    """Layers that are sparse already, with masks of each rank's own."""
    model = st.sparsify(mlp(rank), 0.7, seed=rank)
    model(batch(0, 0))
    manager = st.MaskManager(model, st.SET(every=50), seed=0)
    wrapped = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrapped(batch(0, rank)).square().mean().backward()
    optimizer.step()
    manager.step(optimizer)
    return [manager.hash(), float(wrapped(batch(9, 0)).sum())]


def uneven(rank: int) -> Any:
    """One rank skips a step that the other takes; another step is skipped by both."""
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.7, every=50), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counted = []
    for step in range(4):
        model(batch(step, 0)).square().mean().backward()
        if step != 3 and (step != 1 or rank == 0):
            optimizer.step()
        manager.step(optimizer)
        counted.append(manager.steps)
    return counted


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 12).double(), nn.Linear(12, 12).double()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.b(x) + self.a(x) if both else self.b(x)


def one_sided(rank: int | None) -> Any:
    """A layer that takes part on rank 0 only, under RigL; ``rank`` None is one process with both batches."""
    model = Branches()
    manager = st.MaskManager(model, st.RigL(sparsity=0.7, every=1), seed=0)
    called = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        losses = [called(batch(step, one), one == 0).square().mean() for one in ((0, 1) if rank is None else (rank,))]
        (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    return manager.hash()


def sharded_state(rank: int) -> Any:
    model = mlp()
    manager = st.MaskManager(model, st.SET(sparsity=0.7, every=50), seed=0)
    manager.attach(ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01))


def without_on_resize(rank: int) -> Any:
    model = mlp()
    manager = st.MaskManager(model, RULES["gmp"](), seed=0)
    manager.attach(torch.optim.AdamW(model.parameters()))


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    results: dict[str, Any] = {rule: train(rule, rank, world) for rule in RULES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results |= {
            "without a seed": without_a_seed(rank),
            "masks of each, wrapped": masks_of_each(rank, wrap=True),
            "uneven": uneven(rank),
            "one-sided": one_sided(rank),
            "other seeds": refusal(lambda: train("set", rank, world, seed=rank)),
            "one seed": refusal(lambda: st.MaskManager(mlp(), RULES["set"](), seed=3 if rank else None)),
            "masks of each": refusal(lambda: masks_of_each(rank, wrap=False)),
            "sharded state": refusal(lambda: sharded_state(rank)),
            "without on_resize": refusal(lambda: without_on_resize(rank)),
        }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
