"""What a summary counts, against sums over the model itself, and the one warning of matrices that stay dense."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sparsetrain import summary
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SET, MaskManager, SparsityConfig, SparsityGroup, densify, sparsify


class Experts(nn.Module):
    """Matrices of experts in one tensor, beside a router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))
        self.flat = nn.Parameter(torch.randn(64, 32))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 64))
        self.router = nn.Linear(32, 4)


def zoo() -> nn.ModuleDict:
    torch.manual_seed(0)
    tied = nn.Linear(32, 20, bias=False)
    embedding = nn.Embedding(20, 32)
    tied.weight = embedding.weight
    return nn.ModuleDict(
        {
            "fc": nn.Linear(32, 32),
            "embedding": embedding,
            "norm": nn.LayerNorm((4, 32)),
            "conv": nn.Conv2d(4, 8, 3),
            "up": nn.ConvTranspose1d(8, 8, 3),
            "rnn": nn.GRU(32, 32),
            "bilinear": nn.Bilinear(4, 4, 16),
            "attn": nn.MultiheadAttention(32, 4),
            "moe": Experts(),
            "score": nn.Linear(32, 2),
            "decoder": tied,
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        }
    )


LEFT_OUT = ["*norm*", "conv", "up", "rnn", "bilinear", "moe*", "score", "decoder"]


def test_reasons_of_everything_that_stays_dense() -> None:
    """Each kind of module is named for what it is; a linear layer that could be sparse is excluded."""
    model = sparsify(zoo(), 0.5, exclude=[*LEFT_OUT, "attn.k_proj"], seed=0)
    reasons = {row.name: row.reason for row in summary(model).rows}
    assert reasons == {
        "fc": "",
        "embedding": "embedding",
        "norm": "norm",
        "conv": "convolution",
        "up": "convolution",
        "rnn.weight_ih_l0": "RNN",
        "rnn.weight_hh_l0": "RNN",
        "bilinear": "bilinear",
        "attn.q_proj": "",
        "attn.k_proj": "excluded",
        "attn.v_proj": "",
        "attn.out_proj": "",
        "moe.gate_up_proj": "excluded",
        "moe.flat": "stacked experts",
        "moe.router": "router",
        "score": "head",
        "decoder": "head",
        "normed.parametrizations.weight.original0": "weight is computed (a parametrization)",
        "normed.parametrizations.weight.original1": "weight is computed (a parametrization)",
    }
    assert {row.reason for row in summary(nn.ModuleDict({"fc": nn.Linear(2, 2)})).rows} == {"not sparse yet"}


def test_counts_are_those_of_the_model() -> None:
    """Shares add up, shared weights count once, and zeros are the same whether a layer stores them or not."""
    dense = zoo()
    numel = sum(parameter.numel() for parameter in dense.parameters())
    matrices = sum(p.numel() for name, p in dense.named_parameters() if p.ndim > 1 and "bias" not in name)
    model = sparsify(copy.deepcopy(dense), 0.5, exclude=LEFT_OUT, seed=0)
    found, back = summary(model), summary(densify(copy.deepcopy(model)))
    zeros = 5 * 32 * 32 // 2 - 32 * 32 // 2 + 32 * 32 // 2
    assert (found.parameters, found.matrix_parameters) == (numel, matrices)
    assert (found.nnz, found.matrix_nnz) == (numel - zeros, matrices - zeros)
    assert (back.parameters, back.nnz, back.matrix_sparsity) == (found.parameters, found.nnz, found.matrix_sparsity)
    assert found.sparsity == pytest.approx(zeros / numel)
    assert found.sparse_share == pytest.approx(2 * zeros / numel)
    row = found.rows[0]
    assert (row.kind, row.shape, row.parameters, row.nnz) == ("SparseLinear", (32, 32), 1024, 512)
    assert (row.density, row.is_sparse, row.share) == (0.5, True, 1024 / numel)


def test_the_table_has_a_line_for_every_matrix() -> None:
    """Plain text: a line of titles, one for each matrix, and two of totals."""
    model = sparsify(zoo(), 0.5, exclude=LEFT_OUT, seed=0)
    text = str(summary(model))
    lines = text.splitlines()
    assert len(lines) == len(summary(model).rows) + 3
    assert lines[1].split()[:7] == ["fc", "SparseLinear", "32", "x", "32", "1,024", "512"]
    assert lines[1].endswith("(sparse)")
    assert "sparsity" in lines[-1]
    assert text.isascii()


