"""What each parameterization means: pure functions from (role, multipliers) to initialisation and optimizer settings.

With m_d the fan_in of a matrix over the fan_in of the same matrix at the base width, m_rho its density over the base
density, m_L the number of layers over the base number, and L_ref the number of layers (SP, muP, SuPar) or the base
number (CompleteP and the product):

==========================  ===========================  ==============================  ============  ==========
tensor                      init std                     learning rate                   weight decay  eps
==========================  ===========================  ==============================  ============  ==========
hidden matrix               sigma / sqrt(m_d m_rho)      eta / (m_d m_rho) m_L^(a - 1)   by wd_rule    by eps_rule
output projection           the same / sqrt(2 L_ref)     the same                        by wd_rule    by eps_rule
bias, norm inside a block   0, 1                         eta m_L^(a - 1)                 0             by eps_rule
embedding, positions        sigma                        eta embedding_lr_multiplier     lambda        eps
final norm                  1                            eta                             0             eps
head                        sigma                        eta                             lambda        eps
keep                        its author's values          eta                             0             eps
==========================  ===========================  ==============================  ============  ==========

SP uses none of the multipliers, muP m_d, SuPar m_d and m_rho, CompleteP m_d and m_L, their product all three; one that
is not used is 1. Papers: SμPar (arXiv 2405.15743, Table 1) and CompleteP (arXiv 2505.01618, Table 1). Both hold for
static random masks.

The learning rates above are those of Adam-family optimizers, whose update does not depend on the scale of the gradient.
SGD (``optimizer="sgd"``) steps by the gradient itself and has rules of its own:

==================================  =====================================
tensor                              learning rate under SGD
==================================  =====================================
hidden matrix, output projection    eta / m_rho m_L^(2a - 1)
bias, norm inside a block           eta m_d m_L^(2a - 1)
embedding, positions                eta m_d embedding_lr_multiplier
final norm and its bias; head       eta m_d
keep                                eta
==================================  =====================================

They follow from one count. The head divides by m_d, so every gradient of an activation is 1 / m_d times that of the
base, whatever the density: fan_out m_rho live terms of variance 1 / (fan_in m_rho). Inside a branch it is m_L^-a times
smaller still. A matrix W with gradient g x^T changes its output by lr g (x . x) over its live inputs, that is by
lr m_d m_rho / m_d = lr m_rho times the base; a vector changes by lr g, that is lr / m_d. The branch then passes m_L^-a
of it on, and each of the m_L branches may move the residual stream by 1 / m_L: lr m_L^(-2a) = 1 / m_L. Widths inside
the blocks are taken to grow with the model's. A matrix of which only the inputs or only the outputs grow has eta times
m_out / m_d: the gradient of each of its outputs is 1 / m_out that of the base, and there are m_d live inputs. (An
embedding's rows grow with m_out, and its input is one token.) Weight decay follows the same rule as under Adam: `width`
and `width_density` undo what width and density did to the learning rate. There is no eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from sparsetrain.errors import UserError, check_choice


class Role(StrEnum):
    """What a tensor does in the network; the rules depend on nothing else but its multipliers."""

    EMBEDDING = "embedding"
    POSITION = "position"
    HIDDEN = "hidden"  # a matrix that reads the residual stream: q, k, v, up, gate
    OUTPUT = "output"  # a matrix that writes to it: attention output, down
    NORM = "norm"  # a gain inside a block
    BIAS = "bias"  # a bias, of a matrix or a norm, inside a block
    FINAL_NORM = "final_norm"
    FINAL_BIAS = "final_bias"  # the bias of the final norm or of the head; m_d tells the two apart
    HEAD = "head"
    PROMPT = "prompt"  # soft-prompt vectors
    KEEP = "keep"  # what its author initialises in a way of its own: it keeps its values and gets plain eta, no decay


MATRICES = (Role.HIDDEN, Role.OUTPUT)
INSIDE_BLOCK = (Role.HIDDEN, Role.OUTPUT, Role.NORM, Role.BIAS)
UNDECAYED = (Role.NORM, Role.BIAS, Role.FINAL_NORM, Role.FINAL_BIAS, Role.PROMPT, Role.KEEP)

SCHEMES = ("sp", "mup", "supar", "completep", "supar_completep")
ATTENTION_SCALES = ("auto", "sqrt", "linear")
WD_RULES = ("coupled", "width", "width_density")
EPS_RULES = ("auto", "fixed", "table", "everywhere")
OUTPUT_RULES = ("shrunk", "plain")
OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the rules see it.

    Args:
        role: what it does.
        m_d: fan_in over the fan_in of the same matrix at the base width; for a norm or a bias the ratio of its own
            length, so 1 for the bias of the head.
        density: nnz over the number of elements; 1 for everything dense.
        m_out: the ratio of the numbers of outputs, where exactly one of it and m_d is 1: of a matrix that reads
            features of a fixed size, or a router that writes as many logits at every width. None elsewhere. Only the
            rules of SGD ask for it.
        in_block: False for a matrix, norm or bias outside the residual blocks, which depth does not concern.

    Raises:
        UserError: an unknown role, a multiplier that is not positive, or a density outside (0, 1].
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
        scheme: the name of the column.
        base_width, base_density, base_layers: of the model on which the hyperparameters were tuned.
        alpha: depth exponent of CompleteP in [0.5, 1]; residual branches are multiplied by m_L^(-alpha).
        alpha_in, alpha_out: multipliers of the embeddings and of the logits.
        embedding_lr_multiplier: learning rate of embeddings and positions over eta.
        attention_scale: ``sqrt`` for 1/sqrt(d_head), ``linear`` for 1/d_head, ``auto`` for sqrt under SP and linear
            elsewhere.
        wd_rule: ``coupled`` leaves lambda as it is, so that the decay per step lr * lambda follows the learning rate;
            ``width`` multiplies it by m_d and ``width_density`` by m_d m_rho, which keeps lr * lambda constant.
        eps_rule: ``fixed``, or ``table`` for eps / m_d * m_L^(-alpha) inside blocks; ``everywhere`` gives it to every
            tensor, as the public code of CompleteP does; ``auto`` becomes ``table`` under CompleteP and the product,
            and ``fixed`` elsewhere.
        output_rule: ``shrunk`` divides the initial values of output projections by sqrt(2 L_ref); ``plain`` does not,
            as the public code of CompleteP.
        optimizer: whose rules hold: ``adam`` for Adam, AdamW and their relatives, ``sgd`` for plain and momentum SGD.

    Raises:
        UserError: an unknown choice, or a multiplier or base that is not positive.
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

    def __post_init__(self) -> None:
        check_choice("parameterization", self.scheme, SCHEMES)
        check_choice("parameterization.attention_scale", self.attention_scale, ATTENTION_SCALES)
        check_choice("parameterization.wd_rule", self.wd_rule, WD_RULES)
        check_choice("parameterization.eps_rule", self.eps_rule, EPS_RULES)
        check_choice("parameterization.output_rule", self.output_rule, OUTPUT_RULES)
        check_choice("parameterization.optimizer", self.optimizer, OPTIMIZERS)
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

        SP scales nothing, so it fits both families.
        """
        family = "sgd" if name.lower() in ("sgd", "asgd") else "adam"
        if self.uses_width and family != self.optimizer:
            raise UserError(
                f"optimizer.name={name} with parameterization.optimizer={self.optimizer}: the learning rates of "
                f"{self.scheme} differ between the families; set parameterization.optimizer={family}"
            )

    def _m_d(self, spec: TensorSpec) -> float:
        return spec.m_d if self.uses_width else 1.0

    def _m_rho(self, spec: TensorSpec) -> float:
        return spec.density / self.base_density if self.uses_density and spec.role in MATRICES else 1.0

    def _m_l(self, n_layers: int) -> float:
        return n_layers / self.base_layers if self.uses_depth and self.base_layers else 1.0

    # -- the table ---------------------------------------------------------------------------------------------------

    def init_std(self, spec: TensorSpec, sigma: float, n_layers: int) -> float:
        """Return the standard deviation of the initial values; 0 for what is not drawn: biases, norms, ``keep``."""
        if spec.role in (Role.NORM, Role.BIAS, Role.FINAL_NORM, Role.FINAL_BIAS, Role.KEEP):
            return 0.0
        if spec.role not in MATRICES:
            return sigma
        std = sigma / math.sqrt(self._m_d(spec) * self._m_rho(spec))
        if spec.role is Role.OUTPUT and self.output_rule == "shrunk":
            reference = self.base_layers if self.uses_depth and self.base_layers else n_layers
            std /= math.sqrt(2 * reference)
        return std

    def _divisor(self, spec: TensorSpec, density: bool = True) -> float:
        """Return what the learning rate is divided by for width and, unless ``density`` is False, density."""
        if spec.role is Role.KEEP:
            return 1.0
        if self.optimizer == "sgd":
            if spec.role not in MATRICES:
                return 1.0 / (self._m_d(spec) if spec.m_out is None or not self.uses_width else spec.m_out)
            grown = spec.m_d / spec.m_out if self.uses_width and spec.m_out is not None else 1.0
            return grown * self._m_rho(spec) if density else grown
        if spec.role not in MATRICES:
            return 1.0
        return self._m_d(spec) * self._m_rho(spec) if density else self._m_d(spec)

    def learning_rate(self, spec: TensorSpec, lr: float, n_layers: int) -> float:
        """Return the peak learning rate of the tensor for the base rate ``lr``."""
        lr = lr / self._divisor(spec)
        if spec.role in (Role.EMBEDDING, Role.POSITION):
            return lr * self.embedding_lr_multiplier
        if spec.role not in INSIDE_BLOCK or not spec.in_block:
            return lr
        exponent = 2.0 * self.alpha - 1.0 if self.optimizer == "sgd" else self.alpha - 1.0
        return lr * self._m_l(n_layers) ** exponent

    def weight_decay(self, spec: TensorSpec, weight_decay: float) -> float:
        """Return the decay coefficient of AdamW or SGD, whose decay per step is learning rate times this."""
        if spec.role in UNDECAYED:
            return 0.0
        if self.wd_rule == "coupled":
            return weight_decay
        return weight_decay * self._divisor(spec, density=self.wd_rule == "width_density")

    def epsilon(self, spec: TensorSpec, eps: float, n_layers: int) -> float:
        """Return Adam's eps."""
        inside = spec.role in INSIDE_BLOCK and spec.in_block
        if self.eps_rule == "fixed" or (self.eps_rule == "table" and not inside):
            return eps
        return eps / self._m_d(spec) * self._m_l(n_layers) ** -self.alpha

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
