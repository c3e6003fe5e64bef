"""One rank of a training under FSDP; started by `test_fsdp.py`, never imported.

    python fsdp_masks.py RANK WORLD RENDEZVOUS_FILE OUT_FILE

Writes how far weights with static masks are from those of one process, and what is said to rules that change masks.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import sparsetrain as st
from sparsetrain import seeds
from sparsetrain.errors import UserError

Wrap = Callable[[nn.Module], nn.Module]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()


def train(model: nn.Module, rule: st.sparsity.Rule, wrap: Wrap, rank: int, world: int) -> nn.Module:
    manager = st.MaskManager(model, rule, seed=0)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(8, 12, generator=seeds.generator(step), dtype=torch.float64).chunk(world)[rank]
        (wrapped(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    return wrapped


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))

    def each(model: nn.Module) -> nn.Module:
        for layer in (model[0], model[2]):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def older(original: bool) -> Wrap:
        device = torch.device("cpu")
        return lambda model: FullyShardedDataParallel(model, use_orig_params=original, device_id=device)

    static, moving = st.Static(sparsity=0.7), st.RigL(sparsity=0.7, every=3)
    alone = dict(train(mlp(), static, lambda model: model, 0, 1).named_parameters())
    sharded: dict[str, Any] = dict(train(mlp(), static, each, rank, world).named_parameters())
    older_one = train(mlp(), static, older(True), rank, world)
    found: dict[str, Any] = {
        "values": alone["0.values"].numel(),
        "local": sharded["0.values"].to_local().numel(),
        "off": max(float((sharded[name].full_tensor() - alone[name]).abs().max()) for name in alone),
    }
    with FullyShardedDataParallel.summon_full_params(older_one):
        full = {name.removeprefix("_fsdp_wrapped_module."): value for name, value in older_one.named_parameters()}
        found["off, older"] = max(float((full[name] - alone[name]).abs().max()) for name in alone)
    wraps = {"fully_shard": each, "older": older(True), "older, flat": older(False)}
    found["refused"] = {
        name: refusal(lambda wrap=wrap: train(mlp(), moving, wrap, rank, world))  # type: ignore[misc]
        for name, wrap in wraps.items()
    }
    found["too late"] = {
        name: refusal(lambda wrap=wrap: st.MaskManager(wrap(mlp()), static))  # type: ignore[misc]
        for name, wrap in wraps.items()
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    me, world, rendezvous, out = sys.argv[1:]
    main(int(me), int(world), rendezvous, out)
