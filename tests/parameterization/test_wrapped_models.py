"""A wrapper around a model or its blocks changes no initial value, role or group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import RULES, VOCAB, gpt2
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import Parameterization, assignment, decay_groups, param_groups, parameterize
from sparsetrain.sparsity import sparsify
from sparsetrain.wrappers import unwrap

P = Parameterization


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_blocks(model: Any) -> nn.Module:
    layers = model.transformer.h
    for index, block in enumerate(layers):
        layers[index] = compiled(block)
    return model


def checkpointed_blocks(model: Any) -> nn.Module:
    layers = model.transformer.h
    for index, block in enumerate(layers):
        layers[index] = checkpoint_wrapper(block)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": checkpointed_blocks,
    "DataParallel": nn.DataParallel,
}


def settings(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(*(value for key, value in group.items() if key != "params"), len(group["params"])) for group in groups]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_gets_the_numbers_and_groups_of_the_bare_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    bare = parameterize(sparsify(gpt2(), 0.5, seed=0), RULES, gpt2(16), seed=0)
    inner = sparsify(gpt2(), 0.5, seed=0)
    wrapped = wrap(inner)
    assert parameterize(wrapped, RULES, gpt2(16), seed=0) is wrapped
    assert assignment(wrapped).traits_of == assignment(bare).traits_of
    assert assignment(unwrap(wrapped)) is assignment(wrapped)
    for one, other in zip(wrapped.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)
    for groups in (lambda model: param_groups(model, RULES, lr=0.1), lambda model: decay_groups(model, 0.1)):
        assert settings(groups(wrapped)) == settings(groups(bare))
    if wrap in (compiled, compiled_blocks):
        return  # hooks under a compiler are tested below, on a model that compiles fast
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(wrapped.eval()(tokens).logits, bare.eval()(tokens).logits)


def test_a_compiled_model_has_the_multipliers() -> None:
    """Hooks are traced together with their module."""
    rules = P.mup(16, alpha_in=2.0)

    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(5, width), nn.Linear(width, 5))

    roles = {"1": "head"}
    bare = parameterize(make(32), rules, make(16), roles=roles, seed=0)
    wrapped = parameterize(compiled(make(32)), rules, make(16), roles=roles, seed=0)
    torch.testing.assert_close(wrapped(torch.arange(5)), bare(torch.arange(5)))


def test_a_base_may_be_wrapped_or_not_and_a_depth_rule_sees_through() -> None:
    model = parameterize(compiled_blocks(gpt2()), RULES, compiled(gpt2(16)), seed=0)
    assert assignment(model).depth == 2
    parameterize(gpt2(), RULES, compiled_blocks(gpt2(16)), seed=0)


def test_a_model_wrapped_after_it_was_parameterized_has_its_groups() -> None:
    model = parameterize(gpt2(), RULES, gpt2(16), seed=0)
    expected = settings(param_groups(model, RULES, lr=0.1))
    for wrapped in (compiled(model), AveragedModel(model), nn.DataParallel(model)):
        assert settings(param_groups(wrapped, RULES, lr=0.1)) == expected


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_training_has_the_groups_of_the_bare_model(tmp_path: Path) -> None:
    with one_process(tmp_path):
        model, bare = gpt2(), parameterize(gpt2(), RULES, gpt2(16), seed=0)
        wrapped = nn.parallel.DistributedDataParallel(model)
        parameterize(wrapped, RULES, gpt2(16), seed=0)
        assert settings(param_groups(wrapped, RULES, lr=0.1)) == settings(param_groups(bare, RULES, lr=0.1))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))
        assert settings(decay_groups(wrapped, 0.1)) == settings(decay_groups(bare, 0.1))


def test_our_own_model_may_be_wrapped_as_a_whole_and_in_parts() -> None:
    rules = P.mup(16)
    config = ModelConfig(32, 2, 2, VOCAB, seed=0, sparsity=0.5)
    bare, whole, parts = (Transformer(config, P.sp()) for _ in range(3))
    for index, block in enumerate(parts.blocks):
        parts.blocks[index] = compiled(block)
    expected = parameterize(bare, rules, seed=1)
    for model in (compiled(whole), parts):
        parameterize(model, rules, seed=1)
        assert settings(param_groups(model, rules, lr=0.1)) == settings(param_groups(expected, rules, lr=0.1))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        assert {block.attn.scale for block in map(unwrap, model.blocks)} == {1 / 16}  # type: ignore[arg-type,union-attr]


def test_a_model_that_was_never_parameterized_says_so_through_a_wrapper() -> None:
    with pytest.raises(UserError, match=r"have no roles yet: call parameterize\(model, rules, base\) first"):
        param_groups(compiled(gpt2()), RULES, lr=0.1)
