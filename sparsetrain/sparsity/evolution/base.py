"""What every rule of evolution has, and the registry of rules.

A rule says *when* the mask of a layer is updated, *how dense* the layer is then, *which share* of its weights is
exchanged, *which* weights go (`Rule.score`) and *where* new ones grow (`Rule.growth`).
`sparsetrain.sparsity.evolution.manager.MaskManager` asks the rule and changes the masks. A rule is a pure function of
the step and has no state. Steps count optimizer steps that are done, so the first update of ``every=100`` follows the
100th.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_type_hints, overload

from torch import Tensor

from sparsetrain.errors import UserError, check_choice
from sparsetrain.registry import Registry
from sparsetrain.sparsity.patterns.spec import check_sparsity

GROWTH = ("random", "gradient")
ACCUMULATION = ("last", "staggered")
MOMENTS = ("zero", "mean")

_SETTING = "setting"  # the key of a field's metadata
Kind = TypeVar("Kind", bound="type[Rule]")


@dataclass(frozen=True)
class Setting:
    """How a configuration gives a field of a rule.

    Args:
        type: the type of its values there.
        default: its value where the configuration does not name it; `dataclasses.MISSING` if it must.
        convert: maps a value of the configuration and the number of steps of the training to the field's value.
    """

    type: Any
    default: Any
    convert: Callable[[Any, int | None], Any] = lambda value, _steps: value


def setting(
    default: Any, *, type: Any, configured: Any, convert: Callable[[Any, int | None], Any] | None = None
) -> Any:
    """Return a field of a rule that a configuration gives in another form, or whose default differs there.

    Args:
        default: of the field. type, configured: type and default of the setting. convert: as `Setting` has it.
    """
    given = Setting(type, configured) if convert is None else Setting(type, configured, convert)
    return field(default=default, metadata={_SETTING: given})


def steps(default: int | None, *, fraction: float) -> Any:
    """Return a field in steps, which a configuration gives as a fraction of the training.

    Args:
        default: of the field. fraction: of the training, where a configuration does not name the setting.
    """
    return setting(default, type=float, configured=fraction, convert=in_steps)


def in_steps(fraction: float, total_steps: int | None) -> Any:
    """Return the step at a fraction of the training, rounded to the nearest; the fraction itself if None."""
    return fraction if total_steps is None else round(fraction * total_steps)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The base class of rules. A rule of one's own is a frozen dataclass that is registered by `register_rule`.

    The fields of the dataclass are the settings of the rule in a configuration, next to ``sparsity.evolution.rule``,
    without ``sparsity``, which the section ``sparsity`` gives. A field in steps is declared by `steps`. The section is
    checked before the length of the training is known, with fractions in the place of steps: ``__post_init__`` may
    compare them, but must not need whole numbers.

    Args:
        sparsity: of the layers, in [0, 1); None takes already sparse layers as they are.

    Attributes:
        grows: where weights grow: ``random``, uniformly drawn among the empty positions, or ``gradient``, at the
            largest `growth`.
        accumulation, grown_scale, grown_moments, protect_rows: as fields of
            `sparsetrain.sparsity.evolution.rules.RigL`.
        resizes: whether updates change how many weights a layer has.
        needs_sparsity: whether the rule must know the sparsity that layers are allocated by; a configuration gives it.

    Raises:
        UserError: a field is out of range, or ``grows`` is unknown.
    """

    sparsity: float | None = None

    grows: ClassVar[str] = "random"
    accumulation: ClassVar[str] = "last"
    grown_scale: ClassVar[float] = 0.0
    grown_moments: ClassVar[str] = "zero"
    protect_rows: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    needs_sparsity: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        grows = vars(cls).get("grows")
        if isinstance(grows, str):
            check_choice(f"{cls.__name__}: grows", grows, GROWTH)

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity, f"{self.name}: sparsity")
        self.check_choices()

    def check_choices(self) -> None:
        """Raise `UserError` for an unknown way to grow, to accumulate or to fill the state of grown weights.

        `MaskManager` calls it too, since ``__post_init__`` of a rule of one's own may leave out that of its base class.
        """
        check_choice(f"{self.name}: grows", self.grows, GROWTH)
        check_choice(f"{self.name}: accumulation", self.accumulation, ACCUMULATION)
        check_choice(f"{self.name}: grown_moments", self.grown_moments, MOMENTS)

    @property
    def name(self) -> str:
        return type(self).__name__

    def due(self, step: int) -> bool:
        """Whether masks are updated after ``step`` optimizer steps."""
        return False

    def updates(self, end: int) -> Sequence[int]:
        """Return the steps up to and including ``end`` after which masks are updated, in order."""
        return [step for step in range(1, end + 1) if self.due(step)]

    def layer_density(self, allocated: float, step: int) -> float:
        """Return the density after ``step`` steps of a layer whose allocated density is ``allocated``, in (0, 1]."""
        return allocated

    def densities(self, allocated: float) -> Iterable[float]:
        """Return the smallest and the largest density that the layer has at any time, and possibly others."""
        return (allocated,)

    def drop(self, step: int) -> float:
        """Return the fraction of its weights that an update at ``step`` removes from a layer and grows elsewhere."""
        return 0.0

    @property
    def needs_gradient(self) -> bool:
        """Whether updates need the gradients of weights that do not exist, for `growth`."""
        return self.grows == "gradient"

    def score(self, values: Tensor, gradient: Tensor) -> Tensor:
        """Return the score of each weight; an update removes the weights with the lowest scores.

        A block of weights has the sum of their scores. Of equal scores the first in row-major order goes. The default
        is the magnitude.

        Args:
            values: the weights ``[n]`` of some rows of a layer in row-major order, after the optimizer's step.
            gradient: their gradients ``[n]`` in that step, summed over micro-batches and averaged over ranks, after
                clipping; zeros where the layer took no part.

        Returns:
            A real tensor ``[n]`` without NaN, whose entry i depends on ``values[i]`` and ``gradient[i]`` alone: the
            method is called several times for parts of a layer, to save memory. It must not change its arguments.
        """
        return values.abs()

    def growth(self, gradient: Tensor) -> Tensor:
        """Return the score of each position of some rows; of the empty positions those with the highest scores grow.

        It is called only if ``grows`` is ``gradient``. A block has the sum of its scores. Of equal scores the first in
        row-major order grows. The default is the magnitude.

        Args:
            gradient: ``[rows, in_features]`` in float32 or float64: the gradient of the loss with respect to the
                rows of the weight matrix, at empty positions as if there were a weight of value zero. Of several
                micro-batches it is that of the last one, or the sum of all if ``accumulation`` is ``staggered``;
                ranks are summed.

        Returns:
            A real tensor of the same shape without NaN, whose entries each depend on one entry of ``gradient`` alone,
            as for `score`. The method must not change its argument.
        """
        return gradient.abs()

    def check(self, total_steps: int) -> None:
        """Raise `UserError` if updates would follow the end of a training of ``total_steps``, or never happen."""

    def _refuse(self, text: str) -> UserError:
        return UserError(f"{self.name}: {text}")


