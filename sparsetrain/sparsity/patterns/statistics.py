"""Statistics of a mask: density, the distribution of weights over rows and columns, dead rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsetrain.sparsity.patterns.pattern import SparsityPattern


@dataclass(frozen=True)
class Degrees:
    """How many weights the rows (fan-in of outputs) or columns (fan-out of inputs) of a matrix have."""

    least: int
    mean: float
    most: int
    std: float
    dead: int

    @classmethod
    def of(cls, counts: torch.Tensor) -> Degrees:
        real = counts.double()
        return cls(
            int(counts.min()),
            float(real.mean()),
            int(counts.max()),
            float(real.std(correction=0)),
            int((counts == 0).sum()),
        )


@dataclass(frozen=True)
class MaskStatistics:
    """One layer's mask.

    Args:
        rows: of fan-in per output; ``rows.dead`` outputs are constant. columns: of fan-out per input; ``columns.dead``
            inputs are ignored.
    """

    shape: tuple[int, int]
    nnz: int
    density: float
    rows: Degrees
    columns: Degrees

    @classmethod
    def of(cls, pattern: SparsityPattern) -> MaskStatistics:
        """Return the statistics of a pattern; they count single weights, also in blocks."""
        bh, bw = pattern.block
        fan_in = (pattern.row_ptr[1:] - pattern.row_ptr[:-1]) * bw
        fan_out = torch.bincount(pattern.col.to(torch.int64), minlength=pattern.shape[1] // bw) * bh
        return cls(
            pattern.shape,
            pattern.nnz,
            pattern.density,
            Degrees.of(fan_in.repeat_interleave(bh)),
            Degrees.of(fan_out.repeat_interleave(bw)),
        )
