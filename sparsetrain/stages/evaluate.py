"""Evaluation: a trained model at several context lengths and on probes; it trains nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparsetrain.cost.footprint import Workload
from sparsetrain.data import Batch, DataConfig, Document, Tokenizer, prepare_corpora, sequential_windows
from sparsetrain.data.corpus import division_of
from sparsetrain.data.display import Display
from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.report.evaluation import evaluation_figure, evaluation_sheets
from sparsetrain.report.sweep import write_rows
from sparsetrain.report.tables import print_sheets
from sparsetrain.report.text import percent
from sparsetrain.runs.claim import claimed
from sparsetrain.runs.layout import TOKENIZER
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.provenance import commit, machine
from sparsetrain.runs.result import PositionRow, ProbeRow, RunResult, TextRow, finish
from sparsetrain.screen import say
from sparsetrain.stages.config import RunConfig, as_plain, identify, model_config
from sparsetrain.stages.directories import run_directory
from sparsetrain.stages.evaluate_config import (
    EvaluateConfig,
    check_evaluation,
    last_context,
    scale_name,
    trained_length,
)
from sparsetrain.stages.finished import skipped
from sparsetrain.stages.generate import load_run, run_config
from sparsetrain.stages.masks import starts_sparse
from sparsetrain.stages.memory import check_memory, memory_errors
from sparsetrain.stages.pretrain import FINAL_EVALUATION
from sparsetrain.stages.stage import overall_density
from sparsetrain.training.evaluate import TextScore, score_text
from sparsetrain.training.position_losses import position_losses
from sparsetrain.training.probes import SIZES, TITLE, Probe, probe_accuracy, probes, title_probes
from sparsetrain.training.state import peak_rss_bytes, resolve_device

KIND = "evaluate"
POSITIONS, PROBES, FIGURE = "positions.csv", "probes.csv", "evaluation.png"
ENOUGH = 0.5
"""Share of a kind's probes within the trained length below which it is not asked beyond."""

_ROWS = 8  # sequences that are computed at a time
_SMALLEST, _TRIED = 64, 8  # bytes of the smallest usual probe, and probes of a size that are tried


def evaluate(config: EvaluateConfig, console: Console | None = None) -> RunResult:
    """Evaluate the model of a run, unless it is done already, and return the result.

    It writes ``result.json`` with the rows of `sparsetrain.runs.result`, ``positions.csv``, ``probes.csv`` and a
    figure, and prints the tables. The model computes in float32.

    Raises:
        UserError: ``init_from`` is missing, or the model or the text cannot be evaluated as asked.
    """
    evaluation = Evaluation(config, console)
    console = evaluation.console
    origin = evaluation.origin()
    run = identify(KIND, evaluation.config, origin)
    directory = run_directory(run, evaluation.config, origin)
    with claimed(directory, run, origin) as done:
        if done is not None:
            print_sheets(evaluation_sheets(done.values), console)
            return skipped(done, console)
        with memory_errors("this evaluation"):
            result = evaluation.result()
        if result["positions"]:
            write_rows(result["positions"], directory / POSITIONS)
        if result["probes"]:
            write_rows(result["probes"], directory / PROBES)
        evaluation_figure(result["positions"], result["probes"], result["trained_length"], directory / FIGURE)
        finished = finish(directory, result)
    print_sheets(evaluation_sheets(finished.values), console)
    say(console, f"rows and figure: {directory}")
    return finished


@dataclass(frozen=True)
class Asked:
    """The probes of a kind and a size, with the most tokens that one of them has together with its answer."""

    kind: str
    size: int
    probes: Sequence[Probe]
    tokens: int


