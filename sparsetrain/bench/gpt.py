"""A whole training step of the library's transformer, dense and sparse, and of a GPT written in plain torch.

Shapes: B batch, T tokens, D = d_model, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.bench.config import BLOCK_BACKENDS, GptSection
from sparsetrain.bench.contenders import LayerCase
from sparsetrain.bench.memory import peak_bytes
from sparsetrain.bench.peers import Skipped
from sparsetrain.bench.timing import Work
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparseLinear, SparsityConfig
from sparsetrain.sparsity.backends.base import BACKENDS, resolve_backend

Loss = Callable[[Tensor, Tensor], Tensor]


class PlainGPT(nn.Module):
    """A model of the same shape in plain torch: pre-norm blocks, learned positions, fused attention, a tied head.

    It is what a user of plain torch would write. It shows whether the library's dense model, the baseline of all
    whole-model numbers, is a fair one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.ffn_width
        self.heads = config.n_heads
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn_norm": nn.LayerNorm(width, bias=False),
                    "qkv": nn.Linear(width, 3 * width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "mlp_norm": nn.LayerNorm(width, bias=False),
                    "up": nn.Linear(width, hidden, bias=False),
                    "down": nn.Linear(hidden, width, bias=False),
                }
            )
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        nn.init.normal_(self.embed.weight, std=config.init_std)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of ``targets`` ``[B, T]`` after ``tokens`` ``[B, T]``."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            q, k, v = block["qkv"](block["attn_norm"](x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](attended.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["mlp_norm"](x))))
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class TrainingStep:
    """Loss, gradients, clipping and a fused AdamW step on one fixed batch."""

    def __init__(self, model: nn.Module, gpt: GptSection, seed: int) -> None:
        self.model = model.train()
        draws = torch.randint(
            gpt.vocab_size, (gpt.batch, gpt.context + 1), generator=seeds.generator(seed, "bench", "tokens")
        )
        self.tokens, self.targets = draws[:, :-1].contiguous(), draws[:, 1:].contiguous()
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True, foreach=False
        )
        self.update_seconds = 0.0

    def forward(self) -> Tensor:
        loss: Any = self.model.loss
        return loss(self.tokens, self.targets)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        start = time.perf_counter()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_seconds += time.perf_counter() - start

    @property
    def work(self) -> Work:
        return Work(self.forward, self.backward)

    def peak_activation_bytes(self) -> int:
        """Return the peak memory of forward and backward pass, without the gradients of the parameters."""
        peak = peak_bytes(
            lambda: self.forward().backward(), lambda: [p.grad for p in self.parameters if p.grad is not None]
        )
        self.optimizer.zero_grad(set_to_none=True)
        return peak


def dense_model(config: ModelConfig) -> Transformer:
    """Return the dense model, which contains only ``nn.Linear`` layers."""
    return Transformer(config)


def sparse_model(config: ModelConfig, sparsity: float, backend: str, block: tuple[int, int]) -> Transformer:
    """Return the model with sparse hidden matrices, made by the library's own surgery or in blocks.

    Raises:
        Skipped: this backend cannot be measured here; the message says why.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise Skipped(f"backend '{backend}' does not exist in this version")
    if backend not in BLOCK_BACKENDS:
        return Transformer(config, plan=SparsityConfig(sparsity=sparsity, backend=backend))

    def made(linear: nn.Linear, case: LayerCase) -> nn.Module:
        pattern = case.pattern(block)
        try:
            resolve_backend(backend, pattern, 1, torch.float32, torch.device("cpu"))
        except UserError as error:
            raise Skipped(str(error)) from None
        return SparseLinear.from_linear(linear, pattern, backend)

    return replaced(Transformer(config), sparsity, block, made)


def replaced(
    model: Transformer, sparsity: float, block: tuple[int, int], made: Callable[[nn.Linear, LayerCase], nn.Module]
) -> Transformer:
    """Return ``model`` with each hidden matrix replaced by ``made(linear, case)``; each case has a seed of its own."""
    for number, (name, linear) in enumerate(hidden_linears(model).items()):
        case = LayerCase(linear.in_features, linear.out_features, 1, sparsity, block, number)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made(linear, case))
    return model


def hidden_linears(model: Transformer) -> dict[str, nn.Linear]:
    """Return the matrices that are made sparse, those of the blocks, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")}


class _TimedProduct(torch.autograd.Function):
    """``x @ W.T`` for x ``[n, K]``; it adds the time of its three products to ``clock[0]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, clock: list[float]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.clock = clock
        start = time.perf_counter()
        y = F.linear(x, weight)
        clock[0] += time.perf_counter() - start
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        start = time.perf_counter()
        grad_x, grad_weight = g @ weight, g.t() @ x
        ctx.clock[0] += time.perf_counter() - start
        return grad_x, grad_weight, None


def profile_dense(gpt: GptSection, seed: int, repeats: int) -> dict[str, float]:
    """Return the shares of a dense step that could shrink with density.

    Returns:
        ``linear_share``: share of the products of hidden matrices in the step, in [0, 1], median of ``repeats`` steps.
        ``update_share``: share of clipping and AdamW.
        ``hidden_share``: share of the hidden matrices in the parameters that these update.
    """
    model = dense_model(gpt.model_config())
    clock = [0.0]
    hidden = hidden_linears(model)
    for linear in hidden.values():
        _time_products(linear, clock)
    step = TrainingStep(model, gpt, seed)
    shares, updates = [], []
    for turn in range(repeats + 1):
        clock[0] = step.update_seconds = 0.0
        start = time.perf_counter()
        step.backward(step.forward())
        total = time.perf_counter() - start
        if turn:  # the first step warms up
            shares.append(clock[0] / total)
            updates.append(step.update_seconds / total)
    sizes = sum(linear.weight.numel() for linear in hidden.values()), sum(p.numel() for p in model.parameters())
    return {
        "linear_share": statistics.median(shares),
        "update_share": statistics.median(updates),
        "hidden_share": sizes[0] / sizes[1],
    }


def _time_products(linear: nn.Linear, clock: list[float]) -> None:
    def forward(x: Tensor) -> Tensor:
        return _TimedProduct.apply(x.flatten(0, -2), linear.weight, clock).view(*x.shape[:-1], -1)

    linear.forward = forward  # type: ignore[method-assign, assignment]
