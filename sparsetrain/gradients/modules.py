"""How each class of modules computes the norms of its parameters' per-example gradients.

A rule is called in place of a module's forward method and returns the same output. Rules for matrices replace the
product for the gradient of the weight by one that passes every example's part of it (`gradients.functions`); the others
read the gradient of the output in a hook.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.gradients.functions import Linear, bias_gradient, record_table
from sparsetrain.gradients.record import Kind, Use, digest, wide
from sparsetrain.models.cross_entropy import cross_entropy
from sparsetrain.models.head import Head, Reduction, loss_of_logits
from sparsetrain.models.norm import LayerNorm, RMSNorm, normalise
from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.foreign import is_conv1d

Uses = Mapping[str, Use]  # by the parameter's name in its module
Rule = Callable[..., Any]  # (module, forward, uses, *arguments, **options) -> what forward returns
ExampleGradients = Callable[[nn.Module, tuple[Any, ...], Tensor], Mapping[str, Tensor]]

_OWN: dict[type[nn.Module], Rule] = {}


def register_example_gradients(kind: type[nn.Module], function: ExampleGradients | None = None) -> Any:
    """Say how the per-example gradients of a class of modules are computed, for `sparsetrain.per_example_norms`.

    ```python
    @sparsetrain.register_example_gradients(Scale)
    def of_scale(module, inputs, grad_output):
        (x,) = inputs
        return {"gain": (grad_output * x).flatten(1, -2).sum(1)}
    ```

    Args:
        kind: the class of modules; subclasses need a registration of their own.
        function: called in the backward pass with the module, the arguments of its forward call, a tuple in the order
            of its signature, and the gradient of its output; returns, for each parameter by its name in the module, the
            gradients that the B examples contribute, ``[B, *shape]``. Without it the call returns a decorator.

    Returns:
        ``function``, or the decorator.

    Raises:
        UserError: ``kind`` is no class of modules.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"register_example_gradients: {kind!r} must be a class of modules")
    if function is None:
        return lambda decorated: register_example_gradients(kind, decorated)

    def rule(module: nn.Module, forward: Callable[..., Any], uses: Uses, *arguments: Any, **options: Any) -> Any:
        inputs = inspect.signature(forward).bind(*arguments, **options).args

        def record(g: Tensor) -> None:
            found = function(module, inputs, g)
            if not isinstance(found, Mapping):
                raise UserError(f"the rule of {type(module).__name__} gave {found!r}; it must give {{name: gradients}}")
            for name, parts in found.items():
                if name in uses:
                    shape = (uses[name].examples, *uses[name].parameter.shape)
                    if parts.shape != shape:
                        raise UserError(
                            f"per-example gradients of {uses[name].name} have shape {tuple(parts.shape)}; "
                            f"{type(module).__name__}'s rule must give {shape}"
                        )
                    uses[name].add_parts(parts)

        return _watched(forward(*arguments, **options), record)

    _OWN[kind] = rule
    return function


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule for a module with parameters of its own, or None if there is none."""
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:  # somebody replaced it
        return None
    if type(module) in _OWN:
        return _OWN[type(module)]
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    if is_conv1d(module) and names <= _AFFINE:
        return _conv1d
    if _is_foreign_norm(module):
        return _foreign_norm
    for kind, (rule, known) in _RULES.items():
        # A subclass with a forward method of its own may compute something else.
        if isinstance(module, kind) and type(module).forward is kind.forward and names <= known:
            return None if _unusual(module) else rule
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm with a rule."""
    return rule_of(module) in (_norm, _foreign_norm)


def _is_foreign_norm(module: nn.Module) -> bool:
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"] and not isinstance(module, nn.RMSNorm)


