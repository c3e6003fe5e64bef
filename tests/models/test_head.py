"""The head as a module: the loss is computed in its own call, with hooks, wrappers or other modules as head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.models import ModelConfig, Prompted, SoftPrompt, Transformer, cross_entropy
from sparsetrain.models.head import Head
from sparsetrain.parameterization import Parameterization
from sparsetrain.sparsity import SparseLinear

VOCAB, WIDTH = 53, 16


def build(**options: Any) -> Transformer:
    config = ModelConfig(WIDTH, 1, 2, VOCAB, init_std=0.3, seed=0, **options)
    return Transformer(config, Parameterization.mup(8, alpha_out=3.0))


def batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, VOCAB, (2, 3, 7))
    targets[1, :5] = -100
    return tokens, targets


def with_lora(model: Transformer) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["head"], init_lora_weights=False), model)


def with_weight_norm(model: Transformer) -> None:
    nn.utils.parametrizations.weight_norm(model.head)
    nn.init.ones_(model.head.parametrizations.weight.original0)


def with_forward_of_its_own(model: Transformer) -> None:
    weight = model.head.weight
    model.head.forward = lambda x: F.linear(x.tanh(), weight)  # type: ignore[method-assign, assignment]


def put(module: Callable[[], nn.Module]) -> Callable[[Transformer], None]:
    return lambda model: setattr(model, "head", module())


def wrap(wrapper: Callable[[nn.Module], nn.Module]) -> Callable[[Transformer], None]:
    return lambda model: setattr(model, "head", wrapper(model.head))


AT_THE_HEAD: dict[str, Callable[[Transformer], object]] = {
    "a pre-hook that doubles": lambda model: model.head.register_forward_pre_hook(lambda _, x: (2.0 * x[0], *x[1:])),
    "weight norm": with_weight_norm,
    "pruned": lambda model: prune.random_unstructured(model.head, "weight", 0.5),
    "checkpointed": wrap(checkpoint_wrapper),  # type: ignore[arg-type]
    "a bias": lambda model: setattr(model.head, "bias", nn.Parameter(torch.randn(VOCAB))),
    "LoRA": with_lora,
    "linear": put(lambda: nn.Linear(WIDTH, VOCAB)),
    "sparse": put(lambda: SparseLinear(WIDTH, VOCAB, density=0.5, seed=0)),
    "several layers": put(lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, VOCAB))),
    "a forward on the object": with_forward_of_its_own,
}


@pytest.mark.parametrize("kind", AT_THE_HEAD)
def test_the_loss_is_that_of_the_logits_whatever_stands_at_the_head(kind: str) -> None:
    model = build(tie_embeddings=False)
    AT_THE_HEAD[kind](model)
    tokens, targets = batch()
    logits = model(tokens)
    assert not torch.allclose(logits, build(tie_embeddings=False)(tokens)) or kind == "checkpointed"
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(model.token_losses(tokens, targets), each.detach())


def test_hooks_on_model_and_head_see_the_loss() -> None:
    model, (tokens, targets), seen = build(), batch(), []
    for name in ("", "head"):
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.append((name, output))
        )
    loss = model.loss(tokens, targets)
    assert [name for name, _ in seen] == ["head", ""]
    assert all(output is loss for _, output in seen)
    seen.clear()
    model.token_losses(tokens, targets)
    assert [name for name, _ in seen] == ["head"]


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


def test_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CPU_ELEMENTS", 8 * 500)
    monkeypatch.setattr(cross_entropy, "_LEAST_TOKENS", 1)
    head, targets = Head(4, 500), torch.randint(0, 500, (4, 32))
    with _Largest() as largest:
        head(torch.randn(4, 32, 4, requires_grad=True), targets).backward()
        with torch.no_grad():
            head(torch.randn(4, 32, 4), targets, "none")
    assert largest.elements == 8 * 500  # a chunk of 8 of the 128 tokens; the weight has 4 * 500
    with _Largest() as largest:
        head(torch.randn(4, 32, 4))
    assert largest.elements == 128 * 500


def test_ddp_sends_every_gradient_of_the_loss(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model, (tokens, targets), sent = build(sparsity=0.5), batch(), []

        def send(_state, bucket):  # type: ignore[no-untyped-def]  # torch knows no annotation that is a string
            sent.extend(bucket.parameters())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer() * 3.0)  # the sum of three ranks
            return future

        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, send)
        loss = wrapped(tokens, targets)
        loss.backward()
    finally:
        dist.destroy_process_group()
    alone = build(sparsity=0.5)
    expected = alone.loss(tokens, targets)
    assert torch.equal(loss, expected)
    expected.backward()
    assert {id(parameter) for parameter in sent} == {id(parameter) for parameter in model.parameters()}
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, 3.0 * theirs.grad)


# Warnings of dynamo itself when it resumes after the untraceable part of the loss.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_gives_the_loss() -> None:
    torch.compiler.reset()
    model, (tokens, targets) = build(), batch()
    torch.testing.assert_close(torch.compile(model, backend="eager")(tokens, targets), model(tokens, targets))


def test_a_prompted_model_gives_logits_and_loss_with_and_without_slots() -> None:
    model, prompt = build(), SoftPrompt(2, WIDTH)
    prompted, (tokens, targets) = Prompted(model, prompt), batch()
    assert {*prompted.state_dict()} == {"prompt.vectors", *(f"model.{name}" for name in model.state_dict())}
    slots = torch.full_like(tokens, -1)
    slots[:, :2] = torch.arange(2)
    embeddings = torch.cat((prompt.vectors.expand(3, -1, -1), model.embed(tokens[:, 2:])), dim=1)
    assert torch.equal(prompted(tokens, slots=slots), model.logits(model.hidden(embeddings=embeddings)))
    assert torch.equal(prompted(tokens, targets, slots), model.loss(tokens, targets, embeddings))
    assert torch.equal(prompted(tokens, targets), model.loss(tokens, targets))
