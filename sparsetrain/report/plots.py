"""Figures of a report, as SVG bytes: measured curves and numbers, and FLOPs by the formula.

Every figure has its own `Figure` object. It is drawn with matplotlib's defaults and ``sparsetrain.mplstyle``, not with
the user's own settings, and contains no date, random identifier or installed font. The same report therefore gives the
same bytes. Arms differ in marker as well as in colour.

Drawing changes matplotlib's process-wide settings, so several threads must not draw at once.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from sparsetrain.files import whole_file
from sparsetrain.report.findings import STAGE_NAMES, scored
from sparsetrain.report.schema import STAGES, Arm, Point, Report, terms
from sparsetrain.report.tables import TERM_NAMES, Group, results, term_names
from sparsetrain.report.text import byte_size, clean, percent, shorten, si, tick


def _settings(look: str) -> mpl.RcParams:
    return mpl.rc_params_from_file(Path(__file__).with_name(f"{look}.mplstyle"), use_default_template=False)


LOOK = "sparsetrain"
_SETTINGS = _settings(LOOK)
INK: str = _SETTINGS["text.color"]
RULE: str = _SETTINGS["grid.color"]
MUTED: str = _SETTINGS["axes.edgecolor"]
SERIES: tuple[str, ...] = tuple(_SETTINGS["axes.prop_cycle"].by_key()["color"])
"""Colours of text, grid, secondary lines and data. `html` replaces these colours by variables of the page's theme."""

MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH_INCHES = 5.2
_MAX_POINTS = 600
_NOISE_CAPTION = "Bands: 95 % intervals (Fieller) of averages over about 100 steps."
_LOSS_CAPTION = (
    "Faint: the loss of each step. Line: its trailing mean. Points: validation. The vertical axis is fitted to what "
    "follows the first tenth."
)


@dataclass(frozen=True)
class Picture:
    """A finished figure.

    Args:
        name: short and unique within a report.
        title: the title of the figure.
        svg: the figure.
        alt: a description for screen readers.
        caption: an explanation below the figure.
    """

    name: str
    title: str
    svg: bytes
    alt: str
    caption: str = ""


def pictures(report: Report) -> list[Picture]:
    """Return every figure for which the report has data, in reading order."""
    figures = [
        loss_curves(report, "pretrain"),
        bits_per_byte(report),
        noise_scale(report),
        accuracy(report),
        loss_curves(report, "finetune"),
        loss_curves(report, "prompt"),
        *(loss_curves(report, stage, name) for name, stage in text_curves(report).items()),
        stacked(report, "flops"),
        stacked(report, "bytes"),
    ]
    return [figure for figure in figures if figure is not None]


def text_curves(report: Report) -> dict[str, str]:
    """Return the stages of text that have a figure of their own beside pre-training's, by the name of that figure."""
    stages = dict.fromkeys(stage for arm in report["arms"] for stage in arm.get("texts", {}) if stage != "pretrain")
    return {f"loss-text-{number}": stage for number, stage in enumerate(stages)}


def loss_curves(report: Report, stage: str, name: str | None = None) -> Picture | None:
    """Return training losses over tokens: raw values, moving averages, and validation losses as points; or None.

    The name of the figure, ``loss-STAGE`` by default, must be safe in a page.
    """
    arms = [(index, arm, _curve(arm, stage)) for index, arm in enumerate(report["arms"]) if _curve(arm, stage)]
    if not any(_series(points, "loss")[0].size for _, _, points in arms):
        return None
    title = f"Loss, {STAGE_NAMES.get(stage, clean(stage))}"
    with _axes(title) as (figure, axes):
        shown: list[np.ndarray] = []
        for index, _, points in arms:
            colour, marker = _look(index)
            x, y = _series(points, "loss")
            smooth = moving_average(y)
            raw_x, raw_y = thin(x, y)
            axes.plot(raw_x, raw_y, color=colour, alpha=0.25, linewidth=0.7)
            axes.plot(*thin(x, smooth), color=colour, linewidth=1.7)
            value_x, value_y = _series(points, "val_loss")
            axes.plot(
                value_x,
                value_y,
                marker,
                color=colour,
                markersize=4.5,
                markeredgecolor=INK,
                markeredgewidth=0.6,
            )
            shown += [smooth, value_y]
        _limit(axes, shown)
        _tokens_axis(axes, "nats per token")
        _legend(axes, [(index, arm) for index, arm, _ in arms])
        svg = _svg(figure)
    ends = "; ".join(
        f"{clean(arm['name'])} ends at {moving_average(_series(points, 'loss')[1])[-1]:.3f}"
        for _, arm, points in arms
        if _series(points, "loss")[1].size
    )
    alt = f"Line chart. {title} against tokens, smoothed: {ends}."
    return Picture(name or f"loss-{stage}", title, svg, alt, _LOSS_CAPTION)


def bits_per_byte(report: Report) -> Picture | None:
    """Return bits per byte of the validation text over training, or None; unlike losses, tokenizers do not matter."""
    return _lines(report, "bits_per_byte", "Bits per byte, validation text", "bits per byte")


