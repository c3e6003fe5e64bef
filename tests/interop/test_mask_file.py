"""`masks.npz` and `sparsity_config` of a Hugging Face directory; what is read is what numpy reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.interop.mask_file import MASK_FILE, SECTION, read_masks, write_masks
from sparsetrain.sparsity.patterns.draw import block_pattern, random_pattern
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


def patterns() -> dict[str, SparsityPattern]:
    return {
        "a.q_proj": random_pattern((6, 11), 0.25, seeds.generator(0)),
        "a.down": block_pattern((8, 6), 0.5, seeds.generator(1), (2, 3)),
    }


def test_the_section_counts_what_the_file_holds(tmp_path: Path) -> None:
    section = write_masks(tmp_path, patterns(), parameters=1000, pattern="random")
    arrays = np.load(tmp_path / MASK_FILE)
    zeros = {
        name: 1.0 - np.unpackbits(arrays[f"{name}.bits"], axis=1, count=pattern.shape[1]).mean()
        for name, pattern in patterns().items()
    }
    assert section["layers"] == pytest.approx(zeros)
    elements = {name: pattern.shape[0] * pattern.shape[1] for name, pattern in patterns().items()}
    absent = sum(zeros[name] * elements[name] for name in zeros)
    assert section["global_sparsity"] == pytest.approx(absent / 1000)
    assert section["masked_sparsity"] == pytest.approx(absent / sum(elements.values()))
    assert section["sparsity_structure"] == "block"
    found = read_masks(tmp_path, {SECTION: section})
    assert all(found[name].equals(pattern) for name, pattern in patterns().items())


def test_a_directory_without_our_file_has_no_masks(tmp_path: Path) -> None:
    assert read_masks(tmp_path, {}) == {}
    assert read_masks(tmp_path, {SECTION: {"format": "dense", "global_sparsity": 0.5}}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_file": "../masks.npz"}, r"sparsity_config.mask_file='../masks.npz' must be the name of a file"),
        ({"mask_file": "none.npz"}, "none.npz: no such file"),
        ({"mask_file": 3}, "sparsity_config.mask_file=3 must be text"),
        ({"layers": {"a.q_proj": 0.5}}, "layers and masks.npz differ in 'a.down'"),
        ({"layers": {"a.q_proj": 2.0}}, r"sparsity_config.layers.* must be a number of at most 1"),
    ],
)
def test_a_section_that_does_not_fit_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    section = write_masks(tmp_path, patterns(), parameters=1000)
    with pytest.raises(UserError, match=message) as caught:
        read_masks(tmp_path, {SECTION: section | changes})
    assert "\n" not in str(caught.value)