class Evaluation:
    """What is asked of a trained model.

    Args:
        config: the settings; those of the text are completed by the run's.

    Raises:
        UserError: there is no such run.
    """

    def __init__(self, config: EvaluateConfig, console: Console | None = None) -> None:
        if config.init_from is None:
            raise UserError("init_from is missing: an evaluation needs a trained model, init_from=RUN_DIR")
        self.console, self.directory = console or Console(), Path(config.init_from)
        if not self.directory.is_dir():
            raise UserError(f"init_from={config.init_from}: no such run directory")
        self.run = run_config(self.directory)
        self.config = replace(config, data=text_of(config, self.run, self.directory))

    def origin(self) -> Origin:
        """Return the text, the tokenizer, and the weights.

        Raises:
            UserError: the run has no checkpoint, or its text has another tokenizer than its model.
        """
        assert self.config.data is not None
        assert self.config.init_from is not None
        found = Origin.of_run(self.config.init_from)
        self.corpora = prepare_corpora(self.config.data, progress=True, console=self.console)
        if self.corpora.tokenizer.sha256 != found.tokenizer.sha256:
            raise UserError(f"{self.directory}: its text has another tokenizer than its model, which cannot read it")
        self.seen = found.train_ids
        return replace(found, corpus=self.corpora.key)

    def result(self) -> dict[str, Any]:
        """Return the content of ``result.json``.

        Raises:
            UserError: the model or the text cannot be evaluated as asked.
        """
        started, config, run = time.monotonic(), self.config, self.run
        device, trained = resolve_device(config.device), trained_length(run)
        shape = model_config(run.model, self.corpora.tokenizer.vocab_size)
        scales, lengths = check_evaluation(config, run, self.corpora)
        asked = self._asked(shape, trained)
        longest = max(*lengths, *(each.tokens for each in asked), last_context(run))
        plan = run.sparsity if run.sparsity.is_sparse else None
        workload = Workload(shape, plan, evaluated=_ROWS, context=longest, cached=longest)
        check_memory(workload, f"evaluation of passes of {longest} tokens", {}, device, config.force)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model, prompt = load_run(self.directory, device)
        if prompt is not None:
            say(self.console, f"{self.directory} has a soft prompt, which is not used here")
        model.config.max_context = trained  # where the run does not say it, from here on dynamic positions know it
        with Display(self.console, True) as display:
            texts = self._texts(model, device)
            positions = self._positions(model, device, lengths, scales, trained, _Cells(display, self.console))
            found = self._probes(model, asked, scales, trained, _Cells(display, self.console))
        score = TextScore.of([score for _, score in texts])
        if not math.isfinite(score.loss):
            raise UserError(f"init_from={config.init_from}: the loss of its model is {score.loss}; nothing to evaluate")
        return {
            "stage": KIND,
            "status": "complete",
            "parameterization": run.parameterization.scheme,
            "sparsity": starts_sparse(run),
            "density": overall_density(model),
            "width": model.config.d_model,
            "depth": model.config.n_layers,
            "lr": run.optimizer.lr,
            "seed": run.seed,
            "loss_last": score.loss,
            "bits_per_byte": score.bits_per_byte,
            "trained_length": trained,
            "texts": [row for row, _ in texts],
            "positions": positions,
            "probes": found,
            "init_from": config.init_from,
            "corpus": self.corpora.key,
            "machine": machine(device),
            "commit": commit(),
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": peak_rss_bytes(),
            "model": {**vars(shape)},
            "config": as_plain(config),
        }

    def _texts(self, model: Transformer, device: torch.device) -> list[tuple[TextRow, TextScore]]:
        """Return the losses at the context of the run, with the run's own scale of the positions."""
        context, found = last_context(self.run), []
        for name, corpus in self.corpora.items():
            windows = sequential_windows(corpus.validation, context, FINAL_EVALUATION)
            score = score_text(model, _losses(model, device), windows.split(_ROWS))
            numbers: TextRow = {
                "corpus": name,
                "context": context,
                "loss": score.loss,
                "bits_per_byte": score.bits_per_byte,
                "tokens": score.tokens,
            }
            found.append((numbers, score))
        return found

    def _positions(
        self,
        model: Transformer,
        device: torch.device,
        lengths: Sequence[int],
        scales: Sequence[float | str],
        trained: int,
        cells: _Cells,
    ) -> list[PositionRow]:
        rows: list[PositionRow] = []
        cells.begin("lengths", len(self.corpora) * len(scales))
        for name, corpus in self.corpora.items():
            for scale in scales:
                model.config.positions_scale = scale
                found = position_losses(
                    *(model, _losses(model, device), corpus.validation, lengths),
                    *(self.config.width, self.config.blocks, _ROWS),
                )
                for at, length in enumerate(lengths):
                    difference, error = found.difference(length, trained)
                    blocks = found.blocks[at]
                    spread = float(blocks.std(ddof=1)) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.nan
                    rows.append(
                        {
                            "corpus": name,
                            "scale": scale_name(scale),
                            "length": length,
                            "loss": found.loss(length),
                            "standard_error": _known(spread),
                            "difference": difference,
                            "difference_error": _known(error),
                        }
                    )
                cells.done(f"{name}, positions {scale_name(scale)}")
        return rows

    def _asked(self, shape: ModelConfig, trained: int) -> list[Asked]:
        """Return the probes, in the order of their kinds and sizes."""
        documents = held_out_titles(self._data, self.seen) if TITLE in self.config.probes else []
        found = []
        for kind in self.config.probes:
            sizes = self.config.sizes or self._usual_sizes(kind, documents, shape, trained)
            if not sizes:
                say(self.console, f"{kind}: no probe fits into the trained length of {trained} tokens")
            for size in sorted(sizes):
                each = self._probes_of(kind, size, self.config.n_probes, documents)
                if shape.positions == "learned" and each.tokens > shape.max_context:
                    raise UserError(
                        f"sizes: {size} bytes of {kind} are up to {each.tokens} tokens, and the model has "
                        f"{shape.max_context} learned positions"
                    )
                found.append(each)
        return found

    @property
    def _data(self) -> DataConfig:
        assert self.config.data is not None
        return self.config.data

    def _probes_of(self, kind: str, size: int, count: int, documents: Sequence[Document]) -> Asked:
        try:
            if kind == TITLE:
                made = title_probes(documents, size, count, self.config.seed)
            else:
                made = probes(kind, size, count, self.config.seed, self.config.marks)
        except UserError as error:
            raise UserError(f"sizes: {kind}: {error}") from None
        return Asked(kind, size, made, max(_tokens(probe, self.corpora.tokenizer) for probe in made))

    def _usual_sizes(self, kind: str, documents: Sequence[Document], shape: ModelConfig, trained: int) -> list[int]:
        """Return the largest power of two whose probes the trained length holds, and twice that."""
        largest, size = 0, _SMALLEST
        while size <= SIZES[-1]:
            try:
                tokens = self._probes_of(kind, size, _TRIED, documents).tokens
            except UserError:  # too small for a probe, or no document is so long
                tokens = 0
            if tokens > trained:
                break
            largest = size if tokens else largest
            size *= 2
        return [] if not largest else [largest] if shape.positions == "learned" else [largest, 2 * largest]

    def _probes(
        self, model: Transformer, asked: Sequence[Asked], scales: Sequence[float | str], trained: int, cells: _Cells
    ) -> list[ProbeRow]:
        rows: list[ProbeRow] = []
        cells.begin("probes", len(asked) * len(scales))
        for kind in self.config.probes:
            best: float | None = None  # of the probes of this kind within the trained length
            for each in sorted((each for each in asked if each.kind == kind), key=lambda each: each.size):
                inside = each.tokens <= trained
                why = "" if inside else _why_not(best, trained)
                done: dict[float, ProbeRow] = {}  # dynamic positions are those of a factor of 1 within the length
                for scale in scales:
                    model.config.positions_scale = scale
                    factor = model.config.positions_factor(each.tokens) if inside else None
                    row = (done.get(factor) if factor is not None else None) or self._probe_row(model, each, why)
                    row = {**row, "scale": scale_name(scale)}
                    if factor is not None:
                        done[factor] = row
                    rows.append(row)
                    if inside and row["accuracy"] is not None:
                        best = max(best or 0.0, row["accuracy"])
                    cells.done(f"{kind} of {each.size} bytes, positions {scale_name(scale)}")
        return rows

    def _probe_row(self, model: Transformer, each: Asked, why: str) -> ProbeRow:
        row: ProbeRow = {
            "kind": each.kind,
            "size": each.size,
            "tokens": each.tokens,
            "scale": scale_name(model.config.positions_scale),
            "n": len(each.probes),
            "accuracy": None,
            "ci_low": None,
            "ci_high": None,
            "chance": 1.0 / len(each.probes[0].choices),
            "why": why,
        }
        if why:
            return row
        score = probe_accuracy(model, self.corpora.tokenizer, each.probes, per_byte=each.kind == TITLE)
        return {**row, "accuracy": score.accuracy, "ci_low": score.ci95[0], "ci_high": score.ci95[1]}


