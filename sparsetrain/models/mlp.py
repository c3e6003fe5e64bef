"""Feed-forward layers: GELU (up, down) and SwiGLU (gate, up, down)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.models.config import ModelConfig


class MLP(nn.Module):
    """``down(gelu(up(x)))``, or ``down(silu(gate(x)) * up(x))`` (Shazeer 2020).

    The GELU is exact, or approximated by tanh (Hendrycks and Gimpel 2016) with ``mlp="gelu_tanh"``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.ffn_width
        self.up = nn.Linear(config.d_model, width, bias=config.bias)
        self.gate = nn.Linear(config.d_model, width, bias=config.bias) if config.mlp == "swiglu" else None
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"
        self.down = nn.Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., d_model]`` to ``[..., d_model]``."""
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate=self.approximate))
        return self.down(F.silu(self.gate(x)) * self.up(x))
