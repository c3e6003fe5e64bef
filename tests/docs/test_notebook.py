"""The quickstart notebook: valid, without outputs, and its code runs from the first cell to the last."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

PATH = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def sources() -> list[str]:
    """Return the code of the notebook's cells; this is what a kernel would run."""
    cells = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_valid_and_holds_no_outputs() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


@pytest.mark.usefixtures("small_medline")
def test_the_cells_of_the_notebook_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one namespace, in order, with fewer steps and on a smaller text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    first, *rest = sources()
    scope: dict[str, Any] = {}
    exec(compile(re.sub(r"^STEPS = \d+$", "STEPS = 10", first, flags=re.MULTILINE), str(PATH), "exec"), scope)
    assert scope["STEPS"] == 10
    said = []
    for source in rest:
        exec(compile(source, str(PATH), "exec"), scope)
        said.append(capsys.readouterr().out)
    assert re.match(r"\d\.\d+ bits per byte, in runs/quickstart\n", said[0])
    assert said[1].startswith("step    1  loss ")
    rows = re.findall(r"^blocks\.\d\.\S+ +(\d+) of +(\d+) weights$", said[2], re.MULTILINE)
    assert len(rows) == 8
    assert all(4 * int(kept) == int(there) for kept, there in rows)
    skipped, counted = (float(number) for number in re.findall(r"(\S+) FLOPs a training step", said[3]))
    assert skipped < counted
    assert re.match(r"accuracy 0\.\d\d; always the most frequent label: 0\.\d\d\n", said[4])
    assert said[5].startswith("The aim of this study was")
