"""Names of modules and parameters that do not depend on what is wrapped around a model, or around a part of it.

``torch.compile``, DDP, FSDP, activation checkpointing and running averages put a module around another one, and a part
of their own into every name below (``_orig_mod.``, ``module.``). Masks, initial values, roles and saved state are
functions of a name, so the names here leave those parts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import UserError

# By the name of the class, so that neither a compiler nor FSDP is imported: class -> the child that it wraps.
_BY_NAME = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}
# Called by `replace_module` with the name, the old module and the new one, before the one takes the other's place.
on_replacement: list[Callable[[str, nn.Module, nn.Module], None]] = []

_BY_TYPE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def wrapped_child(module: nn.Module) -> str | None:
    """Return the name of the child that ``module`` is a wrapper around, None if it is no known wrapper."""
    child = "module" if isinstance(module, _BY_TYPE) else _BY_NAME.get(type(module).__name__)
    return child if child is not None and child in module._modules else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers around it; wrappers of its parts stay."""
    while (child := wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` as ``model.named_modules()`` does, without wrappers and their parts of the names."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if remove_duplicate:
            if module in seen:
                return
            seen.add(module)
        yield name, module
        for child, inner in module._modules.items():
            if inner is not None:
                yield from walk(inner, f"{name}.{child}" if name else child)

    yield from walk(model, "")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` as ``model.named_parameters()`` does, each once, without wrappers' parts of names."""
    seen: set[nn.Parameter] = set()
    for prefix, module in named_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, parameter


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name, as `named_modules` gives names.

    Raises:
        AttributeError: there is none.
    """
    module = unwrap(model)
    for part in name.split(".") if name else ():
        module = unwrap(module.get_submodule(part))
    return module


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module called ``name``, which must not be the model itself.

    Raises:
        UserError: the module is wrapped on its own: the wrapper would go on calling the old one.
    """
    parent, _, child = name.rpartition(".")
    holder = find_module(model, parent)
    old = holder.get_submodule(child)
    if wrapped_child(old) is not None:
        kind = type(old).__name__
        raise UserError(f"{name}: it is wrapped ({kind}); change the bare module first, then compile or wrap it")
    for tell in on_replacement:
        tell(name, old, new)
    setattr(holder, child, new)
