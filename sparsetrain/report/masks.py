"""``sparsetrain mask inspect``: statistics and a picture of the masks of a run, a checkpoint or a file."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from sparsetrain.cost.flops import matrices
from sparsetrain.errors import UserError
from sparsetrain.files import file_errors
from sparsetrain.models.config import ModelConfig
from sparsetrain.reading import read_yaml
from sparsetrain.report.tables import Sheet
from sparsetrain.report.text import ABSENT, clean, percent, shorten
from sparsetrain.runs.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from sparsetrain.runs.layout import CHECKPOINTS, CONFIG
from sparsetrain.runs.weights import RunWeights
from sparsetrain.screen import say
from sparsetrain.sparsity.evolution.history import unpack_bits
from sparsetrain.sparsity.evolution.topology import active_units, grid_of
from sparsetrain.sparsity.patterns.files import SUFFIXES, load_masks, patterns_of
from sparsetrain.sparsity.patterns.pattern import SparsityPattern
from sparsetrain.sparsity.patterns.statistics import Degrees, MaskStatistics
from sparsetrain.training.loop import MASK_HISTORY

PIXELS = 160  # the longer side of a layer's picture; larger layers are averaged
COLUMNS = 4
FILE_WIDTH = 170


@dataclass(frozen=True)
class InspectedMask:
    """The mask of a layer.

    Args:
        name: the layer.
        pattern: the mask.
        ever: fraction of the layer's weights that were ever active; None if unknown.
        overlap: fraction of the first mask that is active now; None if unknown.
    """

    name: str
    pattern: SparsityPattern
    ever: float | None = None
    overlap: float | None = None


def inspect_masks(path: Path, console: Console, picture: Path | None = None) -> None:
    """Print the statistics of all masks at ``path`` and draw them.

    Args:
        path: a run's directory (its newest checkpoint), a checkpoint, or a ``.npz`` or ``.safetensors`` file.
        console: where to print the table and the path of the picture.
        picture: path of the PNG; None for ``masks.png`` in the run's directory, or the file's own name with ``.png``.

    Raises:
        UserError: ``path`` holds no mask, or a file is damaged.
    """
    masks = read_masks(path)
    if not console.is_terminal:  # rich assumes 80 columns for a file, and the table needs more
        console = Console(file=console.file, width=max(console.width, FILE_WIDTH))
    console.print(mask_table(masks).rich())
    if picture is None:
        picture = path / "masks.png" if path.is_dir() else path.with_suffix(".png")
        if _is_checkpoint(path):  # its manifest lists its files, so nothing may be added to it
            picture = path.parent.parent / f"masks-{path.name}.png"
    draw_masks(masks, picture)
    say(console, f"picture: {picture}")


def read_masks(path: Path) -> list[InspectedMask]:
    """Return the masks of a run, a checkpoint or a file.

    Raises:
        UserError: ``path`` holds no mask, or a file is damaged.
    """
    if path.is_file() or path.suffix in SUFFIXES:
        return [InspectedMask(name, pattern) for name, pattern in load_masks(path).items()]
    if not path.is_dir():
        raise UserError(f"{path}: no such run, checkpoint or file")
    if list_checkpoints(path / CHECKPOINTS):
        run, stored = path, load_checkpoint(path / CHECKPOINTS)
    elif _is_checkpoint(path):
        run, stored = path.parent.parent, load_checkpoint(path.parent, path.name)
    else:
        raise UserError(f"{path} holds no checkpoint; give a run's directory, a checkpoint, or a {SUFFIXES[0]} file")
    tensors = RunWeights.of(stored.model).model
    shapes = _shapes(run, len(tensors))
    sparse = {name: tensor for name, tensor in tensors.items() if not name.endswith(".weight")}
    found = patterns_of(sparse, shapes)
    if not found:
        raise UserError(f"{path}: the model of this checkpoint has no sparse layer")
    return [_with_history(name, found[name], stored) for name in sorted(found, key=_natural)]


def _is_checkpoint(path: Path) -> bool:
    return path.name in list_checkpoints(path.parent)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts block 2 before block 10."""
    return [(int(label), "") if label.isdigit() else (-1, label) for label in name.split(".")]


