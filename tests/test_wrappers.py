"""Names do not depend on wrappers; the oracle is torch's own naming of the bare model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import UserError
from sparsetrain.wrappers import find_module, named_modules, named_parameters, replace_module, unwrap


def net() -> nn.Module:
    shared = nn.Linear(2, 2)
    return nn.ModuleDict({"module": nn.Sequential(nn.Linear(2, 2), shared), "twice": shared, "norm": nn.LayerNorm(2)})


def wrap_inside(model: nn.Module) -> nn.Module:
    model["module"] = checkpoint_wrapper(torch.compile(model["module"], backend="eager"))  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: AveragedModel(model),
        wrap_inside,
    ],
    ids=["bare", "compiled", "parallel and compiled", "averaged", "parts"],
)
def test_names_are_those_of_the_bare_model(wrap) -> None:  # type: ignore[no-untyped-def]
    """A child called "module" keeps its name; only components of wrappers are left out."""
    bare, wrapped = net(), wrap(net())
    for duplicates in (False, True):
        right = [name for name, _ in bare.named_modules(remove_duplicate=not duplicates)]
        assert [name for name, _ in named_modules(wrapped, remove_duplicate=not duplicates)] == right
    assert [name for name, _ in named_parameters(wrapped)] == [name for name, _ in bare.named_parameters()]
    assert dict(named_modules(wrapped))["module.1"] is find_module(wrapped, "module.1")
    assert type(unwrap(wrapped)) is nn.ModuleDict


def test_a_part_is_replaced_where_it_stands_unless_it_is_wrapped_itself() -> None:
    """A wrapper of the replaced module itself would keep the old module; a wrapper further out does not."""
    wrapped, new = torch.compile(net(), backend="eager"), nn.Identity()
    replace_module(wrapped, "module.0", new)
    assert unwrap(wrapped).get_submodule("module.0") is new
    with pytest.raises(UserError, match=r"module.*wrapped"):
        replace_module(wrap_inside(net()), "module", new)
