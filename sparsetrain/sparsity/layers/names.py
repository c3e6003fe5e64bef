"""Usual names of heads and routers in models of others: one table, for masks and for roles.

A name must match whole components at the end of a qualified name: ``model.lm_head`` is a head, while the layer
``heads.0.key`` of an attention head and ``my_header.fc`` are not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Layers that turn the last hidden state into logits or scores.
HEAD_NAMES: tuple[str, ...] = (
    *("head", "lm_head", "embed_out", "score", "classifier", "qa_outputs", "output"),
    *("output_layer", "output_projection", "to_logits", "logits", "classification_head", "mlm_head", "nsp_head"),
    *("cls_head", "score_head", "value_head", "v_head", "policy_head", "reward_head", "regression_head"),
    *("token_head", "prediction_head", "vocab_projector", "predictions.decoder", "seq_relationship"),
)
# Of these, the names that inner layers also have; inside a numbered block they are not heads.
_AMBIGUOUS = ("output", "score", "output_layer", "output_projection", "logits")
# The layers of a head of several layers, beside numbers: `lm_head.dense`, `classifier.out_proj`, `v_head.summary`.
_PARTS_OF_HEADS = ("dense", "decoder", "out_proj", "linear", "fc", "proj", "summary")

# Layers that route tokens to experts. A gate is a router if `experts` is beside it; in a gated MLP, `gate` is a matrix
# like the others.
ROUTER_NAMES: tuple[str, ...] = (
    *("router", "router.classifier", "router.layer", "router.proj", "router.weight", "gate.wg"),
    *("shared_expert_gate", "gating_network"),
)
GATE_NAMES: tuple[str, ...] = ("gate", "gating", "gate.weight")


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Whether the last components of a dotted name are one of ``ends``, which may have dots themselves."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def is_head(name: str) -> bool:
    """Whether a module of that name is an output head."""
    if not ends_with(name, HEAD_NAMES):
        return False
    return not (ends_with(name, _AMBIGUOUS) and any(part.isdigit() for part in name.split(".")[:-1]))


def is_part_of_head(name: str) -> bool:
    """Whether a module of that name is an output head, or a layer of one: ``head.0``, ``lm_head.dense``."""
    if is_head(name):
        return True
    parent, _, last = name.rpartition(".")
    if not (last.isdigit() or last in _PARTS_OF_HEADS):
        return False
    return is_head(parent) and not ends_with(parent, _AMBIGUOUS)


def is_router(name: str, others: Collection[str] = ()) -> bool:
    """Whether a module of that name routes tokens to experts.

    Args:
        others: names of the model's other modules or parameters; a gate is a router if its experts are among them.
    """
    if ends_with(name, ROUTER_NAMES):
        return True
    gate = next((gate for gate in GATE_NAMES if ends_with(name, (gate,))), None)
    if gate is None:
        return False
    beside = f"{name[: len(name) - len(gate)]}experts"
    return any(other == beside or other.startswith(f"{beside}.") for other in others)


def default_reason(name: str, others: Collection[str] = ()) -> str | None:
    """Return why a linear layer of that name stays dense by default: ``head``, ``router`` or ``embedding``, or None."""
    if "embed" in name and not is_head(name):
        return "embedding"
    if is_part_of_head(name):
        return "head"
    return "router" if is_router(name, others) else None
