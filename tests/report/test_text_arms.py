"""Tables of text stages: which arms are compared, means and differences against SciPy, evaluations, and figures."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tests.helpers.text_tables import ARMS, position_rows, text_rows, write_tables

from sparsetrain.cli import main
from sparsetrain.errors import UserError
from sparsetrain.report.arms import read_arms
from sparsetrain.report.arms_sheets import adaptations, differences, means
from sparsetrain.report.measured import POSITIONS, PROBES, measured_sheet
from sparsetrain.report.pairs import comparisons, divided
from sparsetrain.report.text_plots import text_figure


@pytest.mark.parametrize(
    ("arm", "sparsity", "choice"),
    [
        ("dense", 0.0, ""),
        ("sparse-0.75", 0.75, ""),
        ("sparse-1e-05_two_phase", 1e-5, "two_phase"),
        ("d_model-64_sparse-0.5_rope", 0.5, "d_model-64_rope"),
        ("two_phase_dense", 0.0, "two_phase"),
        ("condensed_prose", None, "condensed_prose"),
        ("positions-rope", None, "positions-rope"),
    ],
)
def test_a_name_is_divided_into_sparsity_and_choice(arm: str, sparsity: float | None, choice: str) -> None:
    assert divided(arm) == (sparsity, choice)


@pytest.mark.parametrize(
    ("arms", "pairs"),
    [
        # One axis: every arm and the first.
        ({"dense": 0, "sparse-0.5": 0.5, "sparse-0.75": 0.75}, [("sparse-0.5", "dense"), ("sparse-0.75", "dense")]),
        ({"mlp-gelu": 0.5, "mlp-relu": 0.5}, [("mlp-relu", "mlp-gelu")]),
        ({"width-64": 0.0, "width-128": 0.75}, [("width-128", "width-64")]),
        (
            ARMS,
            [
                ("dense_prose", "dense_two_phase"),
                ("sparse-0.75_two_phase", "dense_two_phase"),
                ("sparse-0.75_prose", "sparse-0.75_two_phase"),
                ("sparse-0.75_prose", "dense_prose"),
            ],
        ),
    ],
)
def test_choices_are_compared_at_equal_sparsity_and_sparsities_at_equal_choice(
    arms: dict[str, float], pairs: list[tuple[str, str]]
) -> None:
    assert comparisons(list(arms), arms) == pairs


def test_a_base_takes_the_place_of_the_nearest_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_tables(tmp_path))
    assert main(["report", path, "--base", "dense_prose"]) == 0
    said = capsys.readouterr().out
    assert "sparse-0.75_two_phase - dense_prose" in said
    assert "- dense_two_phase" not in said
    assert main(["report", path, "--base", "dense_pros"]) == 2
    assert "--base=dense_pros is no arm (did you mean 'dense_prose'?); there are dense_two" in capsys.readouterr().err


def test_means_and_differences_have_every_stage_and_corpus() -> None:
    rows = text_rows()
    shown = {row[0]: row[1:] for row in means(rows).rows}
    assert list(shown) == [f"{arm}, {stage}" for stage in ("pretrain", "evaluate") for arm in ARMS]

    def code(arm: str) -> list[float]:
        return [row["bits_per_byte_code"] for row in rows if (row["arm"], row["stage"]) == (arm, "evaluate")]

    one, other = code("sparse-0.75_prose"), code("dense_prose")
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(one), scipy.stats.sem(one))
    columns = means(rows).columns
    assert columns[2:5] == ("bits per byte", "bits per byte, prose", "bits per byte, code")
    assert shown["sparse-0.75_prose, evaluate"][3] == f"{np.mean(one):.4f} [{low:.4f}, {high:.4f}]"
    assert shown["sparse-0.75_prose, pretrain"][-3:] == ("20.3", "81.4", "625 GFLOP")
    logs = np.log(one) - np.log(other)
    low, high = scipy.stats.ttest_rel(np.log(one), np.log(other)).confidence_interval(0.95)
    found = {row[0]: row[1:] for row in differences(rows).rows}
    assert len(found) == 2 * 4 * 3  # stages, pairs of arms, and both corpora apart and together
    assert found["sparse-0.75_prose - dense_prose, evaluate, bits per byte, code"][:2] == (
        f"{100 * np.expm1(logs.mean()):+.2f} %",
        f"[{100 * np.expm1(low):.2f}, {100 * np.expm1(high):.2f}]",
    )


def test_tables_are_written_as_they_were_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tables(tmp_path / "made")
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Loss by length" in said
    assert "Probes" in said
    names = {"results.csv", "positions.csv", "probes.csv"}
    assert {each.name for each in (tmp_path / "out").iterdir()} == names | {"figure.png", "positions.png"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (path.parent / name).read_bytes()


def test_sheets_of_evaluations_hold_means_over_seeds(tmp_path: Path) -> None:
    table = read_arms(write_tables(tmp_path))
    sheet = measured_sheet(POSITIONS, table.measured["positions"], list(ARMS))
    assert sheet.columns == ("arm", "64", "128", "256", "512")
    losses = [
        row["loss"]
        for row in position_rows()
        if (row["arm"], row["scale"], row["length"]) == ("dense_prose", "dynamic", 256)
    ]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(losses), scipy.stats.sem(losses))
    shown = {row[0]: row[1:] for row in sheet.rows}
    assert shown["dense_prose, scale dynamic"][2] == f"{np.mean(losses):.3f} [{low:.3f}, {high:.3f}]"
    probes = {row[0]: row[1:] for row in measured_sheet(PROBES, table.measured["probes"], list(ARMS)).rows}
    assert list(probes) == list(ARMS)
    assert probes["dense_prose"][1] == "-"  # nothing was measured there


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("positions.csv", ",64,", ",0,", r"row 1: length=0 must be a whole number of at least 1"),
        ("positions.csv", "seed", "sed", r"has no column seed"),
        ("positions.csv", "evaluate,0,prose,1,128", "evaluate,0,prose,1,64", r"two rows of arm='dense_two_phase', st"),
        ("probes.csv", "evaluate,0", "evaluate,", r"row 1: seed=None must be a whole number"),
    ],
)
def test_a_table_of_evaluations_that_holds_something_else_is_one_line(
    name: str, old: str, new: str, said: str, tmp_path: Path
) -> None:
    path = write_tables(tmp_path)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}.*{said}"):
        read_arms(path)


def test_a_score_of_a_corpus_is_a_number(tmp_path: Path) -> None:
    path = write_tables(tmp_path)
    rows = path.read_text().splitlines()
    place = rows[0].split(",").index("bits_per_byte_code")
    cells = rows[3].split(",")
    cells[place] = "much"
    path.write_text("\n".join([*rows[:3], ",".join(cells), *rows[4:]]) + "\n")
    with pytest.raises(UserError, match="row 3: bits_per_byte_code='much' must be a number"):
        read_arms(path)


def test_an_adaptation_is_compared_with_what_it_began_with() -> None:
    rows = [row for row in text_rows() if row["stage"] == "pretrain"]
    for row in rows:
        before = {"bits_per_byte_before_prose": 1.1 * row["bits_per_byte_prose"], "forgetting": -0.1}
        row |= before | {"stage": "adapt", "bits_per_byte_initialised_prose": 2.0}
    sheet = adaptations(rows)
    assert sheet.columns == ("arm", "before, prose", "new rows, prose", "after, prose", "forgetting")
    assert sheet.rows[0][2] == "2.0000 [2.0000, 2.0000]"
    found = {row[0]: row[1:] for row in differences(rows).rows}
    assert found["after - before, dense_prose, bits per byte, prose"][:2] == ("-9.09 %", "[-9.09, -9.09]")


@pytest.mark.parametrize("count", [2, 4])
def test_labels_of_a_figure_do_not_overlap(count: int) -> None:
    """Two names fit side by side, and four are tilted, so that the distance of two lines counts."""
    figure = text_figure(
        [row for row in text_rows() if row["arm"] in list(ARMS)[:count] and row["stage"] == "pretrain"]
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["pretrain, prose", "pretrain, code"]
    for axes in figure.axes:
        labels = axes.get_xticklabels()
        assert [label.get_text() for label in labels] == list(ARMS)[:count]
        left, right = (axes.transData.transform((place, 0.0))[0] for place in (0, 1))
        angle = math.radians(labels[0].get_rotation())
        for label in labels:
            label.set_rotation(0)
        sizes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
        if angle:
            assert (right - left) * math.sin(angle) > max(size.height for size in sizes)
        else:
            assert max(size.width for size in sizes) < right - left


def test_a_figure_of_more_stages_than_arms_has_a_place_for_each_stage() -> None:
    arm = next(iter(ARMS))
    few = [row for row in text_rows() if row["arm"] == arm and row["stage"] == "pretrain"]
    figure = text_figure([{**row, "stage": name} for name in ("first", "second", "third") for row in few])
    assert [axes.get_title() for axes in figure.axes] == ["prose", "code"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second", "third"]
