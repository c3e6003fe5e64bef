"""``sparsetrain VERB [overrides]``: the command line."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from sparsetrain import __version__, process
from sparsetrain.errors import UserError, nearest, single_line
from sparsetrain.files import NO_SPACE, file_errors, typed_path

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; for the statuses see `sparsetrain.process`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with process.handled(process.Stop()), warnings.catch_warnings():
            # The line that describes the model counts its empty rows; one warning a layer would bury it.
            warnings.filterwarnings("ignore", message=".* have no weight: they are constant")
            try:
                status = _run(given)
                sys.stdout.flush()  # here, where a failure is still told from an error of the run
                return status
            except UserError as error:
                return _refused(single_line(error))
            except KeyboardInterrupt as stop:
                print(f"sparsetrain: {process.INTERRUPTED}", file=sys.stderr)
                return 143 if isinstance(stop, process.Terminated) else 130
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                return _refused(_system_error(error))
    except BrokenPipeError:
        if process.nobody_reads():
            return process.NOBODY_READS
        raise
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich has turned the one into the other
            return process.NOBODY_READS
        raise


def _refused(line: str) -> int:
    print(f"sparsetrain: {line}", file=sys.stderr)
    return 2


def _system_error(error: OSError) -> str:
    """Return what the system refused as one line; it names the file.

    Raises:
        OSError: ``error`` itself, where it is neither about room nor about a name or a right.
    """
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    try:
        with file_errors(place or Path("the disk or the output")):
            raise error
    except UserError as refused:
        if error.errno in NO_SPACE:
            process.silence(1)  # what Python has not written, which it would try again at its end
            return single_line(refused)
        return f"{place}: {error.strerror}" if place else single_line(refused)


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
    return _execute(verb, rest)


def _execute(verb: str, words: list[str]) -> int:
    from sparsetrain.config import load
    from sparsetrain.multirun import Words, run_multirun, show
    from sparsetrain.verbs import start

    given = Words.of(verb, words)
    command = shlex.join(["sparsetrain", verb, *words])
    try:
        if given.asks:
            show(verb, given)
            return 0
        if given.multirun:
            return run_multirun(verb, given, command)
        return start(verb, load(verb, given.overrides), command)
    except UserError as error:
        raise UserError(given.said(error)) from None


def _report(words: list[str]) -> int:
    from rich.console import Console

    from sparsetrain.report.show import show_run

    if len(words) != 1:
        raise UserError(f"report takes one run directory, not {len(words)}: sparsetrain report RUN_DIR")
    show_run(typed_path(words[0], "RUN_DIR"), Console())
    return 0


def _sweep_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sparsetrain sweep", add_help=False, exit_on_error=False)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run directories, directories of them, or results.csv")
    parser.add_argument("--x", default="lr", metavar="KEY", help="the swept setting: lr (default), model.init_std, ...")
    parser.add_argument("--out", metavar="DIR", help="where results.csv, optima.csv and figure.png go")
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
    places = [typed_path(place, "RUNS") for place in given.runs]
    out = None if given.out is None else typed_path(given.out, "--out")
    show_sweep(places, given.x, out, given.seeds, given.search, Console())
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
    picture = typed_path(pictures[0], "picture") if pictures else None
    inspect_masks(typed_path(paths[0], "PATH"), Console(), picture)
    return 0


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
