"""Whether two pictures are the same one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread


def assert_same_picture(one: Path, other: Path) -> None:
    drawn, filed = imread(one), imread(other)
    assert drawn.shape == filed.shape
    assert np.abs(drawn - filed).mean() < 1e-3  # another version of FreeType shifts the edges of letters
