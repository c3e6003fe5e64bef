"""Tables of arms: reading, errors, and bars and verdicts against SciPy's paired intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from sparsetrain.errors import UserError
from sparsetrain.report.arms import Arms, join, read_arms, select
from sparsetrain.report.arms_sheets import differences
from sparsetrain.report.bars import bars, verdicts

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DEMO, MASKS, MEDISWIFT = (
    EXPERIMENTS / name / "results.csv" for name in ("demo", "dynamic_masks", "mediswift_pipeline")
)
NEARER, FARTHER = "(b) sparse-0.5 within 2 points of dense", "(b) sparse-0.75 10 points above scratch"


@pytest.fixture
def recipe() -> Arms:
    return read_arms(MEDISWIFT)


def outcome(table: Arms, bar: str) -> str:
    return {name: outcome for name, outcome, _ in bars(table.rows)}[bar]


def paired(one: dict[int, float], other: dict[int, float]) -> tuple[float, float, float]:
    """Return mean and interval of ``one - other`` by SciPy's paired test."""
    both = [[values[seed] for seed in sorted(one)] for values in (one, other)]
    low, high = scipy.stats.ttest_rel(*both).confidence_interval(0.95)
    return float(np.mean(both[0]) - np.mean(both[1])), low, high


def test_columns_that_are_not_known_are_written_as_they_were_read(tmp_path: Path) -> None:
    lines = DEMO.read_text().splitlines()
    path = tmp_path / "results.csv"
    path.write_text("\n".join([f"{lines[0]},note,run", *(f'{line},007,"a, 1e5"' for line in lines[1:])]) + "\n")
    read_arms(path).write(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (",0.54975,", ",1.54975,", ["row 1", "accuracy=1.54975", "at most 1"]),
        (",188,", ",many,", ["row 1", "steps='many'", "whole number"]),
        ("dense,finetune", ",finetune", ["row 1", "arm=None", "text"]),
        ("arm,stage", "arm,place", ["neither a column rule nor the columns arm and stage"]),
        ("majority,", "most,", ["majority is missing"]),
    ],
)
def test_a_table_that_holds_something_else_is_one_line(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    path = tmp_path / "results.csv"
    path.write_text(DEMO.read_text().replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_arms(path)
    assert [part for part in [str(path), *parts] if part not in str(caught.value)] == []


def test_what_cannot_be_averaged_is_refused(recipe: Arms) -> None:
    demo = read_arms(DEMO)
    with pytest.raises(UserError, match="two tables"):
        join([demo, read_arms(MASKS)])
    with pytest.raises(UserError, match="dense/finetune/section_roles of seed 0 occurs twice"):
        join([demo, recipe])
    recipe.rows[-1]["lr"] = 0.5
    with pytest.raises(UserError, match=r"differ in more than the seed: lr=0\.5"):
        join([recipe])


def test_bars_are_decided_by_the_whole_interval(recipe: Arms) -> None:
    dense, sparse, scratch = (
        select(recipe.rows, "accuracy", arm=arm, stage="finetune", task="section_roles")
        for arm in ("dense", "sparse-0.5", "scratch")
    )
    _, low, high = paired(sparse, dense)
    assert low < -0.02 < high
    assert outcome(recipe, NEARER) == "not established"
    for shift, expected in ((-0.02 - low + 1e-6, "holds"), (-0.02 - high - 1e-6, "fails")):
        for row in recipe.rows:
            if (row["arm"], row["stage"], row["task"]) == ("sparse-0.5", "finetune", "section_roles"):
                row["accuracy"] = sparse[row["seed"]] + shift
        assert outcome(recipe, NEARER) == expected
    assert paired(dense, scratch)[1] < 0.10  # as bars.md has it: not established


def test_bars_of_fewer_seeds_or_arms(recipe: Arms) -> None:
    one = [row for row in recipe.rows if row["seed"] == 0]
    ratio = "(e) FLOP ratio of sparse-0.5"
    assert {said for name, said, _ in bars(one) if not name.startswith("(e)")} == {"too few seeds"}
    assert {name: said for name, said, _ in bars(one)}[ratio] == "holds"
    assert not any("nan" in numbers for _, _, numbers in bars([row for row in one if row["stage"] == "pretrain"]))
    untuned = Arms([row for row in one if row["stage"] == "pretrain"], recipe.columns, "here")
    assert outcome(untuned, FARTHER) == "not run"
    assert bars([row for row in recipe.rows if row["arm"] != "sparse-0.5"]) == []


def test_verdicts_on_masks_are_those_of_a_paired_test() -> None:
    rows = read_arms(MASKS).rows
    static, rigl = (select(rows, "loss", rule=rule) for rule in ("static", "rigl"))
    mean, low, high = paired(static, rigl)
    assert verdicts(rows)["rigl"] == (
        f"is worse than static: static - rigl = {mean:+.4f} ± {(high - low) / 2:.4f} nats (3 seeds)"
    )
    for row in rows:
        if row["rule"] == "rigl":
            row["loss"] -= 0.05
    assert low + 0.05 > 0
    assert verdicts(rows)["rigl"].startswith("beats static")
    rows[0]["loss"] = None  # a seed of static that diverged
    assert verdicts(rows)["set"].endswith("(2 seeds)")


def test_differences_are_those_of_the_readme() -> None:
    shown = {row[0]: row[1:] for row in differences(read_arms(DEMO).rows).rows}
    assert shown["sparse-0.75 - dense, bits per byte"] == ("+1.07 %", "[0.78, 1.36]", "3", "told apart")
    tuned = "sparse-0.75 - dense, finetune, section_roles"
    assert shown[tuned] == ("+0.15 points", "[-3.24, 3.54]", "3", "not told apart")
