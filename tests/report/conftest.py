"""A small but complete report, with numbers that behave like a run's."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.models.config import ModelConfig

CONFIG = ModelConfig(d_model=256, n_layers=4, n_heads=4, vocab_size=4096, max_context=256)
TOKENS = 4_096_000


def make_arm(name: str, sparsity: float, steps: int = 400) -> dict[str, Any]:
    noise = random.Random(name)
    floor = 4.1 + 0.25 * sparsity
    curve: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        tokens = TOKENS * step // steps
        mean = floor + 4.2 * math.exp(-6 * step / steps)
        point = {"step": step, "tokens": tokens, "loss": mean + noise.gauss(0, 0.08), "lr": 2e-3 * (1 - step / steps)}
        if step % (steps // 10) == 0:
            point |= {"val_loss": mean + 0.02, "bits_per_byte": 0.36 * mean}
        curve.append(point)
    tuning = [
        {"step": s, "tokens": 4096 * s, "loss": 1.6 * math.exp(-s / 60) + 0.7 + noise.gauss(0, 0.05), "lr": 1e-4}
        for s in range(1, 201)
    ]
    flops = training_flops_per_token(CONFIG, 1 - sparsity, 256).for_tokens(TOKENS)
    accuracy = 0.72 - 0.02 * sparsity
    return {
        "name": name,
        "sparsity": sparsity,
        "density": 1 - sparsity,
        "train_flops": flops.total,
        "pretrain": {
            "tokens": TOKENS,
            "loss_first": 8.32,
            "loss_last": floor + 0.01,
            "bits_per_byte": 0.36 * floor,
        },
        "finetune": {
            "task": "section roles",
            "n_test": 2000,
            "accuracy": accuracy,
            "ci95": [accuracy - 0.021, accuracy + 0.02],
            "macro_f1": accuracy - 0.05,
        },
        "prompt": {
            "task": "section roles",
            "n_test": 2000,
            "accuracy": accuracy + 0.004,
            "ci95": [accuracy - 0.017, accuracy + 0.024],
            "macro_f1": accuracy - 0.045,
        },
        "curves": {"pretrain": curve, "finetune": tuning},
        "flops": flops.as_dict(),
        "bytes": {
            "parameters": 17e6 - 9e6 * sparsity,
            "optimizer": 34e6 - 18e6 * sparsity,
            "index": 12.6e6 * (1 - sparsity) if sparsity else 0,
        },
        "seconds": {"pretrain": 640.0 + 50 * sparsity, "finetune": 71.0, "prompt": 33.5},
    }


@pytest.fixture(scope="session")
def report_json() -> str:
    """A complete report as the text of its file."""
    return json.dumps(make_report())


@pytest.fixture
def content(report_json: str) -> dict[str, Any]:
    """A complete report as plain data; a test may change it."""
    return json.loads(report_json)


def make_report() -> dict[str, Any]:
    return {
        "arms": [make_arm("dense", 0.0), make_arm("s50", 0.5), make_arm("s75", 0.75)],
        "scratch": {"accuracy": 0.58, "ci95": [0.558, 0.602]},
        "majority": 0.355,
        "peak_rss_bytes": 2_147_483_648,
        "seconds": 2310.4,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "overlap_train_test": 0,
        "command": "sparsetrain pipeline experiment=demo seed=0",
        "machine": {"processor": "8 cores", "memory": "32 GiB", "torch": "2.13.0", "threads": 2},
        "task": {"name": "section roles", "labels": ["RESULTS", "METHODS", "OBJECTIVE"], "train": 12000, "test": 2000},
        "model": {"d_model": 256, "n_layers": 4, "n_heads": 4, "vocab_size": 4096, "parameters": 4_194_304},
        "data": {"name": "MEDLINE abstracts", "licence": "read in place, not redistributed", "tokens": 10_900_000},
        "settings": {"seed": 0, "optimizer": {"lr": 2e-3, "weight_decay": 0.1}, "schedule": {"name": "linear_to_zero"}},
        "limits": ["One seed: the spread over seeds was not measured.", "The models are small."],
    }
