"""Laws: what they predict, how sure that is, where they were fitted, and where they come from.

A law has one of three forms, each with its parameters and a covariance of their estimates:

- `PowerLaw`, y = c x^m: the best timescale, the best and the critical batch size.
- `LossLaw`, L(N, D) = E + A / N^alpha + B / D^beta.
- `Hyperbola`, D = D_min (1 + B / B_crit): the tokens that reach one loss at a batch size.

Intervals are Student's t with the covariance and its degrees of freedom. Parameters that are positive by definition
have their covariance in natural logarithms, so that their intervals are positive too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict, get_args

import numpy as np
from msgspec import Meta

from sparsetrain.errors import UserError, as_number, check_choice
from sparsetrain.files import write_text
from sparsetrain.reading import read_yaml
from sparsetrain.shapes import Count, Fraction

FORMAT = 1
Interval = tuple[float, float]
Kind = Literal["power", "tau", "batch", "critical", "loss", "noise"]
KINDS: tuple[str, ...] = get_args(Kind)

_Positive = Annotated[float, Meta(gt=0.0, le=1e300)]
_Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]


@dataclass(frozen=True)
class Quantity:
    """What an input or the output of a law is, such as ``tokens_per_weight``, and its unit."""

    name: str
    unit: str = ""


class _QuantityFile(TypedDict):
    name: str
    unit: str


class _LawFile(TypedDict):
    """The content of a law's file. The intervals in it are for readers, and follow from the covariance."""

    format: Literal[1]
    form: str
    kind: Kind
    parameters: dict[str, _Finite]
    covariance: list[list[_Finite]] | None
    freedom: _Positive | None
    reported: dict[str, tuple[_Finite, _Finite, Fraction]]
    inputs: list[_QuantityFile]
    output: _QuantityFile
    ranges: list[tuple[_Positive, _Positive]] | None
    r_squared: _Finite | None
    points: Count | None
    runs: Count | None
    seeds: Count | None
    sparsity: Fraction | None
    source: str
    verified: str


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """What all laws have. `Law.load` returns the form that a file holds; each form is a subclass.

    Args:
        parameters: values by name.
        kind: what it says: ``tau``, ``batch``, ``critical``, ``loss``, ``noise``, or ``power`` for anything else.
        inputs, output: what its numbers are.
        covariance: of the estimates, in the order of the parameters; None where it is not known. Rows and columns of
            positive parameters (`LOGARITHMIC`) are those of their natural logarithms.
        freedom: degrees of freedom of the covariance.
        reported: intervals that a paper reports, as ``(low, high, level)`` by parameter.
        ranges: smallest and largest value of each input in the fit; None where they are not known.
        r_squared: of the fit, in logarithms for a power law and a hyperbola.
        points, runs, seeds: numbers of what it was fitted to.
        sparsity: of the models that it was fitted to; None where it is not known.
        source: the sweep with its commit, or the paper.
        verified: how far its numbers have been checked.
    """

    PARAMETERS: ClassVar[tuple[str, ...]] = ()
    LOGARITHMIC: ClassVar[tuple[str, ...]] = ()
    FORM: ClassVar[str] = ""

    parameters: Mapping[str, float]
    kind: str = "power"
    inputs: tuple[Quantity, ...] = (Quantity("x"),)
    output: Quantity = Quantity("y")
    covariance: tuple[tuple[float, ...], ...] | None = None
    freedom: float | None = None
    reported: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    ranges: tuple[Interval, ...] | None = None
    r_squared: float | None = None
    points: int | None = None
    runs: int | None = None
    seeds: int | None = None
    sparsity: float | None = None
    source: str = ""
    verified: str = ""

    def __call__(self, *x: float, **named: float) -> float:
        """Return the law's value; also outside of its range, where it is an extrapolation: see `inside`.

        Args:
            x: the inputs in order. named: inputs by the names in `inputs`, as in ``tau_opt(tokens_per_parameter=20)``.

        Raises:
            UserError: an input is unknown, missing, or not a number above 0 and finite.
        """
        if named:
            names = [each.name for each in self.inputs[len(x) :]]
            for name in named:
                check_choice("the law's input", name, names)
            x = (*x, *(named[name] for name in names if name in named))
        return float(self._value(self._vector(), *self._checked(x)))

    def inside(self, *x: float) -> bool | None:
        """Return whether all inputs lie in the range of the fit, or None where that is not known.

        Raises:
            UserError: an input is not above 0 and finite.
        """
        given = self._checked(x)
        if self.ranges is None:
            return None
        near = 1e-9  # a value at an end is inside, also after rounding
        return all(
            low * (1 - near) <= value <= high * (1 + near)
            for value, (low, high) in zip(given, self.ranges, strict=True)
        )

    def interval(self, level: float = 0.95, of: str | None = None) -> Interval | None:
        """Return the interval of a parameter, by default the last one; for a power law that is the exponent.

        It is None where it is not known: a published law has only the levels that its paper reports.

        Args:
            level: of confidence, in (0, 1).
            of: the name of the parameter.

        Raises:
            UserError: there is no such parameter, or ``level`` lies outside (0, 1).
        """
        of = self.PARAMETERS[-1] if of is None else of
        check_choice("of", of, self.PARAMETERS)
        quantile = self._quantile(level)
        if self.covariance is None:
            low, high, said = self.reported.get(of, (math.nan, math.nan, math.nan))
            return (low, high) if math.isclose(said, level) else None
        place = self.PARAMETERS.index(of)
        half = quantile * math.sqrt(max(0.0, self.covariance[place][place]))
        middle = float(self._vector()[place])
        low, high = middle - half, middle + half
        return (_exp(low), _exp(high)) if of in self.LOGARITHMIC else (low, high)

    def predict_interval(self, *x: float, level: float = 0.95) -> Interval | None:
        """Return the interval of the law's value at an input; a single new run scatters more.

        It is None for a law without a covariance. It holds for one input: over all of them the band of a few seeds
        pinches where their lines happen to cross.

        Raises:
            UserError: an input is not above 0 and finite, or ``level`` lies outside (0, 1).
        """
        given, quantile = self._checked(x), self._quantile(level)
        if self.covariance is None:
            return None
        value = self(*x)
        if not 0.0 < value < math.inf:  # too small or too large for a number
            return 0.0, math.inf
        # The value is positive, so the error of its logarithm is carried over from the parameters.
        gradient = self._log_gradient(self._vector(), *given)
        spread = math.sqrt(max(0.0, float(gradient @ np.array(self.covariance) @ gradient)))
        middle = math.log(value)
        return _exp(middle - quantile * spread), _exp(middle + quantile * spread)

    def save(self, path: str | Path) -> None:
        """Write the law to a YAML file, completely or not at all."""
        import yaml

        content = {
            "format": FORMAT,
            "form": self.FORM,
            "kind": self.kind,
            "parameters": {name: float(self.parameters[name]) for name in self.PARAMETERS},
            "intervals_95": {name: _plain(self.interval(0.95, name)) for name in self.PARAMETERS},
            "covariance": None if self.covariance is None else [list(map(float, row)) for row in self.covariance],
            "freedom": None if self.freedom is None else float(self.freedom),
            "reported": {name: list(map(float, said)) for name, said in self.reported.items()},
            "inputs": [vars(each) for each in self.inputs],
            "output": vars(self.output),
            "ranges": None if self.ranges is None else [list(map(float, ends)) for ends in self.ranges],
            "r_squared": None if self.r_squared is None else float(self.r_squared),
            **{name: getattr(self, name) for name in ("points", "runs", "seeds", "sparsity", "source", "verified")},
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        write_text(Path(path), text)

    @staticmethod
    def load(path: str | Path) -> Law:
        """Return the law of a file that `save` wrote: a `PowerLaw`, a `LossLaw` or a `Hyperbola`.

        Raises:
            UserError: there is no such file, or it holds no law.
        """
        content = read_yaml(Path(path), _LawFile, finite=True)
        form = _FORMS.get(content["form"])
        if form is None:
            raise UserError(f"{path}: form={content['form']!r:.60} must be one of {', '.join(_FORMS)}")
        inputs, ranges = content["inputs"], content["ranges"]
        if content["parameters"].keys() != set(form.PARAMETERS):
            raise UserError(f"{path}: parameters must be {', '.join(form.PARAMETERS)}, no more and no fewer")
        for name in form.LOGARITHMIC:
            if not content["parameters"][name] > 0.0:
                raise UserError(f"{path}: parameters.{name}={content['parameters'][name]} must be above 0")
        if len(inputs) != form._count() or (ranges is not None and len(ranges) != len(inputs)):
            raise UserError(f"{path}: a law of the form {form.FORM} has {form._count()} inputs, each with a range")
        if any(low > high for low, high in ranges or ()):
            raise UserError(f"{path}: ranges={ranges} must each begin with the smaller number")
        covariance = content["covariance"]
        if covariance is not None:
            _check_covariance(covariance, len(form.PARAMETERS), content["freedom"], str(path))
        return form(
            parameters=content["parameters"],
            inputs=tuple(Quantity(each["name"], each["unit"]) for each in inputs),
            output=Quantity(content["output"]["name"], content["output"]["unit"]),
            covariance=None if covariance is None else tuple(map(tuple, covariance)),
            reported={name: (low, high, level) for name, (low, high, level) in content["reported"].items()},
            ranges=None if ranges is None else tuple((low, high) for low, high in ranges),
            **{name: content[name] for name in ("kind", "freedom", "r_squared", "points", "runs", "seeds")},
            **{name: content[name] for name in ("sparsity", "source", "verified")},
        )

    # -- of each form --------------------------------------------------------------------------------------------------

    @classmethod
    def _count(cls) -> int:
        return 1

    @staticmethod
    @abstractmethod
    def _value(parameters: np.ndarray, *x: Any) -> Any:
        """Return the value of the form for parameters in the coordinates of the covariance."""

    @abstractmethod
    def _log_gradient(self, parameters: np.ndarray, *x: float) -> np.ndarray:
        """Return the derivatives of the value's logarithm by the coordinates of the parameters."""

    # ------------------------------------------------------------------------------------------------------------------

    def _vector(self) -> np.ndarray:
        """Return the parameters in the coordinates of the covariance."""
        values = (self.parameters[name] for name in self.PARAMETERS)
        logs = (math.log(v) if n in self.LOGARITHMIC else v for n, v in zip(self.PARAMETERS, values, strict=True))
        return np.array(list(logs))

    def _checked(self, x: Sequence[float]) -> list[float]:
        if len(x) != len(self.inputs):
            names = ", ".join(each.name for each in self.inputs)
            raise UserError(f"the law takes {names}; {len(x)} numbers were given")
        for quantity, value in zip(self.inputs, x, strict=True):
            if not 0.0 < as_number(quantity.name, value) < math.inf:
                raise UserError(f"{quantity.name}={value} must be above 0 and finite")
        return [float(value) for value in x]

    def _quantile(self, level: float) -> float:
        if not 0.0 < as_number("level", level) < 1.0:
            raise UserError(f"level={level} must lie in (0, 1)")
        if self.covariance is None or self.freedom is None:
            return math.nan
        from scipy.special import stdtrit  # slow to import

        return float(stdtrit(self.freedom, (1.0 + level) / 2.0))


@dataclass(frozen=True, kw_only=True)
class PowerLaw(Law):
    """``y = coefficient * x ** exponent``."""

    PARAMETERS: ClassVar[tuple[str, ...]] = ("coefficient", "exponent")
    LOGARITHMIC: ClassVar[tuple[str, ...]] = ("coefficient",)
    FORM: ClassVar[str] = "power"

    @property
    def coefficient(self) -> float:
        return self.parameters["coefficient"]

    @property
    def exponent(self) -> float:
        return self.parameters["exponent"]

    @property
    def range(self) -> Interval | None:
        """Smallest and largest x of the fit, or None where they are not known."""
        return None if self.ranges is None else self.ranges[0]

    def predict(self, x: float) -> float:
        """Return y at x; the same as calling the law.

        Raises:
            UserError: x is not above 0 and finite.
        """
        return self(x)

    @staticmethod
    def _value(parameters: np.ndarray, *x: Any) -> Any:
        return _exp(parameters[0] + parameters[1] * math.log(x[0]))

    def _log_gradient(self, parameters: np.ndarray, *x: float) -> np.ndarray:
        return np.array([1.0, math.log(x[0])])


@dataclass(frozen=True, kw_only=True)
class LossLaw(Law):
    """``L(N, D) = floor + a / N ** alpha + b / D ** beta``, for N parameters and D training tokens."""

    PARAMETERS: ClassVar[tuple[str, ...]] = ("floor", "a", "b", "alpha", "beta")
    LOGARITHMIC: ClassVar[tuple[str, ...]] = ("a", "b")
    FORM: ClassVar[str] = "loss"

    @classmethod
    def _count(cls) -> int:
        return 2

    @staticmethod
    def _value(parameters: np.ndarray, *x: Any) -> Any:
        floor, log_a, log_b, alpha, beta = parameters
        return floor + _exp(log_a - alpha * math.log(x[0])) + _exp(log_b - beta * math.log(x[1]))

    def _log_gradient(self, parameters: np.ndarray, *x: float) -> np.ndarray:
        _, log_a, log_b, alpha, beta = parameters
        by_size, by_tokens = (
            math.exp(log - power * math.log(value)) for log, power, value in ((log_a, alpha, x[0]), (log_b, beta, x[1]))
        )
        raw = [1.0, by_size, by_tokens, -by_size * math.log(x[0]), -by_tokens * math.log(x[1])]
        return np.array(raw) / self._value(parameters, *x)


@dataclass(frozen=True, kw_only=True)
class Hyperbola(Law):
    """``D = d_min * (1 + B / b_crit)``: the tokens D that reach one loss with batches of B tokens.

    It is ``(S / S_min - 1) (D / D_min - 1) = 1`` for the steps S = D / B and S_min = d_min / b_crit (arXiv 1812.06162
    for examples, arXiv 2505.13738 for tokens). At ``B = b_crit`` a training reads twice the tokens that it needs.
    """

    PARAMETERS: ClassVar[tuple[str, ...]] = ("d_min", "b_crit")
    LOGARITHMIC: ClassVar[tuple[str, ...]] = PARAMETERS
    FORM: ClassVar[str] = "hyperbola"

    @staticmethod
    def _value(parameters: np.ndarray, *x: Any) -> Any:
        return _exp(parameters[0] + float(np.logaddexp(0.0, math.log(x[0]) - parameters[1])))

    def _log_gradient(self, parameters: np.ndarray, *x: float) -> np.ndarray:
        return np.array([1.0, -1.0 / (1.0 + _exp(parameters[1] - math.log(x[0])))])


_FORMS: dict[str, type[Law]] = {form.FORM: form for form in (PowerLaw, LossLaw, Hyperbola)}


def _check_covariance(rows: list[list[float]], size: int, freedom: float | None, where: str) -> None:
    if freedom is None:
        raise UserError(f"{where}: freedom is null, which must be a number where there is a covariance")
    if len(rows) != size or any(len(row) != size for row in rows):
        raise UserError(f"{where}: covariance must have {size} rows of {size} numbers")
    matrix = np.array(rows)
    tolerance = 1e-9 * max(1e-300, float(np.abs(matrix).max()))
    if not np.allclose(matrix, matrix.T, rtol=0.0, atol=tolerance) or np.linalg.eigvalsh(matrix).min() < -tolerance:
        raise UserError(f"{where}: covariance must be symmetric, and no variance in it may be negative")


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf


def _plain(interval: Interval | None) -> list[float | None] | None:
    """Return an interval for a file, in which an infinite end is null."""
    return None if interval is None else [float(end) if math.isfinite(end) else None for end in interval]
