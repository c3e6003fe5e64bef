"""Give every parameter of a model its initial values and its place in the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.parameterization.rules import Parameterization, Role, TensorSpec
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.surgery import is_conv1d

# Module names of the usual architectures, after the last "." or in full; the first match wins.
MATRIX_ROLES: tuple[tuple[str, Role], ...] = (
    *((name, Role.HEAD) for name in ("head", "lm_head", "embed_out", "score", "classifier")),
    *(
        (name, Role.OUTPUT)
        for name in (
            "c_proj",
            "o_proj",
            "out_proj",
            "wo",
            "attn.out",
            "attention.dense",
            "self_attention.dense",
        )
    ),
    *((name, Role.OUTPUT) for name in ("down_proj", "mlp.down", "fc2", "fc_out", "dense_4h_to_h")),
    *((name, Role.HIDDEN) for name in ("c_attn", "q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "Wqkv")),
    *((name, Role.HIDDEN) for name in ("query_key_value", "wq", "wk", "wv")),
    *((name, Role.HIDDEN) for name in ("c_fc", "up_proj", "gate_proj", "mlp.up", "mlp.gate", "fc1", "fc_in")),
    ("dense_h_to_4h", Role.HIDDEN),
)
DEFAULT_SIGMA = 0.02
POSITION_NAMES = ("wpe", "positions", "embed_positions", "position_embeddings", "pos_emb")
# Only outside the numbered blocks: OPT, for one, has a final_layer_norm in each of them.
FINAL_NORM_NAMES = ("ln_f", "final_norm", "norm_f", "final_layer_norm", "final_layernorm", "norm")


def initialise(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    rules: Parameterization,
    sigma: float,
    n_layers: int,
    seed: int,
) -> None:
    """Fill every parameter from its rule and a seed of its own, and record the assignment for `param_groups`.

    Matrices are normal with the standard deviation of the rules, norms one, biases zero. A sparse layer takes the
    numbers that the dense matrix of the same name would get, at its positions, so that models which differ in
    density alone are compared on common random numbers.

    Args:
        model: parameters on any device; on ``meta`` nothing is drawn.
        specs: one per parameter name, as ``named_parameters`` gives them.
        sigma: the base standard deviation.
        n_layers: number of transformer blocks.
        seed: of all draws; see `sparsetrain.seeds`.

    Raises:
        UserError: a parameter without a spec.
    """
    assign(model, specs, rules, n_layers)
    owners = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = specs[name]
            if parameter.is_meta:
                continue
            if spec.role in (Role.NORM, Role.FINAL_NORM):
                parameter.fill_(1.0)
                continue
            if spec.role in (Role.BIAS, Role.FINAL_BIAS):
                parameter.zero_()
                continue
            module_name, _, leaf = name.rpartition(".")
            owner = owners[module_name]
            std = rules.init_std(spec, sigma, n_layers)
            sparse = isinstance(owner, SparseLinear)
            key = name.removesuffix(leaf) + "weight" if sparse else name
            # A Conv1D holds the transposed matrix; drawn as [M, K] too, so that its sparse successor gets its numbers.
            transposed = is_conv1d(owner) and parameter.ndim == 2
            shape = owner.pattern.shape if sparse else parameter.shape[::-1] if transposed else parameter.shape
            # On the CPU and in float32, so that neither torch's default device nor its default dtype changes a number.
            draws = torch.empty(shape, dtype=torch.float32, device="cpu")
            draws.normal_(0.0, 1.0, generator=seeds.generator(seed, "init", key)).mul_(std)
            if sparse:
                draws = owner.pattern.gather(draws.to(parameter.device))
            parameter.copy_(draws.t() if transposed else draws)


@dataclass(frozen=True)
class Assignment:
    """Which rules hold for a model of ``depth`` blocks, and the spec of each parameter by name."""

    specs: Mapping[str, TensorSpec]
    rules: Parameterization
    depth: int


def assign(model: nn.Module, specs: Mapping[str, TensorSpec], rules: Parameterization, n_layers: int) -> None:
    """Record which rules and specs hold for the parameters of ``model``, without touching their values."""
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in specs]
    if missing:
        raise UserError(f"parameter '{missing[0]}' has no role ({len(missing)} without one)")
    # One attribute under a name that no user's model has; it travels with copies and pickles of the model.
    model._sparsetrain_assignment = Assignment(  # type: ignore[assignment]
        {name: specs[name] for name in names}, rules, n_layers
    )


def assignment(model: nn.Module) -> Assignment:
    """Return what `assign` recorded.

    Raises:
        UserError: the model has not been parameterized.
    """
    recorded = getattr(model, "_sparsetrain_assignment", None)
    if not isinstance(recorded, Assignment):
        raise UserError("the model's tensors have no roles yet: call parameterize(model, rules, base) first")
    return recorded


def param_groups(
    model: nn.Module,
    rules: Parameterization,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    optimizer: type[torch.optim.Optimizer] | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer groups with the learning rate, weight decay and eps that the rules give each tensor.

    Parameters with the same role and the same settings share a group. Frozen parameters are left out. Masks that change
    their density later (`sparsetrain.sparsity.GMP`, variable sparsity) do not change the groups: learning rates and
    weight decays keep the multipliers of the density at this moment, and SμPar makes no claim about what follows.

    Args:
        model: a `Transformer`, or a model that `parameterize` has seen.
        rules: those for which the model was initialised.
        lr: base peak learning rate eta. weight_decay: base lambda. eps: base eps of Adam.
        optimizer: the class that the groups are for, to be told when the rules are those of the other family.

    Returns:
        Dicts with ``params``, ``name``, ``lr``, ``weight_decay`` and, under rules for Adam, ``eps``.

    Raises:
        UserError: a model without roles, other rules than those it was initialised for, a parameter without a role,
            a layer whose density is not the one it was initialised for, or SGD with rules for Adam or the reverse.
    """
    if optimizer is not None:
        sgd = issubclass(optimizer, (torch.optim.SGD, torch.optim.ASGD))
        rules.check_optimizer("sgd" if sgd else optimizer.__name__)
    recorded = assignment(model)
    specs, depth = recorded.specs, recorded.depth
    if recorded.rules != rules:
        raise UserError(f"the model was initialised for {recorded.rules}, not for {rules}")
    _check_densities(model, specs)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name not in specs:
            raise UserError(f"parameter '{name}' has no role: parameterize after sparsify, densify or adding layers")
        if not parameter.requires_grad:
            continue
        spec = specs[name]
        settings = {
            "lr": rules.learning_rate(spec, lr, depth),
            "weight_decay": rules.weight_decay(spec, weight_decay),
        }
        if rules.optimizer == "adam":
            settings["eps"] = rules.epsilon(spec, eps, depth)
        key = (spec.role, *settings.values())
        group = groups.setdefault(key, {"params": [], "name": str(spec.role), **settings})
        group["params"].append(parameter)
    return list(groups.values())


