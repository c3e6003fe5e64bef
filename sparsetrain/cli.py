"""``sparsetrain VERB [overrides]``: the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from uuid import uuid4

from sparsetrain import __version__
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.files import file_errors
from sparsetrain.screen import say

ABOUT = {
    "data": "Download or read a corpus, train its tokenizer, write its token files.",
    "pretrain": "Train a language model on text, dense or sparse from the first step.",
    "finetune": "Train a pre-trained model (or a fresh one) on a labelled task, dense or with its masks.",
    "prompt": "Learn a soft prompt for a task, alone or together with the model.",
    "pipeline": "Pre-train, fine-tune and soft-prompt at several sparsities, and compare them in a report.",
    "generate": "Continue a text with the model of a run.",
    "coord-check": "Check that activations and updates keep their scale over sparsity, width or depth.",
    "sweep": "Collect the runs of a sweep: results.csv, where the optimum is with its interval, and the figure.",
    "tune": "Measure on this machine from which sparsity on a layer is computed by its nonzeros.",
    "bench": "Measure how fast sparse layers and models are on this machine, beside dense ones and other libraries.",
    "report": "Show the results of a run or of a pipeline, and write the pipeline's page again.",
    "mask": "Inspect the masks of a run, a checkpoint or a file: statistics, and a picture.",
}

EXAMPLES = {
    "data": ["sparsetrain data", "sparsetrain data data.path=notes.txt data.vocab_size=2048"],
    "pretrain": [
        "sparsetrain pretrain model=demo sparsity.sparsity=0.75 schedule.tokens=2000000",
        "sparsetrain pretrain data.path=notes.txt model.d_model=64 schedule.steps=200 run_dir=runs/notes",
        "sparsetrain pretrain -m sparsity.sparsity=0,0.5,0.75 optimizer.lr=1e-3,2e-3,4e-3",
    ],
    "finetune": [
        "sparsetrain finetune init_from=RUN_DIR task=section_roles",
        "sparsetrain finetune init_from=RUN_DIR task=pubmedqa task.path=PUBMEDQA_DIR mode=sparse",
    ],
    "prompt": ["sparsetrain prompt init_from=RUN_DIR n_tokens=16", "sparsetrain prompt init_from=RUN_DIR train=both"],
    "pipeline": [
        "sparsetrain pipeline experiment=demo",
        "sparsetrain pipeline experiment=demo pipeline.sparsities=[0,0.5,0.75]",
    ],
    "generate": ["sparsetrain generate init_from=RUN_DIR prompt='The aim of this study was'"],
    "coord-check": [
        "sparsetrain coord-check",
        "sparsetrain coord-check check=depth parameterization=completep parameterization.base_layers=2 check.seeds=2",
        "sparsetrain coord-check check=width parameterization=mup optimizer.lr=1e-3 check.seeds=3",
    ],
    "sweep": [
        "sparsetrain sweep runs/supar_lr_transfer --out experiments/supar_lr_transfer",
        "sparsetrain sweep runs/supar_init_transfer --x model.init_std --out experiments/supar_init_transfer",
        "sparsetrain sweep runs/base_tuning --search --out experiments/base_tuning",
    ],
    "tune": ["sparsetrain tune", "sparsetrain tune threads=[1,4,8] tokens=[512,4096]"],
    "bench": [
        "sparsetrain bench",
        "sparsetrain bench preset=quick",
        "sparsetrain bench what=layers sparsities=[0.75,0.9] shapes=[[512,2048],[1024,1024]] threads=[1]",
        "sparsetrain bench what=model gpt.d_model=768 gpt.n_layers=12 max_seconds=600",
    ],
    "report": ["sparsetrain report RUN_DIR"],
    "mask": ["sparsetrain mask inspect RUN_DIR", "sparsetrain mask inspect masks.npz picture=masks.png"],
}

PLAIN = ("report", "sweep", "mask")  # verbs that take paths, not settings
HYDRA_FLAGS = ("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--config-dir", "-cd", "--hydra-help")
MULTIRUN_FLAGS = ("-m", "--multirun")
FORCE = "--force"  # is short for force=true


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a diverged run, 2 for input that cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminations(), warnings.catch_warnings():
            # The line that describes the model counts its empty rows; one warning a layer would bury it.
            warnings.filterwarnings("ignore", message=".* have no weight: they are constant")
            return _run(given)
    except UserError as error:
        print(f"sparsetrain: {_single_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("sparsetrain: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """SIGTERM outside a training loop, which has handlers of its own."""


@contextmanager
def _terminations() -> Iterator[None]:
    """Make SIGTERM end the program as Ctrl-C does: temporary files are removed and a line says how to go on."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _single_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n"))


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"sparsetrain {__version__}")
        return 0
    verb, rest = given[0], given[1:]
    if verb not in ABOUT:
        raise UserError(f"no verb '{verb}'{nearest(verb, ABOUT)}; there are {', '.join(ABOUT)}")
    if any(word in ("-h", "--help") for word in rest):
        print(_verb_help(verb))
        return 0
    if verb in PLAIN:
        return {"report": _report, "sweep": _sweep, "mask": _mask}[verb](rest)
    rest = ["force=true" if word == FORCE else word for word in rest]
    options = [word.partition("=")[0] for word in rest if word.startswith("-")]
    for word in options:
        known = (*MULTIRUN_FLAGS, *HYDRA_FLAGS, FORCE, "--help")
        if word not in known:
            raise UserError(f"no option '{word}'{nearest(word, known)}; settings are written key=value")
    if options:
        return _through_hydra(verb, rest)
    return _execute(verb, rest)