def _shapes(run: Path, tensors: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a transformer's hidden matrices, from a run's configuration; empty if there is none.

    Args:
        run: the directory of the run.
        tensors: the number of tensors in the checkpoint, which must exceed the number of the model's layers.

    Raises:
        UserError: the configuration is damaged or belongs to another model.
    """
    path = run / CONFIG
    if not path.exists():
        return {}
    section = read_yaml(path, dict).get("model")
    if not isinstance(section, dict):
        raise UserError(f"{path}: model={reprlib.repr(section)} must be a mapping")
    values = {key: value for key, value in section.items() if value is not None and key != "sparsity"}
    try:
        config = ModelConfig(**{**values, "vocab_size": values.get("vocab_size") or 1})
        if config.n_layers > tensors:
            raise UserError(f"n_layers={config.n_layers}, and the checkpoint has {tensors} tensors")
    except (ValueError, TypeError, ArithmeticError) as error:  # an unknown or invalid setting
        raise UserError(f"{path}: model: {shorten(error, 200)}") from None
    return {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices(config)}


def _with_history(name: str, pattern: SparsityPattern, stored: Checkpoint) -> InspectedMask:
    bits = [stored.optimizer.tensors.get(f"{MASK_HISTORY}{name}.{key}") for key in ("first", "ever")]
    if bits[0] is None or bits[1] is None:
        # A managed mask without a history never changed. Without a manager, nothing is known about earlier masks.
        still = isinstance(stored.state.get("masks"), dict)
        return InspectedMask(name, pattern, *((pattern.density, 1.0) if still else (None, None)))
    grid = grid_of(pattern)
    first, ever = unpack_bits(bits[0], grid), unpack_bits(bits[1], grid)
    overlap = float((first & active_units(pattern)).sum() / first.sum())
    return InspectedMask(name, pattern, float(ever.double().mean()), overlap)


def mask_table(masks: list[InspectedMask]) -> Sheet:
    """Return one row per layer, and one for all layers together."""
    rows = []
    for mask in masks:
        statistics = MaskStatistics.of(mask.pattern)
        rows.append(
            (
                clean(mask.name) or "(matrix)",
                f"{mask.pattern.shape[0]} x {mask.pattern.shape[1]}"
                + ("" if mask.pattern.block == (1, 1) else f" in {mask.pattern.block[0]}x{mask.pattern.block[1]}"),
                f"{statistics.nnz:,}",
                f"{statistics.density:.6g}",
                _degrees(statistics.rows),
                _degrees(statistics.columns),
                str(statistics.rows.dead),
                str(statistics.columns.dead),
                ABSENT if mask.ever is None else percent(mask.ever),
                ABSENT if mask.overlap is None else percent(mask.overlap),
            )
        )
    nnz = sum(mask.pattern.nnz for mask in masks)
    numel = sum(mask.pattern.shape[0] * mask.pattern.shape[1] for mask in masks)
    rows.append(("all", "", f"{nnz:,}", f"{nnz / numel:.6g}", "", "", "", "", "", ""))
    columns = ("Layer", "Shape", "Weights", "Density", "Fan-in", "Fan-out", "Dead rows", "Dead columns")
    note = "Fan-in and fan-out: least, mean ± standard deviation, most. A dead row is an output without a weight."
    return Sheet("Masks", (*columns, "Ever active", "Of first mask"), tuple(rows), note)


def _degrees(degrees: Degrees) -> str:
    return f"{degrees.least}, {degrees.mean:.1f} ± {degrees.std:.1f}, {degrees.most}"


def shrunk(pattern: SparsityPattern, pixels: int = PIXELS) -> Tensor:
    """Return the pattern as an image ``[h, w]`` of local densities in [0, 1], with at most ``pixels`` per side.

    Positions are counted into pixels directly, so that a large layer needs no dense mask.
    """
    rows, columns = pattern.shape
    height, width = min(rows, pixels), min(columns, pixels)
    positions = pattern.positions().cpu()
    row, column = (positions // columns) * height // rows, (positions % columns) * width // columns
    counts = torch.bincount(row * width + column, minlength=height * width).view(height, width).double()
    tall = torch.bincount(torch.arange(rows) * height // rows, minlength=height)
    wide = torch.bincount(torch.arange(columns) * width // columns, minlength=width)
    return counts / (tall[:, None] * wide)


def draw_masks(masks: list[InspectedMask], path: Path) -> None:
    """Draw all masks into one PNG, in which darker pixels have more weights.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only this function needs it

    across = min(COLUMNS, len(masks))
    down = math.ceil(len(masks) / across)
    figure = Figure(figsize=(3.2 * across, 3.2 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes, mask in zip(grid.flat, masks, strict=False):
        image = shrunk(mask.pattern)
        axes.imshow(image.numpy(), cmap="Greys", vmin=0.0, vmax=max(float(image.max()), 1e-9), interpolation="nearest")
        axes.set_title(f"{clean(mask.name)}\n{percent(mask.pattern.density)} of {mask.pattern.shape}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in list(grid.flat)[len(masks) :]:
        axes.set_visible(False)
    with file_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format="png")
