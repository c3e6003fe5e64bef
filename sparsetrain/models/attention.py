"""Causal multi-head attention with grouped queries, with or without a key-value cache.

Shapes: B batch, T tokens, S keys (T plus the tokens in a cache), H query heads, K key and value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparsetrain.models.config import ModelConfig
from sparsetrain.models.cpu_attention import attend_to_cache, fused_attention, suits
from sparsetrain.models.kv_cache import KVCache, positions_after
from sparsetrain.models.positions import (
    alibi_bias,
    alibi_features,
    alibi_slopes,
    rope_frequencies,
    rope_tables,
    rotate,
)
from sparsetrain.sparsity.layers.ops import dispatched

_QUERY_BLOCK = 128  # queries per explicit mask [H, block, S]; a mask for all queries could be too large


@dataclass
class Span:
    """What all layers share in one call: the positions of its tokens, and the tables computed from them.

    Attributes:
        first: position of the first token, in the longest row; above 0 only with a cache.
        length: T.
        firsts: position of the first token of each row, int64 ``[B]``, if rows differ in it.
        factor: s, by which ALiBi or RoPE is stretched in this call; see `ModelConfig.positions_scale`.
        rope: cosines and sines for rotary positions, ``[T, 1, R]``, or ``[B, T, 1, R]`` if rows differ.
        slopes: ALiBi slopes ``[H]``, or zeros without ALiBi; set if `fused_attention` computes the call.
        alibi: extra features ``[T, 3 H, E]`` for ALiBi; set if torch's kernel computes a call without a filled cache.
        lengths: tokens of each row in the cache, int64 ``[B]``; set if `attend_to_cache` may compute the call.
        numbers: what `attend_to_cache` takes beside them for ``scale``.
        scale: the factor of scores that ``numbers`` holds.
    """

    first: int
    length: int
    firsts: Tensor | None = None
    factor: float = 1.0
    rope: tuple[Tensor, Tensor] | None = None
    slopes: Tensor | None = None
    alibi: Tensor | None = None
    lengths: Tensor | None = None
    numbers: Tensor | None = None
    scale: float = 1.0


def make_span(config: ModelConfig, scale: float, x: Tensor, first: int, firsts: Tensor | None = None) -> Span:
    """Return the span of tokens ``x`` ``[B, T, d_model]`` whose first position is ``first``, or ``firsts`` by row."""
    length = x.shape[1]
    span = Span(first, length, firsts, config.positions_factor(first + length))
    if config.positions == "rope":
        frequencies, multiplier = rope_frequencies(
            config.d_rotary, config.rope_base, config.rope_scaling, span.factor, config.max_context
        )
        span.rope = rope_tables(first if firsts is None else firsts, length, frequencies, x.device, multiplier)
    alibi, dtype = config.positions == "alibi", attention_dtype(x)
    ours = suits(dtype, x.device)
    if first > 0 and not (ours and length == 1):
        return span
    slopes = alibi_slopes(config.n_heads) / span.factor
    if ours:
        slopes = slopes.float() if alibi else torch.zeros_like(slopes, dtype=torch.float32)
    if first > 0:
        span.lengths = torch.full((len(x),), first) if firsts is None else firsts
        span.numbers, span.scale = torch.cat((slopes.new_full((1,), scale), slopes)), scale
    elif ours:
        span.slopes = slopes
    elif alibi:
        span.alibi = alibi_features(slopes, length, scale, config.d_head, dtype, x.device)
    return span


def attention_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for attention: the autocast dtype, except that a CPU uses float32 instead of a 16-bit type.

    The CPU's fused kernel takes 4 to 7 times longer in bfloat16 than in float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return torch.float32 if device == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype


class Attention(nn.Module):
    """``out(softmax(scale * q k^T + position bias) v)``, in which each query sees tokens up to its own position.

    The rows of ``qkv`` are all queries, then all keys, then all values, head by head.

    Args:
        config: shapes and positions.
        scale: factor of the scores, before the position bias is added; None is 1 / sqrt(d_head).
    """

    def __init__(self, config: ModelConfig, scale: float | None = None) -> None:
        super().__init__()
        self.n_heads, self.kv_heads, self.d_head = config.n_heads, config.kv_heads, config.d_head
        self.positions = config.positions
        self.scale = self.d_head**-0.5 if scale is None else scale
        rows = (self.n_heads + 2 * self.kv_heads) * self.d_head
        self.qkv = nn.Linear(config.d_model, rows, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, span: Span, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Map ``x`` ``[B, T, d_model]`` to the same shape; ``layer`` is this layer's index in the cache."""
        qkv = self.qkv(x)
        if cache is not None and span.numbers is not None and self._decodes(qkv, span, cache):
            return self.out(self._decode(qkv, span, cache, layer))
        qkv = rearrange(qkv, "b t (h d) -> b t h d", d=self.d_head)
        if span.rope is not None:
            turned, v = qkv.split((self.n_heads + self.kv_heads, self.kv_heads), dim=2)
            qkv = torch.cat((rotate(turned, *span.rope), v), dim=2)
        if cache is not None:
            q, k, v = qkv.split((self.n_heads, self.kv_heads, self.kv_heads), dim=2)
            k, v = cache.append(layer, k, v)
            if span.first > 0:
                return self.out(self._attend_to_cache(q, k, v, span))
        return self.out(self._attend(qkv, span))

    def _decodes(self, qkv: Tensor, span: Span, cache: KVCache) -> bool:
        """Return whether a kernel computes the attention of one new token to a cache: without gradients, in float32."""
        graph = torch.is_grad_enabled() and qkv.requires_grad
        return self.scale == span.scale and not graph and cache.keys.dtype == torch.float32 and not dispatched(qkv)

    def _decode(self, qkv: Tensor, span: Span, cache: KVCache, layer: int) -> Tensor:
        """Append one token a row to the cache and return its attention, ``[B, 1, H D]``."""
        assert span.lengths is not None
        assert span.numbers is not None
        if span.rope is not None:
            turned, v = rearrange(qkv, "b t (h d) -> b t h d", d=self.d_head).split(
                (self.n_heads + self.kv_heads, self.kv_heads), dim=2
            )
            qkv = torch.cat((rotate(turned, *span.rope), v), dim=2).flatten(2)
        held = cache.room(layer, 1)
        y = attend_to_cache(qkv[:, 0].float(), *held, span.lengths, span.numbers, self.kv_heads)
        return y[:, None].to(qkv.dtype)

    def _attend(self, qkv: Tensor, span: Span) -> Tensor:
        """Causal attention of tokens ``[B, T, H + 2 K, D]`` to one another: ``[B, T, H D]``."""
        dtype, alibi = qkv.dtype, span.alibi
        qkv = qkv.to(attention_dtype(qkv))
        if span.slopes is not None:
            return fused_attention(qkv, span.slopes, self.kv_heads, self.scale).to(dtype)
        q, k, v = qkv.split((self.n_heads, self.kv_heads, self.kv_heads), dim=2)
        if alibi is not None:
            if self.kv_heads < self.n_heads:
                qkv = torch.cat((q, self._repeat(k), self._repeat(v)), dim=2)
            extra = alibi.expand(qkv.shape[0], -1, -1, -1)
            # One copy appends the features of queries, keys and values.
            q, k, v = torch.cat((qkv, extra), dim=-1).chunk(3, dim=2)
        else:
            k, v = self._repeat(k), self._repeat(v)
        y = self._fused(q, k, v, causal=True)[..., : self.d_head]
        return rearrange(y, "b h t d -> b t (h d)").to(dtype)

    def _attend_to_cache(self, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        """Attention of the queries ``[B, T, H, D]`` of a span to keys ``[B, S, K, D]``: ``[B, T, H D]``."""
        dtype = attention_dtype(q)
        k, v = self._repeat(k.to(dtype)), self._repeat(v.to(dtype))
        blocks = []
        for start in range(0, q.shape[1], _QUERY_BLOCK):
            block = q[:, start : start + _QUERY_BLOCK].to(dtype)
            mask = self._mask(span, start, block, k.shape[1])
            y = self._fused(block, k, v, mask=mask)
            blocks.append(rearrange(y, "b h t d -> b t (h d)"))
        return torch.cat(blocks, dim=1).to(q.dtype)

    def _mask(self, span: Span, start: int, queries: Tensor, n_keys: int) -> Tensor | None:
        """Return the additive mask of the queries ``[B, Q, H, D]`` of a span from the one at ``start`` on.

        It is ``[1 or B, 1 or H, Q, n_keys]``.
        """
        alibi, count = self.positions == "alibi", queries.shape[1]
        if not alibi and span.firsts is None and count == 1 and span.first + start == n_keys - 1:
            return None
        firsts = torch.tensor([span.first], device=queries.device) if span.firsts is None else span.firsts
        places = positions_after(firsts + start, count)[:, None, :, None]
        keys = torch.arange(n_keys, device=queries.device)
        if alibi:
            bias = alibi_bias(alibi_slopes(self.n_heads) / span.factor, places, keys, queries)
        else:
            bias = torch.zeros(1, device=queries.device, dtype=queries.dtype)
        return bias.masked_fill(keys > places, -torch.inf)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention of ``[B, T, H, D]`` to ``[B, S, H, D]``: ``[B, H, T, D]``; ``causal`` needs S = T and no mask."""
        if mask is not None:
            mask = mask.expand(q.shape[0], *mask.shape[1:])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # Without this, autocast would cast float32 on a CPU back to 16 bits.
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)

    def _repeat(self, x: Tensor) -> Tensor:
        """Repeat each key or value head for each query head that shares it: ``[B, S, K, D]`` to ``[B, S, H, D]``."""
        groups = self.n_heads // self.kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=2)
