"""``nn.MultiheadAttention`` whose input projections are layers, so that they can be sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.sparsity.layers.foreign import Rows, move_hooks, others_attributes
from sparsetrain.sparsity.layers.linear import SparseLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class DenseView(Tensor):
    """A dense matrix made from sparse layers, whose type makes torch's encoder skip its fused path."""


class SparseMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the layers ``q_proj``, ``k_proj`` and ``v_proj`` in place of ``in_proj_weight``.

    `sparsetrain.sparsify` puts it in the place of an ``nn.MultiheadAttention``, and `sparsetrain.densify` gives that
    one back. Arguments and results of ``forward`` are the same. Every projection is called as a module, the output
    projection too, so hooks and gradients of layers work. ``in_proj_bias``, ``bias_k``, ``bias_v`` and ``out_proj``
    are the objects of the original. ``in_proj_weight`` ``[3 * embed_dim, embed_dim]`` is read-only and made on access.
    """

    q_proj: SparseLinear | nn.Linear
    k_proj: SparseLinear | nn.Linear
    v_proj: SparseLinear | nn.Linear

    def __init__(self, attention: nn.MultiheadAttention, projections: Mapping[str, nn.Module]) -> None:
        # The constructor of the base class would make parameters that are properties here.
        nn.Module.__init__(self)
        for key in others_attributes(attention):
            setattr(self, key, vars(attention)[key])
        for name in PROJECTIONS:
            setattr(self, name, projections[name])
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            if name in attention._parameters:
                self.register_parameter(name, attention._parameters[name])
        self.out_proj = attention.out_proj
        move_hooks(attention, self)
        self.training = attention.training

    def dense(self) -> nn.MultiheadAttention:
        """Return the module that this one replaced, with the present weights; the projections must be dense layers."""
        dense = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        nn.Module.__init__(dense)
        for key in others_attributes(self):
            setattr(dense, key, vars(self)[key])
        layers = [getattr(self, name) for name in PROJECTIONS]
        if self._qkv_same_embed_dim:
            trains = any(layer.weight.requires_grad for layer in layers)
            dense.in_proj_weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), trains)
        else:
            dense.register_parameter("in_proj_weight", None)
        for name, layer in zip(_WEIGHTS, layers, strict=True):
            dense.register_parameter(name, None if self._qkv_same_embed_dim else layer.weight)
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            if name in self._parameters:
                dense.register_parameter(name, self._parameters[name])
        dense.out_proj = self.out_proj
        move_hooks(self, dense)
        dense.training = self.training
        return dense

    def joined_projections(self) -> dict[str, tuple[list[str], Callable[[list[Tensor]], Tensor]]]:
        """Return by name of each weight of `dense`: the keys of the weights here, and what joins them."""
        keys = [f"{name}.weight" for name in PROJECTIONS]
        if self._qkv_same_embed_dim:
            return {"in_proj_weight": (keys, torch.cat)}
        return {weight: ([key], lambda weights: weights[0]) for weight, key in zip(_WEIGHTS, keys, strict=True)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The projections load after this, from what is left here.
        whole = state_dict.pop(f"{prefix}in_proj_weight", None)
        parts = () if whole is None else whole.chunk(3)
        parts = parts or [state_dict.pop(prefix + key) for key in _WEIGHTS if prefix + key in state_dict]
        if len(parts) == len(PROJECTIONS):
            state_dict |= {f"{prefix}{name}.weight": part for name, part in zip(PROJECTIONS, parts, strict=True)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The three projections as one dense matrix, or None if keys or values have a different width."""
        if not self._qkv_same_embed_dim:
            return None
        return torch.cat([getattr(self, name).weight for name in PROJECTIONS]).as_subclass(DenseView)

    @property
    def q_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The dense query projection if keys or values have a different width, else None."""
        return None if self._qkv_same_embed_dim else self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The dense key projection if keys or values have a different width, else None."""
        return None if self._qkv_same_embed_dim else self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The dense value projection if keys or values have a different width, else None."""
        return None if self._qkv_same_embed_dim else self.v_proj.weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``nn.MultiheadAttention`` does; see there for shapes and masks.

        Raises:
            RuntimeError: ``is_causal`` without ``attn_mask``, or nested tensors.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if query.is_nested:
            raise RuntimeError("SparseMultiheadAttention takes no nested tensors: pad, and give key_padding_mask")
        batched = query.dim() == 3
        inputs = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._project(*inputs)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v ``[batch, heads, length, head_dim]``, with the extra positions of keys and values."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.in_proj_bias is not None:
            of_q, of_k, of_v = self.in_proj_bias.chunk(3)
            q, k, v = q + of_q, k + of_k, v + of_v
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, length: int) -> Tensor | None:
        """Return both masks as one to add to the scores ``[batch, heads, query length, length]``."""
        masks = []
        if attn_mask is not None:
            shape = (len(q), self.num_heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else (1, 1, *attn_mask.shape)
            masks.append(_additive(attn_mask, q.dtype).view(shape))
        if padding is not None:
            masks.append(_additive(padding, q.dtype)[:, None, None, :])
        # Every query sees the extra positions of keys and values.
        padded = [F.pad(mask, (0, length - mask.shape[-1])) for mask in masks]
        return sum(padded[1:], padded[0]) if padded else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores from a bool mask, true for hidden positions, or from an additive one."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def projections_of(name: str, attention: nn.MultiheadAttention) -> dict[str, Rows]:
    """Return the input projections of an attention module as linear layers by qualified name, sharing its memory."""
    width = attention.embed_dim
    prefix = f"{name}." if name else ""
    parts = {}
    for index, (projection, weight) in enumerate(zip(PROJECTIONS, _WEIGHTS, strict=True)):
        whole = attention._parameters["in_proj_weight"]
        matrix = attention._parameters[weight] if whole is None else whole[index * width : (index + 1) * width]
        assert matrix is not None
        parts[prefix + projection] = Rows(name, projection, matrix, attention.training)
    return parts


def can_split(attention: nn.Module, uses: Mapping[int, int]) -> bool:
    """Whether the input projections of a module can become layers: it is of torch's class and shares no parameter."""
    if type(attention) is not nn.MultiheadAttention or "forward" in vars(attention) or attention._buffers:
        return False
    names = ("in_proj_weight", *_WEIGHTS)
    weights = [weight for key in names if (weight := attention._parameters.get(key)) is not None]
    plain = all(
        type(weight) is nn.Parameter
        and uses.get(id(weight), 0) == 1
        and weight.is_floating_point()
        and not weight.is_meta
        and not weight._backward_hooks
        for weight in weights
    )
    return plain and len(weights) in (1, 3) and set(attention._modules) == {"out_proj"}
