"""What a backend is, the backends by name, and which of them a layer's ``backend`` stands for.

Legend: N rows (tokens), K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor

from sparsetrain.errors import UserError, check_choice
from sparsetrain.registry import Registry
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


class Backend(ABC):
    """Three contractions over a pattern, and how forward and backward share work between them.

    Subclasses define `matmul`, `matmul_t` and `sampled`, and that is enough. One that can reuse in the backward pass
    what the forward pass computed (a scattered matrix) defines `forward`, `kept` and `backward` too, and one that
    computes per-example norms in fewer calls `sampled_by_example`.
    """

    name: str

    tuned_with: tuple[int, int] | None = None
    """The block size of the patterns by which ``sparsetrain tune`` measures from which sparsity on this backend is
    faster than a dense product. ``auto`` chooses among the backends that have one; without it a backend is used only
    where it is named."""

    def refusal(self, dtype: torch.dtype, device: torch.device, pattern: SparsityPattern) -> str | None:
        """Return why this backend cannot compute with such values, or None."""
        return None

    @abstractmethod
    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return ``x @ W.T``: ``[N, K] -> [N, M]``."""

    @abstractmethod
    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return ``g @ W``: ``[N, M] -> [N, K]``."""

    @abstractmethod
    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return the values ``[nnz]`` of ``g.T @ x`` at the stored positions."""

    def sampled_by_example(
        self, g: Tensor, x: Tensor, pattern: SparsityPattern, examples: int
    ) -> tuple[Tensor, Tensor]:
        """Return what `sampled` returns, and the squared norm of each example's part of it, float32 ``[examples]``.

        Args:
            examples: into which the N rows are divided, consecutive ones and equally many each.
        """
        parts = zip(g.chunk(examples), x.chunk(examples), strict=True)
        total, squared = None, []
        for of_g, of_x in parts:
            values = self.sampled(of_g.contiguous(), of_x.contiguous(), pattern)
            wide = values if values.dtype == torch.float64 else values.float()
            squared.append(wide.square().sum())
            total = wide if total is None else total.add_(wide)
        assert total is not None
        return total.to(g.dtype), torch.stack(squared).float()

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern, keep: bool) -> tuple[Tensor, Tensor]:
        """Return ``x @ W.T`` and what `backward` needs beside x (an empty tensor for nothing).

        Args:
            keep: whether `backward` may follow.
        """
        return self.matmul(x, values, pattern), x.new_empty(0)

    def kept(self, x: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return an uninitialised tensor like the one that `forward` keeps."""
        return x.new_empty(0)

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
        """Return ``g @ W`` and the values of ``g.T @ x``; an empty tensor for one that is not needed.

        ``x`` is empty unless ``need_values``; ``kept`` is what `forward` kept.
        """
        return (
            self.matmul_t(g, values, pattern) if need_x else g.new_empty(0),
            self.sampled(g, x, pattern) if need_values else values.new_empty(0),
        )


BACKENDS: Registry[Backend] = Registry(
    "backend",
    "backend",
    calls={
        "matmul": ("x", "values", "pattern"),
        "matmul_t": ("g", "values", "pattern"),
        "sampled": ("g", "x", "pattern"),
        "refusal": ("dtype", "device", "pattern"),
    },
)
"""The backends that a layer's ``backend`` can name, besides ``auto``."""

_Registered = TypeVar("_Registered", bound="Backend | type[Backend]")


@overload
def register_backend(name: Backend) -> Backend: ...


@overload
def register_backend(name: str) -> Callable[[_Registered], _Registered]: ...


@overload
def register_backend(name: str, backend: _Registered) -> _Registered: ...


def register_backend(name: Any, backend: Any = None) -> Any:
    """Make a backend available to every sparse layer; it replaces an earlier one of that name.

    ```python
    @sparsetrain.register_backend("loops")
    class Loops(sparsetrain.Backend):
        def matmul(self, x, values, pattern): ...
        def matmul_t(self, g, values, pattern): ...
        def sampled(self, g, x, pattern): ...
    ```

    ``backend="loops"`` of a layer and ``sparsity.backend=loops`` of a configuration then choose it.

    Args:
        name: the name, see `sparsetrain.registry.Registry.register`; or a backend that has one in ``backend.name``.
        backend: a `Backend`, or a class of backends, of which one is made. Without it, for a name, the function returns
            a decorator.

    Returns:
        ``backend``, or the decorator, which returns what it decorates.

    Raises:
        UserError: the name is malformed or ``auto``, which stands for a choice among backends; or ``backend`` is none,
            or lacks one of the products.
    """
    if isinstance(name, str) and backend is None:
        return lambda decorated: register_backend(name, decorated)
    if not isinstance(name, str):
        name, backend = getattr(name, "name", None), name
    if name == "auto":
        raise UserError("backend name 'auto' is taken: it stands for the choice among the registered ones")
    kind = backend if isinstance(backend, type) else type(backend)
    if not issubclass(kind, Backend):
        raise UserError(f"backend {name!r}: {backend!r} must be a sparsetrain.Backend, or a class derived from it")
    if lacks := getattr(kind, "__abstractmethods__", None):
        raise UserError(f"backend {name!r}: {kind.__qualname__} must define {', '.join(sorted(lacks))}")
    try:
        made = backend() if isinstance(backend, type) else backend
    except TypeError as error:
        raise UserError(f"backend {name!r}: {kind.__qualname__} must be made without arguments: {error}") from None
    BACKENDS.register(name, made, replace=True)
    made.name = name
    return backend


def backend_names() -> list[str]:
    """Return the names that a layer's ``backend`` accepts."""
    return ["auto", *BACKENDS]


def check_backend(name: str, key: str = "backend") -> None:
    """Raise `UserError` unless a layer's ``backend`` accepts ``name``; ``key`` is what the message calls it."""
    if name != "auto" and name not in BACKENDS:
        check_choice(key, name, backend_names())


# What ``auto`` stands for. It is set from above, since the crossover tables build on this file.
class _Choice(Protocol):
    def __call__(
        self, pattern: SparsityPattern, tokens: int, dtype: torch.dtype, device: torch.device, *, forward_only: bool
    ) -> str: ...


def _masked_always(
    pattern: SparsityPattern, tokens: int, dtype: torch.dtype, device: torch.device, *, forward_only: bool = False
) -> str:
    return "masked"


_choice: list[_Choice] = [_masked_always]


def set_choice(choice: _Choice) -> None:
    """Make ``choice`` decide what ``auto`` stands for; it returns a registered name, see `auto.choose`."""
    _choice[0] = choice


def resolve_backend(
    name: str,
    pattern: SparsityPattern,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    forward_only: bool = False,
) -> str:
    """Return the registered backend that ``name`` stands for at this pattern, number of rows, type and device.

    Args:
        forward_only: whether no backward pass may follow.

    Raises:
        UserError: no such backend, or one that was asked for by name and cannot compute this.
    """
    device = pattern.device if device is None else device
    check_backend(name)
    if name == "auto":
        return _choice[0](pattern, tokens, dtype, device, forward_only=forward_only)
    if reason := BACKENDS[name].refusal(dtype, device, pattern):
        raise UserError(f"backend '{name}' {reason}; backend='auto' takes another")
    return name
