"""The products of any module, counted while a copy of it without values runs forward and backward.

The copy has fake tensors: shapes, types and devices without memory. So nothing is computed, and the caller's model, its
gradients, hooks, modes and torch's generators stay as they are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.cost.ledger import Entry, Pass
from sparsetrain.cost.operations import ATTENTION, BACKWARD, FORWARD, HEAD, LINEAR
from sparsetrain.errors import UserError
from sparsetrain.flop_formulas import DENSE
from sparsetrain.sparsity.layers.linear import SparseLinear

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
)
# Products of two batches of matrices, and fused attention: neither factor is a weight.
_BATCHED = ("bmm", "baddbmm", "attention", "attention_backward", "flex_attention", "flex_attention_backward")


@dataclass(frozen=True)
class Traced:
    """What a trace saw: the products, the bytes of the cache after the pass, and whether any weight has a gradient."""

    entries: list[Entry]
    cache_bytes: int


def trace(model: nn.Module, asked: Pass, inputs: Sequence[Any] | None = None) -> Traced:
    """Return the products of one pass of ``model``.

    Args:
        model: takes token ids ``[batch, context]``, or, if it has no embedding, vectors ``[batch, context, features]``
            of the width of its first linear layer.
        asked: the pass. In training the gradient is that of the sum of the module's output; a loss has no products.
            Decoding calls the model with ``use_cache`` and ``past_key_values``, as Hugging Face's models take them.
        inputs: arguments of the model's call, of which tensors are used by shape, type and device; None makes some.

    Raises:
        UserError: the model cannot be copied, cannot be called so, or depends on values of tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    name = type(model).__name__
    try:
        twin = _twin(model, fake)
    except Exception as error:
        raise UserError(f"{name} cannot be copied to be traced: {_line(error)}") from error
    given = _inputs(model, asked) if inputs is None else list(inputs)
    try:
        with _quiet(fake):
            arguments = [_fake(value, fake) for value in given]
            return _run(twin, arguments, asked, _head(model))
    except UserError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in given)
        hint = "" if inputs is not None else "; give its arguments as inputs="
        raise UserError(f"{name} cannot be traced with ({shapes}){hint}: {_line(error)}") from error


def _run(twin: nn.Module, arguments: list[Any], asked: Pass, head: str | None) -> Traced:
    options: dict[str, Any] = {}
    if asked.phase == "decoding":
        before = [_like(value, asked.cached) for value in arguments]
        with torch.no_grad():
            past = getattr(twin(*before, use_cache=True), "past_key_values", None)
        if past is None:
            raise UserError(f"{type(twin).__name__} returns no past_key_values, so a cache of it is not known")
        options = {"use_cache": True, "past_key_values": past}
    counter = _counter(type(twin).__name__, head)
    if asked.phase == "training":
        with torch.enable_grad(), counter, _nodes_of_modules(twin, counter.nodes):
            outcome = _differentiable(twin(*arguments))
            counter.now = BACKWARD
            if outcome is not None:
                outcome.sum().backward()
        return Traced(counter.entries(), 0)
    with torch.no_grad(), counter:
        result = twin(*arguments, **options)
    return Traced(counter.entries(), _bytes_of(getattr(result, "past_key_values", None)))


def _counter(root: str, head: str | None) -> Any:
    """Return a counter that gives each operation to the innermost module; made here, since counters import late."""
    from torch.utils.flop_counter import FlopCounterMode

    class Counter(FlopCounterMode):
        def __init__(self) -> None:
            super().__init__(display=False)
            self.sums: dict[tuple[str, str, str], list[int]] = {}
            self.nodes: dict[Any, str] = {}
            self.now = FORWARD

        def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
            formula = self.flop_registry.get(func_packet)
            if formula is not None:
                name = getattr(func_packet, "__name__", str(func_packet))
                flops = int(formula(*args, **kwargs, out_val=out))
                dense = flops
                if name in DENSE and getattr(func_packet, "_qualified_op_name", "").startswith("sparsetrain"):
                    dense = int(DENSE[name](*_shapes(args), **kwargs))
                module = self.nodes.get(torch._C._current_autograd_node()) if self.now == BACKWARD else None
                if module is None:
                    inside = self.mod_tracker.parents - {"Global"}
                    module = max(inside, key=len, default="")
                    module = module.removeprefix(root).removeprefix(".")
                kind = ATTENTION if name in _BATCHED or "attention" in name else LINEAR
                kind = HEAD if kind == LINEAR and head is not None and module == head else kind
                held = self.sums.setdefault((kind, self.now, module or root), [0, 0])
                held[0] += flops
                held[1] += dense
            return out

        def entries(self) -> list[Entry]:
            return [Entry(*key, flops, dense) for key, (flops, dense) in self.sums.items()]

    return Counter()


