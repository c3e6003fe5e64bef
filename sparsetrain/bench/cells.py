"""The cells of a bench: groups of contenders to compare, and the cells that are measured in the same rounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsetrain.bench.config import BenchConfig
from sparsetrain.bench.contenders import DENSE, Contender, LayerCase, contender, measure_memory, wrong
from sparsetrain.bench.decoding import GENERATING_PEERS, measure_generation, measure_products
from sparsetrain.bench.gpt import PlainGPT, TrainingStep, dense_model, profile_dense, sparse_model
from sparsetrain.bench.machine import with_threads
from sparsetrain.bench.memory import bytes_per_nonzero
from sparsetrain.bench.peers import Skipped, missing
from sparsetrain.bench.timing import Work, interleaved

# Kinds of cells: a layer, a layer of the two scaling series, a sparse model, and the dense model beside plain torch.
LAYER, NNZ, TOKENS, MODEL, REFERENCE = "layer", "nnz", "tokens", "model", "reference"
# Without gradients: layers with few tokens, and a model that generates.
DECODING, GENERATION = "decoding", "generation"
PLAIN = "plain_torch"


@dataclass(frozen=True)
class Cell:
    """Contenders that are timed in turns; ``dense`` is always one of them.

    Attributes:
        part: `LAYER`, `NNZ`, `TOKENS`, `MODEL`, `REFERENCE`, `DECODING` or `GENERATION`.
        in_features, out_features: shape of a layer; None for a model.
        tokens: tokens per step; of a generation, rows.
        sparsity: None for the reference model.
    """

    part: str
    threads: int
    contenders: tuple[str, ...]
    tokens: int
    sparsity: float | None = None
    in_features: int | None = None
    out_features: int | None = None

    @property
    def key(self) -> str:
        """A readable name that is unique within a configuration."""
        labels = [self.part]
        if self.in_features is not None:
            labels.append(f"{self.in_features}x{self.out_features}")
        labels.append(f"tokens={self.tokens}")
        if self.sparsity is not None:
            labels.append(f"sparsity={self.sparsity:g}")
        return " ".join([*labels, f"threads={self.threads}", "+".join(self.contenders)])

    @property
    def title(self) -> str:
        """The key without the contenders."""
        return self.key.rpartition(" ")[0]


def cells_of(config: BenchConfig) -> list[Cell]:
    """Return the cells of a configuration in the order of measurement."""
    cells = []
    peers = [name for name in config.peers if missing(name) is None]
    for part in config.parts:
        for threads in config.threads:
            if part == "layers":
                names = (DENSE, *config.backends, *peers)
                for sparsity in config.sparsities:
                    for k, m in config.shapes:
                        cells.append(Cell(LAYER, threads, names, config.tokens, sparsity, k, m))
            elif part == "model":
                tokens = config.gpt.context * config.gpt.batch
                cells.append(Cell(REFERENCE, threads, (DENSE, PLAIN), tokens))
                names = (DENSE, *config.gpt.backends)
                cells += [Cell(MODEL, threads, names, tokens, sparsity) for sparsity in config.sparsities]
            elif part == "decoding":
                cells += _decoding_cells(config, threads, peers)
            else:
                k, m = config.scaling.shape
                names = (DENSE, *config.scaling.backends)
                cells += [Cell(NNZ, threads, names, config.tokens, s, k, m) for s in config.scaling.sparsities]
                counts = config.scaling.token_counts
                cells += [Cell(TOKENS, threads, names, n, config.scaling.sparsity, k, m) for n in counts]
    return cells


def _decoding_cells(config: BenchConfig, threads: int, peers: Sequence[str]) -> list[Cell]:
    section, each = config.decoding, list(itertools.product(config.decoding.token_counts, config.sparsities))
    k, m = section.shape
    names = (DENSE, *section.backends, *peers)
    whole = (DENSE, *section.backends, *(name for name in peers if name in GENERATING_PEERS))
    products = [Cell(DECODING, threads, names, tokens, sparsity, k, m) for tokens, sparsity in each]
    return products + [Cell(GENERATION, threads, whole, rows, sparsity) for rows, sparsity in each]


def together(cells: Sequence[Cell]) -> list[tuple[Cell, ...]]:
    """Return the cells in groups that are timed in the same rounds: a whole series of `NNZ` or `TOKENS`, or one cell.

    A line is fitted through a series. If its points were measured one by one, a slow minute of the machine would bend
    the line.
    """
    groups: list[tuple[Cell, ...]] = []
    for (part, _), several in itertools.groupby(cells, lambda cell: (cell.part, cell.threads)):
        alike = tuple(several)
        groups += [alike] if part in (NNZ, TOKENS) else [(cell,) for cell in alike]
    return groups


def effort(cell: Cell, config: BenchConfig) -> float:
    """Return the relative time that a cell takes, to estimate the remaining time."""
    section = config.decoding
    if cell.part == DECODING:
        size = 1e3 * section.layers * section.shape[0] * section.shape[1] + 1e8
    elif cell.part == GENERATION:
        size = 1e2 * section.n_layers * section.d_model**2 * section.new_tokens * section.generations + 1e8
    elif cell.in_features is not None and cell.out_features is not None:
        size = 6.0 * cell.in_features * cell.out_features * cell.tokens + 1e8
    else:
        gpt = config.gpt
        size = 6.0 * (12 * gpt.n_layers * gpt.d_model**2 + gpt.vocab_size * gpt.d_model) * cell.tokens + 1e8
        size *= 2.0 if cell.part == REFERENCE else 1.0  # the reference is also profiled
    return size * len(cell.contenders) / cell.threads


def measure(cells: Sequence[Cell], config: BenchConfig) -> list[dict[str, Any]]:
    """Measure a group of cells and return the results as plain values.

    Returns:
        For each cell, ``asdict(cell)`` without the contenders, and ``results`` by contender: ``forward_seconds`` and
        ``step_seconds`` with one entry per round, ``calls`` per round, ``note``, and memory where it is known.
        ``skipped`` gives the reason for each contender that could not be measured; the reference model has a
        ``profile``.
    """
    with with_threads(cells[0].threads):
        if cells[0].part in (MODEL, REFERENCE):
            found = [_measure_model(cell, config) for cell in cells]
        elif cells[0].part in (DECODING, GENERATION):
            found = [_measure_decoding(cell, config) for cell in cells]
        else:
            found = _measure_layers(cells, config)
    return [
        {key: value for key, value in asdict(cell).items() if key != "contenders"} | values
        for cell, values in zip(cells, found, strict=True)
    ]


def _measure_layers(cells: Sequence[Cell], config: BenchConfig) -> list[dict[str, Any]]:
    """Return the results of layers; all contenders of all cells take turns."""
    made = [_contenders(cell, config) for cell in cells]
    works = {(number, name): entry.work for number, (entries, _) in enumerate(made) for name, entry in entries.items()}
    beside = {key: (key[0], DENSE) for key in works}
    times = interleaved(works, config.repeats, config.least_seconds, config.patience, beside)
    found = []
    for number, (entries, skipped) in enumerate(made):
        results = {}
        for name, entry in entries.items():
            taken = times[number, name]
            memory = measure_memory(entry) if config.memory and not taken.given_up else {}
            results[name] = taken.plain(entry.note) | {"stored_weights": entry.stored} | memory
        found.append({"results": results, "skipped": skipped})
    return found


def _contenders(cell: Cell, config: BenchConfig) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders of a layer whose result is correct, and the reason for each of the others."""
    case = _case(cell, config)
    entries: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name in cell.contenders:
        try:
            entry = contender(name, case)
            if reason := wrong(entry, case):
                raise Skipped(reason)
            entries[name] = entry
        except Skipped as reason:
            skipped[name] = str(reason)
    return entries, skipped


