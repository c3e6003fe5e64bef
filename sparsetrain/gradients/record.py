"""What is recorded while gradients are computed: the squared norm of each example's own gradient, by parameter.

A *micro-batch* is one forward pass of the model over B examples. A *use* is one place of that forward pass that reads a
parameter; its backward pass adds the norms. Gradients of several uses add up, and norms do not: a parameter with
several uses keeps what its gradients are made of, until all of them are known. The exception is the common case of one
table that is embedding and head at once, see `Tied`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError

Kind = Literal["matrix", "table", "other"]
Gradient = Callable[[int], Tensor]  # from an example to its share of the gradient, in the parameter's shape

_ROW = 1024  # elements of a norm in float32
_SAMPLE = 256  # elements of a vector that are compared with what the layers computed


@functools.lru_cache(maxsize=256)
def direction(size: int, device: torch.device) -> Tensor:
    """Return a vector ``[size]`` of normal draws, the same for a size, onto which gradients are projected."""
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device)


def digest(gradient: Tensor) -> Tensor:
    """Return a few numbers that are linear in a parameter's gradient, by which two gradients are compared.

    Of a matrix G ``[M, N]`` it is ``a^T G b`` for two random vectors, in which a difference of the size e shows as a
    draw of the deviation e, wherever it is; of other shapes, evenly spaced elements.
    """
    gradient = wide(gradient.detach())
    if gradient.ndim == 2:
        left, right = (direction(size, gradient.device) for size in gradient.shape)
        return ((gradient @ right.to(gradient.dtype)) @ left.to(gradient.dtype)).double()[None]
    count = min(_SAMPLE, gradient.numel())
    places = torch.linspace(0, gradient.numel() - 1, count, dtype=torch.float64, device=gradient.device).long()
    return gradient.reshape(-1)[places].double()


def length_of(x: Tensor) -> Tensor:
    """Return the 2-norm of all elements as a float64 scalar, to about 1e-6.

    Norms of a thousand elements at a time are taken in float32, or in float64 if x is: `torch.linalg.vector_norm` over
    everything has an error of 1e-4 for millions of float32 elements, and costs 30 times as much if it converts them to
    float64. Squares below 1e-38 or above 3e38 are zero and infinity in float32.
    """
    flat = wide(x.detach()).reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    return torch.linalg.vector_norm(torch.cat([rows, rest[None]]))


class MicroBatch:
    """The norms of one forward pass and its backward pass.

    Args:
        examples: B, the leading dimension of the model's input.
        rows: B times T, for an input ``[B, T, ...]``: how many rows a layer may see as one matrix.
        expected: receives what the layers add to the gradients, see `Use.expect`.
    """

    def __init__(self, examples: int, rows: int, expected: dict[nn.Parameter, tuple[Tensor, float]]) -> None:
        self.examples, self.rows, self.expected = examples, rows, expected
        self.recomputed: dict[nn.Parameter, int] = {}  # calls inside the backward pass, by gradient checkpointing
        self.kinds: dict[nn.Parameter, list[Kind]] = {}  # of the uses in the forward pass
        self.ids: dict[nn.Parameter, Tensor] = {}  # [B, T], the rows that were taken of a table
        self.tied: dict[nn.Parameter, Tied] = {}
        self._squared: dict[nn.Parameter, Tensor] = {}
        self._deferred: dict[nn.Parameter, list[Gradient]] = {}

    def count(self, parameter: nn.Parameter, kind: Kind, in_backward: bool) -> None:
        """Count a use of a parameter.

        Gradient checkpointing calls a layer again inside the backward pass. That is a use only if the first call was
        without gradients, as the reentrant kind makes it.
        """
        uses = self.kinds.setdefault(parameter, [])
        if in_backward:
            self.recomputed[parameter] = self.recomputed.get(parameter, 0) + 1
            if self.recomputed[parameter] <= len(uses):
                return
        uses.append(kind)

    @property
    def open(self) -> bool:
        """Whether it has uses, and no backward pass has come."""
        return bool(self.kinds) and not (self._squared or self._deferred)

    def add(self, parameter: nn.Parameter, squared: Tensor, name: str) -> None:
        """Record the squared norms ``[B]`` of a parameter."""
        if parameter in self._squared or parameter in self._deferred:
            raise UserError(f"per-example norms of {name}: a second backward pass through one forward pass")
        self._squared[parameter] = squared.detach().to(torch.promote_types(squared.dtype, torch.float32))

    def defer(self, parameter: nn.Parameter, gradient: Gradient, name: str) -> None:
        """Keep one of several shares of the gradients of a parameter until `settle`."""
        if parameter in self._squared:
            raise UserError(f"per-example norms of {name}: it is used again after its backward pass")
        self._deferred.setdefault(parameter, []).append(gradient)

    def settle(self) -> dict[nn.Parameter, Tensor]:
        """Return the squared norms ``[B]`` of each example's share of the gradient, by parameter."""
        for parameter, gradients in self._deferred.items():
            squared = []
            for example in range(self.examples):
                whole = gradients[0](example).double()
                for gradient in gradients[1:]:
                    whole = whole + gradient(example).double()
                squared.append(whole.square().sum())
            exact = torch.stack(squared).detach()
            self._squared[parameter] = exact if parameter.dtype == torch.float64 else exact.float()
        self._deferred.clear()
        for parameter, tied in self.tied.items():
            if parameter not in self._squared and tied.squared is not None:
                self._squared[parameter] = tied.squared  # the backward pass reached one of the two uses
        return self._squared


