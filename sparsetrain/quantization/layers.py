"""Layers for inference that hold codes instead of weights, and decode them in each forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.quantization.codes import SCALES, decode, encode, row_bytes
from sparsetrain.quantization.gaps import decode_gaps, encode_gaps
from sparsetrain.sparsity.layers.linear import SparseLinear

_PANEL = 1 << 22  # numbers that are decoded at a time


class PackedMatrix(nn.Module):
    """A matrix ``[rows, columns]`` as codes, scales and offsets; layers with tied weights share one.

    ``codes`` uint8 ``[rows, P]``, ``scales`` and ``offsets`` bfloat16 ``[rows, G]`` are its buffers, see `codes`. A
    change of the model's dtype leaves them as they are and changes only ``dtype``, that of the decoded numbers.

    Args:
        rows, columns: the shape. bits: 4 or 8. group: the number of weights of a row that share a scale.
        dtype: of the decoded numbers.
        device: of the buffers, which the constructor does not fill.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    _like: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        groups = -(-columns // group)
        self.register_buffer("codes", torch.empty(rows, row_bytes(columns, bits), dtype=torch.uint8, device=device))
        for name in ("scales", "offsets"):
            self.register_buffer(name, torch.empty(rows, groups, dtype=SCALES, device=device))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    @classmethod
    def of(cls, matrix: Tensor, bits: int, group: int) -> Self:
        """Return the codes of ``matrix`` ``[rows, columns]``, on its device."""
        packed = cls(matrix.shape[0], matrix.shape[1], bits, group, matrix.dtype, "meta")
        packed.codes, packed.scales, packed.offsets = encode(matrix.detach(), bits, group)
        return packed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoded numbers."""
        return self._like.dtype

    def decode(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return the numbers of some rows, by a slice or by int64 indices ``[n]``: ``[n, columns]``."""
        held = (self.codes, self.scales, self.offsets)
        parts = [held_.index_select(0, rows) if isinstance(rows, Tensor) else held_[rows] for held_ in held]
        return decode(parts[0], parts[1], parts[2], self.columns, self.bits, self.group).to(self.dtype)

    def panels(self) -> Iterator[slice]:
        """Yield slices that cover the rows, each of about a few million numbers."""
        step = max(1, _PANEL // max(1, self.columns))
        for first in range(0, self.rows, step):
            yield slice(first, min(first + step, self.rows))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Scales pass as whole numbers, so that `model.half()` does not round them.
        for name in ("scales", "offsets"):
            self._buffers[name] = getattr(self, name).view(torch.int16)
        super()._apply(fn, recurse)
        for name in ("scales", "offsets"):
            self._buffers[name] = getattr(self, name).view(SCALES)
        return self

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}, group={self.group}"


class Quantized(nn.Module):
    """What the layers have in common: a `PackedMatrix`, and that they do not train."""

    matrix: PackedMatrix

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Refuse the training mode.

        Raises:
            UserError: ``mode`` is true.
        """
        if mode:
            raise UserError(f"weights of {self.matrix.bits} bits do not train: train the model, then quantize it")
        return super().train(mode)


class QuantizedLinear(Quantized):
    """``y = x @ W.T + b`` with W decoded some rows at a time.

    Args:
        matrix: W, ``[out_features, in_features]``. bias: ``[out_features]`` or None.
    """

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__(matrix)
        self.out_features, self.in_features = matrix.rows, matrix.columns
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, read-only, for code that looks for a ``weight``."""
        return self.matrix.decode()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return _product(x, self.bias, ((rows, self.matrix.decode(rows)) for rows in self.matrix.panels()))


class QuantizedEmbedding(Quantized):
    """Rows of a table, decoded when they are read.

    Args:
        matrix: the table, ``[num_embeddings, embedding_dim]``.
    """

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__(matrix)
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns

    @property
    def weight(self) -> Tensor:
        """The decoded table, read-only, for code that looks for a ``weight``."""
        return self.matrix.decode()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map indices ``[...]`` to ``[..., embedding_dim]``."""
        return self.matrix.decode(tokens.flatten()).view(*tokens.shape, self.embedding_dim)


class QuantizedSparseLinear(Quantized):
    """``y = x @ W.T + b`` with the values of a sparse W as codes and their positions as gaps.

    The groups of values run over the ends of rows, because a row may store only a few. The matrix is made dense some
    rows at a time in each forward pass: the layer saves bytes and no time.

    Args:
        matrix: the values, ``[1, nnz]``.
        index: uint8, the packed gaps between stored blocks, see `gaps`. gap_bits: the width of their units.
        shape: ``(out_features, in_features)``. block: of the pattern, ``(1, 1)`` for single weights.
        bias: ``[out_features]`` or None.
    """

    index: Tensor

    def __init__(
        self,
        matrix: PackedMatrix,
        index: Tensor,
        gap_bits: int,
        shape: tuple[int, int],
        block: tuple[int, int],
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__(matrix)
        self.register_buffer("index", index)
        self.out_features, self.in_features = shape
        self.gap_bits, self.block, self.bias = gap_bits, block, bias

    @classmethod
    def of(cls, layer: SparseLinear, bits: int, group: int) -> QuantizedSparseLinear:
        """Return the quantized layer of a sparse one; the bias is the same object."""
        pattern = layer.pattern
        across = pattern.shape[1] // pattern.block[1]
        index, gap_bits = encode_gaps(pattern.block_rows() * across + pattern.col)
        values = PackedMatrix.of(layer.values.detach()[None], bits, group)
        return cls(values, index, gap_bits, pattern.shape, pattern.block, layer.bias)

    @property
    def nnz(self) -> int:
        """The number of stored values."""
        return self.matrix.columns

    @property
    def weight(self) -> Tensor:
        """The dense matrix, read-only, for code that looks for a ``weight``."""
        return torch.cat([weight for _, weight in self._panels()])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return _product(x, self.bias, self._panels())

    def check(self) -> None:
        """Raise `UserError` if the index does not name ``nnz`` positions of the matrix."""
        places = self._places()
        if int(places[-1]) >= (self.out_features // self.block[0]) * (self.in_features // self.block[1]):
            raise UserError(f"the index leads beyond a matrix of {self.out_features} x {self.in_features}")

    def _places(self) -> Tensor:
        return decode_gaps(self.index, self.gap_bits, self.nnz // (self.block[0] * self.block[1]))

    def _panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the rows, and the dense matrix of these rows."""
        (bh, bw), columns = self.block, self.in_features
        across, down = columns // bw, self.out_features // bh
        places, values = self._places(), self.matrix.decode()[0].view(-1, bh * bw)
        lines = torch.arange(bh, device=places.device)[:, None] * columns
        inside = (lines + torch.arange(bw, device=places.device)).view(-1)
        step = max(1, _PANEL // (bh * columns))
        for first in range(0, down, step):
            last = min(first + step, down)
            bounds = torch.tensor([first * across, last * across], device=places.device)
            start, end = torch.searchsorted(places, bounds).tolist()
            local = places[start:end] - first * across
            corners = local // across * (bh * columns) + local % across * bw
            dense = values.new_zeros((last - first) * bh * columns)
            dense[(corners[:, None] + inside).view(-1)] = values[start:end].reshape(-1)
            yield slice(first * bh, last * bh), dense.view(-1, columns)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, nnz={self.nnz}, gap_bits={self.gap_bits}, bias={self.bias is not None}"


def _product(x: Tensor, bias: Tensor | None, panels: Iterator[tuple[slice, Any]]) -> Tensor:
    parts = [F.linear(x, weight, None if bias is None else bias[rows]) for rows, weight in panels]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
