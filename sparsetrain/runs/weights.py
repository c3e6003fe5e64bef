"""The weights of a run: its transformer, and its soft prompt if it learned one.

A checkpoint of soft-prompt training holds the prompt and, with a prefix, the transformer. Every other checkpoint holds
the transformer without a prefix. A sparse layer is saved with its pattern.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.runs.layout import CHECKPOINTS
from sparsetrain.runs.result import finished

MODEL_PREFIX, PROMPT_VECTORS = "model.", "prompt.vectors"
_log = logging.getLogger(__name__)

_PATTERN = ".row_ptr"  # suffix of a tensor name that only sparse layers have


@dataclass(frozen=True)
class RunWeights:
    """The tensors of a checkpoint, split by what they belong to.

    Args:
        model: the state dict of the transformer.
        prompt: the vectors of the soft prompt, ``[n_tokens, d_model]``; None if the run learned none.
    """

    model: dict[str, Tensor]
    prompt: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> RunWeights:
        """Split the ``model`` tensors of a checkpoint."""
        prompt = tensors.get(PROMPT_VECTORS)
        if prompt is None:
            return cls(dict(tensors), None)
        model = {name.removeprefix(MODEL_PREFIX): value for name, value in tensors.items() if name != PROMPT_VECTORS}
        return cls(model, prompt)

    @property
    def stored(self) -> dict[str, int]:
        """The number of stored weights of each sparse layer, by layer name."""
        layers = [name.removesuffix(_PATTERN) for name in self.model if name.endswith(_PATTERN)]
        return {layer: self.model[f"{layer}.values"].numel() for layer in layers}

    @property
    def sparse(self) -> bool:
        """Whether any layer has a pattern; layers that were made dense have none."""
        return bool(self.sparse_layers)

    @property
    def sparse_layers(self) -> list[str]:
        """The names of the layers that have a pattern."""
        return [name.removesuffix(_PATTERN) for name in self.model if name.endswith(_PATTERN)]


def read_weights(directory: Path) -> RunWeights:
    """Return the newest valid weights of a run; log a warning if the run is not finished.

    Raises:
        UserError: there is no such run, or it has no readable checkpoint.
    """
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    stored = load_checkpoint(directory / CHECKPOINTS)
    done = finished(directory)
    if done is None or not done.complete:
        _log.warning("%s is not finished; its weights are those of step %d", directory, stored.step)
    return RunWeights.of(stored.model)
