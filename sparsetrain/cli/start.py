"""Run a verb with its complete configuration and turn the outcome into an exit status."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from sparsetrain import stages
from sparsetrain.cli.verb import named
from sparsetrain.cli.verbs import find
from sparsetrain.data import DataConfig, TaskConfig, load_task, prepare_corpora
from sparsetrain.errors import single_line
from sparsetrain.report.task import overlap_sentences
from sparsetrain.runs.origin import Origin
from sparsetrain.screen import say
from sparsetrain.stages.pipeline_report import overlap_caveat
from sparsetrain.stages.text_overlap import text_overlap
from sparsetrain.training.state import Diverged, Interrupted


def start(verb: str, config: Any, command: str) -> int:
    """Run a verb with its complete configuration and return its exit status. ``command`` would start it again."""
    run = named(find(verb).run)
    try:
        result = run(config)
    except Diverged as error:
        print(f"sparsetrain: diverged: {single_line(error)}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"sparsetrain: {single_line(error)}: {command}", file=sys.stderr)
        return error.exit_code
    if isinstance(result, stages.RunResult):
        _summary(result)
    return result if isinstance(result, int) else 0


@dataclass
class DataVerbConfig:
    """Prepare a corpus.

    Args:
        data: the text and the tokenizer.
        task: a labelled task to prepare too; null for none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig | None = None


def pipeline(config: stages.PipelineConfig) -> int:
    """Run a pipeline, which prints its own results; return 1 if one of its arms diverged, else 0."""
    return 1 if stages.pipeline(config).values.get("diverged") else 0


def generate(config: stages.GenerateConfig) -> None:
    """Print the continuation of a text."""
    print(stages.generate(config))


def predict(config: stages.PredictConfig) -> None:
    """Write a table with labels, and print where it is."""
    stages.predict(config)


def data(config: DataVerbConfig) -> None:
    """Prepare a corpus and print how much text it holds."""
    console = Console()
    corpora = prepare_corpora(config.data, progress=True, console=console)
    for corpus in corpora.values():
        for split, counts in corpus.manifest["splits"].items():
            entries = (f"{counts[key]:,} {key}" for key in ("documents", "tokens", "bytes"))
            say(console, f"{split}: {', '.join(entries)}")
        say(console, f"licence: {corpus.manifest['licence']}")
    if config.task is not None:
        task = load_task(config.task)
        say(console, f"task: {task.describe()}")
        overlap = task.overlap(corpora.train_ids())
        say(console, f"test documents in the training text: {overlap}")
        for sentence in overlap_sentences(text_overlap(task, config.data, Origin.of_corpora(corpora))):
            say(console, sentence)
        for sentence in overlap_caveat(corpora, [task.name]):
            say(console, f"warning: {sentence}")


def _summary(result: Any) -> None:
    shown = ("loss_last", "bits_per_byte", "accuracy", "ci95", "macro_f1", "token_f1", "bag of words", "majority")
    values = dict(result.values)
    if bag := values.get("bag_of_words"):
        values["bag of words"] = bag["accuracy"]
    parts = [f"{key} {_number(values[key])}" for key in (*shown, "seconds") if key in values]
    print("; ".join([f"{result.values['stage']}: {result.values['status']}", *([", ".join(parts)] if parts else [])]))
    print(f"run directory: {result.directory}")


def _number(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_number(item) for item in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