RULES: Registry[type[Rule]] = Registry("rule", "sparsity.evolution.rule")
"""The rules of evolution that a configuration can name."""


@overload
def register_rule(name: str, *, replace: bool = False) -> Callable[[Kind], Kind]: ...


@overload
def register_rule(name: str, rule: Kind, *, replace: bool = False) -> Kind: ...


def register_rule(name: str, rule: Kind | None = None, *, replace: bool = False) -> Kind | Callable[[Kind], Kind]:
    """Make a rule of evolution available by name; without ``rule``, return a decorator that does so.

    ``sparsity.evolution.rule=noisy`` then chooses it, and its fields are settings of the section:

    ```python
    @sparsetrain.register_rule("noisy")
    @dataclass(frozen=True, kw_only=True)
    class Noisy(sparsetrain.SET):
        exponent: float = 2.0

        def score(self, values: Tensor, gradient: Tensor) -> Tensor:
            return (values * gradient).abs() ** self.exponent
    ```

    Args:
        name: the name, see `sparsetrain.registry.Registry.register`.
        rule: a frozen dataclass derived from `Rule`, each of whose fields has a default.
        replace: take the place of another rule of that name.

    Returns:
        ``rule``, or the decorator, which returns what it decorates.

    Raises:
        UserError: the name is malformed or taken, or ``rule`` is no such class.
    """
    if rule is None:
        return lambda decorated: register_rule(name, decorated, replace=replace)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise UserError(f"rule {name!r}: {rule!r} must be a class derived from sparsetrain.Rule")
    if vars(rule).get("__annotations__") and "__dataclass_fields__" not in vars(rule):
        raise UserError(f"rule {name!r}: {rule.__name__} needs the decorator @dataclass(frozen=True, kw_only=True)")
    for key, given in settings_of(rule).items():
        if key == "rule":
            raise UserError(f"rule {name!r}: {rule.__name__} has a field 'rule'; a configuration uses it for the name")
        if given.default is MISSING:
            raise UserError(f"rule {name!r}: the field {key!r} of {rule.__name__} needs a default")
    RULES.register(name, rule, replace=replace)
    return rule


def settings_of(rule: type[Rule]) -> dict[str, Setting]:
    """Return the settings that a configuration has for a rule: its fields without ``sparsity``."""
    kind: Any = rule  # mypy takes the hash of its instances for that of the class
    hints = _hints(kind)
    return {
        entry.name: _setting_of(entry, hints[entry.name])
        # First what only some rules have, then what `Rule` has a value for.
        for entry in sorted(fields(rule), key=lambda entry: hasattr(Rule, entry.name))
        if entry.init and entry.name != "sparsity"
    }


@functools.lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    """Return the types of a rule's fields; looking them up takes longer than everything else in `settings_of`."""
    return get_type_hints(kind)


def _setting_of(entry: Field[Any], hint: Any) -> Setting:
    found: Setting | None = entry.metadata.get(_SETTING)
    if found is not None:
        return found
    return Setting(hint, entry.default if entry.default_factory is MISSING else entry.default_factory())
