"""A made-up table of pipelines of text: two corpora, two choices at two sparsities, three seeds, and evaluations."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARMS = {"dense_two_phase": 0.0, "dense_prose": 0.0, "sparse-0.75_two_phase": 0.75, "sparse-0.75_prose": 0.75}
CORPORA = ("prose", "code")
SEEDS = (0, 1, 2)
SCALES, LENGTHS = (1, 2, "dynamic"), (64, 128, 256, 512)


def text_rows() -> list[dict[str, Any]]:
    """Return rows of ``results.csv``: the losses depend on the choice, the sparsity, the corpus and the seed."""
    draw, rows = random.Random(0), []
    for seed in SEEDS:
        for arm, sparsity in ARMS.items():
            for stage in ("pretrain", "evaluate"):
                tokens, evaluated = 2_000_000, stage == "evaluate"
                row: dict[str, Any] = {"parameterization": "supar", "sparsity": sparsity, "width": 64, "depth": 2}
                row |= {"lr": 0.008, "seed": seed, "steps": None if evaluated else 100, "commit": "abc"}
                row |= {"arm": arm, "stage": stage, "task": None, "status": "complete", "density": 1 - sparsity}
                row |= {"tokens": None if evaluated else tokens, "accuracy": None, "majority": None}
                row |= {"flops": None if evaluated else 1e12 * (1 - 0.5 * sparsity), "weights": 98304}
                row["tokens_per_weight"] = None if evaluated else tokens / 98304
                row["tokens_per_nonzero"] = None if evaluated else tokens / (98304 * (1 - sparsity))
                scores = []
                for corpus in CORPORA:
                    harder = 0.3 * (corpus == "code") * ("prose" in arm)
                    scores.append(3.0 + harder + 0.2 * sparsity + 0.1 * seed + draw.gauss(0, 0.02))
                    row |= {f"loss_{corpus}": scores[-1], f"bits_per_byte_{corpus}": scores[-1] / 2.5}
                row |= {"loss": sum(scores) / 2, "bits_per_byte": sum(scores) / 5}
                rows.append(row)
    return rows


def position_rows() -> list[dict[str, Any]]:
    """Return rows of ``positions.csv``: beyond 128 tokens losses rise, less so with a scale."""
    draw, rows = random.Random(1), []
    for seed in SEEDS:
        for arm, sparsity in ARMS.items():
            for scale in SCALES:
                for length in LENGTHS:
                    beyond = max(0, length - 128) / 256 * (1.0 if scale == 1 else 0.3)
                    loss = 3.0 + 0.2 * sparsity + beyond + 0.1 * seed + draw.gauss(0, 0.02)
                    rows.append({"arm": arm, "stage": "evaluate", "seed": seed, "corpus": "prose", "scale": scale})
                    rows[-1] |= {"length": length, "loss": loss, "standard_error": 0.01, "note": "007"}
    return rows


def probe_rows() -> list[dict[str, Any]]:
    """Return rows of ``probes.csv``."""
    draw = random.Random(2)
    return [
        {"arm": arm, "stage": "evaluate", "seed": seed, "kind": "repeat", "size": size, "scale": 1, "n": 100}
        | {"accuracy": None if size == 512 and arm == "dense_prose" else draw.randint(40, 60) / 100}
        for seed in SEEDS
        for arm in ARMS
        for size in (256, 512)
    ]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write rows as the library does."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tables(directory: Path) -> Path:
    """Write the three tables; return the path of ``results.csv``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_table(position_rows(), directory / "positions.csv")
    write_table(probe_rows(), directory / "probes.csv")
    return write_table(text_rows(), directory / "results.csv")
