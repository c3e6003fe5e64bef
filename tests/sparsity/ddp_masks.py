"""Data-parallel training whose masks evolve: one rank of it, started by `test_ranks.py`, which also imports it.

    python ddp_masks.py RANK WORLD RENDEZVOUS_FILE OUT_FILE

Writes what `train` returns for every rule. Ends with an error: the last training gives each rank a seed of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st
from sparsetrain import seeds

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


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    results = {rule: train(rule, rank, world) for rule in RULES}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(results, file)
    dist.barrier()
    train("set", rank, world, seed=rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
