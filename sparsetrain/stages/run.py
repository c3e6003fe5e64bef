"""A run's directory: who may write to it, what it holds, and when it is done."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

import sparsetrain
from sparsetrain.data import Corpus, Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.files import clear_leftovers, file_errors, sha256_of, whole_file, write_json, write_text
from sparsetrain.processor import cpuinfo
from sparsetrain.reading import read_text, read_yaml
from sparsetrain.report.run_files import load_result
from sparsetrain.report.text import shorten
from sparsetrain.runs import checkpoint
from sparsetrain.runs.checkpoint import list_checkpoints, load_checkpoint
from sparsetrain.screen import say
from sparsetrain.stages.config import RunConfig, as_plain, differences
from sparsetrain.training.state import Diverged

CONFIG, RESULT, TOKENIZER, CHECKPOINTS = "config.yaml", "result.json", "tokenizer.json", "checkpoints"
# What every table of an experiment begins with, one row a run.
COLUMNS = ("parameterization", "sparsity", "width", "depth", "lr", "seed", "steps", "loss", "commit")
MAX_ID_BYTES = 1 << 30
METRICS, LOCK, TRAIN_IDS, BACKENDS = "metrics.jsonl", ".lock", "train_ids.txt", "backends.json"


@dataclass(frozen=True)
class RunResult:
    """What a stage leaves behind: its directory and the content of its ``result.json``."""

    directory: Path
    values: dict[str, Any]

    @property
    def complete(self) -> bool:
        return self.values.get("status") == "complete"

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


@dataclass(frozen=True)
class Origin:
    """What a run is made from, kept in its directory so that the run can be used without the corpus.

    Args:
        corpus: the name of the corpus, which is a hash of its content.
        source: see `source_key`; None for a run from scratch.
        tokenizer: of the corpus and the model.
        train_ids: the documents that the weights have seen, for the overlap with a task's test documents.
    """

    corpus: str
    source: str | None
    tokenizer: Tokenizer
    train_ids: set[str]

    @classmethod
    def of_corpus(cls, corpus: Corpus, init_from: str | None = None) -> Origin:
        """Return the origin of a run on ``corpus``, from scratch or from the weights of another run."""
        seen = corpus.train_ids()
        if init_from is not None:
            seen |= cls.of_run(init_from).train_ids
        return cls(corpus.directory.name, source_key(init_from), corpus.tokenizer, seen)

    @classmethod
    def of_run(cls, init_from: str) -> Origin:
        """Return the origin of a run that starts from the weights of another and reads no corpus of its own."""
        directory = Path(init_from)
        corpus = str(read_config(directory).get("corpus"))
        try:
            seen = read_text(directory / TRAIN_IDS, MAX_ID_BYTES).split("\n")[:-1]
        except UserError as error:
            raise UserError(f"init_from={init_from}: {error}") from None
        return cls(corpus, source_key(init_from), run_tokenizer(directory), set(seen))

    def save(self, directory: Path) -> None:
        """Write tokenizer and document ids beside the weights."""
        with whole_file(directory / TOKENIZER) as temporary:
            self.tokenizer.save(temporary)
        write_text(directory / TRAIN_IDS, "".join(f"{name}\n" for name in sorted(self.train_ids)))


def source_key(init_from: str | None) -> str | None:
    """Return what identifies the weights of a run: the name of its newest checkpoint and a hash of its manifest.

    Raises:
        UserError: no run there, or one without a checkpoint.
    """
    if init_from is None:
        return None
    directory = Path(init_from)
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    names = list_checkpoints(directory / CHECKPOINTS)
    if not names:
        raise UserError(f"init_from={directory} holds no checkpoint")
    return f"{names[-1]}-{sha256_of(directory / CHECKPOINTS / names[-1] / 'manifest.json')[:16]}"


@contextmanager
def claimed(directory: Path, config: RunConfig, origin: Origin) -> Iterator[RunResult | None]:
    """Claim a run directory for this process and check that it belongs to ``config``; yield its result, if it is done.

    A `UserError` inside, before the first checkpoint, leaves no trace: with the mistake put right, the same directory
    can be used.

    Args:
        origin: the text and the weights behind the run; if either changes, it is another run.

    Raises:
        UserError: another process is writing to it, it holds a run of another configuration, or it is not writable.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    with file_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run_dir={directory} is in use by another process; wait for it or choose another"
            ) from None
        with file_errors(directory):
            clear_leftovers(directory)
            checkpoint.clear_leftovers(directory / CHECKPOINTS)
        ours = {**as_plain(config), "corpus": origin.corpus, "source": origin.source}
        fresh = not (directory / CONFIG).exists()
        try:
            if fresh:
                write_text(directory / CONFIG, yaml.safe_dump(ours, sort_keys=False))
            elif changed := differences(ours, read_config(directory)):
                raise UserError(
                    f"run_dir={directory} holds a run with another configuration: "
                    f"{shorten(', '.join(changed[:3]), 600)}; choose another run_dir or delete that one"
                )
            yield finished(directory)
        except UserError:
            if fresh:
                _remove_traces(directory, made)
            raise
    finally:
        os.close(lock)


