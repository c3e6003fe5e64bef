"""Forward multipliers as hooks on modules: alpha_in, alpha_out / m_d and m_L^(-alpha)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.depth import Blocks
from sparsetrain.parameterization.roles import Place, is_norm

# Norms at the end of a branch, before the addition. If a block has the first name, the multiplier must follow the norms
# in the second place, because it would cancel before them (Gemma 2 and 3, OLMo 2, GLM 4).
_BRANCH_NORMS = (
    ("post_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm")),
    ("post_mlp_layernorm", ("post_self_attn_layernorm", "post_mlp_layernorm")),
)
# Norms of the summed embeddings; alpha_in must follow them, because it would cancel before (BERT, BLOOM, BART).
_EMBEDDING_NORMS = (
    *("embeddings.LayerNorm", "embeddings.norm", "word_embeddings_layernorm", "layernorm_embedding", "emb_ln"),
)


_SETTING_UP = ("__init__", "reset_parameters", "_reset_parameters", "init_weights", "_init_weights", "tie_weights")


class _Scale:
    """A forward hook that multiplies; a class, so that a model with it can be copied and pickled."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class _OutputScale(_Scale):
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention returns further values, which stay
            return (output[0] * self.factor, *output[1:])
        return output * self.factor


class _InputScale(_Scale):
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.factor, *inputs[1:])


def scale_output(module: nn.Module, factor: float) -> None:
    """From now on, multiply the output of ``module``, or the first one of a tuple, by ``factor``."""
    if factor != 1.0:
        module.register_forward_hook(_OutputScale(factor))


def scale_input(module: nn.Module, factor: float) -> None:
    """From now on, multiply the first input of ``module`` by ``factor``."""
    if factor != 1.0:
        module.register_forward_pre_hook(_InputScale(factor))


def remove_scales(model: nn.Module) -> None:
    """Remove every multiplier that `scale_output` and `scale_input` attached to modules of ``model``."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Scale)]:
                del hooks[key]


def input_scale(embedding: nn.Module) -> float:
    """Return the factor that `sparsetrain.parameterize` applies to the output of an embedding; 1 if there is none.

    Vectors that replace rows of its weight, as in `sparsetrain.SoftPrompt`, need the same factor.
    """
    module = wrappers.unwrap(embedding)
    return next((hook.factor for hook in module._forward_hooks.values() if isinstance(hook, _OutputScale)), 1.0)


# -- where the multipliers go ------------------------------------------------------------------------------------------


def branch_ends(model: nn.Module, outputs: Iterable[Place], blocks: Blocks) -> dict[str, nn.Module]:
    """Return the modules whose output ends a residual branch, by name.

    For each output projection that is the projection itself; or the module around it, if its code reads the weight
    without calling the projection (``nn.MultiheadAttention``, the mixers of Mamba); or the norm that follows it in the
    branch.

    Raises:
        UserError: unknown code reads the weight of a projection.
    """
    modules = dict(wrappers.named_modules(model))
    ends: dict[str, nn.Module] = {}
    for place in outputs:
        name, module = place.module_name, place.module
        block = blocks.block_of(name)
        norms = _branch_norms(block, modules) if block is not None else ()
        if norms:
            ends |= {norm: modules[norm] for norm in norms}
            continue
        if place.slice is not None and place.slice.stacked:  # the module sums the outputs of its experts
            ends[place.slice.holder_name] = place.slice.holder
            continue
        parent_name, _, child = name.rpartition(".")
        parent = modules.get(parent_name)
        if parent is not None and child == "out_proj" and _returns_its_out_proj(parent):
            ends[parent_name] = parent
            continue
        check_called(name, parent, child, "the residual multiplier")
        ends[name] = module
    return ends


def _branch_norms(block: str, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    for mark, norms in _BRANCH_NORMS:
        if f"{block}.{mark}" in modules:
            return tuple(f"{block}.{norm}" for norm in norms if f"{block}.{norm}" in modules)
    return ()


def _returns_its_out_proj(module: nn.Module) -> bool:
    """Whether a module returns the output of its ``out_proj``, but (sometimes) computes it directly from the weight."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return type(module).__name__.endswith("Mixer") and reads_weight(module, "out_proj")


