"""Surgery on models inside wrappers: the same names and masks as without, or a refusal that says what to do first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SET, MaskManager, SparseLinear, densify, sparse_layers, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning")


class Model(nn.Module):
    """Two blocks, one of which can have a wrapper of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def inner_checkpoint(model: Any) -> Any:
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


def inner_compiled(model: Any) -> Any:
    model.blocks[1] = compiled(model.blocks[1])
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "compiled in place": lambda model: (model.compile(backend="eager"), model)[1],
    "data parallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "averaged": AveragedModel,
    "a checkpointed block": inner_checkpoint,
    "a compiled block": inner_compiled,
    "both": lambda model: compiled(nn.DataParallel(inner_checkpoint(model))),
}


def thin(model: nn.Module) -> None:
    sparsify(model, 0.6, seed=0)


def manage(model: nn.Module) -> None:
    MaskManager(model, SET(sparsity=0.6), seed=0)


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.pattern.mask() for name, layer in sparse_layers(model)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler asks
@pytest.mark.parametrize(("wrapper", "act"), [*((wrapper, thin) for wrapper in WRAPPERS), ("both", manage)])
def test_names_masks_and_function_do_not_depend_on_a_wrapper(wrapper: str, act: Callable[[nn.Module], Any]) -> None:
    """The wrapper ran before the change; afterwards it computes, and differentiates, with the new layers."""
    x = torch.randn(3, 16)
    bare = Model()
    act(bare)
    model = WRAPPERS[wrapper](Model())
    before = model(x)
    act(model)
    expected = masks(bare)
    assert list(masks(model)) == list(expected)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model).items())
    torch.testing.assert_close(model(x), bare(x))
    assert not torch.allclose(model(x), before)
    model(x).square().sum().backward()
    assert all(layer.values.grad is not None for _, layer in sparse_layers(model))
    densify(model)
    assert not list(sparse_layers(model))
    torch.testing.assert_close(model(x), bare(x))


def test_globs_and_given_masks_speak_of_names_without_wrappers() -> None:
    """A file of masks from a bare model fits the wrapped one."""
    bare = sparsify(Model(), 0.6, include=["blocks.0.*"], seed=0)
    model = sparsify(compiled(inner_compiled(Model())), masks=masks(bare))
    assert list(masks(model)) == ["blocks.0.0", "blocks.0.2"]
    assert len(masks(sparsify(compiled(Model()), 0.6, exclude=["blocks.1.2"], seed=0))) == 3


def test_a_manager_of_a_compiled_model_is_continued_by_that_of_the_bare_one() -> None:
    """Saved under a compiler and loaded without it: the layers have the same names."""
    one, bare = compiled(Model()), Model()
    saved, manager = MaskManager(one, SET(sparsity=0.6), seed=0), MaskManager(bare, SET(sparsity=0.6), seed=0)
    manager.load_state(*saved.state())
    assert list(saved.layers) == list(manager.layers) == [f"blocks.{i}.{j}" for i in range(2) for j in (0, 2)]


def test_a_layer_with_a_wrapper_of_its_own_is_refused_and_nothing_is_changed() -> None:
    """The wrapper would go on calling the old layer."""
    for wrap in (compiled, checkpoint_wrapper):
        model = Model()
        model.blocks[1][2] = wrap(model.blocks[1][2])
        with pytest.raises(UserError, match=r"blocks\.1\.2: it is wrapped"):
            sparsify(model, 0.6, seed=0)
        assert not masks(model)
        sparse = sparsify(Model(), 0.6, seed=0)
        sparse.blocks[1][2] = wrap(sparse.blocks[1][2])
        with pytest.raises(UserError, match=r"blocks\.1\.2: it is wrapped"):
            densify(sparse)
        assert len(masks(sparse)) == 4


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_wrapper_that_holds_the_parameters_is_refused() -> None:
    """DDP's reducer and FSDP's shards are those of the old weights; the model inside is not changed."""
    ddp = nn.parallel.DistributedDataParallel
    given = masks(sparsify(Model(), 0.6, seed=0))
    for wrap in (ddp, lambda model: nn.Sequential(ddp(model)), lambda model: compiled(ddp(model))):
        model, sparse = Model(), sparsify(Model(), 0.6, seed=0)
        for act in (thin, manage):
            with pytest.raises(UserError, match=r"in DistributedDataParallel.* the bare model first, then wrap"):
                act(wrap(model))
        assert not masks(model)
        with pytest.raises(UserError, match="densify the bare model first"):
            densify(wrap(sparse))
        assert list(masks(sparse)) == list(given)
    with pytest.raises(UserError, match="sparsify the bare model first"):
        sparsify(ddp(Model()), masks=given)
    assert isinstance(MaskManager(ddp(sparse), SET(), seed=0).layers["blocks.0.0"], SparseLinear)