def _execute(verb: str, overrides: list[str]) -> int:
    from sparsetrain.config import load

    return _start(verb, load(verb, overrides), shlex.join(["sparsetrain", verb, *overrides]))


def _start(verb: str, config: Any, command: str) -> int:
    """Run a verb with its complete configuration; return the exit status. ``command`` is what would start it again."""
    from sparsetrain import stages
    from sparsetrain.bench import bench
    from sparsetrain.training.state import Diverged, Interrupted

    runs: dict[str, Callable[[Any], Any]] = {
        "data": _data,
        "pretrain": stages.pretrain,
        "finetune": stages.finetune,
        "prompt": stages.prompt,
        "pipeline": stages.pipeline,
        "coord-check": stages.coord_check,
        "tune": stages.tune,
        "bench": bench,
        "generate": lambda settings: print(stages.generate(settings)),
    }
    try:
        result = runs[verb](config)
    except Diverged as error:
        print(f"sparsetrain: diverged: {_single_line(error)}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"sparsetrain: {_single_line(error)}: {command}", file=sys.stderr)
        return error.exit_code
    if verb == "pipeline":
        return 1 if result.values.get("diverged") else 0
    if isinstance(result, stages.RunResult):
        _summary(result)
    return 0


def _data(config: Any) -> None:
    from rich.console import Console

    from sparsetrain.data import load_task, prepare
    from sparsetrain.stages.pipeline import overlap_caveat

    console = Console()
    corpus = prepare(config.data, progress=True, console=console)
    for split, counts in corpus.manifest["splits"].items():
        entries = (f"{counts[key]:,} {key}" for key in ("documents", "tokens", "bytes"))
        say(console, f"{split}: {', '.join(entries)}")
    say(console, f"licence: {corpus.manifest['licence']}")
    if config.task is not None:
        task = load_task(config.task)
        say(console, f"task: {task.describe()}")
        overlap = task.overlap(corpus.train_ids())
        say(console, f"test documents in the training text: {overlap}")
        for sentence in overlap_caveat(corpus):
            say(console, f"warning: {sentence}")


def _summary(result: Any) -> None:
    shown = ("loss_last", "bits_per_byte", "accuracy", "ci95", "macro_f1", "majority", "seconds")
    parts = [f"{key} {_number(result.values[key])}" for key in shown if key in result.values]
    print("; ".join([f"{result.values['stage']}: {result.values['status']}", *([", ".join(parts)] if parts else [])]))
    print(f"run directory: {result.directory}")


def _number(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_number(item) for item in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report(words: list[str]) -> int:
    from rich.console import Console

    from sparsetrain.report.show import show_run

    if len(words) != 1:
        raise UserError(f"report takes one run directory, not {len(words)}: sparsetrain report RUN_DIR")
    show_run(Path(words[0]), Console())
    return 0


def _sweep_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sparsetrain sweep", add_help=False, exit_on_error=False)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="run directories, directories of them, or results.csv"
    )
    parser.add_argument("--x", default="lr", metavar="KEY", help="the swept setting: lr (default), model.init_std, ...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results.csv, optima.csv and figure.png go")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds wanted around a minimum (default 3)")
    parser.add_argument("--search", action="store_true", help="a random search: rank the points instead of curves")
    return parser


def _sweep(words: list[str]) -> int:
    from rich.console import Console

    from sparsetrain.stages.sweep import show_sweep

    known = [action.option_strings[-1] for action in _sweep_parser()._actions if action.option_strings]
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in known:
            raise UserError(f"sweep has no option '{word}'{nearest(word, known)}; there are {', '.join(known)}")
    try:
        with redirect_stderr(StringIO()) as said:
            given = _sweep_parser().parse_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"sweep: {error}; sparsetrain sweep --help shows how") from None
    except SystemExit:
        raise UserError(f"sweep: {said.getvalue().strip().splitlines()[-1].partition('error: ')[2]}") from None
    if given.seeds < 1:
        raise UserError(f"--seeds={given.seeds} must be at least 1")
    show_sweep(given.runs, given.x, given.out, given.seeds, given.search, Console())
    return 0


