"""The state of a `MaskManager` as a file in a checkpoint directory of another library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsetrain.errors import UserError
from sparsetrain.files import whole_file
from sparsetrain.reading import parse_json
from sparsetrain.sparsity import MaskManager
from sparsetrain.sparsity.patterns.npz import read_npz

MANAGER_FILE = "mask_manager.npz"
_NUMBERS = "state.json"


def save_manager(directory: Path, manager: MaskManager) -> None:
    """Write the manager's state: its numbers as JSON, and the bits of its history by layer.

    Raises:
        UserError: the file cannot be written.
    """
    state, tensors = manager.state()
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays[_NUMBERS] = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    with whole_file(directory / MANAGER_FILE) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def load_manager(directory: Path, manager: MaskManager) -> None:
    """Restore `save_manager`; the model's weights and masks must be restored already.

    Raises:
        UserError: no such file, a damaged one, or the state of other masks or another rule.
    """
    path = directory / MANAGER_FILE
    arrays = read_npz(path)
    numbers = arrays.pop(_NUMBERS, None)
    if numbers is None or numbers.dtype != np.uint8 or any(array.dtype != np.uint8 for array in arrays.values()):
        raise UserError(f"{path} holds no state of a MaskManager")
    state = parse_json(numbers.tobytes().decode("utf-8", "replace"), f"{path}: {_NUMBERS}", dict[str, Any])
    try:
        manager.load_state(state, {name: torch.from_numpy(array) for name, array in arrays.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