def embedding_norm(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the norm that follows the embedding called ``name``; alpha_in must be applied after it."""
    parents = name.split(".")[:-1]
    # The names above may start at the embedding's module or one level higher, as in `embeddings.LayerNorm`.
    prefix = "".join(f"{part}." for part in parents)
    outer = "".join(f"{part}." for part in parents[:-1])
    for norm in _EMBEDDING_NORMS:
        for start in (prefix, outer):
            if f"{start}{norm}" in modules and is_norm(modules[f"{start}{norm}"]):
                return f"{start}{norm}"
    return None


def check_called(name: str, parent: nn.Module | None, child: str, what: str) -> None:
    """Raise `UserError` if the code of ``parent`` reads the weight of its ``child`` and never calls it.

    A hook on such a child would never run. If the code is unavailable, it is assumed to call the child.
    """
    if parent is not None and _uses(parent, child) == {"weight"}:
        raise UserError(
            f"parameterize: {what} cannot reach '{name}': {type(parent).__name__} reads its weight and never calls "
            f"it; call the module (self.{child}(x)) there"
        )


def reads_weight(parent: nn.Module | None, child: str) -> bool:
    """Whether the code of ``parent`` multiplies by the weight of its ``child`` directly, whether or not it calls it."""
    return parent is not None and "weight" in _uses(parent, child)


def _uses(parent: nn.Module, child: str) -> set[str]:
    """Return how the methods of a module's class use a child when the model runs: ``call``, ``weight``, or both."""
    sources = _sources(parent)
    if sources is None:
        return {"call"}
    weight = rf"self\.{re.escape(child)}\.weight\b(?!\s*(=[^=]|\.(dtype|device|shape|size|numel|dim)))"
    patterns = {"call": rf"self\.{re.escape(child)}\(", "weight": weight}
    return {way for way, pattern in patterns.items() if any(re.search(pattern, source) for source in sources)}


def _sources(module: nn.Module) -> list[str] | None:
    """Return the source of the methods of a module's class that run with the model, or None if it is unavailable."""
    found = []
    for kind in type(module).__mro__:
        if not issubclass(kind, nn.Module) or kind is nn.Module:
            continue
        for name, method in vars(kind).items():
            if name in _SETTING_UP or not inspect.isfunction(method):
                continue
            try:
                found.append(inspect.getsource(method))
            except (OSError, TypeError):
                return None
    return found


def check_reachable(place: Place, factor: float, what: str) -> None:
    """Raise `UserError` if a multiplier is needed for a parameter that is not the weight of a layer of its own."""
    if factor != 1.0:
        raise UserError(
            f"parameterize: {what}={factor:g} cannot reach parameter '{place.name}', which "
            f"{type(place.module).__name__} adds itself; multiply it there and set {what} to 1"
        )


def embedding_factor(name: str, modules: dict[str, nn.Module]) -> float:
    """Return the factor that a model's own code applies to an embedding, such as sqrt(d_model) in Gemma and BART."""
    module, parent_name = modules[name], name.rpartition(".")[0]
    measured = _measured_factor(module)
    if measured is not None:
        return measured
    for owner in (module, modules.get(parent_name)):
        # Gemma keeps the number in an attribute beside the buffer, which has no value on the meta device.
        for factor in (getattr(owner, "scalar_embed_scale", None), getattr(owner, "embed_scale", None)):
            if isinstance(factor, int | float) or (isinstance(factor, Tensor) and not factor.is_meta):
                return float(factor)
    return 1.0


def _measured_factor(module: nn.Module) -> float | None:
    """Return the factor that a subclass of ``nn.Embedding`` applies to the rows of its weight, or None if unknown."""
    if not isinstance(module, nn.Embedding) or type(module).forward is nn.Embedding.forward or module.weight.is_meta:
        return None
    tokens = torch.arange(module.num_embeddings, device=module.weight.device)[:64]
    rows = module.weight.detach()[tokens].double()
    try:
        with torch.no_grad():
            output = module.forward(tokens).double()
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
        return None  # it needs other inputs
    if output.shape != rows.shape or not rows.any():
        return None
    factor = (output * rows).sum() / rows.square().sum()
    return factor.item() if torch.allclose(output, rows * factor, rtol=0.05) else None


def check_no_root_of_width(name: str, modules: dict[str, nn.Module], scheme: str) -> None:
    """Raise `UserError` if a model's own code multiplies an embedding by a square root, which grows with the width."""
    parent_name, _, child = name.rpartition(".")
    parent, call = modules.get(parent_name), rf"self\.{re.escape(child)}\([^\n]*\)"
    root = r"(?:(?:math\.|np\.|torch\.)?sqrt\(|[\w.]+\s*\*\*\s*\(?0?\.5)"
    pattern = rf"{call}\s*\*\s*\(?{root}|{root}[^\n*]*\*\s*{call}"
    if parent is not None and any(re.search(pattern, source) for source in _sources(parent) or ()):
        raise UserError(
            f"parameterize: {type(parent).__name__} multiplies '{name}' by a square root; under {scheme} the output of "
            "an embedding must not grow with the width: keep the base's factor at every width, or use alpha_in"
        )


def logit_factor(model: nn.Module) -> float:
    """Return the factor that a model's own code applies to the input of its head, such as d_model^-0.5 in T5."""
    config = getattr(wrappers.unwrap(model), "config", None)
    width = getattr(config, "d_model", None)
    scaled = getattr(config, "scale_decoder_outputs", getattr(config, "tie_word_embeddings", False))
    if not (isinstance(width, int) and scaled):
        return 1.0
    try:
        source = inspect.getsource(type(wrappers.unwrap(model)))
    except (OSError, TypeError):
        return 1.0
    return width**-0.5 if re.search(r"(model_dim|d_model) ?\*\* ?-0\.5", source) else 1.0
