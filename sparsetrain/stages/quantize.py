"""Quantization of a run: its model in 4 or 8 bits, with the bytes and the validation loss before and after."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsetrain.data import Batch, Corpora, prepare_corpora, sequential_windows
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.quantization.layers import Quantized, QuantizedSparseLinear
from sparsetrain.quantization.quantize import quantize
from sparsetrain.runs.layout import TOKENIZER
from sparsetrain.runs.origin import run_tokenizer, source_key
from sparsetrain.runs.quantized import REPORT, write_quantized
from sparsetrain.screen import say
from sparsetrain.sparsity import SparseLinear
from sparsetrain.stages.generate import load_run, run_config
from sparsetrain.stages.pretrain import FINAL_EVALUATION
from sparsetrain.training.evaluate import score_text

PARTS = ("embedding and head", "dense matrices", "sparse values", "sparse index", "norms and biases")
_ROWS = 16  # sequences that are evaluated at a time


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model by part; see `PARTS`.

    Args:
        stored: the bytes that the model holds.
        bf16: the bytes of the same tensors in bfloat16, with the index of a sparse matrix as `SparseLinear` holds it.
        nonzeros: the values of sparse layers.
    """

    stored: dict[str, int]
    bf16: dict[str, int]
    nonzeros: int

    @property
    def ratio(self) -> float:
        """Stored bytes over those in bfloat16."""
        return sum(self.stored.values()) / sum(self.bf16.values())

    @property
    def per_nonzero(self) -> float | None:
        """Bytes of a stored value of sparse layers with its index; None without sparse layers."""
        sparse = self.stored["sparse values"] + self.stored["sparse index"]
        return sparse / self.nonzeros if self.nonzeros else None


def sizes(model: Transformer) -> dict[str, int]:
    """Return the bytes of the tensors of a model by part; tensors that several layers share count once."""
    found, seen = dict.fromkeys(PARTS, 0), set()
    outer: list[nn.Module | None] = [model.embed, model.head, model.positions]
    ends = {id(module.matrix if isinstance(module, Quantized) else module) for module in outer}
    sparse = {id(module.matrix) for module in model.modules() if isinstance(module, QuantizedSparseLinear)}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.data_ptr() in seen or not tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            found[_part(module, name, ends, sparse)] += tensor.nbytes
    return found


def _part(module: nn.Module, name: str, ends: set[int], sparse: set[int]) -> str:
    if id(module) in ends:
        return "embedding and head"
    if name in ("row_ptr", "col", "index"):
        return "sparse index"
    if name == "values" or id(module) in sparse:
        return "sparse values"
    return "dense matrices" if name in ("weight", "codes", "scales", "offsets") and not _is_norm(module) else PARTS[-1]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def quantize_run(directory: Path, out: Path, bits: int, group: int, console: Console) -> dict[str, Any]:
    """Quantize the model of a run into the new directory ``out``, print the report and return it.

    Args:
        directory: the run. out: see `sparsetrain.save_quantized`; it also gets the tokenizer and the report.
        bits, group: see `sparsetrain.quantize`.

    Raises:
        UserError: there is no such run, it has a soft prompt, its text has another tokenizer than the model, ``out``
            exists or cannot be written, or ``bits`` or ``group`` is refused.
    """
    if out.exists():
        raise UserError(f"out={out} exists already; a quantized model is written into a new directory")
    model, prompt = load_run(directory, torch.device("cpu"))
    if prompt is not None:
        raise UserError(f"{directory} has a soft prompt, which a quantized model has no place for")
    config, tokenizer = run_config(directory), run_tokenizer(directory)
    corpora = prepare_corpora(config.data, progress=True, console=console)
    if corpora.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"{directory}: its text has another tokenizer than its model, so there is no loss to compare")
    nonzeros = sum(layer.values.numel() for layer in model.modules() if isinstance(layer, SparseLinear))
    before, wide = _losses(model, corpora, config.data.context), sizes(model)
    factor = 2 / next(model.parameters()).element_size()  # all parameters of a run have one type
    bf16 = {part: size if part == "sparse index" else round(size * factor) for part, size in wide.items()}
    quantize(model, bits, group)
    measured = Sizes(sizes(model), bf16, nonzeros)
    after = _losses(model, corpora, config.data.context)
    report = {
        "source": {"run": directory.name, "weights": source_key(str(directory))},
        "bits": bits,
        "group": group,
        "bytes": measured.stored,
        "bytes_bf16": measured.bf16,
        "ratio": measured.ratio,
        "bytes_per_nonzero": measured.per_nonzero,
        "loss_before": before,
        "loss_after": after,
    }
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place) / TOKENIZER)
        content = (Path(place) / TOKENIZER).read_bytes()
    write_quantized(model, out, {TOKENIZER: content, REPORT: (json.dumps(report, indent=2) + "\n").encode()})
    _show(measured, before, after, console)
    say(console, f"quantized model: {out}")
    return report


def _losses(model: Transformer, corpora: Corpora, context: int) -> dict[str, float]:
    """Return the validation loss in nats per token on each corpus, as a run's final evaluation computes it."""

    def losses(batch: Batch) -> Tensor:
        return model.token_losses(batch.tokens, batch.targets)

    return {
        name: score_text(
            model,
            losses,
            sequential_windows(corpus.validation, context, FINAL_EVALUATION).split(_ROWS),
        ).loss
        for name, corpus in corpora.items()
    }


def _show(measured: Sizes, before: dict[str, float], after: dict[str, float], console: Console) -> None:
    rows = [(part, measured.stored[part], measured.bf16[part]) for part in PARTS if measured.bf16[part]]
    rows.append(("all", sum(measured.stored.values()), sum(measured.bf16.values())))
    say(console, f"{'bytes':<20} {'quantized':>14} {'bfloat16':>14} {'ratio':>7}")
    for part, stored, wide in rows:
        say(console, f"{part:<20} {stored:>14,} {wide:>14,} {stored / wide:>7.3f}")
    if measured.per_nonzero is not None:
        say(console, f"{measured.per_nonzero:.3f} bytes a nonzero of the sparse matrices, with its index")
    for name, loss in before.items():
        change = after[name] / loss - 1
        say(console, f"validation loss on {name}: {loss:.4f} before, {after[name]:.4f} after ({change:+.2%})")
