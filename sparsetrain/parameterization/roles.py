"""Which role each parameter of a model has: by the type of its module, and by one table of names.

A name in a table stands at the end of a qualified name, as whole parts between dots. Names of heads and routers are
those by which `sparsetrain.sparsify` leaves such layers dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.parameterization.parts import Part, part_of
from sparsetrain.parameterization.rules import Role
from sparsetrain.sparsity.layers.names import ends_with, is_head, is_part_of_head, is_router
from sparsetrain.sparsity.layers.surgery import is_conv1d

# Matrices that write to the residual stream. The first table that has a name wins.
OUTPUT_NAMES = (
    *("c_proj", "o_proj", "out_proj", "wo", "attn.out", "attn.proj", "to_out", "to_out.0", "out_lin"),
    *("attention.dense", "self_attention.dense", "self_attn.dense", "attention.output.dense"),
    *("SelfAttention.o", "EncDecAttention.o"),
    *("down_proj", "mlp.down", "fc2", "fc_out", "dense_4h_to_h", "output.dense", "ffn_output", "ffn.lin2", "w2"),
)
# Matrices that read the residual stream, or that stand between the blocks and the embeddings or the head.
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
# Matrices that read features of a fixed size: they act as an embedding does.
INPUT_NAMES = ("patch_embeddings.projection", "patch_embed.proj", "patch_embedding")
POSITION_NAMES = (
    *("wpe", "positions", "embed_positions", "position_embeddings", "position_embedding"),
    *("pos_emb", "pos_embed", "pos_embedding"),
)
TOKEN_NAMES = ("cls_token", "mask_token", "dist_token", "distillation_token", "register_tokens", "class_embedding")
# What an author initialises in a way of its own: state-space parameters, learned sinks and temperatures, position bias.
KEPT_PARAMETERS = (
    *("A_log", "D", "dt_bias", "sinks", "sink", "bias_k", "bias_v"),
    *("relative_position_bias_table", "relative_position_bias", "rel_pos_bias"),
    *("layer_scale", "layer_scale_1", "layer_scale_2", "layer_scale_parameter", "gamma", "gamma_1", "gamma_2"),
    *("lambda_1", "lambda_2", "logit_scale", "temperature"),
    *("attn_gate", "ffn_gate", "cross_attn_attn_gate", "cross_attn_mlp_gate"),
)
KEPT_MODULES = ("dt_proj", "relative_attention_bias", "relative_position_bias", "rel_pos_bias")
# Parameters that a module of an unknown type holds itself, for example experts in one tensor.
RAW_OUTPUT_NAMES = ("down_proj", "w2", "wo", "fc2", "c_proj", "o_proj")
RAW_HIDDEN_NAMES = ("gate_up_proj", "up_proj", "gate_proj", "w1", "w3", "wi", "wi_0", "wi_1", "fc1", "c_fc", "in_proj")
FINAL_NORM_NAMES = ("ln_f", "final_norm", "norm_f", "final_layer_norm", "final_layernorm", "norm")

MATRIX_TYPES = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
EMBEDDING_TYPES = (nn.Embedding, nn.EmbeddingBag)
TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Place:
    """One module that holds one parameter. A tied parameter has several places.

    Args:
        module_name: without the parts that wrappers put into it.
        leaf: the parameter's name inside the module.
        part: of which dense tensor a sparse layer holds a part, if it does.
    """

    module_name: str
    leaf: str
    module: nn.Module
    parameter: nn.Parameter
    part: Part | None = None

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.leaf}" if self.module_name else self.leaf

    @property
    def dense(self) -> tuple[str, str]:
        """Module and name of the tensor in a dense model: the same for a dense and for a sparse matrix."""
        if self.part is not None:
            return self.part.holder_name, self.part.leaf
        return self.module_name, "weight" if self.leaf == "values" else self.leaf

    @property
    def is_bias(self) -> bool:
        # Also in_proj_bias of attention, bias_ih_l0 of a recurrent layer, down_proj_bias of experts and a norm's beta.
        return self.leaf.endswith("bias") or self.leaf.startswith("bias_") or self.leaf == "beta"


def places(model: nn.Module) -> Iterator[Place]:
    """Yield every place of every parameter, in the order of the modules."""
    modules = dict(wrappers.named_modules(model))
    for module_name, module in modules.items():
        part = part_of(module_name, modules)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(module_name, leaf, module, parameter, part)


def home(tied: list[Place]) -> Place:
    """Return the place that gives a parameter its role: an embedding, else a layer of torch, else the first."""
    for types in (EMBEDDING_TYPES, MATRIX_TYPES):
        for place in tied:
            if isinstance(place.module, types):
                return place
    return tied[0]


def check_globs(roles: Mapping[str, Role | str], everywhere: list[Place]) -> None:
    """Raise `UserError` for a glob that matches neither a module nor a parameter, or a role that does not exist."""
    names = {place.module_name for place in everywhere} | {place.name for place in everywhere}
    names |= {part.name for place in everywhere if (part := place.part) is not None}
    for glob, role in roles.items():
        check_choice(f"roles['{glob}']", role, Role)
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(f"parameterize: roles['{glob}'] matches no module or parameter{nearest(glob, names)}")


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: a norm of torch, or a class whose name says so and that holds no matrix."""
    if isinstance(module, TORCH_NORMS):
        return True
    if "Norm" not in type(module).__name__ or isinstance(module, (*MATRIX_TYPES, *EMBEDDING_TYPES)):
        return False
    # A norm has gains and biases; one that computes them from something has layers inside, which have roles.
    return not module._modules and all(p is None or p.ndim <= 1 or is_constant(p) for p in module._parameters.values())


