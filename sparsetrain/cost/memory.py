"""Bytes of parameters, gradients and optimizer state: predicted from a `ModelConfig`, and counted on a live model.

A sparse layer stores ``values [nnz]`` and, in compressed-row form, ``row_ptr`` (int64, rows + 1) and ``col`` (int32,
nnz). Its gradient and each optimizer moment also have nnz entries. Activations are not counted, nor are the layouts
that the kernels derive, which depend on the backend and can be dropped and rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sparsetrain.cost.flops import Density, matrices, parameter_count
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.sparsity.layers.linear import SparseLinear

_ROW_PTR_BYTES = torch.int64.itemsize
_COLUMN_BYTES = torch.int32.itemsize


@dataclass(frozen=True)
class StateBytes:
    """Bytes by purpose.

    Args:
        parameters: of parameters.
        gradients: of gradients.
        optimizer: of optimizer state.
        index: of the topology of sparse layers (row_ptr and col).
        buffers: of all other buffers.
    """

    parameters: int
    gradients: int
    optimizer: int
    index: int
    buffers: int = 0

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return self.parameters + self.gradients + self.optimizer + self.index + self.buffers

    def as_dict(self) -> dict[str, int]:
        """Return every field and the total, as a report stores them."""
        return {**asdict(self), "total": self.total}


def training_bytes(
    config: ModelConfig,
    density: Density = 1.0,
    *,
    value_bytes: int = 4,
    moments: int = 2,
    moment_bytes: int = 4,
) -> StateBytes:
    """Return the bytes of ``Transformer(config)`` in training, in closed form.

    Args:
        config: the model.
        density: stored fraction of the hidden matrices, as in `sparsetrain.cost.flops.matrices`.
        value_bytes: bytes of a parameter, and of its gradient: 4 for float32, 2 for bfloat16.
        moments: optimizer values per parameter: 2 for AdamW, 1 for SGD with momentum, 0 for SGD. The step counter of
            4 bytes that torch keeps per tensor is left out.
        moment_bytes: bytes of one optimizer value.

    Raises:
        UserError: a size is negative, or ``density`` is refused by `matrices`.
    """
    for name, size in (("value_bytes", value_bytes), ("moments", moments), ("moment_bytes", moment_bytes)):
        if size < 0:
            raise UserError(f"{name}={size} is negative")
    stored = parameter_count(config, density).total
    index = sum(
        (matrix.out_features + 1) * _ROW_PTR_BYTES + matrix.nnz * _COLUMN_BYTES
        for matrix in matrices(config, density)
        if matrix.density < 1.0
    )
    return StateBytes(
        parameters=stored * value_bytes,
        gradients=stored * value_bytes,
        optimizer=stored * moments * moment_bytes,
        index=index,
    )


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> StateBytes:
    """Return the bytes that a live model and its optimizer hold at this moment.

    Tensors that share storage (a tied head, a view) count once. Gradients count only while they exist, between
    ``backward()`` and ``zero_grad()``. Optimizer state exists from the first step on.
    """
    seen: set[tuple[torch.device, int]] = set()
    index: list[Tensor] = []
    buffers: list[Tensor] = []
    for module in model.modules():
        held = list(module.buffers(recurse=False))
        (index if isinstance(module, SparseLinear) else buffers).extend(held)
    parameters = list(model.parameters())
    state = [] if optimizer is None else [v for entry in optimizer.state.values() for v in entry.values()]
    return StateBytes(
        parameters=_bytes(parameters, seen),
        gradients=_bytes([p.grad for p in parameters if p.grad is not None], seen),
        optimizer=_bytes([value for value in state if isinstance(value, Tensor)], seen),
        index=_bytes(index, seen),
        buffers=_bytes(buffers, seen),
    )


def _bytes(tensors: Iterable[Tensor], seen: set[tuple[torch.device, int]]) -> int:
    """Return the bytes of the storages of ``tensors`` that are not in ``seen``, and add these storages to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # A tensor on the meta device has no address, so its Python identity stands in for one.
        key = (tensor.device, storage.data_ptr() or id(tensor))
        if key not in seen:
            seen.add(key)
            total += storage.nbytes()
    return total
