"""A linear layer whose weight matrix is stored as the values of its nonzeros."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.gradients.record import Use
from sparsetrain.sparsity.backends.base import check_backend
from sparsetrain.sparsity.backends.layouts import layout_id
from sparsetrain.sparsity.layers.dense_gradient import DenseGradientRequest
from sparsetrain.sparsity.layers.dense_matrix import block_of, dense_matrix, from_dense
from sparsetrain.sparsity.layers.ops import sparse_linear
from sparsetrain.sparsity.patterns.draw import random_pattern
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


class _Moves:
    """How many times the masks of a layer have moved; copies of the layer share the counter."""

    def __init__(self) -> None:
        self.count = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Moves:
        return self


class SparseLinear(nn.Module):
    """``y = x @ W.T + b`` with W stored as ``values`` ``[nnz]`` over a `SparsityPattern`.

    ``values`` is the only weight parameter, so gradients, optimizer moments, clipping and checkpoints cost nnz. The
    buffers ``row_ptr`` (int64) and ``col`` (int32) own the topology, travel in the ``state_dict`` and are adopted by
    ``load_state_dict``, which resizes ``values``; the Parameter object itself survives every change of topology.

    ``values`` has one dimension, so code that decays only parameters with ``ndim >= 2`` gives it no weight decay. Group
    parameters by role instead (`sparsetrain.param_groups`), or by name.

    Args:
        in_features, out_features: K and M of the dense matrix ``[M, K]``.
        density: fraction of nonzeros in (0, 1], drawn at random with an exact count. Give either density or pattern.
        pattern: the positions, of shape ``(out_features, in_features)``.
        bias: whether to add a bias ``[M]``.
        backend: ``auto`` or a registered backend; can be assigned later.
        seed: of the mask and the initial values; None draws both from torch's global generator.
        strict_topology: make ``load_state_dict`` refuse a topology other than the layer's own.

    Raises:
        UserError: neither or both of density and pattern, a pattern of another shape, density outside (0, 1], or a
            layer without any weight.
    """

    row_ptr: Tensor
    col: Tensor
    _label = ""
    _copied = False
    _evolves = False  # whether a manager moves the masks
    from_conv1d = False  # whether the dense layer that this one replaced stores its weight ``[K, M]``
    _request: DenseGradientRequest[Any] | None = None
    # The product of few tokens, while `prepared` says that the weights do not change.
    prepared: Any = None
    _origin: tuple[_Moves, int, int] | None = None  # of a copy: moves of the original, and versions at that time

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float | None = None,
        pattern: SparsityPattern | None = None,
        bias: bool = True,
        backend: str = "auto",
        seed: int | None = None,
        strict_topology: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (density is None) == (pattern is None):
            raise UserError("SparseLinear: give exactly one of density and pattern")
        self.in_features, self.out_features = in_features, out_features
        self.strict_topology = strict_topology
        self.backend = backend
        self._moves = _Moves()
        seed = seeds.resolve_seed(seed)
        device = torch.device(device or torch.get_default_device())
        if device.type == "meta":
            raise UserError("SparseLinear cannot be built on the meta device: its positions are data, not only a shape")
        if pattern is None:
            assert density is not None
            shape = (out_features, in_features)
            pattern = random_pattern(shape, density, seeds.generator(seed, "mask"))
        if pattern.shape != (out_features, in_features):
            raise UserError(f"pattern has shape {pattern.shape}; the layer needs ({out_features}, {in_features})")
        if pattern.nnz == 0:
            raise UserError(f"SparseLinear({in_features}, {out_features}) would have no weight at all")
        if pattern.empty_rows:
            warnings.warn(
                f"{pattern.empty_rows} of {out_features} outputs of a SparseLinear({in_features}, {out_features}) "
                "have no weight: they are constant",
                stacklevel=2,
            )
        # The layer gets a pattern of its own: safetensors refuses to save buffers that share memory.
        pattern = SparsityPattern(pattern.shape, pattern.row_ptr.to(device), pattern.col.to(device), pattern.block)
        self.register_buffer("row_ptr", pattern.row_ptr)
        self.register_buffer("col", pattern.col)
        self._replace_pattern(pattern)
        factory: dict[str, Any] = {"device": pattern.device, "dtype": dtype or torch.get_default_dtype()}
        self.values = nn.Parameter(torch.empty(pattern.nnz, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw values and bias uniformly as ``nn.Linear`` does, with ``density * K`` as fan_in."""
        draws = seeds.generator(seeds.resolve_seed(seed), "init")
        bound = 1.0 / math.sqrt(max(1.0, self.pattern.density * self.in_features))
        with torch.no_grad():
            for tensor in (self.values, self.bias):
                if tensor is not None:
                    noise = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
                    tensor.copy_(noise.uniform_(-bound, bound, generator=draws))

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_backend(name)
        self._backend = name

    @property
    def pattern(self) -> SparsityPattern:
        """The topology as a `SparsityPattern`: a cached view of the buffers, which notices writes into them.

        Raises:
            UserError: the buffers hold no valid indices; the message names the layer.
        """
        pattern = self._current()
        if torch.compiler.is_compiling() or pattern.untouched:  # a compiled product checks when it runs
            return pattern
        pattern.refresh()
        return pattern

    def _current(self) -> SparsityPattern:
        """Return the view of the tensors that are the buffers now, without a check of their content."""
        pattern, buffers = self._pattern, self._buffers  # attributes of modules are slow to look up
        if pattern.row_ptr is buffers["row_ptr"] and pattern.col is buffers["col"]:
            return pattern
        # The buffers were replaced, by a device move or a load.
        sizes = self.row_ptr.shape == pattern.row_ptr.shape and self.col.shape == pattern.col.shape
        try:
            # While FSDP holds the values in shards, their number does not tell the block.
            block = pattern.block if sizes else block_of(self.row_ptr, self.col, self.values.numel(), *self._shape)
            self._replace_pattern(SparsityPattern.over(self._shape, self.row_ptr, self.col, block))
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from None
        return self._pattern

    @property
    def label(self) -> str:
        """The name of the layer in messages: its name in the model, or its sizes if it is in none."""
        return self._label or f"SparseLinear({self.in_features}, {self.out_features})"

    @label.setter
    def label(self, name: str) -> None:
        self._label = name
        self._mark(self._pattern)

    def _mark(self, pattern: SparsityPattern) -> None:
        pattern.__dict__.update(owner=self.label, copied=self._copied, request=self._request)

    def request_dense_gradient(self, request: DenseGradientRequest[Any] | None) -> None:
        """Give the dense gradients of the following backward passes to ``request``; None ends it."""
        self._request = request
        self._mark(self._pattern)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def set_topology(self, pattern: SparsityPattern, values: Tensor) -> None:
        """Replace positions and values; the Parameter object stays, its gradient is dropped.

        Raises:
            UserError: a pattern of another shape, without weights, or values that do not fit it.
        """
        if pattern.shape != (self.out_features, self.in_features):
            raise UserError(
                f"pattern has shape {pattern.shape}; the layer needs ({self.out_features}, {self.in_features})"
            )
        if pattern.nnz == 0 or values.shape != (pattern.nnz,):
            raise UserError(
                f"values have shape {tuple(values.shape)}; the pattern has {pattern.nnz} nonzeros (at least 1 needed)"
            )
        # A copy, as at construction.
        device = self.values.device
        row_ptr, col = pattern.row_ptr.to(device), pattern.col.to(device)
        self._replace_pattern(SparsityPattern(pattern.shape, row_ptr, col, pattern.block))
        self.values.grad = None
        self._replace_values(values.detach().to(self.values, copy=True))

    def move_topology(self, pattern: SparsityPattern, carry: Callable[[Tensor], Tensor]) -> None:
        """Replace positions and let values and their gradient, if there is one, follow; the Parameter object stays.

        Args:
            pattern: of the layer's shape, on its device. carry: from ``[old nnz]`` to a new tensor ``[nnz]``.
        """
        # One tensor after the other, so that each old one is freed before the next new one is made.
        self._moves.count += 1
        self._replace_pattern(pattern)
        gradient, self.values.grad = self.values.grad, None
        self._replace_values(carry(self.values))
        if gradient is not None:
            self.values.grad = carry(gradient)

    def _replace_pattern(self, pattern: SparsityPattern) -> None:
        # The view and the buffers are the same tensors.
        self._pattern, self.row_ptr, self.col = pattern, pattern.row_ptr, pattern.col
        self._mark(pattern)
        layout_id(pattern)  # registered here, because a compiler that traces the forward pass cannot register it

    def _replace_values(self, new: Tensor) -> None:
        if new.shape != self.values.shape:
            # A graph that is still alive, such as that of the last step's loss, holds a gradient accumulator of the old
            # size, which autograd would reuse. After a change of dtype autograd makes a new accumulator.
            other = torch.float64 if new.dtype != torch.float64 else torch.float32
            self.values.data = torch.empty(0, dtype=other, device=new.device)
        self.values.data = new

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: SparsityPattern, backend: str = "auto") -> SparseLinear:
        """Return a sparse layer with the weights that ``linear`` has at the positions of ``pattern``."""
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            pattern=pattern,
            bias=linear.bias is not None,
            backend=backend,
            seed=0,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            layer.values.copy_(layer.pattern.gather(weight))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.values.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return a dense layer with the same function; it is exactly zero where the mask was, and all of it trains."""
        linear = skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def dense_weight(self) -> Tensor:
        """Return the dense ``[out_features, in_features]`` matrix, differentiable in ``values``."""
        return dense_matrix(self.values, self.pattern)

    @property
    def weight(self) -> Tensor:
        """The dense matrix, read-only, for code that looks for a ``weight``; writing to it changes nothing."""
        return self.dense_weight()

    def forward(self, x: Tensor, use: Use | None = None) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``; for ``use`` see `sparse_linear`."""
        if self.prepared is not None and use is None and (y := self.prepared(x)) is not None:
            return y
        if self._origin is not None and not torch.compiler.is_compiling():
            self._compare_with_origin()
        return sparse_linear(x, self.values, self._current(), self.bias, self.backend, use)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # From now on the layer computes with what is saved here, even if torch recorded no write. Nothing is refused,
        # because a damaged layer is repaired through the tensors of its state.
        self._current().doubt()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        # A request for this layer's gradient is no request for a copy's, nor is the copy's product prepared.
        return {key: value for key, value in self.__dict__.items() if key not in ("_request", "prepared")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # An average of copies can go wrong only if the masks of the original move.
        self._copied, self._moves = state.get("_evolves", False), _Moves()
        if self._copied:
            self._origin = state["_moves"], state["_moves"].count, self.values._version
        self._mark(self._pattern)

    def forget_origin(self, evolves: bool = False) -> None:
        """Stop comparing the layer with the one that it was copied from.

        Args:
            evolves: whether its own masks move from now on.
        """
        self._origin, self._copied, self._evolves = None, False, evolves
        self._mark(self._pattern)

    def _compare_with_origin(self) -> None:
        """Warn if the weights of a copy were written to after the masks of the original had moved."""
        assert self._origin is not None
        if self._pattern.trained:
            self.forget_origin()
            return
        self._current().refresh()  # refuses masks that were modified in place
        moves, count, version = self._origin
        if moves.count != count and self.values._version != version:
            self._origin = None
            warnings.warn(
                f"{self.label}: the masks of the layer that this one was copied from have moved since, and its weights "
                "were written to: if they are averages, they average weights of different positions "
                "(sparsetrain.AveragedModel averages matrices)",
                stacklevel=3,
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parts = ("row_ptr", "col", "values")
        found = {key: state_dict[prefix + key] for key in parts if prefix + key in state_dict}
        try:
            if found:
                self._adopt(found)
            elif f"{prefix}weight" in state_dict:  # of the dense layer
                state_dict = {**state_dict, f"{prefix}row_ptr": self.row_ptr, f"{prefix}col": self.col}
                weight = state_dict.pop(f"{prefix}weight")
                state_dict[f"{prefix}values"] = from_dense(weight.t() if self.from_conv1d else weight, self.pattern)
        except UserError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'SparseLinear'}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._origin is not None:  # the loaded positions and weights belong together
            self._origin = self._origin[0], self._origin[0].count, self.values._version

    def _adopt(self, found: dict[str, Tensor]) -> None:
        if len(found) < 3:
            # Values over the indices of another topology would be another matrix.
            raise UserError(f"the state has {', '.join(found)}; row_ptr, col and values belong together")
        row_ptr, col, values = found["row_ptr"], found["col"], found["values"]
        if values.ndim != 1:
            raise UserError(f"values have shape {tuple(values.shape)}; one dimension is needed")
        block = block_of(row_ptr, col, values.numel(), *self._shape)
        pattern = SparsityPattern((self.out_features, self.in_features), row_ptr, col, block)
        # The comparison is with the buffers, because after `to_empty` there is no valid view.
        same = values.shape == self.values.shape and all(
            torch.equal(new.cpu(), old.cpu()) for new, old in ((pattern.row_ptr, self.row_ptr), (pattern.col, self.col))
        )
        if same:
            # A distributed checkpoint reads into the layer's own tensors, so the buffers may already be the new ones.
            self._current().refresh(accept=True)
            return
        if self.strict_topology:
            raise UserError(
                f"the stored topology ({pattern.nnz} nonzeros) differs from the layer's ({self.values.numel()}) "
                "and strict_topology is set"
            )
        self.set_topology(pattern, values)

    def extra_repr(self) -> str:
        nnz = self._pattern.nnz  # of the checked indices, so that a damaged layer can be shown
        density = nnz / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, density={density:.4g}, nnz={nnz}, "
            f"bias={self.bias is not None}, backend={self.backend!r}"
        )
