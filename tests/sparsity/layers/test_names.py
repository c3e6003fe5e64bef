"""The table of heads and routers, against names that models in use have."""

from __future__ import annotations

import pytest

from sparsetrain.sparsity.layers.names import is_head, is_part_of_head, is_router

HEADS = ["head", "lm_head", "model.lm_head", "score", "classifier", "qa_outputs", "output", "embed_out", "heads.head"]
PARTS = ["head.0", "classifier.out_proj", "lm_head.dense", "lm_head.decoder", "cls.predictions.decoder"]
NO_HEADS = [
    *("heads.0.key", "sa.heads.3.query", "my_header.fc", "header", "lm_head.attn.q_proj", "head.0.key", "subhead"),
    *("layer.0.output.dense", "blocks.1.attn.output", "layers.0.attention.score", "classifier.layers.0.fc1"),
    *("blocks.0.attn.out", "blocks.0.mlp.gate", "headless"),
]


def test_heads_are_known_by_the_end_of_their_names() -> None:
    """Whole parts at the end of a name count; a name that only contains one does not."""
    assert all(is_head(name) and is_part_of_head(name) for name in HEADS)
    assert all(is_part_of_head(name) and not is_head(name) for name in PARTS[:4])
    assert is_head(PARTS[4])
    assert not any(is_part_of_head(name) for name in NO_HEADS)


@pytest.mark.parametrize(
    ("name", "others", "expected"),
    [
        ("layers.0.mlp.router", (), True),
        ("layer.1.mlp.router.classifier", (), True),
        ("layers.0.mlp.shared_expert_gate", (), True),
        ("layers.0.mlp.gate", ("layers.0.mlp.experts.0.w1",), True),
        ("layers.0.mlp.gate", ("layers.0.mlp.experts",), True),
        ("layers.0.mlp.gate", ("layers.1.mlp.experts", "layers.0.mlp.expertsize"), False),
        ("blocks.0.mlp.gate", ("blocks.0.mlp.up", "blocks.0.mlp.down"), False),
        ("gate_proj", ("experts",), False),
    ],
)
def test_a_gate_is_a_router_where_it_stands_beside_experts(name: str, others: tuple[str, ...], expected: bool) -> None:
    """The gate of a gated MLP is a matrix like the others; that of a mixture of experts is a router."""
    assert is_router(name, others) is expected
