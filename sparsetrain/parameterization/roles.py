"""Roles of parameters, found by the type of their module and by one table of names.

A table entry matches the end of a qualified name, as whole components between dots. The names of heads and routers are
those whose layers `sparsetrain.sparsify` leaves dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.parameterization.rules import Role
from sparsetrain.parameterization.slices import TensorSlice, slice_of
from sparsetrain.sparsity.layers.names import ends_with, is_head, is_part_of_head, is_router
from sparsetrain.sparsity.layers.surgery import is_conv1d

# Matrices that write to the residual stream. The first table that contains a name wins.
OUTPUT_NAMES = (
    *("c_proj", "o_proj", "out_proj", "wo", "attn.out", "attn.proj", "to_out", "to_out.0", "out_lin"),
    *("attention.dense", "self_attention.dense", "self_attn.dense", "attention.output.dense"),
    *("SelfAttention.o", "EncDecAttention.o"),
    *("down_proj", "mlp.down", "fc2", "fc_out", "dense_4h_to_h", "output.dense", "ffn_output", "ffn.lin2", "w2"),
)
# Matrices that read the residual stream, or that lie between the blocks and the embeddings or the head.
HIDDEN_NAMES = (
    *("c_attn", "q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "Wqkv", "query_key_value", "wq", "wk", "wv"),
    *("query", "key", "value", "q_lin", "k_lin", "v_lin", "to_q", "to_k", "to_v", "to_kv", "to_qkv"),
    *(f"{attention}.{part}" for attention in ("SelfAttention", "EncDecAttention") for part in "qkv"),
    *("c_fc", "up_proj", "gate_proj", "gate_up_proj", "mlp.up", "mlp.gate", "fc1", "fc_in", "dense_h_to_4h"),
    *("intermediate.dense", "ffn", "ffn.lin1", "wi", "wi_0", "wi_1", "w1", "w3"),
    *("in_proj", "in_proj_qkvz", "in_proj_ba", "x_proj"),
    *("pooler", "pooler.dense", "transform.dense", "predictions.dense", "classifier.dense", "lm_head.dense"),
    *("pre_classifier", "vocab_transform", "project_in", "project_out", "embedding_hidden_mapping_in"),
)
# Matrices that read features of a fixed size, and so act as embeddings.
INPUT_NAMES = ("patch_embeddings.projection", "patch_embed.proj", "patch_embedding")
POSITION_NAMES = (
    *("wpe", "positions", "embed_positions", "position_embeddings", "position_embedding"),
    *("pos_emb", "pos_embed", "pos_embedding"),
)
TOKEN_NAMES = ("cls_token", "mask_token", "dist_token", "distillation_token", "register_tokens", "class_embedding")
# Parameters with special initial values: state-space parameters, learned sinks and temperatures, position biases.
KEPT_PARAMETERS = (
    *("A_log", "D", "dt_bias", "sinks", "sink", "bias_k", "bias_v"),
    *("relative_position_bias_table", "relative_position_bias", "rel_pos_bias"),
    *("layer_scale", "layer_scale_1", "layer_scale_2", "layer_scale_parameter", "gamma", "gamma_1", "gamma_2"),
    *("lambda_1", "lambda_2", "logit_scale", "temperature"),
    *("attn_gate", "ffn_gate", "cross_attn_attn_gate", "cross_attn_mlp_gate"),
)
KEPT_MODULES = ("dt_proj", "relative_attention_bias", "relative_position_bias", "rel_pos_bias")
# Parameters that a module of unknown type holds directly, for example experts in one tensor.
RAW_OUTPUT_NAMES = ("down_proj", "w2", "wo", "fc2", "c_proj", "o_proj")
RAW_HIDDEN_NAMES = ("gate_up_proj", "up_proj", "gate_proj", "w1", "w3", "wi", "wi_0", "wi_1", "fc1", "c_fc", "in_proj")
FINAL_NORM_NAMES = ("ln_f", "final_norm", "norm_f", "final_layer_norm", "final_layernorm", "norm")

MATRIX_TYPES = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
EMBEDDING_TYPES = (nn.Embedding, nn.EmbeddingBag)
TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Place:
    """One occurrence of a parameter in a module. A tied parameter has several places.

    Args:
        module_name: name without the components that wrappers insert.
        leaf: name of the parameter in the module.
        slice: slice of a dense tensor that a sparse layer replaces, if any.
    """

    module_name: str
    leaf: str
    module: nn.Module
    parameter: nn.Parameter
    slice: TensorSlice | None = None

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.leaf}" if self.module_name else self.leaf

    @property
    def dense(self) -> tuple[str, str]:
        """Module and name of the tensor in a dense model; they are the same whether the matrix is dense or sparse."""
        if self.slice is not None:
            return self.slice.holder_name, self.slice.leaf
        return self.module_name, "weight" if self.leaf == "values" else self.leaf

    @property
    def is_bias(self) -> bool:
        # This includes in_proj_bias of attention, bias_ih_l0 of a recurrent layer, down_proj_bias of experts, and beta.
        return self.leaf.endswith("bias") or self.leaf.startswith("bias_") or self.leaf == "beta"


def places(model: nn.Module) -> Iterator[Place]:
    """Yield all places of all parameters, in the order of the modules."""
    modules = dict(wrappers.named_modules(model))
    for module_name, module in modules.items():
        dense = slice_of(module_name, modules)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(module_name, leaf, module, parameter, dense)


def home(tied: list[Place]) -> Place:
    """Return the place that determines a parameter's role: an embedding, else a layer of torch, else the first."""
    for types in (EMBEDDING_TYPES, MATRIX_TYPES):
        for place in tied:
            if isinstance(place.module, types):
                return place
    return tied[0]


