"""Squared norms of each example's own gradient, computed together with the gradients (arXiv 2411.00999)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.gradients.modules import Rule, kind_of, rule_of
from sparsetrain.gradients.record import MicroBatch, Use, digest, length_of

_CLOSE = 1.0 / 32.0  # of the size of a gradient, which may have been rounded to bfloat16 on its way


class per_example_norms:  # noqa: N801 - it is called like a function
    """A context in which forward and backward passes also give the squared norms of each example's own gradient.

    ```python
    with sparsetrain.per_example_norms(model) as norms:
        loss = model(tokens, targets)  # the mean over B examples
        loss.backward()
    norms.squared["blocks.0.attn.qkv.weight"]  # [B]
    ```

    An example is a row of the batch, such as a sequence with all of its tokens. Its gradient is B times its share of
    the gradient of the loss: for a loss that is a mean over B examples, the gradient of that example's own loss. Of a
    sparse layer it exists at the kept weights only. The gradients themselves are those without the context, up to
    rounding.

    Several forward passes are micro-batches of one batch: divide each loss as for gradient accumulation. A scaled loss
    scales all norms by the square. The passes may run under autocast, gradient checkpointing and DDP; there each
    process gets the norms of its own examples.

    Args:
        model: its batch dimension is the first one, and all layers see the examples in their order. A layer that sees
            the tokens first is refused by its shape, so try a new model with another number of tokens than of examples.
        include: patterns of qualified module names whose parameters are wanted, such as ``["*norm*"]``; None for all.
        strict: refuse modules whose rule is unknown. Otherwise `left_out` lists their parameters. Rules of your own:
            `sparsetrain.register_example_gradients`.
        examples: B of each forward pass; None takes it from the first dimension of the model's tensors.

    Attributes:
        left_out: qualified names of parameters without norms.

    Raises:
        UserError: a module with parameters has no rule, the model is compiled, or its parameters are sharded; in the
            forward pass: a layer that does not see the examples in its first dimension; at the end: a parameter whose
            gradient comes from elsewhere than its modules' calls, or no backward pass inside the context.
    """

    def __init__(
        self,
        model: nn.Module,
        include: Sequence[str] | None = None,
        strict: bool = True,
        examples: int | None = None,
    ) -> None:
        if isinstance(include, str):
            raise UserError(f"include={include!r} must be a list of patterns")
        if examples is not None and examples < 1:
            raise UserError(f"examples={examples} must be at least 1")
        self._model, self._include, self._strict, self._examples = model, include, strict, examples
        self.left_out: list[str] = []
        self._batches: list[MicroBatch] = []
        self._expected: dict[nn.Parameter, tuple[Tensor, float]] = {}
        self._arrived: dict[nn.Parameter, str] = {}  # parameters that have a gradient -> what is wrong, if anything
        self._names: dict[nn.Parameter, str] = {}
        self._patched: list[nn.Module] = []
        self._handles: list[Any] = []

    @property
    def squared(self) -> dict[str, Tensor]:
        """Squared norms ``[B]`` by qualified parameter name, for every parameter that has a gradient.

        B counts the examples of all micro-batches that had a backward pass, in their order. The norms are float32, or
        float64 for float64 gradients.

        Raises:
            UserError: a parameter's gradient does not come from the calls of its modules, or there was a forward pass
                with gradients and no backward pass inside the context.
        """
        if not self._arrived and any(batch.kinds for batch in self._batches):
            raise UserError(
                "per-example norms: no backward pass has reached the parameters; call loss.backward() inside the with"
            )
        batches = [batch for batch in self._batches if not batch.open and batch.kinds]
        settled = [batch.settle() for batch in batches]
        total = sum(batch.examples for batch in batches)
        found = {}
        for parameter, name in self._names.items():
            if parameter not in self._arrived or name in self.left_out:
                continue
            wrong = self._arrived[parameter]
            if not wrong and not any(parameter in squared for squared in settled):
                wrong = "has a gradient that no call of its module computed"
            if wrong:
                if self._strict:
                    raise UserError(f"per-example norms: {name} {wrong}; strict=False leaves it out")
                self.left_out.append(name)
                continue
            parts = [
                squared[parameter] if parameter in squared else torch.zeros(batch.examples, device=parameter.device)
                for squared, batch in zip(settled, batches, strict=True)
            ]
            found[name] = torch.cat(parts) * float(total) ** 2
        return found

    def __enter__(self) -> per_example_norms:
        try:
            self._enter()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        if error is None:
            _ = self.squared  # raises if something is wrong

    def _enter(self) -> None:
        root = wrappers.unwrap(self._model)
        if isinstance(self._model, nn.DataParallel):
            raise UserError("per_example_norms: nn.DataParallel copies the modules; use DistributedDataParallel")
        unknown = []
        for name, module in wrappers.named_modules(self._model):
            own = {leaf: one for leaf, one in module._parameters.items() if one is not None and one.requires_grad}
            if not own or not self._wanted(name):
                continue
            for leaf, parameter in own.items():
                self._names.setdefault(parameter, f"{name}.{leaf}" if name else leaf)
            rule = rule_of(module)
            if rule is None:
                unknown.append(f"{name or 'the model'} ({type(module).__name__})")
                if isinstance(vars(module).get("forward"), _Recorded):
                    raise UserError(f"per_example_norms: {name or 'the model'} is inside such a context already")
                names = (self._names[parameter] for parameter in own.values())
                self.left_out += [one for one in names if one not in self.left_out]
                continue
            if any(type(parameter) is not nn.Parameter for parameter in own.values()):
                raise UserError(f"per_example_norms: the parameters of {name} are {type(next(iter(own.values())))}")
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise UserError(f"per_example_norms: {name} is compiled; use the model before it is compiled")
            self._patch(name, module, rule)
        if type(self._model).__name__ == "OptimizedModule":
            raise UserError("per_example_norms: the model is compiled; pass the one that was given to torch.compile")
        if unknown and self._strict:
            raise UserError(
                f"per_example_norms knows no rule for {', '.join(unknown)}: register_example_gradients adds one, "
                "strict=False leaves their parameters out"
            )
        if not self._names:
            chosen = "the model" if self._include is None else f"include={list(self._include)}"
            raise UserError(f"per_example_norms: no parameter of {chosen} requires a gradient")
        left_out = set(self.left_out)
        for parameter, name in self._names.items():
            if name not in left_out:
                self._handles.append(parameter.register_hook(functools.partial(self._arrive, parameter)))
        self._handles.append(root.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _wanted(self, name: str) -> bool:
        return self._include is None or any(fnmatchcase(name, pattern) for pattern in self._include)

    def _leave(self) -> None:
        for module in self._patched:
            del module.forward
        for handle in self._handles:
            handle.remove()
        self._patched, self._handles = [], []

    def _patch(self, name: str, module: nn.Module, rule: Rule) -> None:
        module.forward = _Recorded(self, name, module, rule)
        self._patched.append(module)

    def call(self, recorded: _Recorded, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a module in the place of its forward method."""
        module, name, forward = recorded.module, recorded.name, recorded.forward
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        if torch._C._are_functorch_transforms_active():
            raise UserError(f"per_example_norms: {name} is called inside a transform of torch.func")
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and any(batch.open for batch in self._batches[:-1]):
            raise UserError(
                "per_example_norms: gradient checkpointing calls layers again while two forward passes await their "
                "backward pass; call backward before the next forward pass"
            )
        batch, uses = self._batch(name), {}
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter in self._names and parameter.requires_grad:
                batch.count(parameter, kind_of(module, leaf), in_backward)
                uses[leaf] = Use(batch, parameter, f"{name}.{leaf}" if name else leaf)
        return recorded.rule(module, forward, uses, *arguments, **options)

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Begin a micro-batch, unless gradient checkpointing around the model calls it again."""
        if torch._C._current_graph_task_id() != -1 and self._batches:
            return
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.ndim]
        tensors = [x for x in tensors if x.ndim > 1] or tensors
        sizes = {len(x) for x in tensors}
        sizes = sizes - {1} or sizes
        examples = self._examples
        if examples is None:
            if len(sizes) != 1:
                shapes = ", ".join(str(tuple(x.shape)) for x in tensors) or "none"
                raise UserError(f"per_example_norms: the model's tensors ({shapes}) do not tell B; pass examples=B")
            (examples,) = sizes
        if examples < 1:
            raise UserError("per_example_norms: the batch has no example")
        first = next((x for x in tensors if len(x) == examples), None)
        rows = examples if first is None or first.ndim < 2 else examples * first.shape[1]
        self._batches.append(MicroBatch(examples, rows, self._expected))

    def _batch(self, name: str) -> MicroBatch:
        if not self._batches:
            if self._examples is None:
                raise UserError(
                    f"per_example_norms: {name} is called outside of the model's own forward pass; call the model "
                    "inside the with block, or pass examples=B"
                )
            self._batches.append(MicroBatch(self._examples, self._examples, self._expected))
        return self._batches[-1]

    def _arrive(self, parameter: nn.Parameter, g: Tensor) -> None:
        """Compare the gradient of a parameter in this backward pass with what its modules computed."""
        expected = self._expected.pop(parameter, None)
        wrong = ""
        if expected is None:
            wrong = "has a gradient that no call of its module computed"
        else:
            (computed, magnitude), found = expected, g.detach()
            found = found.to_dense() if found.is_sparse else found
            size = length_of(found) if found.ndim == 2 else found.abs().amax().double()
            apart = (digest(found) - computed).abs().amax()
            close = apart <= _CLOSE * torch.maximum(size, computed.abs().amax()) + magnitude
            # A loss that diverges, or a loss scale that is too large, makes gradients of which nothing can be told.
            if not bool(close) and bool(torch.isfinite(size) & torch.isfinite(apart)):
                wrong = "has a gradient that its modules compute in part only"
        self._arrived[parameter] = self._arrived.get(parameter) or wrong


class _Recorded:
    """Stands in for the forward method of a module; a copy of the module has its own forward method."""

    def __init__(self, context: per_example_norms, name: str, module: nn.Module, rule: Rule) -> None:
        self.context, self.name, self.module, self.rule = context, name, module, rule
        self.forward = module.forward
        self.takes_targets = getattr(rule, "takes_targets", False)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.context.call(self, arguments, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Any:
    return MethodType(type(module).forward, module)