def _check_densities(model: nn.Module, specs: Mapping[str, TensorSpec]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            spec = specs.get(f"{name}.values")
            if spec is not None and abs(spec.density - module.pattern.density) > 1e-9:
                raise UserError(
                    f"layer '{name}' has density {module.pattern.density:.6g} but was initialised for "
                    f"{spec.density:.6g}: call parameterize again"
                )


@runtime_checkable
class AppliesRules(Protocol):
    """A model, such as `sparsetrain.Transformer`, that knows its roles and applies the multipliers itself."""

    def parameterize(
        self, rules: Parameterization, sigma: float | None, seed: int | None, reinitialise: bool
    ) -> nn.Module: ...


def parameterize(
    model: nn.Module,
    rules: Parameterization,
    base: nn.Module | None = None,
    *,
    roles: Mapping[str, Role | str] | None = None,
    sigma: float | None = None,
    n_layers: int | None = None,
    seed: int | None = None,
    reinitialise: bool = True,
) -> nn.Module:
    """Apply a parameterization to any ``nn.Module``: initial values, forward multipliers, optimizer roles.

    Call it after `sparsify`. Roles come from module types and the names of the usual architectures; ``roles`` adds to
    them. The multipliers alpha_in, alpha_out / m_d and m_L^(-alpha) become forward hooks on the embeddings, the head
    and the output projections (whose output must be the end of its residual branch). The attention scale is the
    model's own: with the same d_head at every width it is a constant.

    Args:
        model: changed in place.
        base: the same architecture at the base width (and any density), for m_d; needed by all rules but SP.
        roles: glob over module names -> role; checked before the built-in names, first match wins.
        sigma: base standard deviation; None is 0.02, or what the model's own configuration says.
        n_layers: number of blocks; by default, as many as hold matrices.
        seed: of the initial values; None draws it from torch's global generator.
        reinitialise: False keeps the weights, for example to fine-tune.

    Returns:
        ``model``.

    Raises:
        UserError: a parameter without a role, a base that lacks one of the modules, is wider than the model or has none
            of the rules' base width, or roles that name no module.
    """
    if isinstance(model, AppliesRules):
        return model.parameterize(rules, sigma, seed, reinitialise)
    if rules.uses_width and base is None:
        raise UserError(f"parameterize: {rules.scheme} needs base=, the same model at the base width")
    modules = dict(model.named_modules())
    _check_globs(roles or {}, modules)
    module_roles = {name: _role(name, module, roles or {}) for name, module in modules.items()}
    widths = _widths(base) if base is not None else {}
    if rules.uses_width and rules.base_width not in widths.values():
        raise UserError(
            f"parameterize: base_width={rules.base_width} is the width of no module of the base model (its widths: "
            f"{', '.join(str(width) for width in sorted(set(widths.values())))})"
        )
    specs: dict[str, TensorSpec] = {}
    blocks: set[str] = set()
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        module = modules[module_name]
        role = module_roles[module_name]
        if role is None:
            raise UserError(
                f"parameter '{name}' ({type(module).__name__}) has no known role: pass roles={{'{module_name}': ROLE}} "
                f"with one of {', '.join(Role)}"
            )
        m_d = 1.0
        if base is not None:
            if module_name not in widths:
                raise UserError(f"parameterize: the base model has no module '{module_name}'")
            m_d = _width(module) / widths[module_name]
            if leaf.endswith("bias"):
                m_d = len(parameter) / len(getattr(base.get_submodule(module_name), leaf, parameter))
            if m_d < 1.0:
                raise UserError(
                    f"parameterize: the base is wider than the model: '{module_name}' has {widths[module_name]} there "
                    f"and {_width(module)} here; the base is the small model that was tuned"
                )
        if role in (Role.HIDDEN, Role.OUTPUT):
            blocks.add(_block_prefix(module_name))
        density = module.pattern.density if isinstance(module, SparseLinear) and leaf == "values" else 1.0
        specs[name] = TensorSpec(_leaf_role(role, leaf), m_d, density)
    depth = n_layers if n_layers is not None else max(1, len(blocks))
    if reinitialise:
        initialise(model, specs, rules, DEFAULT_SIGMA if sigma is None else sigma, depth, seeds.resolve_seed(seed))
    else:
        assign(model, specs, rules, depth)
    for module_name, role in module_roles.items():
        module = modules[module_name]
        _remove_scales(module)
        if role in (Role.EMBEDDING, Role.POSITION):
            _scale_output(module, rules.embedding_multiplier())
        elif role is Role.HEAD:
            m_d = _width(module) / widths[module_name] if base is not None else 1.0
            _scale_input(module, rules.logit_multiplier(m_d))
        elif role is Role.OUTPUT:
            _scale_output(module, rules.residual_multiplier(depth))
    return model


def _check_globs(roles: Mapping[str, Role | str], modules: Mapping[str, nn.Module]) -> None:
    for glob, role in roles.items():
        check_choice(f"roles['{glob}']", role, Role)
        if not any(fnmatchcase(name, glob) for name in modules):
            raise UserError(f"parameterize: roles['{glob}'] matches no module{nearest(glob, modules)}")


def _role(name: str, module: nn.Module, roles: Mapping[str, Role | str]) -> Role | None:
    """Return the role of a module's weight, or None for a module whose parameters are not known."""
    if not any(True for _ in module.parameters(recurse=False)):
        return None
    for glob, role in roles.items():
        if fnmatchcase(name, glob):
            return Role(role)
    if isinstance(module, nn.Embedding):
        return Role.POSITION if _ends_with(name, POSITION_NAMES) else Role.EMBEDDING
    if type(module).__name__.endswith("Norm"):
        final = _ends_with(name, FINAL_NORM_NAMES) and not _block_prefix(name)
        return Role.FINAL_NORM if final else Role.NORM
    for known, role in MATRIX_ROLES:
        if _ends_with(name, (known,)):
            return role
    return None


def _leaf_role(role: Role, leaf: str) -> Role:
    if not leaf.endswith("bias"):  # also in_proj_bias of nn.MultiheadAttention
        return role
    return Role.FINAL_BIAS if role in (Role.FINAL_NORM, Role.HEAD) else Role.BIAS


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _block_prefix(name: str) -> str:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _width(module: nn.Module) -> int:
    """Return the fan_in of a matrix, the width of a norm or an embedding."""
    if isinstance(module, SparseLinear):
        return module.in_features
    weight = next(module.parameters(recurse=False))
    if weight.ndim > 2:
        return weight[0].numel()  # a convolution: input channels times the kernel
    # Everything else keeps it last, be it [M, K], [vocabulary, D] or [D]; only a Conv1D is [K, M].
    return weight.shape[0 if is_conv1d(module) else -1]


def _widths(base: nn.Module) -> dict[str, int]:
    owners = {name: module for name, module in base.named_modules() if any(True for _ in module.parameters(False))}
    return {name: _width(module) for name, module in owners.items()}


class _Scale:
    """A forward hook that multiplies; a class, so that a model with it can be copied and pickled."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class _OutputScale(_Scale):
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.factor


class _InputScale(_Scale):
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.factor, *inputs[1:])


def _scale_output(module: nn.Module, factor: float) -> None:
    if factor != 1.0:
        module.register_forward_hook(_OutputScale(factor))


def _scale_input(module: nn.Module, factor: float) -> None:
    if factor != 1.0:
        module.register_forward_pre_hook(_InputScale(factor))


def _remove_scales(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Scale)]:
            del hooks[key]
