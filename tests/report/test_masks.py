"""``mask inspect`` on runs, checkpoints and files; masks in tables and pages."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.report.html import render_html
from sparsetrain.report.masks import InspectedMask, draw_masks, inspect_masks, read_masks, shrunk
from sparsetrain.report.schema import validate_report
from sparsetrain.report.tables import layer_masks, masks, run_metrics, sheets
from sparsetrain.runs.checkpoint import verify_checkpoint
from sparsetrain.sparsity import SparsityPattern
from sparsetrain.sparsity.patterns.draw import random_pattern
from sparsetrain.sparsity.patterns.files import save_masks
from sparsetrain.stages import PretrainConfig, RunResult, pretrain

Configure = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


@pytest.fixture
def run(configure: Configure, tmp_path: Path, screen: Console) -> RunResult:
    evolution = {"rule": "set", "every": 2, "drop_schedule": "constant"}
    changes = {"sparsity": {"sparsity": 0.75, "evolution": evolution}, "model.n_heads": 2}
    return pretrain(configure(PretrainConfig, changes, run_dir=tmp_path / "run"), screen)


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_run_is_inspected_with_its_history(run: RunResult, screen: Console) -> None:
    found = {mask.name: mask for mask in read_masks(run.directory)}
    assert list(found)[:2] == ["blocks.0.attn.out", "blocks.0.attn.qkv"]
    for name, layer in run["masks"]["layers"].items():
        assert found[name].pattern.nnz == layer["nnz"]
        assert found[name].ever == pytest.approx(layer["itop_rate"])
        assert found[name].overlap == pytest.approx(layer["overlap"])
        assert found[name].pattern.empty_rows == layer["dead_rows"]
    assert found["blocks.1.mlp.down"].pattern.shape == (32, 128)
    inspect_masks(run.directory, screen)
    assert min(png_size(run.directory / "masks.png")) > 300
    assert "blocks.1.mlp.up" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_checkpoint_is_inspected_and_left_whole(run: RunResult, screen: Console) -> None:
    checkpoint = run.directory / "checkpoints" / "step-00000008"
    inspect_masks(checkpoint, screen)
    verify_checkpoint(checkpoint)
    assert (run.directory / "masks-step-00000008.png").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_is_inspected_without_a_history(tmp_path: Path, screen: Console, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    save_masks(path, {"layer": random_pattern((20, 30), 0.3, seeds.generator(0))})
    inspect_masks(path, screen, tmp_path / "picture.png")
    assert png_size(tmp_path / "picture.png")[0] > 100
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "20 x 30" in text
    assert "0.3" in text
    assert read_masks(path)[0].ever is None


def test_a_picture_shows_local_densities() -> None:
    mask = torch.zeros(400, 10, dtype=torch.bool)
    mask[:200] = True
    image = shrunk(SparsityPattern.from_mask(mask), 40)
    assert image.shape == (40, 10)
    assert torch.equal(image, torch.cat([torch.ones(20, 10), torch.zeros(20, 10)]).double())
    uneven = random_pattern((333, 217), 0.37, seeds.generator(0))
    image = shrunk(uneven, 100)
    assert float(image.max()) <= 1.0
    whole = uneven.mask()
    assert float(image[0, 0]) == pytest.approx(float(whole[:4, :3].double().mean()))
    small = random_pattern((5, 4), 0.5, seeds.generator(0))
    assert torch.equal(shrunk(small) > 0, small.mask())


def test_hostile_names_are_drawn_as_text(tmp_path: Path) -> None:
    pattern = random_pattern((4, 4), 0.5, seeds.generator(0))
    draw_masks([InspectedMask("[bold]\x1b[31m$", pattern)] * 5, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_nothing_to_inspect_is_one_line(configure: Configure, tmp_path: Path, screen: Console) -> None:
    dense = pretrain(configure(PretrainConfig, {"sparsity": {}}, run_dir=tmp_path / "dense"), screen)
    (tmp_path / "empty").mkdir()
    for path, message in [
        (dense.directory, "has no sparse layer"),
        (tmp_path / "empty", "holds no checkpoint"),
        (tmp_path / "nowhere", "no such run, checkpoint or file"),
        (tmp_path / "nowhere.npz", "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            read_masks(path)


# Masks in reports.


def test_masks_that_changed_have_a_table_and_a_section(content: dict[str, Any]) -> None:
    numbers = {"density": 0.25, "target_density": 0.25, "itop_rate": 0.4, "mask_overlap": 0.6, "dead_rows": 3}
    content["arms"][1]["masks"] = {"rule": "Static", **numbers}
    content["arms"][2]["masks"] = {"rule": "RigL", **numbers}
    report = validate_report(content)
    assert masks(report).rows == (("s75", "RigL", "0.2500", "0.2500", "0.4000", "0.6000", "3"),)
    assert sheets(report)[-1].title == "Masks"
    assert "RigL" in render_html(report)
    del content["arms"][2]["masks"]
    assert "<h2>Masks</h2>" not in render_html(validate_report(content))
    content["arms"][1]["masks"]["itop_rate"] = 1.5
    with pytest.raises(UserError, match=r"arms\[1\]\.masks\.itop_rate"):
        validate_report(content)


def test_metrics_show_masks_where_they_change() -> None:
    still = {"density": 0.25, "target_density": 0.25, "itop_rate": 0.25, "mask_overlap": 1.0}
    rows = [{"step": step, "loss": 1.0, **still} for step in (1, 2)]
    assert "Density" not in run_metrics(rows).columns
    rows[1]["mask_overlap"] = 0.9
    assert run_metrics(rows).columns[-4:] == ("Density", "Target", "R_s", "Overlap")


def test_layers_of_a_run_have_a_row_each(run: RunResult) -> None:
    sheet = layer_masks(run["masks"]["layers"])
    assert len(sheet.rows) == 8
    assert {len(row) for row in sheet.rows} == {len(sheet.columns)}
