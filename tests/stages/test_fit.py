"""`sparsetrain fit` on made-up sweeps whose laws are known."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from shell import Shell

import sparsetrain as st
from sparsetrain.cli.resolve import load
from sparsetrain.errors import UserError
from sparsetrain.report.run_files import COLUMNS
from sparsetrain.report.sweep import write_rows
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.settings import build
from sparsetrain.stages.config import PretrainConfig
from sparsetrain.stages.hidden import hidden_of_run
from sparsetrain.studies.fit import FitRequest, fit_sweep
from sparsetrain.studies.sweep import read_sweep

ORDER = (*COLUMNS, "optimizer.weight_decay", "budget.batch_size", "budget.tokens", "status", "tokens", "seconds")
ORDER += ("precision", "flops", "weights", "nonzeros", "tau", "run")


def row(**values: Any) -> dict[str, Any]:
    usual = {"parameterization": "supar", "sparsity": 0.0, "width": 32, "depth": 2, "lr": 0.01, "seed": 0, "steps": 100}
    usual |= {"loss": 2.0, "commit": "abc", "optimizer.weight_decay": 0.1, "budget.batch_size": 8}
    usual |= {"budget.tokens": 1000, "status": "complete", "tokens": 1000, "seconds": 1.0, "precision": "fp32"}
    usual |= {"flops": 1.0, "weights": 1000, "nonzeros": 1000, "tau": 1.0, "run": ""}
    return {**usual, **values}


def table(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ORDER) -> Path:
    for number, each in enumerate(rows):
        each["run"] = f"run-{number}"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def fitted(path: Path, law: str, **request: Any) -> tuple[dict[str, Any], str]:
    """Return the laws by label, and what is printed."""
    stream = io.StringIO()
    laws = fit_sweep(FitRequest([path], law, **request), Console(file=stream, width=160))
    return laws, stream.getvalue()


def decays(sparsities: tuple[float, ...] = (0.0,), ratios: tuple[int, ...] = (2, 5, 10, 20)) -> list[dict[str, Any]]:
    """Return runs whose best tau is ``1.2 (1 - s)^-0.1 ratio^-0.5``, for an lr of 0.01 and steps of 10 tokens."""
    rng, rows = np.random.default_rng(0), []
    for sparsity in sparsities:
        for ratio in ratios:
            best = math.log2(1.2 * (1 - sparsity) ** -0.1 * ratio**-0.5)
            steps = 100 * ratio
            for log2 in range(-6, 4):
                for seed in (0, 1, 2):
                    tau = 2.0**log2 * 1.1
                    loss = 2.0 + 0.01 * (math.log2(tau) - best) ** 2 + 0.01 * seed + rng.normal(0.0, 2e-4)
                    values = {"tau": tau, "optimizer.weight_decay": 1 / (0.01 * steps * tau), "loss": loss}
                    values |= {"tokens": 1000 * ratio, "budget.tokens": 1000 * ratio, "steps": steps}
                    rows.append(row(sparsity=sparsity, seed=seed, nonzeros=round(1000 * (1 - sparsity)), **values))
    return rows


def test_the_law_of_tau_is_found_for_each_sparsity_and_written(tmp_path: Path) -> None:
    path = table(tmp_path / "results.csv", decays((0.0, 0.75)))
    laws, said = fitted(path, "tau", out=tmp_path / "out")
    assert list(laws) == ["sparsity 0", "sparsity 0.75"]
    for sparsity, law in zip((0.0, 0.75), laws.values(), strict=True):
        assert law.exponent == pytest.approx(-0.5, abs=0.03)
        assert law.coefficient == pytest.approx(1.2 * (1 - sparsity) ** -0.1, rel=0.05)
        low, high = law.interval()
        assert low < -0.5 < high
        assert (law.sparsity, law.range, law.seeds, law.runs) == (sparsity, (2.0, 20.0), 3, 120)
        assert (law.inputs[0].name, law.kind) == ("tokens_per_weight", "tau")
        assert law.source == "own fit of results.csv, commit abc"
        assert st.Law.load(tmp_path / "out" / f"law-s{sparsity:g}.yaml")(10.0) == law(10.0)
    assert (tmp_path / "out" / "law.png").stat().st_size > 10_000
    assert "published: tau = 1.084 tokens_per_parameter^-0.527, Power Lines" in said
    kept, _ = fitted(path, "tau", per="nonzero")
    assert kept["sparsity 0.75"].range == (8.0, 80.0)
    assert kept["sparsity 0.75"].coefficient == pytest.approx(2 * laws["sparsity 0.75"].coefficient, rel=0.1)


def test_a_single_law_has_a_name_of_its_own_and_curves_without_a_minimum_are_named(tmp_path: Path) -> None:
    rows = [each for each in decays(ratios=(2, 5, 10, 20)) if each["tokens"] != 20_000 or each["tau"] > 0.4]
    laws, said = fitted(table(tmp_path / "results.csv", rows), "tau", out=tmp_path)
    assert [path.name for path in tmp_path.glob("law*")] == ["law.yaml", "law.png"] or len(laws) == 1
    edge = "note: tokens 20000: lowest at the smallest value, so its minimum is not known; run next: "
    assert edge in said
    # A step of 2x further in tau is half of it, so twice the weight decay.
    decay = 1 / (0.01 * 2000 * 0.55)
    assert f"budget.tokens=20000 optimizer.weight_decay={2 * decay:.6g},{4 * decay:.6g} seed=0" in said


def test_too_few_optima_are_one_line_that_says_what_to_run(tmp_path: Path) -> None:
    rows = [each for each in decays(ratios=(2, 5, 10)) if each["tokens"] != 10_000 or each["tau"] > 0.5]
    path = table(tmp_path / "results.csv", rows)
    with pytest.raises(
        UserError, match=r"2 of 3 curves have a minimum .* run next: budget\.tokens=10000 opt"
    ) as raised:
        fitted(path, "tau", out=tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("law", "changes", "columns", "message"),
    [
        ("tau", {"optimizer.weight_decay": 0.1}, ORDER, "optimizer.weight_decay has the same value in every run"),
        ("batch", {}, ORDER, "budget.batch_size has the same value in every run"),
        ("critical", {}, ORDER, "budget.batch_size has the same value in every run"),
        ("loss", {}, ORDER, "runs of 1 sizes and 4 lengths: a law of loss needs"),
        ("tau", {}, (*ORDER[:-4], "run"), "no row has tau and weights: an older table lacks them"),
        ("loss", {}, (*ORDER[:-4], "run"), "no row has weights: an older table lacks them"),
    ],
)
def test_sweeps_that_give_no_law_are_one_line(
    law: str, changes: dict[str, Any], columns: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = table(tmp_path / "results.csv", [{**each, **changes} for each in decays()], columns)
    with pytest.raises(UserError, match=message):
        fitted(path, law)


def batches(losses: Any) -> list[dict[str, Any]]:
    """Return runs over batch sizes, lengths, weight decays and seeds; ``losses`` maps B and D to the loss."""
    rng, rows = np.random.default_rng(0), []
    for size in (1, 2, 4, 8, 16, 32, 64):
        for length in (50_000, 100_000, 200_000, 400_000):
            steps = -(-length // (size * 100))
            for seed in (0, 1, 2):
                for decay, worse in ((0.1, 0.0), (0.2, 0.05)):
                    b, d = size * 100.0, steps * size * 100
                    loss = losses(b, d) + worse + 0.01 * seed + rng.normal(0.0, 3e-4)
                    values = {"budget.batch_size": size, "tokens": d, "budget.tokens": length, "steps": steps}
                    rows.append(row(seed=seed, loss=loss, **{**values, "optimizer.weight_decay": decay}))
    return rows


def test_the_best_batch_is_found_with_the_best_weight_decay_at_each(tmp_path: Path) -> None:
    def losses(b: float, d: float) -> float:
        return 2.0 + 0.02 * (math.log2(b) - math.log2(4.0 * d**0.45)) ** 2

    laws, said = fitted(table(tmp_path / "results.csv", batches(losses)), "batch", out=tmp_path)
    law = laws["sparsity 0"]
    assert law.exponent == pytest.approx(0.45, abs=0.03)
    assert law(1e5) == pytest.approx(4.0 * 1e5**0.45, rel=0.05)
    assert law.output.name == "batch"
    assert "Power Lines" in said


def test_the_critical_batch_is_found_at_a_loss_and_over_d_min(tmp_path: Path) -> None:
    """Losses whose curves reach each loss on a hyperbola with ``B_crit = 5 D_min^0.5``."""

    def losses(b: float, d: float) -> float:
        least = d
        for _ in range(100):
            least = d / (1 + b / (5 * least**0.5))
        return 1.5 + 100.0 * least**-0.4

    path = table(tmp_path / "results.csv", batches(losses))
    target = 1.51 + 100.0 * 1e5**-0.4
    law = fitted(path, "critical", target=target, out=tmp_path)[0]["sparsity 0"]
    low, high = law.interval(of="b_crit")
    assert low < 5 * 1e5**0.5 < high
    assert law.parameters["d_min"] == pytest.approx(1e5, rel=0.1)
    assert f"It holds for a loss of {target:.6g} and " in law.verified
    over = fitted(path, "critical", out=tmp_path)[0]["sparsity 0"]
    assert over(1e5) == pytest.approx(5 * 1e5**0.5, rel=0.15)
    one = [each for each in batches(losses) if each["seed"] == 0]
    laws, said = fitted(table(tmp_path / "one.csv", one), "critical")
    assert laws["sparsity 0"].interval() is None
    assert "One seed: no interval" in said


def test_the_law_of_loss_is_found_over_weights_or_nonzeros(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for width, n in ((16, 4e4), (24, 1e5), (32, 3e5), (48, 1e6)):
        for ratio in (5, 10, 20, 40):
            for seed in (0, 1):
                d = int(n * ratio)
                loss = 1.5 + 30.0 / n**0.3 + 60.0 / d**0.3 + rng.normal(0.0, 1e-3)
                counts = {"weights": int(n), "nonzeros": int(n) // 4, "steps": d // 100}
                rows.append(row(width=width, seed=seed, loss=loss, tokens=d, **{**counts, "budget.tokens": d}))
    path = table(tmp_path / "results.csv", rows)
    law = fitted(path, "loss", out=tmp_path)[0]["sparsity 0"]
    assert law(2e5, 3e6) == pytest.approx(1.5 + 30.0 / 2e5**0.3 + 60.0 / 3e6**0.3, rel=2e-3)
    assert law.inputs[0].unit == "hidden weights"
    kept = fitted(path, "loss", per="nonzero")[0]["sparsity 0"]
    assert kept.ranges[0] == (1e4, 2.5e5)


def test_what_is_asked_wrongly_is_one_line(tmp_path: Path) -> None:
    for request, message in (
        ({"law": "alpha"}, "law='alpha' is not one of tau, batch, critical, loss"),
        ({"law": "tau", "per": "layer"}, "per='layer' is not one of weight, nonzero"),
        ({"law": "tau", "target": 2.0}, "target=2.0 is the loss of law=critical"),
    ):
        with pytest.raises(UserError, match=message):
            FitRequest([tmp_path], **request)


@pytest.mark.parametrize("law", ["tau", "batch", "critical", "loss"])
@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"tokens": 0},
        {"steps": None},
        {"steps": 0},
        {"optimizer.weight_decay": "x"},
        {"optimizer.weight_decay": -1},
        {"loss": None, "optimizer.weight_decay": None},
    ],
)
def test_a_row_without_the_numbers_of_a_law_is_named(tmp_path: Path, law: str, change: dict[str, Any]) -> None:
    rows = decays()
    rows[3] |= change
    (name,) = [name for name in change if name != "loss"]
    with pytest.raises(UserError, match=rf"^run-3: {name}=.* must be"):
        fitted(table(tmp_path / "results.csv", rows), law)


def test_laws_of_an_earlier_fit_do_not_stay_beside_new_ones(tmp_path: Path) -> None:
    out = tmp_path / "laws"
    fitted(table(tmp_path / "one.csv", decays()), "tau", out=out)
    (out / "law-of-mine.yaml").write_text("none of ours")
    st.Law.load(out / "law.yaml")
    _, said = fitted(table(tmp_path / "two.csv", decays((0.0, 0.5))), "tau", out=out)
    assert "removed laws of an earlier fit: law.yaml" in said
    assert {path.name for path in out.glob("*.yaml")} == {"law-of-mine.yaml", "law-s0.yaml", "law-s0.5.yaml"}


def test_the_verb_takes_paths_and_settings(shell: Shell) -> None:
    path = table(shell.home / "results.csv", decays())
    assert shell.run("fit", str(path), "law=tau", "out=laws")[0] == 0
    law = st.Law.load(shell.home / "laws" / "law.yaml")
    assert law.kind == "tau"
    status, out, _ = shell.run("fit", "law=tau", str(path))
    assert (status, "written" in out) == (0, False)
    for words, said in (
        (["law=tau"], "fit needs a sweep"),
        ([str(path)], "fit needs a law: sparsetrain fit RUNS law=tau"),
        ([str(path), "law=tua"], "law='tua' is not one of tau, batch, critical, loss, noise (did you mean 'tau'?)"),
        ([str(path), "lwa=tau"], "fit has no setting 'lwa' (did you mean 'law'?)"),
        ([str(path), "law=tau", "law=batch"], "fit: law is given twice"),
        ([str(path), "law=critical", "target=low"], "target=low must be a number"),
        (["none", "law=tau"], "none holds no run"),
        ([], "the following arguments are required: RUNS law=LAW"),
    ):
        assert said in shell.refused("fit", *words)


def test_runs_give_the_columns_of_their_hidden_matrices_and_older_tables_are_read(shell: Shell) -> None:
    for decay in (0.1, 0.0):
        run = shell.trained(f"optimizer.weight_decay={decay}", "sparsity.sparsity=0.5", run_dir=f"runs/{decay}")
    found = {row["optimizer.weight_decay"]: row for row in read_sweep([shell.home / "runs"]).rows}
    hidden = hidden_of_run(build(PretrainConfig, read_recorded(run, PretrainConfig).values))
    assert (found[0.1]["weights"], found[0.1]["nonzeros"]) == (hidden.weights, hidden.weights // 2)
    assert found[0.1]["tau"] == pytest.approx(1 / (hidden.lr * hidden.decay_factor * 0.1 * 3))
    assert found[0.0]["tau"] is None
    pruned = read_sweep([shell.trained("sparsity=gmp", "sparsity.evolution.every=1", run_dir="gmp")]).rows[0]
    assert (pruned["weights"], pruned["nonzeros"]) == (hidden.weights, None)
    write_rows(list(found.values()), shell.home / "new.csv")
    again = read_sweep([shell.home / "new.csv"])
    assert again.rows == sorted(found.values(), key=lambda row: row["optimizer.weight_decay"])
    older = [{k: v for k, v in row.items() if k not in ("weights", "nonzeros", "tau")} for row in found.values()]
    write_rows(older, shell.home / "old.csv")
    rows = read_sweep([shell.home / "old.csv"]).rows
    assert [row["tau"] for row in rows] == [None, None]
    assert again.varied == read_sweep([shell.home / "old.csv"]).varied == ["optimizer.weight_decay"]


def test_plan_shows_tokens_per_weight_and_the_timescale(shell: Shell) -> None:
    words = ["plan", "pretrain", *shell.tiny, "sparsity.sparsity=0.5"]
    out = shell.run(*words, "optimizer.weight_decay=100", "optimizer.lr=0.01")[1]
    (line,) = [line for line in out.splitlines() if line.startswith("hidden matrices: ")]
    run = load("pretrain", [*shell.tiny, "sparsity.sparsity=0.5", "optimizer.weight_decay=100", "optimizer.lr=0.01"])
    hidden = hidden_of_run(run)
    assert (
        f"{3 * 4 * 48 / hidden.weights:.3g} tokens per weight, {3 * 4 * 48 / hidden.nonzeros:.3g} per nonzero" in line
    )
    assert line.endswith(f"tau {hidden.tau(3):.3g} of the training")
    assert "above 1 the weight decay is effectively off" in shell.run(*words)[1]
    assert "; no weight decay" in shell.run(*words, "optimizer.weight_decay=0")[1]


def test_tables_of_several_lengths_give_curves_of_their_own(tmp_path: Path) -> None:
    """Each table has one length, which no column says, and its own runs that diverged."""
    places = []
    columns = tuple(name for name in ORDER if name not in ("budget.tokens", "budget.batch_size"))
    rows = decays(ratios=(2, 5, 10, 20))
    for each in rows:
        if each["tau"] < 0.03:
            each |= {"loss": None, "tokens": 10, "status": "diverged"}
    for steps in (200, 500, 1000, 2000):
        places.append(table(tmp_path / f"{steps}.csv", [each for each in rows if each["steps"] == steps], columns))
        text = places[-1].read_text()
        places[-1].write_text(text.replace("run-", f"run-{steps}-"))
    stream = io.StringIO()
    laws = fit_sweep(FitRequest(places, "tau"), Console(file=stream, width=160))
    law = laws["sparsity 0"]
    assert (law.exponent, law.range) == (pytest.approx(-0.5, abs=0.03), (2.0, 20.0))
    whole, _ = fitted(table(tmp_path / "whole.csv", rows), "tau")
    assert law.parameters == pytest.approx(whole["sparsity 0"].parameters)


@pytest.mark.parametrize(("setting", "values"), [("schedule.name", ("linear", "constant")), ("lr", (0.01, 0.04))])
def test_runs_that_differ_in_another_setting_have_laws_of_their_own(
    setting: str, values: tuple[Any, Any], tmp_path: Path
) -> None:
    columns = (*ORDER[:9], *([] if setting == "lr" else [setting]), *ORDER[9:])
    rows = [{**each, setting: values[0]} for each in decays()]
    rows += [{**each, setting: values[1], "tau": 4 * each["tau"]} for each in decays()]
    laws, _ = fitted(table(tmp_path / "results.csv", rows, columns), "tau", out=tmp_path / "out")
    name = setting.rpartition(".")[2]
    assert sorted(laws) == sorted(f"sparsity 0, {name} {value}" for value in values)
    first, second = (laws[f"sparsity 0, {name} {value}"] for value in values)
    assert second(10.0) == pytest.approx(4.0 * first(10.0))
    assert len(list((tmp_path / "out").glob("law-s0-*.yaml"))) == 2


def test_a_rate_of_each_size_is_no_other_setting(tmp_path: Path) -> None:
    rows = [{**each, "width": each["tokens"] // 100, "lr": 1 / each["tokens"]} for each in decays()]
    assert list(fitted(table(tmp_path / "results.csv", rows), "tau")[0]) == ["sparsity 0"]


def test_losses_of_several_texts_are_not_compared(tmp_path: Path) -> None:
    rows = []
    for text, floor in (("a", 1.5), ("b", 2.5)):
        for width, n in ((16, 4e4), (24, 1e5), (32, 3e5), (48, 1e6)):
            for ratio in (5, 10, 20, 40):
                d = int(n * ratio)
                counts = {"weights": int(n), "tokens": d, "budget.tokens": d, "steps": d // 100, "data.path": text}
                rows.append(row(width=width, loss=floor + 30.0 / n**0.3 + 60.0 / d**0.3, **counts))
    laws, _ = fitted(table(tmp_path / "results.csv", rows, (*ORDER[:9], "data.path", *ORDER[9:])), "loss")
    difference = laws["sparsity 0, path b"](2e5, 3e6) - laws["sparsity 0, path a"](2e5, 3e6)
    assert difference == pytest.approx(1.0, rel=1e-2)


def test_a_law_per_nonzero_needs_runs_with_one_number_of_nonzeros(tmp_path: Path) -> None:
    rows = [{**each, "nonzeros": None} for each in decays()]
    path = table(tmp_path / "results.csv", rows)
    assert fitted(path, "tau")[0]
    with pytest.raises(UserError, match=r"no row has tau and nonzeros: .*; masks that change their density leave nonz"):
        fitted(path, "tau", per="nonzero")


def basin(b: float, d: float) -> float:
    return 2.0 + 0.02 * (math.log2(b) - math.log2(4.0 * d**0.45)) ** 2


def test_a_law_of_the_batch_says_what_is_not_known_about_weight_decay(tmp_path: Path) -> None:
    rows = batches(basin)
    fixed = [each for each in rows if each["optimizer.weight_decay"] == 0.1]
    laws, said = fitted(table(tmp_path / "fixed.csv", fixed), "batch")
    line = "Weight decay was the same at every batch"
    assert line in said
    assert line in laws["sparsity 0"].verified
    # The better of two decays is always at an end; with a third one on its other side it is not.
    laws, said = fitted(table(tmp_path / "two.csv", rows), "batch")
    line = "The best weight decay is at an end of those tried for batches of 100 tokens at 50,000; "
    assert line in said.replace("\n", " ")
    assert line in laws["sparsity 0"].verified
    worse = [{**each, "optimizer.weight_decay": 0.05, "loss": each["loss"] + 0.05} for each in fixed]
    laws, said = fitted(table(tmp_path / "three.csv", [*rows, *worse]), "batch")
    assert "weight decay" not in said + laws["sparsity 0"].verified


@pytest.mark.parametrize("law", ["batch", "critical"])
def test_batches_that_change_are_left_out_with_a_note(law: str, tmp_path: Path) -> None:
    def losses(b: float, d: float) -> float:
        return 1.5 + 100.0 * (d / (1 + b / 2000.0)) ** -0.4 + (basin(b, d) - 2.0 if law == "batch" else 0.0)

    rows = batches(losses)
    ramps = [{**each, "budget.batch_size": "gns"} for each in rows[:3]]
    laws, said = fitted(table(tmp_path / "results.csv", [*ramps, *rows]), law, target=None)
    assert "3 runs whose batch size changes are left out." in said
    assert laws["sparsity 0"].parameters == fitted(table(tmp_path / "none.csv", rows), law)[0]["sparsity 0"].parameters


def test_a_curve_whose_runs_all_diverged_is_named(tmp_path: Path) -> None:
    rows = decays(ratios=(2, 5, 10, 20))
    lost = [{**each, "loss": None, "status": "diverged"} if each["tokens"] == 20_000 else each for each in rows]
    said = fitted(table(tmp_path / "results.csv", lost), "tau")[1]
    assert "note: tokens 20000: every run diverged, so this curve is left out." in said
    with pytest.raises(UserError, match="every run diverged"):
        fitted(table(tmp_path / "none.csv", [{**each, "loss": None} for each in rows]), "tau")
