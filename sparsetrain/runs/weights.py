"""The weights of a run: those of its transformer, and the soft prompt that it may have learned.

A checkpoint of a soft prompt holds the prompt and, behind a prefix, the transformer; every other one holds the
transformer alone. A sparse layer is saved with its pattern.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.runs.layout import CHECKPOINTS
from sparsetrain.runs.result import finished

MODEL_PREFIX, PROMPT_VECTORS = "model.", "prompt.vectors"
_PATTERN = ".row_ptr"  # the end of a tensor's name that only a sparse layer has


@dataclass(frozen=True)
class RunWeights:
    """The tensors of a checkpoint, told apart.

    Args:
        model: the state dict of the transformer.
        prompt: the vectors of the soft prompt, ``[n_tokens, d_model]``; None for a run that learned none.
    """

    model: dict[str, Tensor]
    prompt: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> RunWeights:
        """Return the parts of a checkpoint's ``model``."""
        prompt = tensors.get(PROMPT_VECTORS)
        if prompt is None:
            return cls(dict(tensors), None)
        model = {name.removeprefix(MODEL_PREFIX): value for name, value in tensors.items() if name != PROMPT_VECTORS}
        return cls(model, prompt)

    @property
    def stored(self) -> dict[str, int]:
        """The number of weights that each sparse layer stores, by the layer's name."""
        layers = [name.removesuffix(_PATTERN) for name in self.model if name.endswith(_PATTERN)]
        return {layer: self.model[f"{layer}.values"].numel() for layer in layers}

    @property
    def sparse(self) -> bool:
        """Whether any layer has a pattern; a model whose layers were made dense has none."""
        return bool(self.sparse_layers)

    @property
    def sparse_layers(self) -> list[str]:
        """The names of the layers that have a pattern."""
        return [name.removesuffix(_PATTERN) for name in self.model if name.endswith(_PATTERN)]


def read_weights(directory: Path) -> RunWeights:
    """Return the newest valid weights of a run; one that is not finished is named on stderr.

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
    return RunWeights.of(stored.model)
