"""Running averages of a model whose masks may move while it is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.sparsity.evolution.topology import TopologyUpdate
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.surgery import sparse_layers
from sparsetrain.sparsity.patterns.pattern import SparsityPattern
from sparsetrain.wrappers import named_modules, named_parameters, unwrap


class AveragedModel(nn.Module):
    """The average of a model's matrices over its training, for evaluation: exponential (EMA) or equal (SWA).

    ``torch.optim.swa_utils.AveragedModel`` averages the k-th value of each layer with its k-th value of another time,
    which stands at another position once a mask has moved. Here each sparse layer of the average has the union of the
    masks that it has seen, so that it holds the average of the matrices, with zeros where a weight did not exist. While
    masks stay it costs what the model costs; under masks that move it becomes denser, at most dense.

    ::

        average = AveragedModel(model, decay=0.999)
        optimizer.step(); manager.step(optimizer); average.update_parameters(model)
        average(x)

    Args:
        model: copied without what is wrapped around it; an average of its present weights counts them as the first.
        decay: weight of the past in each update, in [0, 1); None weighs all updates alike.

    Raises:
        UserError: a decay outside [0, 1).
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float | None = None) -> None:
        super().__init__()
        if decay is not None and not 0.0 <= decay < 1.0:
            raise UserError(f"AveragedModel: decay={decay} must lie in [0, 1), or be None for an equal average")
        self.decay = decay
        self.module = copy.deepcopy(unwrap(model)).requires_grad_(False)
        for _, layer in sparse_layers(self.module):
            layer.forget_origin()
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.int64))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for _, layer in sparse_layers(self.module):
            layer.forget_origin()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Add the present weights of ``model`` to the average; buffers are copied.

        The first update replaces the weights that the average was built with.

        Raises:
            UserError: a model with other parameters, or other sizes of them.
        """
        count = int(self.n_averaged)
        # The share of the new weights: 1 at the first update, then 1 - decay, or 1 / (n + 1).
        share = 1.0 if count == 0 else 1.0 / (count + 1) if self.decay is None else 1.0 - self.decay
        sources = {name: module for name, module in named_modules(model) if isinstance(module, SparseLinear)}
        given, mine = dict(named_parameters(model)), dict(named_parameters(self.module))
        if given.keys() != mine.keys():
            name = sorted(given.keys() ^ mine.keys())[0]
            raise UserError(f"AveragedModel: parameter '{name}' is in the average or in the model, but not in both")
        for name, average in mine.items():
            layer, _, leaf = name.rpartition(".")
            new: Tensor = given[name]
            if leaf == "values" and layer in sources:
                new = self._at_union(layer, sources[layer])
                average = mine[name]  # the same object, of another size
            if average.shape != new.shape:
                raise UserError(
                    f"AveragedModel: '{name}' has shape {tuple(new.shape)} in the model and {tuple(average.shape)} in "
                    "the average"
                )
            if share == 1.0:
                average.copy_(new)
            elif average.is_floating_point() or average.is_complex():
                average.lerp_(new.to(average), share)
        own = dict(self.module.named_buffers())
        indices = {f"{name}.{leaf}" for name in sources for leaf in ("row_ptr", "col")}
        for name, buffer in unwrap(model).named_buffers():
            if name in own and name not in indices and own[name].shape == buffer.shape:
                own[name].copy_(buffer)
        self.n_averaged += 1

    def _at_union(self, name: str, source: SparseLinear) -> Tensor:
        """Add the positions of ``source`` to a layer of the average; return the values of ``source`` there."""
        layer = self.module.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        now, new = layer.pattern, source.pattern.to(layer.pattern.device)
        if now.equals(new):
            return source.values.detach()
        union: SparsityPattern = now.union(new)
        if union.nnz > now.nnz:
            layer.move_topology(union, TopologyUpdate.between(now, union).carry)
        return TopologyUpdate.between(new, union).carry(source.values.to(union.device))
