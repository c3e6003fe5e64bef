"""Agreement between the processes of a distributed training; a single process has nothing to agree on."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.errors import UserError


def is_sharded(parameter: Tensor) -> bool:
    """Whether ``parameter`` is divided among processes, by ``fully_shard`` or by ``FullyShardedDataParallel``."""
    return hasattr(parameter, "placements") or getattr(parameter, "_fsdp_flattened", False)


def warn_of_own_draws(action: str) -> None:
    """Warn that ``action`` draws masks without a seed in several processes, which would each draw other masks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"{action} draws masks without a seed, and each of {dist.get_world_size()} ranks draws its own: give "
            "seed=, or wrap the model in DDP with broadcast_buffers=True, which copies those of rank 0",
            stacklevel=4,
        )


class Ranks:
    """The processes that train one model together, if there are several when this is built.

    The constructor and every method are collective calls: either all ranks make them, at the same place of the program,
    or no rank does. They must not be made inside a backward pass or depend on events on one rank. The calls use process
    groups of their own, because the calls in one group must come in the same order on all ranks.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        return self  # the same processes

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group() if together else None
        # Small numbers travel between CPUs, so that no rank waits for its GPU.
        self._small = self._group
        if self._group is not None and dist.get_backend(self._group) != "gloo" and dist.is_gloo_available():
            self._small = dist.new_group(backend="gloo")

    @property
    def several(self) -> bool:
        """Whether there is more than one rank."""
        return self._group is not None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, or the only one."""
        return self._group is None or dist.get_rank() == 0

    def any(self, here: bool) -> bool:
        """Return whether something holds on any rank."""
        return here if self._group is None else self._ends(int(here))[1] == 1

    def all(self, here: bool) -> bool:
        """Return whether something holds on all ranks."""
        return here if self._group is None else self._ends(int(here))[0] == 1

    def equal(self, number: int) -> bool:
        """Return whether a number of 63 bits is the same on all ranks."""
        low, high = (number, number) if self._group is None else self._ends(number)
        return low == high

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)

    def share_seed(self, seed: int, given: bool) -> int:
        """Return the seed that all ranks were given, or the one that rank 0 has drawn.

        Raises:
            UserError: ranks were given different seeds, or only some ranks were given one. All ranks raise.
        """
        if self._group is None:
            return seed
        everywhere: list[tuple[int, bool]] = [(0, False)] * dist.get_world_size()
        dist.all_gather_object(everywhere, (int(seed), given), group=self._small)
        if any(was_given for _, was_given in everywhere) and len(set(everywhere)) > 1:
            rank = next(index for index, entry in enumerate(everywhere) if entry != everywhere[0])
            shown = [str(everywhere[index][0]) if everywhere[index][1] else "None" for index in (0, rank)]
            raise UserError(
                f"seed={shown[1]} on rank {rank} and seed={shown[0]} on rank 0: masks and growth would differ between "
                "ranks; give all ranks the same seed, or no rank a seed"
            )
        return everywhere[0][0]

    def check_equal(self, make_digest: Callable[[], str]) -> None:
        """Raise `RuntimeError` unless all ranks make the same hexadecimal digest; a single process skips it."""
        if self._group is None:
            return
        low, high = self._ends(int(make_digest()[:15], 16))  # 60 bits
        if low != high:
            raise RuntimeError(
                f"the masks of rank {dist.get_rank()} differ from those of other ranks: their seeds, weights or "
                "gradients were not the same"
            )

    def _ends(self, number: int) -> tuple[int, int]:
        """Return the smallest and the largest of a number of 63 bits over all ranks."""
        device = "cuda" if dist.get_backend(self._small) == "nccl" else "cpu"
        ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._small)
        return -int(ends[1]), int(ends[0])
