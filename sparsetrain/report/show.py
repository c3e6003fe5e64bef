"""The output of ``sparsetrain report``: a pipeline's tables, a bench, or one run's result and curve."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sparsetrain.errors import UserError
from sparsetrain.report.adaptation import adaptation_sheet, adaptations
from sparsetrain.report.bench import load_bench, print_bench
from sparsetrain.report.evaluation import evaluation_sheets
from sparsetrain.report.html import write_html
from sparsetrain.report.schema import load_report
from sparsetrain.report.tables import corpora_read, layer_masks, noise_scales, print_report, print_sheets, run_metrics
from sparsetrain.report.task import task_sheets
from sparsetrain.report.text import scalar
from sparsetrain.report.times import sheet, times
from sparsetrain.runs.layout import BENCH, METRICS, PAGE, REPORT, RESULT, stage_directories
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.result import load_result
from sparsetrain.screen import say

_HEADLINES = ("stage", "status", "message", "parameterization", "sparsity", "density", "lr", "seed", "steps", "tokens")
_RESULTS = (
    *("loss_first", "loss_last", "bits_per_byte"),
    *("task", "n_test", "accuracy", "ci95", "macro_f1", "majority", "overlap_train_test"),
)


def show_report(directory: Path, console: Console) -> None:
    """Print a pipeline's tables and the path of its page.

    Raises:
        UserError: the directory has no readable ``report.json``.
    """
    report = load_report(directory / REPORT)
    print_report(report, console)
    print_sheets([found for found in (times(report),) if found.rows], console)
    print_sheets(adaptations(report), console)
    say(console, f"report: {(directory / PAGE).absolute()}")


def show_run(directory: Path, console: Console) -> None:
    """Show the pipeline, the bench or the run of a directory; the page of a finished pipeline is written again.

    An unfinished pipeline or run shows its progress.

    Raises:
        UserError: the directory holds no pipeline, bench or run, or a file is damaged.
    """
    if (directory / REPORT).exists():
        write_html(load_report(directory / REPORT), directory / PAGE)
        show_report(directory, console)
        return
    if (directory / BENCH).exists():
        print_bench(load_bench(directory / BENCH), console)
        return
    stages = stage_directories(directory)
    if not _began(directory) and not stages:
        raise UserError(f"{directory} holds no run: neither {REPORT}, {RESULT} nor {METRICS} is there")
    for stage in stages:
        say(console, f"{stage.relative_to(directory)!s:28} {_status(stage)}")
    if _began(directory):
        _show_stage(directory, console)


def _began(directory: Path) -> bool:
    return (directory / METRICS).exists() or (directory / RESULT).exists()


def _status(directory: Path) -> str:
    """Return the status of a finished stage, or the progress of an unfinished one."""
    if (directory / RESULT).exists():
        return scalar(load_result(directory / RESULT).get("status"))
    records = read_metrics(directory / METRICS) if (directory / METRICS).exists() else []
    return f"at step {records[-1]['step']}, not finished" if records else "not begun"


def _show_stage(directory: Path, console: Console) -> None:
    if (directory / RESULT).exists():
        result = load_result(directory / RESULT)
        for key in (*_HEADLINES, *_RESULTS):
            if key in result:
                say(console, f"{key:18} {scalar(result[key])}")
        print_sheets([found for found in task_sheets(result) if found.rows or found.note], console)
        if corpora := result.get("corpora"):
            console.print(corpora_read(corpora).rich())
        masks = result.get("masks") or {}
        if masks.get("rule", "Static") != "Static":
            say(console, f"{'masks':18} {scalar(masks['rule'])}")
            console.print(layer_masks(masks.get("layers", {})).rich())
        if adaptation := result.get("adaptation"):
            print_sheets([adaptation_sheet(adaptation)], console)
        if noise := result.get("noise_scale"):
            console.print(noise_scales(noise, result.get("noise_scale_all")).rich())
        if result.get("step_seconds") is not None:
            print_sheets([sheet([("this run", str(result.get("stage")), result)])], console)
        print_sheets(evaluation_sheets(result), console)
    else:
        say(console, f"{'status':18} {_status(directory)}; run the same command again to continue")
    if (directory / METRICS).exists():
        console.print(run_metrics(read_metrics(directory / METRICS)).rich())