class _Cells:
    """The progress over cells of a table: a bar on a terminal, else a line for each."""

    def __init__(self, display: Display, console: Console) -> None:
        self._display, self._console = display, console

    def begin(self, what: str, count: int) -> None:
        self._what, self._count, self._done = what, max(1, count), 0
        self._report = self._display.task(what)

    def done(self, cell: str) -> None:
        self._done += 1
        self._report(self._done / self._count)
        if not self._console.is_terminal:
            say(self._console, f"{self._what}  {self._done}/{self._count}  {cell}")


def text_of(config: EvaluateConfig, run: RunConfig, directory: Path) -> DataConfig:
    """Return the settings of the text: the run's own, or the given ones with the tokenizer of the run."""
    # The context of a run is not a setting of its evaluation.
    given = run.data if config.data is None else replace(config.data, context=run.data.context)
    if given == run.data and given.tokenizer_path is None:
        return given
    return replace(given, tokenizer_path=str(directory.absolute() / TOKENIZER))


def held_out_titles(data: DataConfig, seen: set[str]) -> list[Document]:
    """Return the validation and test documents of a text that have titles, without those that the weights have seen.

    Raises:
        UserError: no document of the text has a title.
    """
    found: list[Document] = []
    titled = False
    for member in data.members().values():
        source = member.source()
        division = division_of(member, source)
        for split, document in division.assigned(source.documents()):
            if document.title.strip():
                titled = True
                if split != "train" and document.id not in seen:
                    found.append(document)
    if not titled:
        raise UserError(f"probes: {TITLE} needs documents with titles, such as those of medline; this text has none")
    return found


def _why_not(best: float | None, trained: int) -> str:
    if best is None:
        return f"longer than the trained {trained} tokens, and no size lies within"
    return "" if best >= ENOUGH else f"longer than the trained {trained} tokens; within, {percent(best)} are right"


def _tokens(probe: Probe, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(probe.prompt)) + max(map(len, tokenizer.encode_continuations(probe.choices)))


def _losses(model: Transformer, device: torch.device) -> Any:
    def losses(batch: Batch) -> Tensor:
        batch = batch.to(device)
        return model.token_losses(batch.tokens, batch.targets)

    return losses


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