def _remove_traces(directory: Path, made: list[Path]) -> None:
    """Remove what a run wrote that did not come to a checkpoint, and the directories ``made`` for it."""
    traces = {LOCK, CONFIG, TOKENIZER, TRAIN_IDS, METRICS, BACKENDS}
    if not traces.issuperset(entry.name for entry in directory.iterdir()):
        return
    with suppress(OSError):
        for name in traces:
            (directory / name).unlink(missing_ok=True)
        for place in made:
            place.rmdir()


def finished(directory: Path) -> RunResult | None:
    """Return the result of a run that ended, or None."""
    path = directory / RESULT
    return RunResult(directory, load_result(path)) if path.exists() else None


def skipped(done: RunResult, console: Console) -> RunResult:
    """Say that a run was done before and return its result.

    Raises:
        Diverged: that is how it ended, and how it would again.
    """
    if done.values.get("status") == "diverged":
        raise Diverged(f"{done.values.get('message')} (as recorded in {done.directory}; delete it to try again)")
    say(console, f"{done.values.get('stage', 'stage')}: already done in {done.directory}")
    return done


def finish(directory: Path, values: dict[str, Any]) -> RunResult:
    """Write ``result.json``, after which the run counts as done."""
    write_json(directory / RESULT, values)
    return RunResult(directory, values)


def read_config(directory: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run as plain values.

    Raises:
        UserError: no run there, or an unreadable file.
    """
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory} is no run directory: it has no {CONFIG}")
    try:
        content = read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {str(error).removeprefix(str(path)).lstrip(' ,:')}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no configuration")
    return content


def run_weights(directory: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the newest valid weights of a run, those whose name begins with ``prefix``, without it.

    Raises:
        UserError: no run there, or no readable checkpoint.
    """
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    stored = load_checkpoint(
        directory / CHECKPOINTS, on_refused=lambda line: print(f"warning: {line}", file=sys.stderr)
    )
    done = finished(directory)
    if done is None or not done.complete:
        print(f"warning: {directory} is not finished; its weights are those of step {stored.step}", file=sys.stderr)
    return {name.removeprefix(prefix): value for name, value in stored.model.items() if name.startswith(prefix)}


def run_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer that a run was trained with."""
    return Tokenizer.load(directory / TOKENIZER)


def commit() -> str | None:
    """Return the git commit of the source tree that the package is imported from, with ``+`` if it was changed."""
    root = Path(sparsetrain.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsetrain": sparsetrain.__version__,
    }


def _processor() -> str:
    return f"{cpuinfo().get('model name', platform.machine())}, {os.cpu_count()} cores"


def command_line() -> str:
    """Return the command that started this process, as a person would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
