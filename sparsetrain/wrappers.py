"""Names of modules and parameters that do not depend on wrappers around a model or its modules.

``torch.compile``, DDP, FSDP, activation checkpointing and running averages wrap a module and insert a component into
every name below it (``_orig_mod.``, ``module.``). Masks, initial values, roles and saved state are functions of a name,
so the names here leave these components out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import UserError

# Class name -> the child that it wraps; by name, so that neither a compiler nor FSDP must be imported.
_BY_NAME = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}
# `replace_module` calls these with the name, the old and the new module, before it replaces the old one.
on_replacement: list[Callable[[str, nn.Module, nn.Module], None]] = []

_BY_TYPE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def wrapped_child(module: nn.Module) -> str | None:
    """Return the name of the child that ``module`` wraps, or None if it is no known wrapper."""
    child = "module" if isinstance(module, _BY_TYPE) else _BY_NAME.get(type(module).__name__)
    return child if child is not None and child in module._modules else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers around it; wrappers around its modules stay."""
    while (child := wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` as ``model.named_modules()`` does, without wrappers and their name components."""
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
    """Yield ``(name, parameter)`` as ``model.named_parameters()`` does, each once, without components of wrappers."""
    seen: set[nn.Parameter] = set()
    for prefix, module in named_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, parameter


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module with a name as given by `named_modules`.

    Raises:
        AttributeError: there is no such module.
    """
    module = unwrap(model)
    for part in name.split(".") if name else ():
        module = unwrap(module.get_submodule(part))
    return module


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module called ``name``, which must not be the model itself, by ``new``.

    Raises:
        UserError: the module has its own wrapper, which would keep calling the old module.
    """
    parent, _, child = name.rpartition(".")
    holder = find_module(model, parent)
    old = holder.get_submodule(child)
    if wrapped_child(old) is not None:
        kind = type(old).__name__
        raise UserError(f"{name} is wrapped ({kind}); change the bare module first, then compile or wrap it")
    for tell in on_replacement:
        tell(name, old, new)
    setattr(holder, child, new)
