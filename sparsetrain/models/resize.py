"""Another number of tokens for a model: new matrices in the same parameters, and the optimizer's state for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.errors import UserError
from sparsetrain.models.transformer import Transformer
from sparsetrain.sparsity.evolution.optimizers import holder


def vocabulary_matrices(model: Transformer) -> dict[str, nn.Parameter]:
    """Return the matrices with a row per token, by name: the embedding and, unless it is tied, the head.

    Raises:
        UserError: they are no parameters, as in a quantized model.
    """
    embedding, head = (getattr(layer, "weight", None) for layer in (model.embed, model.head))
    if not isinstance(embedding, nn.Parameter) or not isinstance(head, nn.Parameter):
        raise UserError("the model has no embedding or head of parameters; a quantized model cannot get other tokens")
    matrices: dict[str, nn.Parameter] = {"embed.weight": embedding}
    if head is not embedding:
        matrices["head.weight"] = head
    return matrices


def moved_rows(tensor: Tensor, source: Tensor) -> Tensor:
    """Return ``[len(source), ...]``: row ``source[i]`` of ``tensor`` at i, and zeros where ``source`` is -1."""
    rows = tensor.new_zeros(len(source), *tensor.shape[1:])
    here = (source >= 0).to(tensor.device)
    rows[here] = tensor[source.to(tensor.device)[here]]
    return rows


def resize(
    model: Transformer, matrices: Mapping[str, Tensor], source: Tensor, optimizers: Sequence[Optimizer] = ()
) -> None:
    """Give a model other matrices for its tokens, and its optimizers the state for them.

    The parameters stay the same objects, so the groups of the optimizers stay valid, and a tied head stays tied. Their
    gradients are dropped. Moments follow the rows; those of new rows are 0.

    Args:
        model: changed in place.
        matrices: the new ``[rows, D]`` of each of `vocabulary_matrices`, in its dtype and on its device.
        source: int64 ``[rows]``, the old row of each new row, or -1.
        optimizers: the optimizers that hold the matrices; none may be given for a model that is not being trained.

    Raises:
        UserError: no optimizer holds a trainable matrix, or the state of one is not a number per weight. Nothing is
            changed then.
    """
    parameters = vocabulary_matrices(model)
    states = [_moved_state(optimizers, name, parameters[name], source) for name in parameters] if optimizers else []
    for name, parameter in parameters.items():
        parameter.grad = None
        parameter.data = matrices[name]
    for state, moved in states:
        state.update(moved)
    model.config = dataclasses.replace(model.config, vocab_size=len(source))
    model.embed.num_embeddings = model.head.out_features = len(source)


def _moved_state(
    optimizers: Sequence[Optimizer], name: str, parameter: nn.Parameter, source: Tensor
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the state of a parameter, and its entries with the rows moved."""
    optimizer = holder(optimizers, parameter)
    if optimizer is None:
        if parameter.requires_grad:
            raise UserError(f"optimizer: it does not hold {name}; give the optimizer that trains this model")
        return {}, {}
    state: dict[str, object] = optimizer.state.get(parameter, {})
    moved: dict[str, object] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if value.shape != parameter.shape:
            raise UserError(
                f"optimizer: {type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {name} "
                f"{tuple(parameter.shape)}, which cannot follow its rows; use an optimizer with a number per weight, "
                "such as AdamW, or make a new one afterwards"
            )
        with torch.no_grad():
            moved[key] = moved_rows(value, source)
    return state, moved
