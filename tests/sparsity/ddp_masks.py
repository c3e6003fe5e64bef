"""One rank of a data-parallel training whose masks evolve; started by `test_ranks.py`, never imported.

    python ddp_masks.py RULE RANK WORLD RENDEZVOUS_FILE OUT_FILE [SEED_OFFSET]

Writes the hash of the masks after every update, the weights at the end, and how often the wrapper was built.
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


def main(rule: str, rank: int, world: int, rendezvous: str, out: str, seed: int = 0) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()
    builds = 0
    wrapped: nn.Module = model

    def wrap() -> None:
        nonlocal builds, wrapped
        builds += 1
        wrapped = DistributedDataParallel(model) if world > 1 else model

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
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"hashes": hashes, "values": values, "builds": builds}, file)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    name, rank, world, rendezvous, out, *rest = sys.argv[1:]
    main(name, int(rank), int(world), rendezvous, out, *(int(word) for word in rest))