def test_a_whole_mixture_of_experts_is_as_sparse_as_asked() -> None:
    """The experts of a Mixtral, which hold most weights, are among its layers; a model without values is counted."""
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = sparsify(AutoModelForCausalLM.from_config(config), 0.75, exclude=["*head*", "*0.mlp.experts*"], seed=0)
    rows = {row.name.partition("layers.")[2]: row for row in summary(model).rows}
    assert (rows["0.mlp.gate"].reason, rows["1.mlp.gate"].reason) == ("router", "router")
    assert rows["0.mlp.experts.gate_up_proj"].reason == "excluded"
    assert rows["1.mlp.experts.gate_up_proj_layers.3"].density == 0.25
    empty = summary(AutoModelForCausalLM.from_config(config).to("meta"))
    assert empty.parameters == empty.nnz == summary(model).parameters


@pytest.mark.parametrize(
    "act", [lambda m, **o: sparsify(m, 0.5, seed=0, **o), lambda m, **o: MaskManager(m, SET(sparsity=0.5), seed=0, **o)]
)
def test_one_warning_names_large_matrices_that_the_user_did_not_leave_out(act: Callable[..., Any]) -> None:
    """With their share; heads, embeddings, norms and small matrices are expected, and what is excluded is known."""
    part = ["normed"]
    with pytest.warns(UserWarning, match="these matrices stay dense") as caught:
        act(zoo(), exclude=["*head*", "*norm*", "score", "decoder", "moe.router"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    said = str(caught[0].message)
    for name in ("conv", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "moe.flat"):
        assert f"{name} (" in said
    for name in ("fc", "embedding", "norm", "score", "decoder", "attn", "moe.gate_up_proj", *part):
        assert f" {name} (" not in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act(zoo(), exclude=LEFT_OUT)
        act(zoo(), include=["fc", "attn*"])


def test_a_group_without_sparsity_and_given_masks_are_said_on_purpose() -> None:
    """Nothing is warned of where the user named the layers."""
    model = nn.ModuleDict({"fc": nn.Linear(32, 32), "conv": nn.Conv2d(4, 8, 3)})
    sparsify(copy.deepcopy(model), 0.5, include=["fc"], seed=0)
    sparsify(copy.deepcopy(model), masks={"fc": torch.eye(32, dtype=torch.bool)})
    sparsify(copy.deepcopy(model), 0.0)
    other = nn.ModuleDict({"fc": nn.Linear(32, 32), "fc2": nn.Linear(32, 32)})
    sparsify(other, plan=SparsityConfig(sparsity=0.5, groups=[SparsityGroup("fc2", 0.0)]), seed=0)
    assert [row.reason for row in summary(other).rows] == ["", "excluded"]


def test_a_head_that_was_asked_for_by_name_is_said_to_stay_dense() -> None:
    """The default of exclude wins over include, and a line says so."""
    model = nn.ModuleDict({"fc": nn.Linear(32, 32), "score": nn.Linear(32, 2)})
    with pytest.warns(UserWarning, match=r"stay dense: score \(head"):
        sparsify(copy.deepcopy(model), 0.5, include=["fc", "score"], seed=0)
    with pytest.raises(UserError, match=r"exclude=\[\] takes score, which stay dense by default"):
        sparsify(model, 0.5, include=["score"], seed=0)
    sparsify(model, 0.5, include=["fc", "score"], exclude=[], seed=0)
    assert summary(model).sparsity > 0.4


def test_a_model_without_linear_layers_to_thin_is_refused_with_what_it_has() -> None:
    """The line names the large matrices that are none."""
    with pytest.raises(UserError, match=r"no linear layer matches.*conv \(convolution, "):
        sparsify(nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "head": nn.Linear(8, 2)}), 0.5, seed=0)


def test_the_projects_own_models_and_gpt2_give_no_warning() -> None:
    """All that stays dense there is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Transformer(
            ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4), plan=SparsityConfig(sparsity=0.5)
        )
        sparsify(GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=24, n_layer=1, n_head=3)), 0.5)
    assert {row.reason for row in summary(model).rows} <= {"", "embedding", "head"}
