"""The parameterizations: pure functions from (role, multipliers) to initial values and optimizer settings.

m_d is the fan_in of a matrix divided by the fan_in of the same matrix at the base width, m_rho its density divided by
the base density, and m_L the number of layers divided by the base number. L_ref is the number of layers (SP, muP,
SuPar) or the base number (CompleteP and the product):

==========================  ===========================  ==============================  ============  ==========
tensor                      init std                     learning rate                   weight decay  eps
==========================  ===========================  ==============================  ============  ==========
hidden matrix               sigma / sqrt(m_d m_rho)      eta / (m_d m_rho) m_L^(a - 1)   by wd_rule    by eps_rule
output projection           the same / sqrt(2 L_ref)     the same                        by wd_rule    by eps_rule
bias, norm inside a block   0, 1                         eta m_L^(a - 1)                 0             by eps_rule
embedding, positions        sigma                        eta embedding_lr_multiplier     lambda        eps
final norm                  1                            eta                             0             eps
head                        sigma                        eta                             lambda        eps
keep                        unchanged                    eta                             0             eps
==========================  ===========================  ==============================  ============  ==========

SP uses no multiplier, muP uses m_d, SuPar m_d and m_rho, CompleteP m_d and m_L, and their product all three; an unused
multiplier is 1. Papers: SμPar (arXiv 2405.15743, Table 1) and CompleteP (arXiv 2505.01618, Table 1). Both are derived
for static random masks.

The learning rates above hold for Adam-family optimizers, whose update does not depend on the scale of the gradient. SGD
(``optimizer="sgd"``) steps along the gradient itself and has its own rules:

==================================  =====================================
tensor                              learning rate under SGD
==================================  =====================================
hidden matrix, output projection    eta / m_rho m_L^(2a - 1)
bias, norm inside a block           eta m_d m_L^(2a - 1)
embedding, positions                eta m_d embedding_lr_multiplier
final norm and its bias; head       eta m_d
keep                                eta
==================================  =====================================

Derivation. The head divides by m_d, so the gradient of every activation is 1 / m_d times the base's, at any density:
it is a sum of fan_out m_rho nonzero terms of variance 1 / (fan_in m_rho). Inside a branch it is also multiplied by
m_L^-a. A matrix W with gradient g x^T changes its output by lr g (x . x) over its nonzero inputs, that is by
lr m_d m_rho / m_d = lr m_rho times the base's change; a vector changes by lr g, that is by lr / m_d. The branch passes
on m_L^-a of the change, and each of the m_L branches may move the residual stream by 1 / m_L, so
lr m_L^(-2a) = 1 / m_L. This assumes that widths inside the blocks grow with the model's width. A matrix of which only
the inputs or only the outputs grow has the learning rate eta m_out / m_d: the gradient of each of its outputs is
1 / m_out times the base's, and it has m_d times as many inputs. (The rows of an embedding grow with m_out, and its
input is one token.) Weight decay follows the same rules as under Adam: `width` and `width_density` undo the effect of
width and density on the learning rate. SGD has no eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from sparsetrain.errors import UserError, check_choice


class Role(StrEnum):
    """The function of a tensor in the network; the rules depend only on it and on the multipliers."""

    EMBEDDING = "embedding"
    POSITION = "position"
    HIDDEN = "hidden"  # a matrix that reads the residual stream: q, k, v, up, gate
    OUTPUT = "output"  # a matrix that writes to it: attention output, down
    NORM = "norm"  # a gain inside a block
    BIAS = "bias"  # a bias, of a matrix or a norm, inside a block
    FINAL_NORM = "final_norm"
    FINAL_BIAS = "final_bias"  # the bias of the final norm or of the head, which differ in m_d
    HEAD = "head"
    PROMPT = "prompt"  # soft-prompt vectors
    KEEP = "keep"  # a parameter with special initial values: it keeps them, with learning rate eta and no decay


MATRICES = (Role.HIDDEN, Role.OUTPUT)
INSIDE_BLOCK = (Role.HIDDEN, Role.OUTPUT, Role.NORM, Role.BIAS)
UNDECAYED = (Role.NORM, Role.BIAS, Role.FINAL_NORM, Role.FINAL_BIAS, Role.PROMPT, Role.KEEP)

SCHEMES = ("sp", "mup", "supar", "completep", "supar_completep")
# Those with the same rules for a dense model, where the base is dense too.
SAME_WHEN_DENSE = {"mup": "supar", "supar": "mup", "completep": "supar_completep", "supar_completep": "completep"}
ATTENTION_SCALES = ("auto", "sqrt", "linear")
WD_RULES = ("coupled", "width", "width_density")
EPS_RULES = ("auto", "fixed", "table", "everywhere")
OUTPUT_RULES = ("shrunk", "plain")
OPTIMIZERS = ("adam", "sgd")
FOLLOWS = ("none", "density")


@dataclass(frozen=True)
class TensorTraits:
    """The properties of a tensor that the rules depend on.

    Args:
        role: its function in the network.
        m_d: fan_in divided by the fan_in of the same matrix at the base width; for a norm or a bias the ratio of
            lengths, which is 1 for the bias of the head.
        density: nnz divided by the number of elements; 1 for a dense tensor.
        m_out: the ratio of the numbers of outputs, if exactly one of it and m_d is 1, as for a matrix that reads
            features of a fixed size or a router with the same number of logits at every width; otherwise None. Only
            the rules of SGD use it.
        in_block: False for a matrix, norm or bias outside the residual blocks, which depth does not affect.

    Raises:
        UserError: the role is unknown, a multiplier is not positive, or the density is outside (0, 1].
    """

    role: Role
    m_d: float = 1.0
    density: float = 1.0
    m_out: float | None = None
    in_block: bool = True

    def __post_init__(self) -> None:
        check_choice("role", self.role, Role)
        object.__setattr__(self, "role", Role(self.role))
        if not 0.0 < self.m_d < math.inf:
            raise UserError(f"m_d={self.m_d} of a tensor with role {self.role} must be above 0 and finite")
        if not 0.0 < self.density <= 1.0:
            raise UserError(f"density={self.density} of a tensor with role {self.role} must lie in (0, 1]")


@dataclass(frozen=True)
class Parameterization:
    """One column of the table. Build it with `sp`, `mup`, `supar`, `completep` or `supar_completep`.

    Args:
        scheme: name of the column.
        base_width: ``d_model`` of the model on which the hyperparameters were tuned.
        base_density: density of its hidden matrices.
        base_layers: its number of blocks.
        alpha: depth exponent of CompleteP in [0.5, 1]; residual branches are multiplied by m_L^(-alpha).
        alpha_in: multiplier of the embeddings.
        alpha_out: multiplier of the logits.
        embedding_lr_multiplier: learning rate of embeddings and positions, relative to eta.
        attention_scale: ``sqrt`` for 1/sqrt(d_head), ``linear`` for 1/d_head, ``auto`` for sqrt under SP and linear
            otherwise.
        wd_rule: ``coupled`` uses lambda unchanged, so that the decay per step, lr * lambda, follows the learning rate;
            ``width`` multiplies it by m_d and ``width_density`` by m_d m_rho, which keeps lr * lambda constant.
        eps_rule: ``fixed`` uses eps unchanged; ``table`` uses eps / m_d * m_L^(-alpha) inside blocks; ``everywhere``
            uses that for every tensor, as the public code of CompleteP does; ``auto`` means ``table`` under CompleteP
            and the product, and ``fixed`` otherwise.
        output_rule: ``shrunk`` divides the initial values of output projections by sqrt(2 L_ref); ``plain`` does not,
            as in the public code of CompleteP.
        optimizer: ``adam`` for the rules of Adam, AdamW and their relatives, ``sgd`` for those of plain and momentum
            SGD.
        follow: ``none`` keeps the multipliers of the density at the start; ``density`` lets those of a sparse matrix
            follow its density while masks evolve (`sparsetrain.follow_density`), for schemes with m_rho.

    Raises:
        UserError: a choice is unknown, a multiplier or base is not positive, or the scheme has no density to follow.
    """

    scheme: str = "sp"
    base_width: int | None = None
    base_density: float = 1.0
    base_layers: int | None = None
    alpha: float = 1.0
    alpha_in: float = 1.0
    alpha_out: float = 1.0
    embedding_lr_multiplier: float = 1.0
    attention_scale: str = "auto"
    wd_rule: str = "width_density"
    eps_rule: str = "auto"
    output_rule: str = "shrunk"
    optimizer: str = "adam"
    follow: str = "none"

    def __post_init__(self) -> None:
        check_choice("parameterization", self.scheme, SCHEMES)
        check_choice("parameterization.attention_scale", self.attention_scale, ATTENTION_SCALES)
        check_choice("parameterization.wd_rule", self.wd_rule, WD_RULES)
        check_choice("parameterization.eps_rule", self.eps_rule, EPS_RULES)
        check_choice("parameterization.output_rule", self.output_rule, OUTPUT_RULES)
        check_choice("parameterization.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("parameterization.follow", self.follow, FOLLOWS)
        if self.follow == "density" and not self.uses_density:
            raise UserError(
                f"parameterization.follow=density: {self.scheme} has no multiplier m_rho; use supar or supar_completep"
            )
        if self.eps_rule == "auto":
            object.__setattr__(self, "eps_rule", "table" if self.uses_depth else "fixed")
        if self.uses_width and not self.base_width:
            raise UserError(f"parameterization {self.scheme}: base_width={self.base_width} must be at least 1")
        if self.uses_depth and not self.base_layers:
            raise UserError(f"parameterization {self.scheme}: base_layers={self.base_layers} must be at least 1")
        if not 0.0 < self.base_density <= 1.0:
            raise UserError(f"parameterization.base_density={self.base_density} must lie in (0, 1]")
        if not 0.5 <= self.alpha <= 1.0:
            raise UserError(f"parameterization.alpha={self.alpha} must lie in [0.5, 1]")
        for name in ("base_width", "base_layers", "alpha_in", "alpha_out", "embedding_lr_multiplier"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"parameterization.{name}={value} must be above 0")

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def sp(cls, **options: float | str) -> Parameterization:
        """Standard parameterization: no multiplier depends on width, density or depth."""
        return cls._make("sp", **options)

    @classmethod
    def mup(cls, base_width: int, **options: float | str) -> Parameterization:
        """Maximal update parameterization (arXiv 2203.03466) for width."""
        return cls._make("mup", base_width=base_width, **options)

    @classmethod
    def supar(cls, base_width: int, base_density: float = 1.0, **options: float | str) -> Parameterization:
        """SμPar (arXiv 2405.15743): muP with the effective width m_d * m_rho."""
        return cls._make("supar", base_width=base_width, base_density=base_density, **options)

    @classmethod
    def completep(
        cls, base_width: int, base_layers: int, alpha: float = 1.0, **options: float | str
    ) -> Parameterization:
        """CompleteP (arXiv 2505.01618): width and depth."""
        return cls._make("completep", base_width=base_width, base_layers=base_layers, alpha=alpha, **options)

    @classmethod
    def supar_completep(
        cls,
        base_width: int,
        base_density: float,
        base_layers: int,
        alpha: float = 1.0,
        **options: float | str,
    ) -> Parameterization:
        """The product of SμPar and CompleteP: width, density and depth."""
        return cls._make(
            "supar_completep",
            base_width=base_width,
            base_density=base_density,
            base_layers=base_layers,
            alpha=alpha,
            **options,
        )

    @classmethod
    def _make(cls, scheme: str, **options: float | str) -> Parameterization:
        return cls(scheme=scheme, **options)  # type: ignore[arg-type]

    # -- which multipliers are on ------------------------------------------------------------------------------------

    @property
    def uses_width(self) -> bool:
        return self.scheme != "sp"

    @property
    def uses_density(self) -> bool:
        return self.scheme in ("supar", "supar_completep")

    @property
    def uses_depth(self) -> bool:
        return self.scheme in ("completep", "supar_completep")

    def check_width(self, d_model: int, field: str = "d_model") -> None:
        """Raise `UserError` if the base is wider than a model of ``d_model``: transfer goes from small to large."""
        if self.uses_width and self.base_width and self.base_width > d_model:
            raise UserError(
                f"parameterization.base_width={self.base_width} is wider than the model ({field}={d_model}); "
                "the base is the small model that was tuned, at most as wide"
            )

    def check_optimizer(self, name: str) -> None:
        """Raise `UserError` unless the rules are derived for the optimizer ``name``, such as ``adamw`` or ``sgd``.

        SP scales nothing, so it is valid for both families.
        """
        family = "sgd" if name.lower() in ("sgd", "asgd") else "adam"
        if self.uses_width and family != self.optimizer:
            raise UserError(
                f"optimizer.name={name} with parameterization.optimizer={self.optimizer}: the learning rates of "
                f"{self.scheme} differ between the families; set parameterization.optimizer={family}"
            )

    def _m_d(self, traits: TensorTraits) -> float:
        return traits.m_d if self.uses_width else 1.0

    def _m_rho(self, traits: TensorTraits) -> float:
        return traits.density / self.base_density if self.uses_density and traits.role in MATRICES else 1.0

    def _m_l(self, n_layers: int) -> float:
        return n_layers / self.base_layers if self.uses_depth and self.base_layers else 1.0

    # -- the table ---------------------------------------------------------------------------------------------------

    def init_std(self, traits: TensorTraits, sigma: float, n_layers: int) -> float:
        """Return the standard deviation of the initial values; 0 for roles that are not drawn: bias, norm, keep."""
        if traits.role in (Role.NORM, Role.BIAS, Role.FINAL_NORM, Role.FINAL_BIAS, Role.KEEP):
            return 0.0
        if traits.role not in MATRICES:
            return sigma
        std = sigma / math.sqrt(self._m_d(traits) * self._m_rho(traits))
        if traits.role is Role.OUTPUT and self.output_rule == "shrunk":
            reference = self.base_layers if self.uses_depth and self.base_layers else n_layers
            std /= math.sqrt(2 * reference)
        return std

    def _divisor(self, traits: TensorTraits, density: bool = True) -> float:
        """Return the divisor of the learning rate due to width and, unless ``density`` is False, to density."""
        if traits.role is Role.KEEP:
            return 1.0
        if self.optimizer == "sgd":
            if traits.role not in MATRICES:
                return 1.0 / (self._m_d(traits) if traits.m_out is None or not self.uses_width else traits.m_out)
            grown = traits.m_d / traits.m_out if self.uses_width and traits.m_out is not None else 1.0
            return grown * self._m_rho(traits) if density else grown
        if traits.role not in MATRICES:
            return 1.0
        return self._m_d(traits) * self._m_rho(traits) if density else self._m_d(traits)

    def learning_rate(self, traits: TensorTraits, lr: float, n_layers: int) -> float:
        """Return the peak learning rate of the tensor for the base learning rate ``lr``."""
        lr = lr / self._divisor(traits)
        if traits.role in (Role.EMBEDDING, Role.POSITION):
            return lr * self.embedding_lr_multiplier
        if traits.role not in INSIDE_BLOCK or not traits.in_block:
            return lr
        exponent = 2.0 * self.alpha - 1.0 if self.optimizer == "sgd" else self.alpha - 1.0
        return lr * self._m_l(n_layers) ** exponent

    def weight_decay(self, traits: TensorTraits, weight_decay: float) -> float:
        """Return the weight decay coefficient of AdamW or SGD; the decay per step is the learning rate times this."""
        if traits.role in UNDECAYED:
            return 0.0
        if self.wd_rule == "coupled":
            return weight_decay
        return weight_decay * self._divisor(traits, density=self.wd_rule == "width_density")

    def epsilon(self, traits: TensorTraits, eps: float, n_layers: int) -> float:
        """Return Adam's eps."""
        inside = traits.role in INSIDE_BLOCK and traits.in_block
        if self.eps_rule == "fixed" or (self.eps_rule == "table" and not inside):
            return eps
        return eps / self._m_d(traits) * self._m_l(n_layers) ** -self.alpha

    # -- multipliers of the forward pass, in training and in generation ------------------------------------------------

    def embedding_multiplier(self) -> float:
        """Return the factor of the sum of token and position embeddings."""
        return self.alpha_in

    def residual_multiplier(self, n_layers: int) -> float:
        """Return m_L^(-alpha), the factor of every residual branch."""
        return self._m_l(n_layers) ** -self.alpha

    def logit_multiplier(self, m_d: float) -> float:
        """Return alpha_out / m_d for the head's ``m_d``."""
        return self.alpha_out / (m_d if self.uses_width else 1.0)

    def attention_multiplier(self, d_head: int) -> float:
        """Return the factor of q . k before the softmax."""
        linear = self.uses_width if self.attention_scale == "auto" else self.attention_scale == "linear"
        return 1.0 / d_head if linear else 1.0 / math.sqrt(d_head)