def check_globs(roles: Mapping[str, Role | str], everywhere: list[Place]) -> None:
    """Raise `UserError` for a glob that matches neither a module nor a parameter, or for an unknown role."""
    names = {place.module_name for place in everywhere} | {place.name for place in everywhere}
    names |= {place.slice.name for place in everywhere if place.slice is not None}
    for glob, role in roles.items():
        check_choice(f"roles['{glob}']", role, Role)
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(f"parameterize: roles['{glob}'] matches no module or parameter{nearest(glob, names)}")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: one of torch's, or a class named "Norm" that holds no matrix."""
    if isinstance(module, TORCH_NORMS):
        return True
    if "Norm" not in type(module).__name__ or isinstance(module, (*MATRIX_TYPES, *EMBEDDING_TYPES)):
        return False
    # A norm holds gains and biases. A class that computes them has layers inside, which have roles of their own.
    return not module._modules and all(p is None or p.ndim <= 1 or is_constant(p) for p in module._parameters.values())


def is_constant(parameter: nn.Parameter) -> bool:
    """Whether all elements are equal, as in an untrained gain; False on ``meta``."""
    if parameter.is_meta or parameter.numel() == 0:
        return False
    flat = parameter.detach().reshape(-1)
    return bool((flat == flat[0]).all())


def find_role(place: Place, roles: Mapping[str, Role | str], names: set[str]) -> Role | None:
    """Return the role of a parameter at one place, or None if it is unknown.

    All norms get `Role.NORM` here, including final ones.

    Args:
        roles: the user's roles. A glob that matches the module gives the module's biases a bias role; one that matches
            the parameter's own name gives exactly its role. The first match wins.
        names: names of all modules and parameters, to look for the experts of a router.
    """
    for glob, given in roles.items():
        stack = place.slice.name if place.slice is not None else place.module_name
        if fnmatchcase(place.module_name, glob) or fnmatchcase(stack, glob):
            return _of_leaf(Role(given), place)
        if fnmatchcase(place.name, glob):
            return Role(given)
    role = _kept(place) or _of_module(place, names)
    if role is not None:
        return _of_leaf(role, place)
    return _of_raw_parameter(place)


def _of_leaf(role: Role, place: Place) -> Role:
    if not place.is_bias or role is Role.KEEP:
        return role
    return Role.FINAL_BIAS if role in (Role.FINAL_NORM, Role.HEAD) else Role.BIAS


def _kept(place: Place) -> Role | None:
    module, kind = place.module, type(place.module).__name__
    if "LayerScale" in kind or "Sinusoidal" in kind:
        return Role.KEEP
    if is_norm(module):  # a norm's gain may be called gamma
        return None
    # Each output of a depthwise convolution reads a kernel of fixed size in one channel, so no width is involved.
    depthwise = isinstance(module, nn.modules.conv._ConvNd) and 1 < module.in_channels == module.groups
    if depthwise or ends_with(place.leaf, KEPT_PARAMETERS) or ends_with(place.module_name, KEPT_MODULES):
        return Role.KEEP
    return None


def _of_module(place: Place, names: set[str]) -> Role | None:
    name, module = place.module_name, place.module
    if isinstance(module, EMBEDDING_TYPES):
        if not ends_with(name, POSITION_NAMES):
            return Role.EMBEDDING
        # Whisper's sinusoidal table is a frozen embedding.
        return Role.POSITION if place.parameter.requires_grad else Role.KEEP
    if is_norm(module):
        return Role.NORM
    if isinstance(module, nn.MultiheadAttention) or is_router(name, names):
        # A router reads the residual stream as q does, and its few logits are compared only with each other.
        return Role.HIDDEN
    if is_head(name):
        return Role.HEAD
    if is_part_of_head(name) and not name.endswith(".dense") and not name.rpartition(".")[2].isdigit():
        return Role.HEAD
    for known, role in ((OUTPUT_NAMES, Role.OUTPUT), (HIDDEN_NAMES, Role.HIDDEN), (INPUT_NAMES, Role.EMBEDDING)):
        if ends_with(name, known):
            return role
    return None


def roles_inside_torch_layers(model: nn.Module) -> dict[str, Role]:
    """Return the roles of ``linear1`` and ``linear2`` of torch's own transformer layers, by their full names."""
    found: dict[str, Role] = {}
    for name, module in wrappers.named_modules(model):
        if isinstance(module, TORCH_LAYERS):
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}linear1": Role.HIDDEN, f"{prefix}linear2": Role.OUTPUT}
    return found


def _of_raw_parameter(place: Place) -> Role | None:
    """Return the role of a parameter that a module of unknown type holds directly, such as stacked experts."""
    if place.is_bias:
        experts = place.parameter.ndim > 1 and "experts" in place.module_name.split(".")
        zero = is_constant(place.parameter) and place.parameter.detach().reshape(-1)[0].item() == 0.0
        return Role.BIAS if experts or zero else None
    if isinstance(place.module, MATRIX_TYPES) or is_conv1d(place.module):
        return None
    if place.parameter.numel() == 1:
        return Role.KEEP  # a gate or a temperature
    if place.parameter.ndim < 2 and place.slice is None:
        return None
    name = place.name if place.slice is None else place.slice.name
    tables = (
        *((RAW_OUTPUT_NAMES, Role.OUTPUT), (RAW_HIDDEN_NAMES, Role.HIDDEN)),
        *((POSITION_NAMES, Role.POSITION), (TOKEN_NAMES, Role.EMBEDDING)),
    )
    return next((role for known, role in tables if ends_with(name, known)), None)