class Use:
    """One use of a parameter: how the backward pass of a layer reports the norms.

    Args:
        name: qualified name of the parameter, for messages.
    """

    def __init__(self, batch: MicroBatch, parameter: nn.Parameter, name: str) -> None:
        self.batch, self.parameter, self.name = batch, parameter, name
        self.examples = batch.examples

    @property
    def alone(self) -> bool:
        """Whether the forward pass uses the parameter once."""
        return len(self.batch.kinds[self.parameter]) == 1

    @property
    def tied(self) -> Tied | None:
        """What the two uses of a tied table share; None for any other parameter."""
        if sorted(self.batch.kinds[self.parameter]) != ["matrix", "table"]:
            return None
        return self.batch.tied.setdefault(self.parameter, Tied(self.batch.ids[self.parameter]))

    def by_example(self, x: Tensor) -> Tensor:
        """Return a layer's input or the gradient of its output as ``[B, rows, features]``.

        A matrix may also have a row for each token of the model's input, example after example.

        Raises:
            UserError: the leading dimension is not that of the examples.
        """
        if x.ndim == 2 and x.shape[0] == self.batch.rows:
            return x.reshape(self.examples, -1, x.shape[1])
        if x.ndim < 2 or x.shape[0] != self.examples:
            raise UserError(
                f"per-example norms of {self.name}: its layer sees a tensor of shape {tuple(x.shape)}, whose first "
                f"dimension must be the {self.examples} examples of the batch"
            )
        return x.reshape(self.examples, -1, x.shape[-1])

    def add(self, squared: Tensor) -> None:
        """Record the squared norms ``[B]``; for a parameter with no other use."""
        if not self.alone:
            raise UserError(f"per-example norms of {self.name}: it was used once when its norms were computed")
        self.batch.add(self.parameter, squared, self.name)

    def defer(self, gradient: Gradient) -> None:
        """Keep this use's share of the gradients; for a parameter with several uses."""
        self.batch.defer(self.parameter, gradient, self.name)

    def add_parts(self, parts: Tensor, magnitude: float = 0.0) -> Tensor:
        """Record the gradients ``[B, *shape]`` themselves, and return their sum; for ``magnitude`` see `expect`."""
        total = parts.sum(0)
        self.expect(digest(total), magnitude)
        if self.alone:
            self.add(wide(parts).square().flatten(1).sum(1))
        else:
            self.defer(lambda example: parts[example])
        return total

    def expect(self, found: Tensor, magnitude: float = 0.0) -> None:
        """Say what this use adds to the gradient of the parameter.

        Args:
            found: `digest` of it.
            magnitude: norm of the terms that it is a sum of, where they may cancel: it bounds the rounding.
        """
        before, size = self.batch.expected.get(self.parameter, (None, 0.0))
        self.batch.expected[self.parameter] = (found if before is None else before + found, size + magnitude)

    def add_rows(self, squared: Tensor, rows: Tensor) -> None:
        """Record a tied matrix's norms ``[B]`` and the rows ``[B, T, D]`` of its gradients at `Tied.ids`."""
        self._add_tied().matrix(squared, rows)
        self._finish_tied()

    def add_table(self, squared: Tensor, g: Tensor) -> None:
        """Record a tied embedding's norms ``[B]`` and the gradients ``[B, T, D]`` of its output."""
        self._add_tied().table(squared, g)
        self._finish_tied()

    def _add_tied(self) -> Tied:
        if (tied := self.tied) is None:
            raise UserError(f"per-example norms of {self.name}: it had two uses when its norms were computed")
        return tied

    def _finish_tied(self) -> None:
        tied = self._add_tied()
        if tied.squared is not None and tied.complete:
            self.batch.add(self.parameter, tied.squared, self.name)


class Tied:
    """The two uses of a table that is an embedding E and a matrix H (the head) at once.

    The squared norm of the sum of both gradients is ``|E_b|^2 + |H_b|^2 + 2 <E_b, H_b>``. E_b is the sum of the
    gradients g_t of the embedded tokens over rows id_t, so ``<E_b, H_b> = sum_t g_t . H_b[id_t]``: of H_b only those
    rows are kept.

    Args:
        ids: int64 ``[B, T]``, the embedded tokens.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.squared: Tensor | None = None
        self.complete = False
        self._table: Tensor | None = None  # [B, T, D]
        self._rows: Tensor | None = None  # [B, T, D]

    def table(self, squared: Tensor, g: Tensor) -> None:
        """Add the embedding's norms ``[B]`` and the gradients ``[B, T, D]`` of its output."""
        self._table = g
        self._add(squared)

    def matrix(self, squared: Tensor, rows: Tensor) -> None:
        """Add the matrix's norms ``[B]`` and the rows ``[B, T, D]`` of its gradients at `ids`."""
        self._rows = rows
        self._add(squared)

    def _add(self, squared: Tensor) -> None:
        self.squared = wide(squared) if self.squared is None else self.squared + squared
        if self._table is not None and self._rows is not None:
            crossed = (wide(self._table) * wide(self._rows)).sum((1, 2))
            # Rounding must not make a norm negative where both gradients cancel.
            self.squared = (self.squared + 2.0 * crossed).clamp_min(0.0)
            self.complete, self._table, self._rows = True, None, None


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 if it is: sums of squares need more than 16 bits."""
    return x if x.dtype == torch.float64 else x.float()
