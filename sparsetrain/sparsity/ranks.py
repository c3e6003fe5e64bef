"""What the processes of a distributed training must agree on; nothing at all in a single one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether ``parameter`` is divided among processes, by ``fully_shard`` or by ``FullyShardedDataParallel``."""
    return hasattr(parameter, "placements") or getattr(parameter, "_fsdp_flattened", False)


class Ranks:
    """The processes that train one model together, if there are several when this is built.

    All collective calls are made from `MaskManager.step`, which every rank reaches, in the same order everywhere; none
    from a backward pass, in which a rank may not use a layer. They go through a process group of their own, since the
    wrapper of the model talks in its own.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group() if together else None

    @property
    def several(self) -> bool:
        return self._group is not None

    def any(self, here: bool) -> bool:
        """Return whether something holds on any rank."""
        if self._group is None:
            return here
        flag = torch.tensor([int(here)], dtype=torch.int64, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)

    def check_equal(self, make_digest: Callable[[], str]) -> None:
        """Raise RuntimeError unless all ranks make the same hexadecimal digest; a single process makes none."""
        if self._group is None:
            return
        digest = make_digest()
        number = int(digest[:15], 16)  # 60 bits
        ends = torch.tensor([number, -number], dtype=torch.int64, device=self._device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        if int(ends[0]) != number or int(ends[1]) != -number:
            raise RuntimeError(
                f"the masks of rank {dist.get_rank()} differ from those of other ranks: their seeds, weights or "
                "gradients were not the same"
            )
