"""The backend ``triton``: block patterns on a GPU. It exists where triton is installed, and imports it when first used.

On a machine without a GPU its kernels run through Triton's interpreter in a process that is started with
``TRITON_INTERPRET=1``: slow, but the same code, for tests. (Later is too late: torch itself may have imported triton.)
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.backends.base import Backend, register_backend
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


class TritonBackend(Backend):
    """The three contractions by the Triton kernels of `sparsetrain.kernels.triton_bsr`.

    For patterns in blocks of 4 to 64 by 4 to 64, tensors of one type among float32, bfloat16 and float16, on a CUDA
    device. float32 is multiplied as float32, never as TF32; sums are float32; the same input gives the same bits.
    Nothing is kept from the forward pass: what the backward pass needs is in its own inputs. What the kernels need to
    know of a pattern (at most 16 bytes a block) is derived on first use, and kept with it.

    Raises (each contraction):
        UserError: a pattern, a type, a device or a shape that the kernels do not take; the message says which.
    """

    name = "triton"

    def refusal(self, dtype: torch.dtype, device: torch.device, pattern: SparsityPattern) -> str | None:
        kernels = _kernels()
        if device.type != "cuda" and not kernels.INTERPRETED:
            return f"computes on a GPU, not on {device}"
        if dtype not in kernels.DTYPES:
            allowed = ", ".join(str(one).removeprefix("torch.") for one in kernels.DTYPES)
            return f"computes {allowed}, not {dtype}"
        bh, bw = pattern.block
        least, most = kernels.MIN_BLOCK, kernels.MAX_BLOCK
        if least <= bh <= most and least <= bw <= most:
            return None
        return f"computes block patterns; blocks of {bh}x{bw} have a side outside {least} to {most}"

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        kernels, layout = self._prepare(pattern, x=(x, pattern.shape[1]), values=(values, None))
        return kernels.matmul(x, values.contiguous(), layout)

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        kernels, layout = self._prepare(pattern, g=(g, pattern.shape[0]), values=(values, None))
        return kernels.matmul_t(g, values.contiguous(), layout)

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        kernels, layout = self._prepare(pattern, x=(x, pattern.shape[1]), g=(g, pattern.shape[0]))
        if len(g) != len(x):
            raise UserError(f"backend 'triton': g has {len(g)} rows and x has {len(x)}")
        return kernels.sampled(g, x, layout)

    def _prepare(self, pattern: SparsityPattern, **tensors: tuple[Tensor, int | None]) -> tuple[ModuleType, Any]:
        """Return the kernels and the layout of ``pattern``, once they are known to fit the ``tensors``.

        Checked here, because a kernel on a GPU would read beyond a tensor of another shape without a word.

        Args:
            tensors: by name, each with the columns it must have; None for the values of the pattern.
        """
        kernels = _kernels()
        for name, (tensor, columns) in tensors.items():
            if tensor.device != pattern.device:
                raise UserError(f"backend 'triton': {name} is on {tensor.device}, the pattern on {pattern.device}")
            if reason := self.refusal(tensor.dtype, tensor.device, pattern):
                raise UserError(f"backend 'triton' {reason} ({name})")
            fits = tensor.shape == (pattern.nnz,) if columns is None else tensor.shape[1:] == (columns,)
            if not fits:
                wanted = f"({pattern.nnz},)" if columns is None else f"(tokens, {columns})"
                raise UserError(f"backend 'triton': {name} has shape {tuple(tensor.shape)}; {wanted} is needed")
        dtypes = {name: tensor.dtype for name, (tensor, _) in tensors.items()}
        if len(set(dtypes.values())) > 1:
            kinds = " and ".join(f"{name} has dtype {dtype}" for name, dtype in dtypes.items())
            raise UserError(f"backend 'triton': {kinds}; one type is needed")
        layout = pattern.derived(
            "triton", lambda: kernels.layout(pattern.row_ptr, pattern.col, pattern.shape, pattern.block)
        )
        return kernels, layout


def _kernels() -> ModuleType:
    # Not at the top of the file: importing sparsetrain must not import triton.
    from sparsetrain.kernels import triton_bsr

    return triton_bsr


def register_triton() -> bool:
    """Register the backend ``triton`` if triton is installed; return whether it is. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return False
    register_backend("triton", TritonBackend())
    return True


register_triton()
