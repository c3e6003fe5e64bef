"""Two tiny models, and a parameterization for them."""

from __future__ import annotations

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparsetrain.parameterization import Parameterization

P = Parameterization
VOCAB = 37
# The base has one layer and the model two: m_L = 2, so the residual multiplier at alpha = 1/2 is 1 / sqrt(2).
RULES = P.supar_completep(16, 0.5, 1, alpha=0.5, alpha_in=2.0, alpha_out=3.0, embedding_lr_multiplier=4.0)


def gpt2(width: int = 32) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=width, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def mlp(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
