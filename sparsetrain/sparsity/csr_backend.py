"""The backend ``csr``: unstructured sparsity on a CPU, by the kernels of `sparsetrain.kernels.csr`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.sparsity.ops import Backend
from sparsetrain.sparsity.pattern import SparsityPattern

_DTYPES = (torch.float32, torch.bfloat16)


class _Kernels(NamedTuple):
    csr: ModuleType
    layout: ModuleType
    tile: int


@functools.cache
def _kernels() -> _Kernels:
    # When the first sparse product is computed: importing the library is not to import a compiler.
    from sparsetrain.kernels import csr, layout, tiles

    return _Kernels(csr, layout, tiles.TILE)


class CsrBackend(Backend):
    """Multiplies by the nonzeros only: one FMA an element of the weight, on as many threads as torch has.

    Takes float32 and bfloat16 on a CPU, sums in float32. Keeps the input packed into tiles of tokens, in float32, in
    place of the input. The index structures derived from a pattern take 8 bytes a nonzero beside its own 4.
    """

    name = "csr"
    needs_input = False
    keeps_input = True

    def refusal(self, dtype: torch.dtype, device: torch.device, pattern: SparsityPattern) -> str | None:
        if device.type != "cpu":
            return f"computes on a CPU; the input is on {device}"
        if dtype not in _DTYPES:
            return f"computes in float32 and bfloat16; the input has dtype {dtype}"
        if pattern.block != (1, 1):
            return f"computes unstructured patterns; this one has blocks of {pattern.block[0]}x{pattern.block[1]}"
        return None

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return self.forward(x, x.new_empty(0), values, pattern, keep=False)[0]

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return self.backward(g, g, values, g.new_empty(0), pattern, need_x=True, need_values=False)[0]

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        kernels, rows = _kernels(), _rows(x)
        packed = self.kept(x, pattern)
        pack = kernels.csr.pack_all if x.dtype == torch.float32 else kernels.csr.pack_all_bfloat16
        pack(torch.get_num_threads(), _flat(rows), rows.stride(0), len(rows), rows.shape[1], _flat(packed))
        values = x.new_empty(pattern.nnz)
        return self.backward(g, x, values, packed, pattern, need_x=False, need_values=True)[1]

    def kept(self, x: Tensor, pattern: SparsityPattern) -> Tensor:
        tile = 64  # _kernels().tile, without the import: a compiler asks for shapes only
        return x.new_empty(((x.shape[0] + tile - 1) // tile, x.shape[1], tile), dtype=torch.float32, device="cpu")

    def forward(
        self, x: Tensor, shared: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool
    ) -> tuple[Tensor, Tensor]:
        kernels, threads, rows = _kernels(), torch.get_num_threads(), _rows(x)
        out_features, in_features = pattern.shape
        y = x.new_empty(len(rows), out_features)
        layout = _layout(pattern)
        ordered = _scratch(pattern.nnz)
        chunks = len(layout.ends) - 1
        kernels.csr.gather_runs(
            _enough(threads, pattern.nnz),
            *(_flat(values.float().contiguous()), _row_ptr(pattern), layout.ends, chunks, out_features, _flat(ordered)),
        )
        if shared.numel():
            use, packed = 2, shared
        elif keep:
            use, packed = 1, self.kept(x, pattern)
        else:
            use, packed = 0, _scratch(threads, in_features, kernels.tile)
        scratch = _scratch(threads, out_features, kernels.tile)
        multiply = kernels.csr.multiply if x.dtype == torch.float32 else kernels.csr.multiply_bfloat16
        multiply(
            threads,
            *(_flat(rows), _flat(y), rows.stride(0), out_features, len(rows), in_features, out_features),
            *(_flat(packed), use, layout.width, chunks, layout.ends, layout.offsets, _flat(ordered), _flat(scratch)),
        )
        return y, packed if use == 1 else x.new_empty(0)

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        values: Tensor,
        kept: Tensor,
        pattern: SparsityPattern,
        need_x: bool,
        need_values: bool,
    ) -> tuple[Tensor, Tensor]:
        kernels, threads, rows = _kernels(), torch.get_num_threads(), _rows(g)
        out_features, in_features = pattern.shape
        empty = g.new_empty(0)
        grad_x = g.new_empty(len(g), in_features) if need_x else empty
        layout = turned = _layout(pattern)
        ordered = sums = _scratch(0)
        if need_x:
            turned = _turned(pattern)
            ordered = _scratch(pattern.nnz)
            few = _enough(threads, pattern.nnz)
            kernels.csr.gather(few, _flat(values.float().contiguous()), turned.order, pattern.nnz, _flat(ordered))
        if need_values:
            sums = _scratch(threads, pattern.nnz)
            if threads > 1:
                sums.zero_()  # a runtime may lend fewer threads than were asked for
        gradients = kernels.csr.gradients if g.dtype == torch.float32 else kernels.csr.gradients_bfloat16
        gradients(
            threads,
            *(_flat(rows), _flat(grad_x), rows.stride(0), in_features, len(rows), in_features, out_features),
            *(_flat(_scratch(threads, 2, out_features, kernels.tile)), int(need_x)),
            *(turned.width, len(turned.ends) - 1, turned.ends, turned.offsets, _flat(ordered)),
            *(_flat(_scratch(threads, in_features, kernels.tile)), int(need_values), _flat(kept)),
            *(layout.width, len(layout.ends) - 1, layout.ends, layout.offsets, pattern.nnz, _flat(sums)),
        )
        if not need_values:
            return grad_x, values.new_empty(0)
        grad_values = _scratch(pattern.nnz)
        kernels.csr.add_parts(
            _enough(threads, pattern.nnz),
            *(_flat(sums), threads, pattern.nnz, _row_ptr(pattern), layout.ends, len(layout.ends) - 1, out_features),
            _flat(grad_values),
        )
        return grad_x, grad_values.to(values.dtype)


def _enough(threads: int, elements: int) -> int:
    """Return how many threads are worth waking for a pass over so many elements."""
    return max(1, min(threads, elements // 65536))


def _scratch(*shape: int) -> Tensor:
    """Return uninitialised memory of the type that kernels compute in, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous each; their distance may be anything."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _flat(tensor: Tensor) -> Any:
    """Return all memory of a tensor as a flat numpy array, bfloat16 as uint16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def _row_ptr(pattern: SparsityPattern) -> Any:
    return pattern.row_ptr.numpy()


def _layout(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_layout(_row_ptr(pattern), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("csr", build)


def _turned(pattern: SparsityPattern) -> Any:
    def build() -> Any:
        return _kernels().layout.build_transposed(_row_ptr(pattern), pattern.col.numpy(), pattern.shape[1])

    return pattern.derived("csr_transposed", build)
