"""Two languages, tiny models that are adapted from one to the other, and what is read of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from languages import ARABIC, LATIN, VOWELS, documents, words
from torch import Tensor

from sparsetrain.data import DataConfig
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.stages import AdaptConfig
from sparsetrain.stages.generate import load_run

CPU = torch.device("cpu")
ENGLISH = [text.replace("\n", " ") for text in documents(words(LATIN), 60)]
# One English document has Arabic letters, and must be split as before too.
ENGLISH[7] += " " + "".join(ARABIC[:3])
FOREIGN = [text.replace("\n", " ") for text in documents(words(ARABIC, VOWELS), 60, seed=1)]
SMALL: dict[str, Any] = {
    "budget": {"steps": 4, "batch_size": 4},
    "loop": {"log_every": 1, "eval_every": 0, "eval_sequences": 2, "checkpoint_every": 0},
    "device": "cpu",
}
Make = Callable[..., Any]


def weights(directory: Path) -> dict[str, Tensor]:
    return load_checkpoint(directory / "checkpoints").model


def by_hand(directory: Path, text: list[str], context: int = 16) -> float:
    """Return the bits per byte of texts, one window after the other, with torch's own cross-entropy."""
    (model, _), tokenizer = load_run(directory, CPU), Tokenizer.load(directory)
    ids = [tokenizer.eos_id, *(token for one in text for token in [*tokenizer.encode(one), tokenizer.eos_id])]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor(ids[start : start + context + 1])
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(one.encode()) for one in text)


def validation(directory: Path, name: str, home: Path) -> list[str]:
    """Return the documents of a corpus that the run did not train on."""
    seen = set((directory / "train_ids.txt").read_text().split())
    source = DataConfig(path=str(home / f"{name[:2]}.txt"), separator="blank_line").source()
    return [document.text for document in source.documents() if document.id not in seen]


def given(config: AdaptConfig) -> dict[str, Any]:
    """Return the settings of a run that it does not have from `make`."""
    names = ("init_from", "run_dir", "vocabulary", "train", "optimizer")
    return {name: getattr(config, name) for name in names}