def is_constant(parameter: nn.Parameter) -> bool:
    """Whether all elements are equal, as those of a gain are before it is trained; False on ``meta``."""
    if parameter.is_meta or parameter.numel() == 0:
        return False
    flat = parameter.detach().reshape(-1)
    return bool((flat == flat[0]).all())


def find_role(place: Place, roles: Mapping[str, Role | str], names: set[str]) -> Role | None:
    """Return the role of a parameter at one place, None where nothing tells it.

    Norms come back as `Role.NORM`, wherever they stand.

    Args:
        roles: the user's; a glob that matches the module gives its biases the role of a bias, one that matches the
            parameter's own name gives exactly its role. The first that matches wins.
        names: of all modules and parameters, among which the experts of a router are looked for.
    """
    for glob, given in roles.items():
        stack = place.part.name if place.part is not None else place.module_name
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
    if is_norm(module):  # whose gain may be called gamma
        return None
    # A depthwise convolution reads a kernel of a fixed size in one channel: no width enters it.
    depthwise = isinstance(module, nn.modules.conv._ConvNd) and 1 < module.in_channels == module.groups
    if depthwise or ends_with(place.leaf, KEPT_PARAMETERS) or ends_with(place.module_name, KEPT_MODULES):
        return Role.KEEP
    return None


def _of_module(place: Place, names: set[str]) -> Role | None:
    name, module = place.module_name, place.module
    if isinstance(module, EMBEDDING_TYPES):
        if not ends_with(name, POSITION_NAMES):
            return Role.EMBEDDING
        # Whisper's table of sines is a frozen embedding.
        return Role.POSITION if place.parameter.requires_grad else Role.KEEP
    if is_norm(module):
        return Role.NORM
    if isinstance(module, nn.MultiheadAttention) or is_router(name, names):
        # A router reads the residual stream as q does; its few logits are compared with each other only.
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
    """Return the role of a parameter that a module of an unknown type holds itself, such as stacked experts."""
    if place.is_bias:
        experts = place.parameter.ndim > 1 and "experts" in place.module_name.split(".")
        zero = is_constant(place.parameter) and place.parameter.detach().reshape(-1)[0].item() == 0.0
        return Role.BIAS if experts or zero else None
    if isinstance(place.module, MATRIX_TYPES) or is_conv1d(place.module):
        return None
    if place.parameter.numel() == 1:
        return Role.KEEP  # a gate or a temperature
    if place.parameter.ndim < 2 and place.part is None:
        return None
    name = place.name if place.part is None else place.part.name
    tables = (
        *((RAW_OUTPUT_NAMES, Role.OUTPUT), (RAW_HIDDEN_NAMES, Role.HIDDEN)),
        *((POSITION_NAMES, Role.POSITION), (TOKEN_NAMES, Role.EMBEDDING)),
    )
    return next((role for known, role in tables if ends_with(name, known)), None)
