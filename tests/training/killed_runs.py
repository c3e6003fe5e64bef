"""Kill a small run with SIGKILL at random moments, resume it, and compare it with an undisturbed run.

Usage: python killed_runs.py CONFIG.json DIRECTORY TIMES. Runs are forked, so that imports and torch's first steps cost
time only once. A run that is done before its kill does not count, and shows that the machine has become faster. It
prints how many kills hit a running process, TIMES of at most three times as many, and exits with 1 at the first
difference.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from sparsetrain.runs.checkpoint import list_checkpoints, load_checkpoint
from sparsetrain.runs.metrics import TIMED, read_metrics
from sparsetrain.settings import build
from sparsetrain.stages import PretrainConfig, pretrain


def train(settings: dict, directory: Path) -> None:
    torch.set_num_threads(1)
    config = build(PretrainConfig, {**settings, "run_dir": str(directory)})
    pretrain(config, Console(file=io.StringIO()))


def start(settings: dict, directory: Path) -> int:
    """Fork a process that trains in ``directory``; return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(settings, directory)
            status = 0
        finally:
            os._exit(status)
    return child


def outcome(directory: Path) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """Return what must be equal in two runs: the metrics without times, and the final tensors."""
    records = read_metrics(directory / "metrics.jsonl")
    metrics = [tuple(sorted((k, v) for k, v in record.items() if k not in TIMED)) for record in records]
    newest = list_checkpoints(directory / "checkpoints")[-1]
    last = load_checkpoint(directory / "checkpoints", newest)  # by name: a damaged one is an error
    return metrics, {**last.model, **{f"optimizer {name}": t for name, t in last.optimizer.tensors.items()}}


def main(settings: dict, home: Path, times: int) -> int:
    draw = random.Random()
    train(settings, home / "alone")
    began = time.monotonic()
    if os.waitpid(start(settings, home / "forked"), 0)[1]:
        return 1
    whole = time.monotonic() - began
    metrics, tensors = outcome(home / "alone")
    hits = 0
    for number in range(3 * times):
        if hits == times:
            break
        directory = home / f"killed-{number}"
        child = start(settings, directory)
        moment = draw.uniform(0, whole)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        hits += os.WIFSIGNALED(status)
        if os.WIFEXITED(status):
            whole = moment
            continue
        if os.waitpid(start(settings, directory), 0)[1]:
            print(f"run {number} could not be resumed")
            return 1
        other_metrics, other_tensors = outcome(directory)
        same = other_tensors.keys() == tensors.keys() and all(
            torch.equal(other_tensors[k], tensors[k]) for k in tensors
        )
        if not same or other_metrics != metrics:
            print(f"run {number} differs: tensors equal {same}, metrics equal {other_metrics == metrics}")
            return 1
    print(hits)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])))
