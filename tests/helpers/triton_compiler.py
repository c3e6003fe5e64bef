"""A launch of a Triton kernel that compiles it for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


class Compiler:
    """A fake kernel, whose launch only compiles the real one for a GPU of ``capability``, as a launch does."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        names = self.kernel.arg_names
        constants = {name: value for name, value in named.items() if name in names}
        options = {name: value for name, value in named.items() if name not in names}
        given = dict(zip(names, args, strict=False))
        assert [*given, *constants] == names
        # The launcher specialises on integers equal to 1, and on addresses and integers divisible by 16.
        free = self.kernel.do_not_specialize
        integers = {name: value for name, value in given.items() if isinstance(value, int) and name not in free}
        constants |= {name: value for name, value in integers.items() if value == 1}
        kinds, aligned = {}, {}
        for place, name in enumerate(names):
            value = given.get(name)
            if name in constants:
                kinds[name] = "constexpr"
            else:
                kinds[name] = _kind(value)
                if isinstance(value, Tensor) or integers.get(name, 1) % 16 == 0:
                    aligned[place,] = [["tt.divisibility", 16]]
        numbered = {(names.index(name),): value for name, value in constants.items()}
        source = triton.compiler.ASTSource(self.kernel, kinds, numbered, aligned)
        self.compiled.append(triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{NAMES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"
