"""The logits of an exported model beside those of the model that it was made from."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.sparsity import densify

_TEXT = "The aim of this study was to compare 2 groups of patients (n = 120); we measured, e.g., blood pressure.\n" * 4
_TOKENS = 64
MOST = 1e-4
"""Largest difference of logits, relative to the largest logit, with which a model counts as the same."""


def sample(tokenizer: Tokenizer, max_context: int) -> Tensor:
    """Return token ids ``[2, T]``: of a text, and spread evenly over the vocabulary."""
    length = min(_TOKENS, max_context)
    text = (tokenizer.encode(_TEXT) * _TOKENS)[:length]
    spread = torch.linspace(0, tokenizer.vocab_size - 1, length).long()
    return torch.stack([torch.tensor(text), spread])


def same_logits(model: Transformer, directory: Path, ids: Tensor, told: str, anyway: str) -> float | None:
    """Return the largest difference of a logit between our model and what transformers loads; None without it.

    Args:
        model: of ours.
        directory: of the model that transformers loads.
        ids: int64 ``[B, T]``.
        told: how the error begins: who computes other logits.
        anyway: how it ends: what ``verify=false`` would do.

    Raises:
        UserError: the logits differ by more than rounding.
    """
    compared = largest_difference(model, directory, ids)
    if compared is None:
        return None
    difference, largest = compared
    if not difference <= MOST * max(1.0, largest):
        raise UserError(f"{told}: they differ by {difference:.1e}, with logits up to {largest:.1e}; {anyway}")
    return difference


def largest_difference(model: Transformer, directory: Path, ids: Tensor) -> tuple[float, float] | None:
    """Return the largest difference of a logit, and the largest logit; None without transformers.

    Args:
        model: of ours. directory: the exported one. ids: int64 ``[B, T]``.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM

    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
        densify(theirs).eval()  # the layers of transformers alone
        found, expected = theirs(ids).logits, model.float()(ids)
    return float((found - expected).abs().max()), float(expected.abs().max())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing progress and advice."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
