"""A numerical test that blocks are pre-norm, which the depth multiplier requires.

The depth multiplier m_L^(-alpha) is derived for pre-norm blocks, x + branch(norm(x)). In a post-norm block,
norm(x + branch(x)), it has another effect, and before a norm at the end of a branch, x + norm(branch(x)), it has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.depth import Blocks
from sparsetrain.parameterization.roles import TORCH_LAYERS, is_norm
from sparsetrain.sparsity import SparseLinear

LARGE = 1e3
# Errors that a block may raise if it is called alone, without all inputs that its model would pass.
_CANNOT_CALL = (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError, AssertionError)


class _ReachedError(Exception):
    """Raised when the forward pass reaches the first block, to skip the rest."""


def check_pre_norm(model: nn.Module, blocks: Blocks, ends: Mapping[str, nn.Module]) -> None:
    """Raise `UserError` if a multiplier at the end of a branch would not act as in a pre-norm block.

    One block of each kind is called, with the inputs that its model passes to it (for Hugging Face models on their
    dummy inputs) or with a single hidden state. A block that needs more inputs is assumed to be pre-norm, and so is a
    block on ``meta``. Nothing is trained, and no value changes.

    Args:
        ends: the modules to be multiplied, by name; see `scales.branch_ends`.
    """
    modules = dict(wrappers.named_modules(model))
    for name, module in modules.items():
        inside = [end for end in ends if not name or f"{end}.".startswith(f"{name}.")]
        if inside and isinstance(module, TORCH_LAYERS) and not module.norm_first:
            raise _post_norm(inside[0], f"{type(module).__name__} with norm_first=False")
    # One block of each kind; a hybrid model, for example, has attention blocks and recurrent blocks.
    kinds = {(blocks.list_of(name), structure): name for name, structure in reversed([*blocks.structures.items()])}
    for name in kinds.values():
        block = modules[name]
        own = {end: module for end, module in ends.items() if f"{end}.".startswith(f"{name}.")}
        if not own:
            continue
        if any(parameter.is_meta for parameter in block.parameters()):
            continue
        with _quiet(model):
            call = _caller(model, block)
            if call is not None:
                _check_block(name, block, call, own)


def _check_block(name: str, block: nn.Module, call: Callable[[float], Tensor], ends: Mapping[str, nn.Module]) -> None:
    one, large = _size(call(1.0)), _size(call(LARGE))
    if large < 0.1 * LARGE and large < 0.1 * LARGE * one:
        raise _post_norm(next(iter(ends)), f"{type(block).__name__} normalises what it returns")
    for end, module in ends.items():
        without, once, often = (_with_factor(module, factor, call) for factor in (0.0, 1.0, 8.0))
        share = _size(once - without)
        if share > 0.0 and _size(often - once) < 0.5 * share:
            raise UserError(
                f"parameterize: '{end}' is normalised inside its branch ({type(block).__name__} '{name}'), where the "
                "depth multiplier m_L^(-alpha) would cancel: use rules without depth, or base_layers equal to n_layers"
            )


def _post_norm(end: str, why: str) -> UserError:
    return UserError(
        f"parameterize: the branch of '{end}' is normalised after the addition ({why}): the depth multiplier "
        "m_L^(-alpha) holds for pre-norm blocks; use rules without depth, or base_layers equal to n_layers"
    )


def _caller(model: nn.Module, block: nn.Module) -> Callable[[float], Tensor] | None:
    """Return a function of a factor that calls the block on its usual input, of RMS 1, times the factor."""
    args, kwargs = _inputs_of(model, block)
    if args and isinstance(args[0], Tensor):
        hidden, rest, named = args[0], args[1:], kwargs
    elif isinstance(kwargs.get("hidden_states"), Tensor):
        hidden, rest, named = kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        named["hidden_states"] = None
    else:
        vector = next((p for p in block.parameters() if p.is_floating_point()), None)
        width = _width(block)
        if vector is None or width is None:
            return None
        hidden, rest, named = torch.empty(2, 4, width).to(vector), (), {}
    draws = torch.Generator().manual_seed(0)
    unit = torch.empty(hidden.shape).normal_(generator=draws).to(hidden)

    def call(factor: float) -> Tensor:
        if "hidden_states" in named:
            return _first(block(*rest, **{**named, "hidden_states": unit * factor})).detach().double()
        return _first(block(unit * factor, *rest, **named)).detach().double()

    try:
        output = call(1.0)
    except _CANNOT_CALL:
        return None
    return call if output.shape == unit.shape else None


def _inputs_of(model: nn.Module, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that the model passes to its block on its dummy inputs; empty if it has no dummy inputs."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _ReachedError

    bare = wrappers.unwrap(model)
    inputs = getattr(bare, "dummy_inputs", None)
    if not isinstance(inputs, Mapping):
        return (), {}
    if any(wrappers.wrapped_child(module) is not None for module in bare.modules()):
        return (), {}  # a compiled module would be compiled for these inputs
    device = next(bare.parameters()).device
    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        bare(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()})
    except (_ReachedError, *_CANNOT_CALL):
        pass  # reached, or unreachable with these inputs
    finally:
        handle.remove()
    if not found:
        return (), {}
    args, kwargs = found[0]
    return tuple(_without_cache(value) for value in args), {key: _without_cache(of) for key, of in kwargs.items()}


def _without_cache(value: Any) -> Any:
    return None if "Cache" in type(value).__name__ else value  # a cache would grow with every call


def _width(block: nn.Module) -> int | None:
    """Return the width of the residual stream that a block reads: that of its first norm or linear layer."""
    for module in block.modules():
        if isinstance(module, nn.Linear | SparseLinear):
            return module.in_features
        parameter = next(iter(module.parameters(recurse=False)), None)
        if is_norm(module) and parameter is not None:
            return parameter.shape[-1]
    return None


def _with_factor(module: nn.Module, factor: float, call: Callable[[float], Tensor]) -> Tensor:
    def scale(_: nn.Module, inputs: Any, output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    handle = module.register_forward_hook(scale)
    try:
        return call(1.0)
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(output, Tensor):
        raise TypeError("a block that returns no tensor")
    return output


def _size(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and dropout, and restore modes and the global generator afterwards."""
    training = [module for module in model.modules() if module.training]
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of a model about its dummy inputs
            yield
    finally:
        torch.set_rng_state(state)
        for module in training:
            module.training = True
