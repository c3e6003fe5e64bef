"""Give every parameter of a model its initial values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparsetrain import seeds, wrappers
from sparsetrain.parameterization.groups import assign
from sparsetrain.parameterization.norms import is_norm_of_torch, starting_gain
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, IN_PROJECTIONS
from sparsetrain.parameterization.rules import Parameterization, Role, TensorSpec
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.surgery import is_conv1d


def initialise(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    rules: Parameterization,
    sigma: float,
    n_layers: int,
    seed: int,
) -> None:
    """Fill every parameter from its rule and a seed of its own, and record the assignment for `param_groups`.

    Matrices are normal with the standard deviation of the rules, norms have the gain that their author gave them,
    biases are zero, and what has the role ``keep`` stays as it is. The row of an embedding that stands for padding is
    zero. A sparse layer takes the numbers that the dense matrix of the same name would get, at its positions, so that
    models which differ in density alone are compared on common random numbers.

    Args:
        model: parameters on any device; on ``meta`` nothing is drawn. A wrapper changes no number.
        specs: one per parameter name, as ``named_parameters`` of the bare model gives them.
        sigma: the base standard deviation.
        n_layers: number of transformer blocks.
        seed: of all draws; see `sparsetrain.seeds`.

    Raises:
        UserError: a parameter without a spec, or a trained norm whose first gain cannot be told.
    """
    owners = dict(wrappers.named_modules(model))
    padding = _padding_rows(owners)
    with torch.no_grad():
        # First what may be refused, so that the model is then unchanged.
        gains = {
            name: starting_gain(name, owners[name.rpartition(".")[0]], parameter)
            for name, parameter in wrappers.named_parameters(model)
            if name in specs and specs[name].role in (Role.NORM, Role.FINAL_NORM) and not parameter.is_meta
        }
        assign(model, specs, rules, n_layers)
        if _holds_no_values(model, gains):
            gains = dict.fromkeys(gains, 1.0)
        for name, parameter in wrappers.named_parameters(model):
            spec = specs[name]
            if parameter.is_meta or spec.role is Role.KEEP:
                continue
            if name in gains:
                gain = gains[name]
                if gain is not None:
                    parameter.fill_(gain)
                continue
            if spec.role in (Role.BIAS, Role.FINAL_BIAS):
                parameter.zero_()
                continue
            _draw(parameter, owners, name, rules.init_std(spec, sigma, n_layers), seed)
            for row in padding.get(id(parameter), ()):
                parameter[row] = 0.0


def _draw(parameter: nn.Parameter, owners: Mapping[str, nn.Module], name: str, std: float, seed: int) -> None:
    module_name, _, leaf = name.rpartition(".")
    owner = owners[module_name]
    # A Conv1D holds the transposed matrix; drawn as [M, K] too, so that its sparse successor gets its numbers.
    transposed = is_conv1d(owner) and parameter.ndim == 2
    sparse = isinstance(owner, SparseLinear) and leaf == "values"
    key = name.removesuffix(leaf) + "weight" if sparse else name
    shape: tuple[int, ...] = tuple(parameter.shape[::-1] if transposed else parameter.shape)
    if isinstance(owner, SparseLinear) and sparse:
        shape = owner.pattern.shape
    rows = slice(None)
    attention = owners.get(module_name.rpartition(".")[0])
    projection = module_name.rpartition(".")[2]
    if isinstance(attention, nn.MultiheadAttention) and projection in IN_PROJECTIONS:
        # Its dense form holds the three projections in one matrix, or each under a name of its own.
        holder = module_name.rpartition(".")[0]
        key = f"{holder}.{projection}_weight"
        if attention._qkv_same_embed_dim:
            first = IN_PROJECTIONS.index(projection) * shape[0]
            key, rows, shape = f"{holder}.in_proj_weight", slice(first, first + shape[0]), (3 * shape[0], shape[1])
    # On the CPU and in float32, so that neither torch's default device nor its default dtype changes a number.
    draws = torch.empty(shape, dtype=torch.float32, device="cpu")
    draws = draws.normal_(0.0, 1.0, generator=seeds.generator(seed, "init", key))[rows].mul_(std)
    if isinstance(owner, SparseLinear) and sparse:
        draws = owner.pattern.gather(draws.to(parameter.device))
    parameter.copy_(draws.t() if transposed else draws)


def _holds_no_values(model: nn.Module, gains: Mapping[str, float | None]) -> bool:
    """Whether every norm is torch's own and has the gain 0: memory from ``to_empty``, which no author has filled."""
    return bool(gains) and all(
        is_norm_of_torch(wrappers.find_module(model, name.rpartition(".")[0])) and not parameter.detach().any()
        for name, parameter in wrappers.named_parameters(model)
        if name in gains
    )


def _padding_rows(modules: Mapping[str, nn.Module]) -> dict[int, list[int]]:
    """Return the rows of each parameter, by its id, that stand for padding in one of the embeddings that share it."""
    rows: dict[int, list[int]] = {}
    for module in modules.values():
        if isinstance(module, EMBEDDING_TYPES) and module.padding_idx is not None:
            rows.setdefault(id(module.weight), []).append(module.padding_idx)
    return rows