def _unusual(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.scale_grad_by_freq


def kind_of(module: nn.Module, leaf: str) -> Kind:
    """Return how a module uses its parameter ``leaf``: as a matrix, as a table, or in another way."""
    if leaf == "weight" and isinstance(module, nn.Embedding):
        return "table"
    return "matrix" if leaf == "weight" and isinstance(module, nn.Linear) else "other"


def _watched(output: Any, record: Callable[[Tensor], None]) -> Any:
    """Call ``record`` with the gradient of ``output`` in the backward pass; return ``output``."""
    if not isinstance(output, Tensor):
        raise UserError(f"per-example norms need a module that returns a tensor, not {type(output).__name__}")
    if output.requires_grad:
        # A hook must not return anything, or it replaces the gradient.
        def hook(g: Tensor) -> None:
            with torch.no_grad():
                record(g)

        output.register_hook(hook)
    return output


def _cast(*tensors: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
    """Return tensors as ``torch.autocast`` would give them to a product."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _product(module: Any, uses: Uses, x: Tensor, turn: bool) -> Tensor:
    for use in uses.values():
        use.by_example(x)  # refuses a shape that it cannot divide, where the user's code is on the stack
    data, weight, bias = _cast(x, module.weight, module.bias, like=x)
    output: Tensor = Linear.apply(data, weight, bias, uses.get("weight"), uses.get("bias"), turn)
    return output


def _linear(module: nn.Linear, forward: Rule, uses: Uses, *arguments: Tensor, **options: Tensor) -> Tensor:
    return _product(module, uses, _only(arguments, options), turn=False)


def _only(arguments: tuple[Tensor, ...], options: Mapping[str, Tensor]) -> Tensor:
    """Return the one argument of a call, whatever its name is."""
    (x,) = (*arguments, *options.values())
    return x


def _conv1d(module: nn.Module, forward: Rule, uses: Uses, *arguments: Tensor, **options: Tensor) -> Tensor:
    return _product(module, uses, _only(arguments, options), turn=True)


def _head(
    module: Head,
    forward: Rule,
    uses: Uses,
    hidden: Tensor,
    targets: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    if targets is None:
        return _product(module, uses, hidden, turn=False)
    if reduction == "none":  # without gradients
        output: Tensor = forward(hidden, targets, reduction)
        return output
    if module._parameters.get("bias") is not None:
        return loss_of_logits(_product(module, uses, hidden, turn=False), targets)
    use = uses.get("weight")
    if use is not None:
        use.by_example(hidden)
    return cross_entropy(hidden.flatten(0, -2), module.weight, targets.flatten(), use)


_head.takes_targets = True  # type: ignore[attr-defined]


def _sparse(module: SparseLinear, forward: Rule, uses: Uses, x: Tensor) -> Tensor:
    for use in uses.values():
        use.by_example(x)
    output: Tensor = forward(x, uses.get("values"))
    if "bias" in uses:
        _watched(output, lambda g: _ignore(bias_gradient(uses["bias"], g)))
    return output


def _ignore(_: Any) -> None: ...


def _embedding(module: nn.Embedding, forward: Rule, uses: Uses, input: Tensor) -> Tensor:
    output: Tensor = forward(input)
    use = uses.get("weight")
    if use is None:
        return output
    ids = input
    if _shared(ids, use):
        # Positions, which all examples share: each example gets a view of its own, so that its gradient is its own.
        ids = (ids if ids.ndim == 2 else ids[None]).expand(use.examples, -1)
        output = (output if input.ndim == 2 else output[None]).expand(use.examples, -1, -1)
    elif ids.ndim == 0 or (ids.shape[0] != use.examples and ids.shape != (use.batch.rows,)):
        raise UserError(
            f"per-example norms of {use.name}: its table is read at ids of shape {tuple(ids.shape)}, whose first "
            f"dimension must be the {use.examples} examples of the batch, or 1"
        )
    ids = ids.reshape(use.examples, -1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)  # its row has no gradient
    use.batch.ids[use.parameter] = ids.clamp_min(0)
    width = module.weight.shape[1]
    result: Tensor = _watched(output, lambda g: record_table(use, ids, g.reshape(use.examples, -1, width)))
    return result


def _shared(ids: Tensor, use: Use) -> bool:
    """Whether ids ``[T]`` or ``[1, T]`` are positions that all examples share.

    Raises:
        UserError: ids ``[B]`` or ``[B T]`` go up by one each: they are positions, or one id for each example or token.
    """
    examples = use.examples
    if examples == 1 or ids.ndim == 0:
        return False
    if ids.ndim > 1:
        return ids.ndim == 2 and ids.shape[0] == 1
    own = len(ids) in (examples, use.batch.rows)
    if own and bool((ids.diff() == 1).all()):
        raise UserError(
            f"per-example norms of {use.name}: its table is read at the ids {int(ids[0])} to {int(ids[-1])}, which are "
            f"positions that all examples share, or an id for each of {len(ids)} examples or tokens; give positions "
            "the shape [1, T], and ids of examples the shape [B, 1]"
        )
    return not own


def _soft_prompt(module: SoftPrompt, forward: Rule, uses: Uses, slots: Tensor) -> Tensor:
    output: Tensor = forward(slots)
    if (use := uses.get("vectors")) is not None:
        ids = slots.clamp_min(0).reshape(use.examples, -1)
        width = module.vectors.shape[1]
        _watched(output, lambda g: record_table(use, ids, g.reshape(use.examples, -1, width)))
    return output


def _norm(module: Any, forward: Rule, uses: Uses, *arguments: Tensor, **options: Tensor) -> Tensor:
    """LayerNorm and RMSNorm over the last dimension, or over several of them."""
    input = _only(arguments, options)
    if not uses:
        output: Tensor = forward(input)
        return output
    shape = tuple(module.normalized_shape)
    some = next(iter(uses.values()))
    rows = some.by_example(input.flatten(-len(shape)) if len(shape) > 1 else input)
    rms = isinstance(module, nn.RMSNorm)
    if len(shape) > 1 or input.is_nested:
        return cast(Tensor, _watched(forward(input), lambda g: _gains(module, uses, input, g, rms)))

    def collect(*found: Tensor | None) -> None:
        for name, squares, total in zip(("weight", "bias"), found[:2], found[2:], strict=True):
            if name in uses and squares is not None and total is not None and uses[name].alone:
                uses[name].add(squares)
                # torch adds the tokens of a 16-bit norm in 16 bits, which is wrong by some percent of a gradient.
                narrow = torch.finfo(input.dtype).bits <= 16  # reading a number back costs time in every step
                off = 8.0 * torch.finfo(input.dtype).eps * float(squares.sqrt().sum()) if narrow else 0.0
                uses[name].expect(digest(total), off)

    def share(g: Tensor) -> None:
        several = {name: use for name, use in uses.items() if not use.alone}
        if several:
            _gains(module, several, input, g, rms)

    rows = input if input.ndim > 2 else rows
    output = normalise(rows, module.weight, None if rms else module.bias, module.eps, rms, collect)
    # A view could not be changed in place.
    output = output if output.shape == input.shape else torch.ops.aten._unsafe_view(output, input.shape)
    return cast(Tensor, _watched(output, share))


def _gains(module: Any, uses: Uses, x: Tensor, g: Tensor, rms: bool) -> None:
    """Record the gradients of gain and bias of a norm from its input and the gradient of its output."""
    shape = tuple(module.normalized_shape)
    if "weight" in uses:
        # Without gain and bias the same function gives the normalised input.
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        wider = wide(x.detach())
        normal = F.rms_norm(wider, shape, eps=eps) if rms else F.layer_norm(wider, shape, eps=eps)
        uses["weight"].add_parts(_over_rows(uses["weight"], wide(g) * normal, shape))
    if "bias" in uses:
        uses["bias"].add_parts(_over_rows(uses["bias"], wide(g), shape))


def _foreign_norm(module: nn.Module, forward: Rule, uses: Uses, *arguments: Any, **options: Any) -> Any:
    """An RMSNorm of another library, which multiplies by its gain, or by 1 + gain.

    Its output is linear in the gain, so its outputs for gains of 1 and of 0 differ by the derivative.
    """
    output = forward(*arguments, **options)
    use = uses.get("weight")
    if use is None:
        return output

    def record(g: Tensor) -> None:
        # Not by a call, which would run the hooks of the module.
        one, none = (_with_gain(module, fill).forward(*arguments, **options) for fill in (1.0, 0.0))
        shape = tuple(use.parameter.shape)
        use.add_parts(_over_rows(use, wide(g) * (wide(one) - wide(none)), shape))

    use.by_example(output)
    return _watched(output, record)


def _with_gain(module: nn.Module, fill: float) -> nn.Module:
    """Return a copy of a norm with a constant gain."""
    bare = copy.copy(module)
    bare.__dict__.pop("forward", None)
    bare.__dict__["_parameters"] = {"weight": torch.full_like(module._parameters["weight"], fill)}  # type: ignore[arg-type]
    return bare


def _over_rows(use: Use, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the sums ``[B, *shape]`` over everything but the examples and the last dimensions."""
    return x.reshape(use.examples, -1, math.prod(shape)).sum(1).reshape(use.examples, *shape)


_AFFINE = {"weight", "bias"}
_RULES: dict[type[nn.Module], tuple[Rule, set[str]]] = {
    Head: (_head, _AFFINE),
    nn.Linear: (_linear, _AFFINE),
    SparseLinear: (_sparse, {"values", "bias"}),
    nn.Embedding: (_embedding, {"weight"}),
    SoftPrompt: (_soft_prompt, {"vectors"}),
    nn.LayerNorm: (_norm, _AFFINE),
    nn.RMSNorm: (_norm, {"weight"}),
    LayerNorm: (_norm, _AFFINE),
    RMSNorm: (_norm, {"weight"}),
}