def noise_scale(report: Report) -> Picture | None:
    """Return the gradient noise scale of the norm layers over training, with its intervals; None if none was measured.

    Where noise hides the gradient, the noise scale has no value and the line a gap.
    """
    return _lines(report, "noise_scale", "Gradient noise scale of the norm layers", "sequences", _NOISE_CAPTION)


def _lines(report: Report, key: str, title: str, label: str, caption: str = "") -> Picture | None:
    """Return a metric over the tokens of pre-training, with a band between ``key_low`` and ``key_high`` if there are.

    A metric with a band has a logarithmic axis.
    """
    arms = [(index, arm, *_series(_curve(arm, "pretrain"), key)) for index, arm in enumerate(report["arms"])]
    arms = [entry for entry in arms if entry[2].size]
    if not arms:
        return None
    with _axes(title) as (figure, axes):
        for index, arm, x, y in arms:
            (colour, marker), points = _look(index), _curve(arm, "pretrain")
            low, high = (dict(zip(*_series(points, f"{key}_{end}"), strict=True)) for end in ("low", "high"))
            both = sorted(low.keys() & high.keys())
            if both:
                axes.fill_between(both, [low[at] for at in both], [high[at] for at in both], color=colour, alpha=0.15)
                axes.set_yscale("log")
            thinned = thin(x, y) if both else (x, y)
            axes.plot(*thinned, marker=None if both else marker, color=colour, linewidth=1.7, markersize=4.5)
        _tokens_axis(axes, label)
        _legend(axes, [(index, arm) for index, arm, _, _ in arms])
        svg = _svg(figure)
    ends = "; ".join(f"{clean(arm['name'])} ends at {y[-1]:.3f}" for _, arm, _, y in arms)
    return Picture(key.replace("_", "-"), title, svg, f"Line chart. {title} against tokens: {ends}.", caption)


def accuracy(report: Report) -> Picture | None:
    """Return accuracies with 95 % intervals by arm and stage, with the baselines as lines; or None."""
    arms = [(index, arm) for index, arm in enumerate(report["arms"]) if scored(arm)]
    if not arms:
        return None
    title = "Accuracy on the test set, 95 % intervals"
    with _axes(title, height=1.5 + 0.42 * len(arms)) as (figure, axes):
        for row, (index, arm) in enumerate(arms):
            for stage, result in scored(arm):
                low, high = result["ci95"]
                # Soft prompts have open markers, just below the filled ones of fine-tuning.
                y, fill = (row - 0.11, None) if stage == STAGES[0] else (row + 0.11, "none")
                colour, marker = _look(index)
                axes.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="round")
                axes.plot(result["accuracy"], y, marker, color=colour, markerfacecolor=fill or colour, markersize=6)
        keys = [Line2D([], [], marker="o", color=INK, linewidth=1.2, label=STAGE_NAMES["finetune"])]
        if any(arm.get("prompt") is not None for _, arm in arms):
            keys.append(Line2D([], [], marker="o", color=INK, markerfacecolor="none", label=STAGE_NAMES["prompt"]))
        if (scratch := report["scratch"]) is not None:
            axes.axvspan(*scratch["ci95"], color=MUTED, alpha=0.15, linewidth=0)
            label = f"no pre-training, {percent(scratch['accuracy'])}"
            keys.append(axes.axvline(scratch["accuracy"], color=MUTED, linestyle="--", linewidth=1.2, label=label))
        if (bag := report.get("bag_of_words")) is not None:
            label = f"bag of words, {percent(bag['accuracy'])}"
            keys.append(axes.axvline(bag["accuracy"], color=INK, linestyle="-.", linewidth=1.2, label=label))
        if (majority := report["majority"]) is not None:
            label = f"majority class, {percent(majority)}"
            keys.append(axes.axvline(majority, color=INK, linestyle=":", linewidth=1.4, label=label))
        axes.set_yticks(range(len(arms)), [_label(arm["name"]) for _, arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(percent(value))))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(handles=keys, loc="outside lower left", ncols=2, handlelength=2.2)
        svg = _svg(figure)
    sheet = results(report)
    numbers = "; ".join(", ".join(f"{c}: {v}" for c, v in zip(sheet.columns, row, strict=True)) for row in sheet.rows)
    return Picture("accuracy", title, svg, f"Dot chart with error bars. {title}. {numbers}.")