def _mask(words: list[str]) -> int:
    from rich.console import Console

    from sparsetrain.report.masks import inspect_masks

    if not words or words[0] != "inspect":
        said = f"not {words[0]!r}" if words else "not nothing"
        raise UserError(f"mask knows one word, inspect, {said}: sparsetrain mask inspect PATH [picture=FILE]")
    pictures = [word.partition("=")[2] for word in words[1:] if word.startswith("picture=")]
    paths = [word for word in words[1:] if not word.startswith("picture=")]
    if len(paths) != 1 or len(pictures) > 1 or "" in pictures:
        raise UserError("mask inspect takes one path and at most one picture=FILE")
    inspect_masks(Path(paths[0]), Console(), Path(pictures[0]) if pictures else None)
    return 0


def _through_hydra(verb: str, rest: list[str]) -> int:
    """Hand a multirun, or a question about the configuration, to Hydra's own command line."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sparsetrain.config import check, complete, config_directory, one_line, register, with_sweep

    flags = [word for word in rest if word.startswith("-")]
    values = {
        rest[place + 1] for place, word in enumerate(rest[:-1]) if word in HYDRA_FLAGS and "=" not in rest[place + 1]
    }
    overrides = complete(word for word in rest if not word.startswith("-") and word not in values)
    for flag, value in pairwise([*(part for word in rest for part in word.split("=", 1)), ""]):
        if flag in ("--cfg", "-c"):
            check_choice(flag, value, ("job", "hydra", "all"))
    sweep = any(word in MULTIRUN_FLAGS for word in flags)
    check(verb, overrides, sweep=sweep)
    if sweep:
        overrides = with_sweep(verb, overrides)
        check(verb, overrides, sweep=True)
        if verb == "pretrain" and not values:
            _print_cost(overrides)
    register()
    # Hydra would otherwise replace the error of a job by a page of its own.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    launch = hydra.main(version_base="1.3", config_path=str(config_directory().absolute()), config_name=verb)
    before, sys.argv = sys.argv, [f"sparsetrain {verb}", *flags, *sorted(values), *overrides]
    command = shlex.join(["sparsetrain", verb, *rest])
    try:
        # Here and not in a temporary directory: the points of a sweep may run on other machines that share this one.
        with file_errors(Path.cwd()), TemporaryDirectory(prefix=".sweep-", dir=Path.cwd()) as failures:
            launch(_Job(verb, overrides, command, Path(failures)))()
            return max((int(path.name.partition("-")[0]) for path in Path(failures).iterdir()), default=0)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from None
    finally:
        sys.argv = before


def _print_cost(overrides: list[str]) -> None:
    """Say what a sweep takes before it starts."""
    from rich.console import Console

    from sparsetrain.config import points
    from sparsetrain.stages.sweep import sweep_cost

    console = Console()
    say(console, sweep_cost(points("pretrain", overrides), console).describe())


class _Job:
    """One point of a multirun. A class, so that a launcher can send it to another process.

    What fails is said at once and noted in the directory ``failures``, and the sweep goes on with its other points;
    an exception would make Hydra say it again in its own words.
    """

    def __init__(self, verb: str, overrides: list[str], command: str, failures: Path) -> None:
        self.verb, self.overrides, self.command, self.failures = verb, overrides, command, failures

    def __call__(self, tree: Any) -> None:
        from sparsetrain.config import convert

        try:
            status = _start(self.verb, convert(self.verb, tree, self.overrides), self.command)
        except UserError as error:
            print(f"sparsetrain: {_single_line(error)}", file=sys.stderr, flush=True)
            status = 2
        if status > 2:
            raise KeyboardInterrupt
        if status:
            (self.failures / f"{status}-{uuid4().hex}").touch()


def _help() -> str:
    verbs = "\n".join(f"  {verb:11} {about}" for verb, about in ABOUT.items())
    return (
        "sparsetrain: train language models whose weights are sparse from the first step\n\n"
        "usage: sparsetrain VERB [key=value ...]        one run\n"
        "       sparsetrain VERB -m key=a,b,c ...       a Hydra multirun over all combinations\n"
        "       sparsetrain VERB --force ...            although the memory for it seems not to be there\n"
        "       sparsetrain VERB --help                 settings, choices and examples of a verb\n"
        "       sparsetrain --version\n\n"
        f"verbs:\n{verbs}\n\n"
        "A run lives in a directory named after its configuration: the same command again goes on where it was\n"
        "stopped, or says that it is done. Start with: sparsetrain pipeline experiment=demo"
    )


def _verb_help(verb: str) -> str:
    examples = "\n".join(f"  {example}" for example in EXAMPLES[verb])
    head = f"sparsetrain {verb}: {ABOUT[verb]}\n\nexamples:\n{examples}"
    if verb == "sweep":
        return f"{head}\n\n{_sweep_parser().format_help()}"
    if verb in PLAIN:
        return head
    from sparsetrain.config import describe

    return f"{head}\n\n{describe(verb)}"


if __name__ == "__main__":
    sys.exit(main())
