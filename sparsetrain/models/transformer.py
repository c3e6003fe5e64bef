"""A decoder-only transformer whose hidden matrices may be sparse, under any parameterization.

Shapes: B batch, T tokens, D = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain import seeds, wrappers
from sparsetrain.errors import UserError
from sparsetrain.models.attention import Attention, Span, attention_dtype, make_span
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.decoding.generate import generate
from sparsetrain.models.decoding.score import continuation_scores
from sparsetrain.models.head import Head, Reduction, head_loss
from sparsetrain.models.kv_cache import KVCache
from sparsetrain.models.mlp import MLP
from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.parameterization import Parameterization, Role, TensorSpec, assign, initialise
from sparsetrain.sparsity import SparseLinear, SparsityConfig, sparsify


class Block(nn.Module):
    """Pre-norm attention and MLP, each branch times ``residual_scale`` (m_L^-alpha) before it is added."""

    residual_scale = 1.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = _norm(config)
        self.attn = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, span: Span, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Map the residual stream ``[B, T, D]`` to the next block's."""
        x = self._add(x, self.attn(self.attn_norm(x), span, cache, layer))
        return self._add(x, self.mlp(self.mlp_norm(x)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.dropout > 0.0:
            branch = F.dropout(branch, self.dropout, self.training)
        # alpha is a Python number, so this is one pass and exact when it is 1.
        return torch.add(x, branch, alpha=self.residual_scale)


class Transformer(nn.Module):
    """Token embeddings, pre-norm blocks, a final norm and a head.

    The multipliers of the parameterization act in `hidden` and `logits`, which training, evaluation and generation
    all go through.

    Args:
        config: shapes and parts.
        rules: the parameterization; None is the standard one.
        plan: which matrices are sparse; None makes each hidden matrix ``config.sparsity`` sparse in
            ``config.sparsity_pattern``. A plan takes the place of these two fields.

    Raises:
        UserError: from the plan, for example a group that matches no layer, or one that would make the head sparse.

    Built under ``torch.device("meta")`` with sparsity 0 it has shapes but no values.
    """

    def __init__(
        self, config: ModelConfig, rules: Parameterization | None = None, plan: SparsityConfig | None = None
    ) -> None:
        super().__init__()
        rules = Parameterization.sp() if rules is None else rules
        self.config = config

        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_context, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = _norm(config)
        self.head = Head(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

        if plan is None:
            plan = SparsityConfig(sparsity=config.sparsity, pattern=config.sparsity_pattern)
        # On the meta device there is nothing to draw, and a seed cannot be drawn either.
        seed = 0 if self.embed.weight.is_meta else seeds.resolve_seed(config.seed)
        if plan.is_sparse:
            sparsify(self, plan=plan, seed=seed)
        self.parameterize(rules, seed=seed)

    def parameterize(
        self, rules: Parameterization, sigma: float | None = None, seed: int | None = None, reinitialise: bool = True
    ) -> Transformer:
        """Put the model under ``rules``: forward multipliers, roles for `param_groups`, and fresh values.

        Call it again when surgery has changed the layers, `sparsetrain.sparsify` or `sparsetrain.densify`.

        Args:
            rules: the parameterization.
            sigma: base standard deviation; None is ``config.init_std``.
            seed: of the initial values; None draws one from torch's global generator.
            reinitialise: False keeps the values, for example to fine-tune.

        Raises:
            UserError: the rules' base is wider than the model.
        """
        config = self.config
        rules.check_width(config.d_model)
        self.attention_scale = rules.attention_multiplier(config.d_head)
        self.embedding_scale = rules.embedding_multiplier()
        self.logit_scale = rules.logit_multiplier(config.d_model / (rules.base_width or config.d_model))
        for block in map(wrappers.unwrap, self.blocks):
            assert isinstance(block, Block)
            block.attn.scale = self.attention_scale
            block.residual_scale = rules.residual_multiplier(config.n_layers)
        specs = tensor_specs(self, rules)
        if reinitialise:
            sigma = config.init_std if sigma is None else sigma
            initialise(self, specs, rules, sigma, config.n_layers, seeds.resolve_seed(seed))
        else:
            assign(self, specs, rules, config.n_layers)
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Return the logits ``[B, T, V]`` of the token after each one or, given ``targets``, their mean cross-entropy.

        With targets the head works by chunks of tokens: the logits of the whole batch never exist.

        Args:
            tokens: int64 ``[B, T]``; read only for their embeddings, so unused when ``embeddings`` is given.
            targets: int64 ``[B, T]``, the token that follows, or -100, which counts for nothing.
            embeddings: ``[B, T, D]``, what to read in place of the tokens' embeddings.

        Returns:
            Logits, or the mean over the targets that are not -100, in nats.

        Raises:
            UserError: tokens and targets differ in shape, or are more than the learned positions.
        """
        if targets is None:
            return self.logits(self._read(tokens, embeddings))
        return self._loss(tokens, targets, embeddings, "mean")

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return raw embeddings ``[B, T, D]``, before alpha_in and positions; a soft prompt is written into these."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UserError(f"tokens have shape {tuple(tokens.shape)}; [batch, tokens] is needed")
        return self.embed(tokens)

    def hidden(
        self, tokens: Tensor | None = None, embeddings: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the residual stream behind the final norm, ``[B, T, D]``.

        Args:
            tokens: ``[B, T]``; give these or ``embeddings``.
            embeddings: ``[B, T, D]``, as `embed_tokens` returns them.
            cache: earlier tokens, which these follow; the cache grows by T.

        Raises:
            UserError: neither or both inputs, or more tokens than learned positions.
        """
        if (tokens is None) == (embeddings is None):
            raise UserError("hidden: give exactly one of tokens and embeddings")
        if embeddings is None:
            assert tokens is not None
            embeddings = self.embed_tokens(tokens)
        first = 0 if cache is None else cache.length
        x = embeddings
        if self.positions is not None:
            end = first + x.shape[1]
            if end > self.config.max_context:
                raise UserError(f"{end} tokens are more than the {self.config.max_context} learned positions")
            x = x + self.positions.weight[first:end]
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.config.dropout > 0.0:
            x = F.dropout(x, self.config.dropout, self.training)
        span = make_span(self.config, self.attention_scale, x, first)
        for layer, block in enumerate(self.blocks):
            x = block(x, span, cache, layer)
        if cache is not None:
            cache.advance(span.length)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the output of `hidden` ``[..., D]`` to logits ``[..., V]``."""
        return self.head(self._scaled(hidden))

    def loss(self, tokens: Tensor, targets: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return ``self(tokens, targets, embeddings)``, the mean cross-entropy in nats; see `forward`.

        Inside DDP or FSDP call the wrapper, which is to see the forward pass: ``wrapped(tokens, targets)``.
        """
        loss: Tensor = self(tokens, targets, embeddings)
        return loss

    def token_losses(self, tokens: Tensor, targets: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return each token's cross-entropy in nats, float32 ``[B, T]``, 0 where the target is -100; no gradients."""
        with torch.no_grad():
            return self._loss(tokens, targets, embeddings, "none")

    @property
    def max_positions(self) -> int | None:
        """The most tokens that a row can have: those with learned positions, or None for any number."""
        return None if self.positions is None else self.config.max_context

    def new_cache(self, embeddings: Tensor, capacity: int) -> KVCache:
        """Return an empty cache of ``capacity`` tokens for each row of ``embeddings`` ``[B, T, D]``."""
        return KVCache(self.config, len(embeddings), capacity, embeddings.device, attention_dtype(embeddings))

    def continuation_scores(self, embeddings: Tensor, continuations: Sequence[Sequence[int]]) -> Tensor:
        """Return each continuation's log-probability after each row, ``[B, C]``; see `decoding.score`."""
        return continuation_scores(self, embeddings, continuations)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
        prompt: SoftPrompt | None = None,
    ) -> Tensor:
        """Return ``tokens`` with up to ``max_new_tokens`` sampled ones behind them; see `decoding.generate`."""
        return generate(self, tokens, max_new_tokens, temperature, top_p, stop_token, generator, prompt)

    def _loss(self, tokens: Tensor, targets: Tensor, embeddings: Tensor | None, reduction: Reduction) -> Tensor:
        if tokens.shape != targets.shape:
            raise UserError(f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)} differ in shape")
        return head_loss(self.head, self._scaled(self._read(tokens, embeddings)), targets, reduction)

    def _read(self, tokens: Tensor, embeddings: Tensor | None) -> Tensor:
        return self.hidden(tokens) if embeddings is None else self.hidden(embeddings=embeddings)

    def _scaled(self, hidden: Tensor) -> Tensor:
        # alpha_out / m_d on the head's input rather than on the V logits: the same function for less work.
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale


def tensor_specs(model: Transformer, rules: Parameterization) -> dict[str, TensorSpec]:
    """Return role, m_d and density of every parameter of ``model``, by its name without the parts of wrappers."""
    m_d, m_ffn = model.config.width_multipliers(rules.base_width or model.config.d_model)
    modules = dict(wrappers.named_modules(model))
    specs = {}
    for name, _ in wrappers.named_parameters(model):
        module_name, _, leaf = name.rpartition(".")
        module = modules[module_name]
        role = _role(module_name, leaf)
        density = module.pattern.density if isinstance(module, SparseLinear) and leaf == "values" else 1.0
        # A matrix counts its inputs, a bias its own length.
        wide = ("mlp.up", "mlp.gate") if leaf == "bias" else ("mlp.down",)
        specs[name] = TensorSpec(role, m_ffn if module_name.endswith(wide) else m_d, density)
    return specs


def _role(module_name: str, leaf: str) -> Role:
    if module_name == "final_norm":
        return Role.FINAL_BIAS if leaf == "bias" else Role.FINAL_NORM
    top_level = {"embed": Role.EMBEDDING, "positions": Role.POSITION, "head": Role.HEAD}
    if module_name in top_level:
        return top_level[module_name]
    if leaf == "bias":
        return Role.BIAS
    if module_name.endswith("_norm"):
        return Role.NORM
    return Role.OUTPUT if module_name.endswith((".attn.out", ".mlp.down")) else Role.HIDDEN


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
