"""A check that attention heads are as wide as those of the base, because the attention scale is the model's own."""

from __future__ import annotations

import warnings

from torch import nn

from sparsetrain import wrappers
from sparsetrain.parameterization.rules import Parameterization

_COUNTS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead")
_WIDTHS = ("head_dim", "d_head", "dim_head", "head_size", "attention_head_size", "key_value_proj_dim")
_QUERIES = ("q_proj", "query", "to_q", "wq", "q_lin", "q")
_MODEL_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")


def warn_of_head_widths(model: nn.Module, base: nn.Module, rules: Parameterization) -> None:
    """Warn if the heads of ``model`` are wider or narrower than those of ``base``.

    muP and its relatives scale attention by 1 / d_head. A foreign model uses its own scale, usually 1 / sqrt(d_head),
    which differs from that by a constant only if d_head stays the same. Rules with ``attention_scale="sqrt"`` ask for
    that scale, so they cause no warning.
    """
    if rules.attention_scale == "sqrt":
        return
    named = dict(wrappers.named_modules(base))
    for name, module in wrappers.named_modules(model):
        other = named.get(name)
        own, theirs = _head_width(module), None if other is None else _head_width(other)
        if own is not None and theirs is not None and own != theirs:
            warnings.warn(
                f"parameterize: d_head is {own} in '{name or type(module).__name__}' and {theirs} in the base: "
                f"{rules.scheme} scales attention by 1 / d_head, but the model's own scale is not changed; widen by "
                f"the number of heads, or set its scale to {theirs}/{own} of the base's",
                UserWarning,
                stacklevel=3,
            )
            return


def _head_width(module: nn.Module) -> int | None:
    """Return the width of an attention head from a module's attributes or its configuration, or None if unknown."""
    count, width = _number(module, _COUNTS), _number(module, _WIDTHS)
    if count is not None:
        if width is not None:
            return width
        for name in _QUERIES:
            outputs = getattr(getattr(module, name, None), "out_features", None)
            if isinstance(outputs, int):
                return outputs // count
        whole = _number(module, _MODEL_WIDTHS)
        if whole is not None:
            return whole // count
    config = getattr(module, "config", None)
    explicit = _number(config, ("head_dim", "d_kv"))
    heads, whole = _number(config, _COUNTS), _number(config, _MODEL_WIDTHS)
    if explicit is not None or heads is None or whole is None:
        return explicit
    return whole // heads


def _number(owner: object, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
