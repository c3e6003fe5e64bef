"""A decoder-only transformer whose hidden matrices may be sparse, under any parameterization.

Shapes: B batch, T tokens, D = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from sparsetrain.models.kv_cache import KVCache, positions_after
from sparsetrain.models.mlp import MLP
from sparsetrain.models.norm import LayerNorm, RMSNorm
from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.parameterization import Parameterization, Role, TensorTraits, assign, initialise
from sparsetrain.sparsity import SparseLinear, SparsityConfig, sparsify


class Block(nn.Module):
    """Pre-norm attention and MLP; each branch is multiplied by ``residual_scale`` (m_L^-alpha) before it is added."""

    residual_scale = 1.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = _norm(config)
        self.attn = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, span: Span, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Map the residual stream ``[B, T, D]`` to the input of the next block."""
        x = self._add(x, self.attn(self.attn_norm(x), span, cache, layer))
        return self._add(x, self.mlp(self.mlp_norm(x)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.dropout > 0.0:
            branch = F.dropout(branch, self.dropout, self.training)
        # alpha is a Python number, so this is a single pass, and it is exact if alpha is 1.
        return torch.add(x, branch, alpha=self.residual_scale)


class Transformer(nn.Module):
    """Token embeddings, pre-norm blocks, a final norm and a head.

    The multipliers of the parameterization act in `hidden` and `logits`, which training, evaluation and generation
    all use.

    Built under ``torch.device("meta")`` with sparsity 0, the model has shapes but no values.

    Args:
        config: shapes and components.
        rules: the parameterization; None means the standard one.
        plan: which matrices are sparse. None makes each hidden matrix ``config.sparsity`` sparse with the pattern
            ``config.sparsity_pattern``; otherwise these two fields are ignored.

    Raises:
        UserError: the plan is invalid, for example if a group matches no layer or would make the head sparse.
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
        # On the meta device there are no values to draw, and drawing a seed would fail.
        seed = 0 if self.embed.weight.is_meta else seeds.resolve_seed(config.seed)
        if plan.is_sparse:
            sparsify(self, plan=plan, seed=seed)
        self.parameterize(rules, seed=seed)

    def parameterize(
        self, rules: Parameterization, sigma: float | None = None, seed: int | None = None, reinitialise: bool = True
    ) -> Transformer:
        """Apply ``rules`` to the model: forward multipliers, roles for `param_groups`, and new initial values.

        Call it again after `sparsetrain.sparsify` or `sparsetrain.densify` has changed the layers.

        Args:
            rules: the parameterization.
            sigma: base standard deviation; None means ``config.init_std``.
            seed: seed of the initial values; None draws one from torch's global generator.
            reinitialise: False keeps the current values, for example to fine-tune.

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
        traits_of = tensor_traits(self, rules)
        if reinitialise:
            sigma = config.init_std if sigma is None else sigma
            # Under torch's own rule a gate takes no part in the scales of the parameterization.
            gates = () if config.scale_glu_init else [name for name in traits_of if _is_gate(name)]
            drawn = seeds.resolve_seed(seed)
            initialise(self, traits_of, rules, sigma, config.n_layers, drawn, config.init_truncation, gates)
        else:
            assign(self, traits_of, rules, config.n_layers)
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Return the logits ``[B, T, V]`` of the next tokens or, given ``targets``, their mean cross-entropy.

        With targets, the head processes chunks of tokens, so the logits of the whole batch never exist.

        Args:
            tokens: int64 ``[B, T]``; unused if ``embeddings`` is given.
            targets: int64 ``[B, T]``, the next token, or -100, which does not count.
            embeddings: ``[B, T, D]``, read instead of the embeddings of the tokens.

        Returns:
            Logits, or the mean over the targets that are not -100, in nats.

        Raises:
            UserError: tokens and targets differ in shape, or there are more tokens than learned positions.
        """
        if targets is None:
            return self.logits(self._read(tokens, embeddings))
        return self._loss(tokens, targets, embeddings, "mean")

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return raw embeddings ``[B, T, D]``, before alpha_in and positions; soft prompts are inserted into these."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UserError(f"tokens have shape {tuple(tokens.shape)}, but [batch, tokens] is needed")
        return self.embed(tokens)

    def hidden(
        self, tokens: Tensor | None = None, embeddings: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the residual stream after the final norm, ``[B, T, D]``.

        Args:
            tokens: ``[B, T]``; give these or ``embeddings``.
            embeddings: ``[B, T, D]``, as `embed_tokens` returns them.
            cache: the tokens before these; the cache grows by T. The result is that of one pass over all tokens, also
                under ``positions_scale=dynamic``; see `KVCache.inputs`.

        Raises:
            UserError: neither or both inputs are given, or there are more tokens than learned positions.
        """
        if (tokens is None) == (embeddings is None):
            raise UserError("hidden: give exactly one of tokens and embeddings")
        if embeddings is None:
            assert tokens is not None
            embeddings = self.embed_tokens(tokens)
        asked = embeddings.shape[1]
        x = embeddings if cache is None else cache.inputs(embeddings)
        first, firsts = (0, None) if cache is None else (cache.length, cache.lengths)
        if self.positions is not None:
            end = first + x.shape[1]
            if end > self.config.max_context:
                raise UserError(f"{end} tokens are more than the {self.config.max_context} learned positions")
            places = torch.arange(first, end, device=x.device)[None]
            x = x + self.positions(places if firsts is None else positions_after(firsts, x.shape[1]))
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.config.dropout > 0.0:
            x = F.dropout(x, self.config.dropout, self.training)
        span = make_span(self.config, self.attention_scale, x, first, firsts)
        for layer, block in enumerate(self.blocks):
            x = block(x, span, cache, layer)
        if cache is not None:
            cache.advance(span.length)
        return self.final_norm(x if x.shape[1] == asked else x[:, -asked:])

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the output of `hidden` ``[..., D]`` to logits ``[..., V]``."""
        return self.head(self._scaled(hidden))

    def loss(self, tokens: Tensor, targets: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return ``self(tokens, targets, embeddings)``, the mean cross-entropy in nats; see `forward`.

        Inside DDP or FSDP call the wrapper instead, ``wrapped(tokens, targets)``: it must see the forward pass.
        """
        loss: Tensor = self(tokens, targets, embeddings)
        return loss

    def token_losses(self, tokens: Tensor, targets: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return each token's cross-entropy in nats, float32 ``[B, T]``; 0 where the target is -100; no gradients."""
        with torch.no_grad():
            return self._loss(tokens, targets, embeddings, "none")

    @property
    def max_positions(self) -> int | None:
        """Maximum number of tokens per row: the number of learned positions, or None without a limit."""
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
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return ``tokens`` followed by up to ``max_new_tokens`` sampled tokens; see `decoding.generate`."""
        return generate(self, tokens, max_new_tokens, temperature, top_p, stop_token, generator, prompt, lengths)

    def _loss(self, tokens: Tensor, targets: Tensor, embeddings: Tensor | None, reduction: Reduction) -> Tensor:
        if tokens.shape != targets.shape:
            raise UserError(f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)} differ in shape")
        return head_loss(self.head, self._scaled(self._read(tokens, embeddings)), targets, reduction)

    def _read(self, tokens: Tensor, embeddings: Tensor | None) -> Tensor:
        return self.hidden(tokens) if embeddings is None else self.hidden(embeddings=embeddings)

    def _scaled(self, hidden: Tensor) -> Tensor:
        # alpha_out / m_d scales the head's input rather than the V logits: the same function with less work.
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale


def tensor_traits(model: Transformer, rules: Parameterization) -> dict[str, TensorTraits]:
    """Return role, m_d and density of every parameter of ``model``, by its name without the names of wrappers."""
    m_d, m_ffn = model.config.width_multipliers(rules.base_width or model.config.d_model)
    modules = dict(wrappers.named_modules(model))
    traits_of = {}
    for name, _ in wrappers.named_parameters(model):
        module_name, _, leaf = name.rpartition(".")
        module = modules[module_name]
        role = _role(module_name, leaf)
        density = module.pattern.density if isinstance(module, SparseLinear) and leaf == "values" else 1.0
        # The width of a matrix is its inputs, that of a bias its own length.
        wide = ("mlp.up", "mlp.gate") if leaf == "bias" else ("mlp.down",)
        traits_of[name] = TensorTraits(role, m_ffn if module_name.endswith(wide) else m_d, density)
    return traits_of


def matrix_traits(
    config: ModelConfig, rules: Parameterization, densities: Mapping[str, float]
) -> dict[str, TensorTraits]:
    """Return role, m_d and density of hidden matrices by the names of their layers, without building a model.

    Args:
        config: the model.
        rules: the parameterization.
        densities: density of each matrix, by name.
    """
    m_d, m_ffn = config.width_multipliers(rules.base_width or config.d_model)
    return {
        name: TensorTraits(_role(name, "weight"), m_ffn if name.endswith("mlp.down") else m_d, density)
        for name, density in densities.items()
    }


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


def _is_gate(name: str) -> bool:
    """Whether a parameter is the matrix of a gate; its bias starts at zero like all biases."""
    return name.endswith((".mlp.gate.weight", ".mlp.gate.values"))


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
