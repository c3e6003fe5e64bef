"""The masks of a Hugging Face directory: the file ``masks.npz``, and what ``config.json`` says of it.

The weights of such a directory are dense, with zeros in place, so that every library reads them. ``masks.npz`` holds
one bit for each element of each sparse layer, see `sparsetrain.sparsity.patterns.files`. It keeps what the weights
alone do not say: which zeros are stored weights, and the blocks. It is no ``.safetensors`` file, since some servers
read every such file of a directory as weights.

``config.json`` has the section::

    "sparsity_config": {
        "format": "dense",                     # zeros are stored; no decompression is needed
        "sparsity_structure": "unstructured",  # or "block"
        "global_sparsity": 0.61,               # zeros of the masks / all parameters of the model
        "masked_sparsity": 0.75,               # zeros of the masks / elements of the masked layers
        "pattern": "random",                   # how the masks were drawn at first; null if unknown
        "mask_file": "masks.npz",
        "layers": {"model.layers.0.mlp.up_proj": 0.75, ...}   # zeros / elements of each masked layer
    }

``format``, ``sparsity_structure`` and ``global_sparsity`` have the names and meanings of SparseML and
compressed-tensors. Layers have the names of the modules of the transformers model, and their masks have the shape
``[out_features, in_features]``, also where the module stores the transpose, as ``Conv1D`` does. So
``sparsify(model, masks=load_masks(DIR / "masks.npz"))`` makes the loaded model sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sparsetrain.errors import UserError
from sparsetrain.shapes import Fraction, check
from sparsetrain.sparsity.patterns.files import load_masks, save_masks
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

MASK_FILE = "masks.npz"
SECTION = "sparsity_config"


class _Section(TypedDict):
    mask_file: NotRequired[str]
    pattern: NotRequired[str | None]
    layers: NotRequired[dict[str, Fraction]]


class _Config(TypedDict):
    sparsity_config: _Section


def write_masks(
    directory: Path, patterns: Mapping[str, SparsityPattern], parameters: int, pattern: str | None = None
) -> dict[str, Any]:
    """Write ``masks.npz`` into a directory and return the section ``sparsity_config`` for its ``config.json``.

    Args:
        directory: of the model.
        patterns: masks ``[out_features, in_features]`` by the names of the transformers model's modules.
        parameters: elements of all its parameters, tied ones once.
        pattern: name of the pattern by which the masks were drawn, if it is known.

    Raises:
        UserError: no pattern, or the file cannot be written.
    """
    save_masks(directory / MASK_FILE, patterns, packed=True)
    elements = {name: pattern.shape[0] * pattern.shape[1] for name, pattern in patterns.items()}
    zeros = {name: elements[name] - pattern.nnz for name, pattern in patterns.items()}
    blocks = any(pattern.block != (1, 1) for pattern in patterns.values())
    return {
        "format": "dense",
        "sparsity_structure": "block" if blocks else "unstructured",
        "global_sparsity": sum(zeros.values()) / parameters,
        "masked_sparsity": sum(zeros.values()) / sum(elements.values()),
        "pattern": pattern,
        "mask_file": MASK_FILE,
        "layers": {name: zeros[name] / elements[name] for name in patterns},
    }


def read_masks(directory: Path, config: Mapping[str, Any]) -> dict[str, SparsityPattern]:
    """Return the masks of a directory by the names of its modules; empty if its configuration names no mask file.

    Args:
        directory: of the model.
        config: the content of its ``config.json``.

    Raises:
        UserError: the section has another shape, or the file is missing, damaged, or outside of the directory.
    """
    section = config.get(SECTION)
    if section is None:
        return {}
    where = str(directory / "config.json")
    check({SECTION: section}, _Config, where)
    name = section.get("mask_file")
    if name is None:  # written by another library, whose zeros are all that it says
        return {}
    if name != Path(name).name or name in ("", ".", ".."):
        raise UserError(f"{where}: {SECTION}.mask_file={name!r:.60} must be the name of a file in the directory")
    masks = load_masks(directory / name)
    if "layers" in section and set(section["layers"]) != set(masks):
        odd = sorted(set(section["layers"]) ^ set(masks))[0]
        raise UserError(f"{where}: {SECTION}.layers and {name} differ in {odd!r:.60}; both must have the same layers")
    return masks