@contextmanager
def _nodes_of_modules(model: nn.Module, nodes: dict[Any, str]) -> Iterator[None]:
    """Note, while modules run, which nodes of the graph each of them has made: the innermost module has a node."""
    names = {module: name for name, module in model.named_modules()}

    def claim(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        inputs = {tensor.grad_fn for tensor in _tensors((args, kwargs))}
        left = [tensor.grad_fn for tensor in _tensors(result)]
        while left:
            node = left.pop()
            if node is None or node in inputs or node in nodes:
                continue
            nodes[node] = names.get(module, "")
            left += [before for before, _ in node.next_functions]

    # A hook on each module: torch forgets to remove a part of a global one that takes keyword arguments, and then a
    # compiler warns of hooks.
    handles = [module.register_forward_hook(claim, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        nodes.clear()


def _shapes(args: Sequence[Any]) -> list[Any]:
    return [tuple(value.shape) if isinstance(value, Tensor) else value for value in args]


# ------------------------------------------------------------------------------------------------------------ the copy


def _twin(model: nn.Module, fake: Any) -> nn.Module:
    """Return a copy of ``model`` with fake parameters and buffers, and without hooks of others."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        sparse = isinstance(module, SparseLinear)
        if sparse:
            # The positions are read, as numbers, by whoever looks at the pattern; they are shared and not written.
            memo[id(module._pattern)] = module._pattern
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is None or id(tensor) in memo:
                    continue
                memo[id(tensor)] = tensor if sparse and held is module._buffers else _fake(tensor, fake)
        for key in _HOOKS:
            hooks = module.__dict__.get(key)
            if hooks is not None:
                memo[id(hooks)] = _needed(hooks, memo)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        # What a checkpointed module computes again in its backward pass is no product of the model.
        if getattr(module, "gradient_checkpointing", False) is True:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010 - its type is not known
    return twin


def _needed(hooks: Any, memo: dict[int, Any]) -> Any:
    """Return the hooks that a module needs to compute: torch's own, which make a weight from others."""
    if not isinstance(hooks, Mapping):
        return copy.copy(hooks)
    kept = ((key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils"))
    return OrderedDict((key, copy.deepcopy(hook, memo)) for key, hook in kept)


def _fake(value: Any, fake: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = fake.from_tensor(value.detach() if not isinstance(value, nn.Parameter) else value)
    if isinstance(value, nn.Parameter):
        return made if isinstance(made, nn.Parameter) else nn.Parameter(made.detach(), value.requires_grad)
    return made


@contextmanager
def _quiet(fake: Any) -> Iterator[None]:
    """Run without values: attention by products that are counted, and nothing of the process changed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(fake)
        yield


# -------------------------------------------------------------------------------------------------- inputs and results


def _inputs(model: nn.Module, asked: Pass) -> list[Any]:
    """Return token ids, or vectors if the model has no embedding, of the shape of the pass."""
    tensors = (*model.parameters(), *model.buffers())
    device = next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))
    if any(isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__ for module in model.modules()):
        return [torch.empty(0, dtype=torch.int64, device=device).new_zeros(1).expand(asked.batch, asked.context)]
    for module in model.modules():
        width = getattr(module, "in_features", None)
        if isinstance(width, int):
            weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
            vector = torch.empty(0, dtype=weight.dtype, device=device).new_zeros(1)
            return [vector.expand(asked.batch, asked.context, width)]
    raise UserError(f"{type(model).__name__} has no embedding and no linear layer: give its arguments as inputs=")


def _like(value: Any, tokens: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return value.new_zeros((value.shape[0], tokens, *value.shape[2:]))


def _head(model: nn.Module) -> str | None:
    """Return the name of the module that makes logits, if the model says which one does."""
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else getattr(wrappers.unwrap(model), "head", None)
    return next((name for name, module in model.named_modules() if module is found and found is not None), None)


def _differentiable(result: Any) -> Tensor | None:
    """Return the tensor to differentiate: the logits if there are some, else the first one with a gradient."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found if found.requires_grad else None
    return next((tensor for tensor in _tensors(result) if tensor.requires_grad), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes_of(cache: Any) -> int:
    """Return the bytes of cached keys and values: a cache of Hugging Face's, or nested tuples."""
    layers = getattr(cache, "layers", None)
    held = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers] if layers else cache
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(held))


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