def _case(cell: Cell, config: BenchConfig) -> LayerCase:
    assert cell.in_features is not None
    assert cell.out_features is not None
    assert cell.sparsity is not None
    block = (config.block[0], config.block[1])
    return LayerCase(cell.in_features, cell.out_features, cell.tokens, cell.sparsity, block, config.seed)


def _measure_decoding(cell: Cell, config: BenchConfig) -> dict[str, Any]:
    if cell.part == DECODING:
        return measure_products(cell.contenders, _case(cell, config), config)
    assert cell.sparsity is not None
    return measure_generation(cell.contenders, cell.tokens, cell.sparsity, config)


def _measure_model(cell: Cell, config: BenchConfig) -> dict[str, Any]:
    gpt = config.gpt
    steps: dict[str, TrainingStep] = {}
    skipped: dict[str, str] = {}
    for name in cell.contenders:
        try:
            steps[name] = TrainingStep(_model(name, cell, config), gpt, config.seed)
        except Skipped as reason:
            skipped[name] = str(reason)
    works: dict[str, Work] = {name: step.work for name, step in steps.items()}
    times = interleaved(works, config.repeats, config.least_seconds, config.patience)
    results = {}
    for name, step in steps.items():
        entry = times[name].plain() | {"stored_weights": sum(p.numel() for p in step.parameters)}
        if config.memory:
            entry["peak_activation_bytes"] = step.peak_activation_bytes()
            if (held := bytes_per_nonzero(step.model)) is not None:
                entry["state_bytes_per_weight"] = held
        results[name] = entry
    found: dict[str, Any] = {"results": results, "skipped": skipped}
    if cell.part == REFERENCE:
        steps.clear()
        found["profile"] = profile_dense(gpt, config.seed, config.repeats)
    return found


def _model(name: str, cell: Cell, config: BenchConfig) -> Any:
    if name == DENSE:
        return dense_model(config.gpt.model_config())
    if name == PLAIN:
        return PlainGPT(config.gpt.model_config())
    assert cell.sparsity is not None
    return sparse_model(config.gpt.model_config(), cell.sparsity, name, (config.block[0], config.block[1]))
