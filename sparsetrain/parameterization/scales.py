"""The forward multipliers as hooks on modules: alpha_in, alpha_out / m_d and m_L^(-alpha)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.depth import Blocks
from sparsetrain.parameterization.roles import Place, is_norm

# Norms at the end of a branch, before it is added: where the first stands in a block, the multiplier belongs behind
# the second ones, since it would cancel before them (Gemma 2 and 3, OLMo 2, GLM 4).
_BRANCH_NORMS = (
    ("post_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm")),
    ("post_mlp_layernorm", ("post_self_attn_layernorm", "post_mlp_layernorm")),
)
# Norms of the sum of the embeddings, in which alpha_in would cancel before it (BERT, BLOOM, BART).
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
        if isinstance(output, tuple):  # attention: what it returns beside the output stays
            return (output[0] * self.factor, *output[1:])
        return output * self.factor


class _InputScale(_Scale):
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.factor, *inputs[1:])


def scale_output(module: nn.Module, factor: float) -> None:
    """Multiply what ``module`` returns, the first of several outputs, by ``factor`` from now on."""
    if factor != 1.0:
        module.register_forward_hook(_OutputScale(factor))


def scale_input(module: nn.Module, factor: float) -> None:
    """Multiply the first input of ``module`` by ``factor`` from now on."""
    if factor != 1.0:
        module.register_forward_pre_hook(_InputScale(factor))


def remove_scales(model: nn.Module) -> None:
    """Take back every multiplier that `scale_output` and `scale_input` put into ``model``."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Scale)]:
                del hooks[key]


def input_scale(embedding: nn.Module) -> float:
    """Return the factor that `sparsetrain.parameterize` put on what an embedding returns, 1 where there is none.

    Vectors that stand in for rows of its weight, as `sparsetrain.SoftPrompt`, need the same.
    """
    module = wrappers.unwrap(embedding)
    return next((hook.factor for hook in module._forward_hooks.values() if isinstance(hook, _OutputScale)), 1.0)


# -- where the multipliers go ------------------------------------------------------------------------------------------


def branch_ends(model: nn.Module, outputs: Iterable[Place], blocks: Blocks) -> dict[str, nn.Module]:
    """Return the modules whose output is the end of a residual branch, by name.

    That is each output projection, or the module around it whose code reads the projection's weight without calling it
    (``nn.MultiheadAttention``, the mixers of Mamba), or the norm that stands behind it in the branch.

    Raises:
        UserError: a projection that is read by code of which nothing is known.
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
        if place.part is not None and place.part.stacked:  # the module sums up what its experts give
            ends[place.part.holder_name] = place.part.holder
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
    """Whether a module returns what its ``out_proj`` gives, but computes it from the weight, always or at times."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return type(module).__name__.endswith("Mixer") and reads_weight(module, "out_proj")


def embedding_norm(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the norm that follows the embedding called ``name``, of which alpha_in must stand behind."""
    parents = name.split(".")[:-1]
    # As many parts up as the embedding has: `embeddings.word_embeddings` and the model's own `word_embeddings`.
    prefix = "".join(f"{part}." for part in parents)
    outer = "".join(f"{part}." for part in parents[:-1])
    for norm in _EMBEDDING_NORMS:
        for start in (prefix, outer):
            if f"{start}{norm}" in modules and is_norm(modules[f"{start}{norm}"]):
                return f"{start}{norm}"
    return None


def check_called(name: str, parent: nn.Module | None, child: str, what: str) -> None:
    """Raise `UserError` if the code of ``parent`` reads the weight of its ``child`` and never calls it.

    A hook on such a module is never called. Code that cannot be read is taken to call it.
    """
    if parent is not None and _uses(parent, child) == {"weight"}:
        raise UserError(
            f"parameterize: {what} cannot reach '{name}': {type(parent).__name__} reads its weight and never calls "
            f"it; call the module (self.{child}(x)) there"
        )


def reads_weight(parent: nn.Module | None, child: str) -> bool:
    """Whether the code of ``parent`` multiplies by the weight of its ``child`` itself, beside any call of it."""
    return parent is not None and "weight" in _uses(parent, child)


def _uses(parent: nn.Module, child: str) -> set[str]:
    """Return in which ways the methods of a module's class use a child when it runs: ``call``, ``weight``."""
    found = set()
    for kind in type(parent).__mro__:
        if not issubclass(kind, nn.Module) or kind is nn.Module:
            continue
        for name, method in vars(kind).items():
            if name in _SETTING_UP or not inspect.isfunction(method):
                continue
            try:
                source = inspect.getsource(method)
            except (OSError, TypeError):
                return {"call"}
            if re.search(rf"self\.{re.escape(child)}\(", source):
                found.add("call")
            if re.search(
                rf"self\.{re.escape(child)}\.weight\b(?!\s*(=[^=]|\.(dtype|device|shape|size|numel|dim)))", source
            ):
                found.add("weight")
    return found


def check_reachable(place: Place, factor: float, what: str) -> None:
    """Raise `UserError` if a parameter that no module of its own holds would need a multiplier."""
    if factor != 1.0:
        raise UserError(
            f"parameterize: {what}={factor:g} cannot reach parameter '{place.name}', which "
            f"{type(place.module).__name__} adds itself; multiply it there and set {what} to 1"
        )


def embedding_factor(name: str, modules: dict[str, nn.Module]) -> float:
    """Return the factor by which a model's own code multiplies an embedding: Gemma's and BART's sqrt(d_model)."""
    for owner in (modules[name], modules.get(name.rpartition(".")[0])):
        # Gemma keeps the number beside the buffer, which has no value on the meta device.
        for factor in (getattr(owner, "scalar_embed_scale", None), getattr(owner, "embed_scale", None)):
            if isinstance(factor, int | float) or (isinstance(factor, Tensor) and not factor.is_meta):
                return float(factor)
    return 1.0


def logit_factor(model: nn.Module) -> float:
    """Return the factor by which a model's own code multiplies the input of its head: d_model^-0.5 in T5's family."""
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
