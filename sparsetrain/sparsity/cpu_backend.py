"""What the backends that compute on a CPU by `sparsetrain.kernels` have in common: packed inputs, types, memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.sparsity.ops import Backend
from sparsetrain.sparsity.pattern import SparsityPattern

TILE = 64  # tokens of a tile of the kernels, known without importing a compiler
_DTYPES = (torch.float32, torch.bfloat16)
# What `forward` does about the packed input: see `sparsetrain.kernels.csr`.
_PACK_EACH, _PACK_AND_KEEP, _PACKED = 0, 1, 2


class CpuBackend(Backend):
    """Takes float32 and bfloat16 on a CPU, sums in float32, on as many threads as torch has.

    Keeps the input packed into tiles of tokens, in float32, in place of the input. Subclasses define `unsuited`,
    `forward` and `backward`.
    """

    needs_input = False
    keeps_input = True
    spare = 0  # features of a packed tile beyond those of the input

    def refusal(self, dtype: torch.dtype, device: torch.device, pattern: SparsityPattern) -> str | None:
        if device.type != "cpu":
            return f"computes on a CPU; the input is on {device}"
        if dtype not in _DTYPES:
            return f"computes in float32 and bfloat16; the input has dtype {dtype}"
        if pattern.nnz >= 2**31:
            return f"counts nonzeros in 32 bits; this pattern has {pattern.nnz}"
        return self.unsuited(pattern)

    def unsuited(self, pattern: SparsityPattern) -> str | None:
        """Return why this backend cannot compute such a pattern, or None."""
        raise NotImplementedError

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return self.forward(x, x.new_empty(0), values, pattern, keep=False)[0]

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return self.backward(g, g, values, g.new_empty(0), pattern, need_x=True, need_values=False)[0]

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        from sparsetrain.kernels import csr

        packed, rows = self.kept(x, pattern), with_whole_rows(x)
        pack = csr.pack_all if x.dtype == torch.float32 else csr.pack_all_bfloat16
        pack(torch.get_num_threads(), rows, rows.stride(0), *x.shape, packed, self.spare)
        values = x.new_empty(pattern.nnz)
        return self.backward(g, x, values, packed, pattern, need_x=False, need_values=True)[1]

    def kept(self, x: Tensor, pattern: SparsityPattern) -> Tensor:
        tiles = (x.shape[0] + TILE - 1) // TILE
        return x.new_empty((tiles, x.shape[1] + self.spare, TILE), dtype=torch.float32, device="cpu")

    def packed(
        self, x: Tensor, shared: Tensor, pattern: SparsityPattern, keep: bool, threads: int
    ) -> tuple[int, Tensor]:
        """Return what a kernel is to do about the packed input, as it is told, and the memory for it."""
        if shared.numel():
            return _PACKED, shared
        if keep:
            return _PACK_AND_KEEP, self.kept(x, pattern)
        return _PACK_EACH, scratch(threads, x.shape[1] + self.spare, TILE)

    @staticmethod
    def kept_of(use: int, packed: Tensor, x: Tensor) -> Tensor:
        """Return what `forward` keeps after it did what `packed` said."""
        return packed if use == _PACK_AND_KEEP else x.new_empty(0)


def in_float32(values: Tensor) -> Tensor:
    """Return values as kernels read them."""
    return values.detach().float().contiguous()


def enough(threads: int, elements: int) -> int:
    """Return how many threads are worth waking for a pass over so many elements."""
    return max(1, min(threads, elements // 65536))


def scratch(*shape: int) -> Tensor:
    """Return uninitialised memory of the type that kernels compute in, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def with_whole_rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous each; their distance may be anything."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