def stacked(report: Report, group: Group) -> Picture | None:
    """Return horizontal bars by arm, split into terms: training FLOPs by the formula, or measured bytes; or None."""
    arms = [arm for arm in report["arms"] if terms(arm.get(group, {}))]
    if not arms:
        return None
    names = term_names(arms, group)
    is_flops = group == "flops"
    title = "Training FLOPs by the formula (not measured)" if is_flops else "Bytes of the training state"
    show: Callable[[float], str] = (lambda value: si(value, "FLOP")) if is_flops else byte_size
    totals = [sum(terms(arm[group]).values()) for arm in arms]
    with _axes(title, height=1.45 + 0.36 * len(arms)) as (figure, axes):
        left = np.zeros(len(arms))
        for index, name in enumerate(names):
            widths = np.array([arm[group].get(name, 0.0) for arm in arms])
            colour = SERIES[index % len(SERIES)]
            label = _label(TERM_NAMES.get(name, name))
            axes.barh(range(len(arms)), widths, left=left, height=0.62, color=colour, label=label)
            left += widths
        longest = max(totals) or 1.0
        for row, total in enumerate(totals):
            axes.text(total + 0.015 * longest, row, show(total), va="center", fontsize=8.5)
        axes.set_yticks(range(len(arms)), [_label(arm["name"]) for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        unit = 1.0 if is_flops else 1024.0 ** int(np.log(max(longest, 1.0)) / np.log(1024.0))
        axes.set_xticks(unit * np.asarray(MaxNLocator(4).tick_values(0.0, 1.2 * longest / unit)))
        axes.set_xlim(0.0, 1.24 * longest)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(show(value))))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower left", ncols=3, handlelength=1.0, handleheight=1.0)
        svg = _svg(figure)
    numbers = "; ".join(f"{clean(arm['name'])} {show(total)}" for arm, total in zip(arms, totals, strict=True))
    return Picture(group, title, svg, f"Stacked bar chart. {title}, totals: {numbers}.")


def moving_average(values: np.ndarray) -> np.ndarray:
    """Return the trailing mean of ``values`` [n] over a window of n / 20; the first windows are shorter.

    A trailing window never includes later losses, so the average of a jump does not begin before the jump.
    """
    if not values.size:
        return values
    window = max(1, values.size // 20)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    stop = np.arange(1, values.size + 1)
    start = np.maximum(stop - window, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def thin(x: np.ndarray, y: np.ndarray, limit: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return about ``limit`` of the points ``(x, y)`` [n] that draw nearly the same line, spikes included.

    The lowest and the highest point of every group of neighbours stay, and so do both ends of the curve.
    """
    if y.size <= limit:
        return x, y
    keep = {0, y.size - 1}
    for chunk in np.array_split(np.arange(y.size), limit // 2):
        keep |= {int(chunk[np.argmin(y[chunk])]), int(chunk[np.argmax(y[chunk])])}
    kept = np.array(sorted(keep))
    return x[kept], y[kept]


@contextmanager
def styled(look: str = LOOK) -> Iterator[None]:
    """Draw with matplotlib's defaults and ``look``.mplstyle, independent of the user's own settings."""
    with mpl.rc_context():
        mpl.rcdefaults()  # unlike rcParams.update(rcParamsDefault), this leaves the backend and pyplot alone
        mpl.rcParams.update(_settings(look))
        yield


def save_png(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure on a white background, atomically, without a date or a version of matplotlib."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})


def log_axis(axis: Axis, values: Sequence[float] | None = None) -> None:
    """Label a logarithmic axis with plain numbers, at ``values`` or where matplotlib places ticks."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    if values is not None:
        axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _axes(title: str, height: float = 3.2) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure with one set of axes, in the style of this package."""
    with styled():
        figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        axes = figure.add_subplot()
        figure.suptitle(title, x=0.012, ha="left", fontsize=10, fontweight="bold")
        yield figure, axes


def _svg(figure: Figure) -> bytes:
    target = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
    return target.getvalue()


def _curve(arm: Arm, stage: str) -> list[Point]:
    return arm.get("curves", {}).get(stage, [])


def _series(points: Sequence[Point], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and values [n] of the points whose ``key`` is finite."""
    pairs = [(point["tokens"], point.get(key)) for point in points]
    values = np.array([(x, y) for x, y in pairs if isinstance(y, int | float) and np.isfinite(y)], dtype=float)
    return (values[:, 0], values[:, 1]) if values.size else (np.empty(0), np.empty(0))


def _look(index: int) -> tuple[str, str]:
    """Return colour and marker of the arm at ``index``; the pairs repeat after 36 arms."""
    return SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]


def _limit(axes: Axes, shown: list[np.ndarray]) -> None:
    """Fit the vertical axis to the smoothed curves after their first tenth, whose high losses would flatten them."""
    later = np.concatenate([values[values.size // 10 :] for values in shown])
    if later.size:
        low, high = float(later.min()), float(later.max())
        margin = 0.08 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def _tokens_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel("training tokens")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(si(value, ""))))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")


def _legend(axes: Axes, arms: Sequence[tuple[int, Arm]]) -> None:
    keys = []
    for index, arm in arms:
        colour, marker = _look(index)
        keys.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, label=_label(arm["name"])))
    axes.legend(handles=keys, loc="best", handlelength=2.0)


def _label(name: str) -> str:
    """Return ``name`` shortened for a figure, with replacements for characters that the font lacks."""
    known = _charmap()
    text = "".join(c if ord(c) in known else "\ufffd" for c in shorten(name, 24))
    # matplotlib omits labels that begin with an underscore from legends.
    return f" {text}" if text.startswith("_") else text


@functools.cache
def _charmap() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont(_SETTINGS["font.family"][0])).get_charmap())
