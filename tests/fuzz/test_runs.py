"""What runs, sweeps, benches and the tuner leave, mutated: shown, or refused in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import Reader, fuzz, strict_json
from mutations import BYTES, CSV, JSON, JSON_LINES, YAML
from rich.console import Console

from sparsetrain.report.bench import load_bench, print_bench
from sparsetrain.report.masks import mask_table, read_masks
from sparsetrain.report.schema import load_report
from sparsetrain.report.show import show_run
from sparsetrain.report.tables import print_report
from sparsetrain.runs.checkpoint import OptimizerTensors, load_checkpoint, save_checkpoint
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.recorded import read_config
from sparsetrain.scaling.law import Law
from sparsetrain.scaling.power_law import fit_power_law
from sparsetrain.sparsity.backends.auto import from_plain
from sparsetrain.stages.arms import show_arms
from sparsetrain.studies.coordinates import _finished_trials
from sparsetrain.studies.sweep import show_sweep

MASKS = {
    "rule": "SET",
    "layers": {"blocks.0.mlp.up": {"nnz": 4, "density": 0.5, "target_density": 0.5, "dead_rows": 0}},
}
RESULT: dict[str, Any] = {
    "stage": "pretrain",
    "status": "complete",
    "parameterization": "sp",
    "sparsity": 0.5,
    "width": 32,
    "depth": 2,
    "lr": 0.5,
    "seed": 0,
    "steps": 3,
    "tokens": 9,
    "seconds": 1.5,
    "precision": "fp32",
    "commit": "abc",
    "flops": {"total": 1e9},
    "loss_first": 5.0,
    "loss_last": 2.25,
    "ci95": [0.25, 0.5],
    "masks": MASKS,
}
CONFIG = {"parameterization": {"scheme": "sp", "base_width": None}, "optimizer": {"lr": 0.5}, "seed": 0, "corpus": "c"}
NAMES = "parameterization,sparsity,width,depth,lr,seed,steps,loss,commit,x.y,status,tokens,seconds,precision," + (
    "flops,run"
)


def screen() -> Any:
    """A console whose text can be had."""
    return Console(file=io.StringIO(), width=200)


def shown(show: Callable[[Path, Console], None]) -> Callable[[Path], str]:
    """A reader that gives what is shown."""

    def read(place: Path) -> str:
        console = screen()
        show(place, console)
        text: str = console.file.getvalue()
        return text.replace(str(place), "")

    return read


def one(name: str, text: str) -> Callable[[Path], Path]:
    """A maker of one file."""

    def make(directory: Path) -> Path:
        (directory / name).write_text(text)
        return directory / name

    return make


METRICS = [
    {"step": n, "tokens": 9 * n, "loss": 5.0 - n, "lr": 0.5, "density": 0.5, "mask_overlap": 1 / (n + 1)}
    for n in range(4)
]


def a_run(mutated: str) -> Callable[[Path], Path]:
    """A finished run, of which the file ``mutated`` is changed."""

    def make(directory: Path) -> Path:
        (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        (directory / "result.json").write_text(json.dumps(RESULT))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
        return directory / mutated

    return make


def runs(mutated: str) -> Callable[[Path], Path]:
    """A sweep of three rates, of which a file of one run is changed."""

    def make(directory: Path) -> Path:
        for number, lr in enumerate((0.25, 0.5, 1.0)):
            run = directory / f"run-{number}"
            run.mkdir()
            (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "optimizer": {"lr": lr}}))
            (run / "result.json").write_text(json.dumps({**RESULT, "lr": lr, "loss_last": 2 + abs(lr - 0.5)}))
        return directory / "run-1" / mutated

    return make


def table(directory: Path) -> Path:
    """The rows of a sweep."""
    row = "sp,0.5,32,2,{lr},0,4,{loss},abc,{z},complete,512,1.5,fp32,1e9,r{lr}"
    rows = [row.format(lr=lr, loss=2 + abs(lr - 2), z=z) for lr in (0.5, 1, 2, 4) for z in (7,)]
    path = directory / "results.csv"
    path.write_text("\n".join([NAMES, *rows]) + "\n")
    return path


def arms(directory: Path) -> Path:
    """The rows of two arms of pipelines."""
    names = "parameterization,sparsity,width,depth,lr,seed,steps,loss,commit,arm,stage,task,tokens,bits_per_byte"
    row = "sp,{s},32,2,0.5,{seed},4,{loss},abc,{arm},{stage},9,{bits},{accuracy},0.5,1e9"
    rows = []
    for seed in range(2):
        for arm, s in (("dense", 0.0), ("sparse-0.5", 0.5)):
            pretrain = {"stage": "pretrain,", "loss": 2 + s + seed, "bits": 1 + s + seed, "accuracy": ""}
            finetune = {"stage": "finetune,roles", "loss": "", "bits": "", "accuracy": 0.5 + s * seed}
            rows += [row.format(s=s, seed=seed, arm=arm, **stage) for stage in (pretrain, finetune)]
    path = directory / "results.csv"
    path.write_text("\n".join([f"{names},accuracy,majority,flops", *rows]) + "\n")
    return path


def stages(mutated: str) -> Callable[[Path], Path]:
    """Pre-training of two arms of a pipeline, of which a file of one is changed."""

    def make(directory: Path) -> Path:
        model = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}
        for number, arm in enumerate(("dense", "sparse-0.5")):
            run = directory / arm / "pretrain"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {"context": 16}}))
            result = {**RESULT, "sparsity": number / 2, "bits_per_byte": 1.0 + number, "model": model}
            (run / "result.json").write_text(json.dumps(result))
        return directory / "sparse-0.5" / "pretrain" / mutated

    return make


def bench(directory: Path) -> Path:
    """A bench of one layer and of a reference model."""
    timed = {"forward_seconds": [0.5, 0.25, 0.5], "step_seconds": [2.0, 1.0, 2.0], "calls": 1, "note": ""}
    timed |= {"stored_weights": 64, "state_bytes_per_weight": 28.0, "peak_activation_bytes": 100}
    place = {"threads": 1, "tokens": 64, "in_features": 8, "out_features": 8}
    cells: dict[str, Any] = {
        f"{part} {s}": {**place, "part": part, "sparsity": s, "results": {"dense": timed, "csr": timed}, "skipped": {}}
        for part, s in (
            ("layer", 0.75),
            ("reference", None),
            ("nnz", 0.5),
            ("nnz", 0.25),
            ("nnz", 0.75),
            ("model", 0.75),
        )
    }
    cells["reference None"]["profile"] = {"linear_share": 0.7, "update_share": 0.1, "hidden_share": 0.5}
    machine = {"processor": "p", "family": "", "cores": 2, "caches": {"L1": "32K"}, "vector_flags": ["avx2"]}
    machine |= {"native_bf16": False, "versions": {"torch": "2"}}
    path = directory / "bench.json"
    path.write_text(json.dumps({"format": 1, "machine": machine, "commit": "0123+", "cells": cells}))
    return path


def report(directory: Path) -> Path:
    """A pipeline of two arms."""
    scored = {"task": "t", "n_test": 9, "accuracy": 0.5, "ci95": [0.25, 0.75], "macro_f1": 0.5}
    arm = {"sparsity": 0.0, "density": 1.0, "train_flops": 4.0, "flops": {"head": 4.0}, "finetune": scored}
    arm |= {
        "pretrain": {"tokens": 9, "loss_first": 5.0, "loss_last": 2.0, "bits_per_byte": 1.0},
        "seconds": {"pretrain": 1.0},
    }
    values: dict[str, Any] = {"arms": [{"name": "dense", **arm}, {"name": "s75", **arm, "sparsity": 0.75}]}
    values |= {"scratch": {"accuracy": 0.5, "ci95": [0.25, 0.75]}, "majority": 0.5, "peak_rss_bytes": 9, "seconds": 1.0}
    path = directory / "report.json"
    path.write_text(json.dumps({**values, "commit": None, "overlap_train_test": 0}))
    return path


def checkpoint(mutated: str) -> Callable[[Path], Path]:
    """A run with one checkpoint of a sparse layer."""

    def make(directory: Path) -> Path:
        tensors = {"row_ptr": torch.tensor([0, 1, 2, 2, 2]), "col": torch.tensor([0, 1], dtype=torch.int32)}
        state = {f"blocks.0.attn.out.{name}": tensor for name, tensor in {**tensors, "values": torch.ones(2)}.items()}
        save_checkpoint(directory / "checkpoints", 1, state, OptimizerTensors({}, []), {"masks": {"a": 1.5}}, 1)
        model = {"d_model": 4, "n_layers": 1, "n_heads": 1, "vocab_size": 9, "bias": False, "norm": "rmsnorm"}
        (directory / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        return directory / mutated

    return make


def a_law(directory: Path) -> Path:
    """A power law with its intervals."""
    law = fit_power_law([1.0, 2.0, 4.0, 8.0], [4.0, 2.1, 0.9, 0.5])
    law.save(directory / "law.yaml")
    return directory / "law.yaml"


def said_by_law(place: Path) -> Any:
    """What a law says, and how sure it is."""
    law = Law.load(place / "law.yaml")
    return law(3.0), law.predict_interval(3.0), law.inside(3.0), [law.interval(0.9, name) for name in law.PARAMETERS]


def stored(place: Path) -> Any:
    """The only checkpoint there."""
    found = load_checkpoint(place / "checkpoints")
    return found.step, found.state, {name: found.model[name].tolist() for name in sorted(found.model)}


def limits(place: Path) -> Any:
    """The limits of a table of crossovers at some sizes."""
    tables = from_plain(strict(place / "c.json"), "c.json")
    return {name: (vars(each), [each.at(side, side, 1) for side in (1, 90, 10**5)]) for name, each in tables.items()}


def strict(path: Path) -> Any:
    """JSON, as `auto` reads it."""
    from sparsetrain.reading import read_json

    return read_json(path)


def records(content: bytes) -> list[Any]:
    """The lines of metrics, without a last one cut short."""
    lines = content.split(b"\n")
    whole = [strict_json(line) for line in lines[:-1] if line.removeprefix(b"\xef\xbb\xbf").strip()]
    try:
        return [*whole, strict_json(lines[-1])]
    except (ValueError, AssertionError, RecursionError):
        return whole


CROSSOVERS = {"sides": [64, 256], "tokens": [16, 64], "threads": [1], "density": [[[0.5, 0.25], [0.75, 1]]]}
TRIALS = [
    [
        ["sp", 0.5, 0],
        [{"scheme": "sp", "value": 0.5, "seed": 0, "kind": "up", "quantity": "loss", "step": 1, "rms": 2.0}],
    ]
] * 2
MANIFEST, STATE, MODEL = (
    f"checkpoints/step-00000001/{name}" for name in ("manifest.json", "state.json", "model.safetensors")
)
READERS = [
    Reader("result", a_run("result.json"), shown(show_run), JSON),
    Reader("curve", a_run("metrics.jsonl"), shown(show_run), JSON_LINES),
    Reader("metrics", a_run("metrics.jsonl"), lambda place: read_metrics(place / "metrics.jsonl"), JSON_LINES, records),
    Reader(
        "config", a_run("config.yaml"), read_config, YAML, lambda content: yaml.safe_load(content.decode("utf-8-sig"))
    ),
    Reader("law", a_law, said_by_law, YAML),
    Reader("sweep results", runs("result.json"), shown(lambda p, c: show_sweep([p], "lr", None, 3, False, c)), JSON),
    Reader("sweep configs", runs("config.yaml"), shown(lambda p, c: show_sweep([p], "lr", None, 3, False, c)), YAML),
    Reader("sweep search", runs("config.yaml"), shown(lambda p, c: show_sweep([p], "lr", None, 3, True, c)), YAML),
    Reader("table", table, shown(lambda p, c: show_sweep([p / "results.csv"], "lr", None, 3, False, c)), CSV),
    Reader("table search", table, shown(lambda p, c: show_sweep([p / "results.csv"], "lr", None, 3, True, c)), CSV),
    Reader("arms", arms, shown(lambda p, c: show_arms([p / "results.csv"], None, c)), CSV),
    Reader("arms results", stages("result.json"), shown(lambda p, c: show_arms([p], None, c)), JSON),
    Reader("arms configs", stages("config.yaml"), shown(lambda p, c: show_arms([p], None, c)), YAML),
    Reader("bench", bench, shown(lambda p, c: print_bench(load_bench(p / "bench.json"), c)), JSON),
    Reader("report", report, shown(lambda p, c: print_report(load_report(p / "report.json"), c)), JSON),
    Reader("crossovers", one("c.json", json.dumps({"backends": {"csr": CROSSOVERS}})), limits, JSON),
    Reader(
        "trials",
        one("t.jsonl", "".join(json.dumps(trial) + "\n" for trial in TRIALS)),
        lambda place: _finished_trials(place / "t.jsonl"),
        JSON_LINES,
    ),
    Reader("inspected configuration", checkpoint("config.yaml"), lambda place: mask_table(read_masks(place)), YAML),
    Reader("manifest", checkpoint(MANIFEST), stored, JSON, sealed=True),
    Reader("state", checkpoint(STATE), stored, JSON, sealed=True),
    Reader("tensors", checkpoint(MODEL), stored, BYTES, sealed=True),
    Reader("latest", checkpoint("checkpoints/latest"), stored, JSON, sealed=True),
]


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_files_of_runs_are_shown_or_refused(reader: Reader, tmp_path: Path) -> None:
    """No traceback, no markup obeyed, no changed byte of a checkpoint taken."""
    fuzz(reader, tmp_path)
