"""Every experiment of ``conf/`` in a tiny form: all are planned, and some are run and reported."""

from __future__ import annotations

import csv
import functools
import math
import re
import shlex
import signal
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import on_loss, send
from tests.helpers.claims import (
    Claim,
    arm_claims,
    exponent_claims,
    gap_claims,
    item_claims,
    noise_claims,
    paired_claims,
    sweep_claims,
    unsupported,
)
from tests.helpers.control_claims import control_claims, equal_flops_claims
from tests.helpers.pictures import assert_same_picture
from tests.helpers.text_claims import FURTHER, claims_of_text

from sparsetrain.cli import main
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.compose import config_directory, options
from sparsetrain.cli.multirun import points, with_sweep
from sparsetrain.cli.parsers import parsed
from sparsetrain.cli.resolve import load
from sparsetrain.data.sources.wheel import Wheel
from sparsetrain.errors import UserError
from sparsetrain.report.sweep import lines_of, write_optima
from sparsetrain.scaling.law import Law
from sparsetrain.stages import PretrainConfig
from sparsetrain.stages.plan import plan_of
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.studies.sweep import read_sweep

ROOT = Path(__file__).parents[1]
SMALL = [
    *("budget.steps=2", "budget.batch_size=2", "loop.eval_sequences=2", "data.context=24", "data.max_documents=60"),
    "threads=1",
]
NARROW = ["model.d_model=32", "parameterization.base_width=32"]
LR = "optimizer.lr=0.001953125,0.0078125"
ONE = ["sparsity.sparsity=0.5", LR]
# Overrides that reduce each sweep to a few points of small models; each sets a setting that the sweep has.
TINY: dict[str, list[str]] = {
    "base_tuning": [*NARROW, "model.n_layers=1", "draw=range(0,2)"],
    "supar_lr_transfer": [*NARROW, *ONE],
    "supar_init_transfer": [
        *NARROW,
        "sparsity.sparsity=0.5",
        "model.init_std=0.03125,0.0625",
        "parameterization=supar",
    ],
    "supar_iso_parameter": ["model.d_model=128,160", LR, "parameterization=supar", "model.n_layers=1"],
    "supar_loss_gap": [*NARROW, *ONE, "seed=0", "parameterization=supar"],
    "completep_depth": ["model.n_layers=2,4", LR, "parameterization=completep"],
    "supar_completep": ["model.n_layers=2,3", LR, "parameterization=supar_completep"],
    "batch_power_laws": [
        *("budget.steps=null", "budget.tokens=48,96", "optimizer.weight_decay=0.0625,0.25"),
        *("sparsity.sparsity=0.5", "seed=0"),
    ],
    "gns_batch_schedule": [*NARROW, LR, "budget.tokens=null", "budget.batch_size=2,4"],
    "schedule_to_zero": [*NARROW, LR, "budget.steps=null", "budget.tokens=96", "seed=0"],
    "fair_control": [*NARROW, *ONE, "seed=0", "parameterization=mup"],
    "fair_control_search": [*NARROW, "model.n_layers=1", "sparsity.sparsity=0,0.5", "draw=range(0,2)"],
    "long_horizon": [*NARROW, *ONE, "budget.tokens=null"],
    "dynamic_masks_caveat": [*NARROW, *ONE, "sparsity=static,set", "sparsity.evolution.every=1"],
}
SWEEPS = sorted(TINY)
# Those that are run, one of each kind: a search at random, batch sizes, and learning rates.
RUN = ["base_tuning", "gns_batch_schedule", "supar_lr_transfer"]
# Pipelines of text stages: their results.csv, with positions.csv and probes.csv where they evaluate.
TEXT = ["crystal_two_phase", "btlm_ladder", "arabic_adaptation", "context_curriculum", "alibi_interpolation"]
# Of those with losses by length, the ranges of lengths whose means are compared.
RANGES = {"context_curriculum": [(96, 256)], "alibi_interpolation": [(192, 256)]}
# Sweeps whose rows lie in the folder of another experiment, and searches, which have no curves.
INSIDE = {"fair_control_search": "fair_control/search"}
SEARCHES = ["base_tuning", "fair_control_search"]
PIPELINES = ["demo", "dynamic_masks", "pipeline_equal_flops"]
FOLDERS = sorted({*SWEEPS, "supar_coordinates", *PIPELINES, *TEXT} - set(INSIDE))
PAGES = [name for name in SWEEPS if name not in INSIDE]
CURVES = [name for name in SWEEPS if name not in SEARCHES]
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# The swept settings other than the rate.
SWEPT = {"supar_init_transfer": "model.init_std", "batch_power_laws": "optimizer.weight_decay"}
# Of a sweep of laws, in tokens: the budget with several batch sizes, and the batch size with several budgets.
LAWS = {"batch_power_laws": (552960, 1024)}
# The tables of noise scales, and the columns of a sweep whose arms are compared at their own best rates.
NOISE = ["gns_batch_schedule"]
PAIRED = {
    "gns_batch_schedule": ("budget.batch_size", "budget.tokens"),
    "schedule_to_zero": ("schedule.name", "tokens", "sparsity"),
}
# Those in which the gap between two values of the first of these columns is compared over the others.
GAPS = ["schedule_to_zero"]
# The columns that identify the arms of the other tables.
ARMS = {
    **dict.fromkeys(["demo", "pipeline_equal_flops"], ("arm", "stage")),
    "mediswift_pipeline": ("arm", "how", "task"),
    "dynamic_masks": ("rule",),
}


def swept(name: str) -> str:
    return SWEPT.get(name, "lr")


@functools.cache
def claims(name: str) -> list[Claim]:
    """Return the claims that the rows of an experiment support; empty for a table without arms or curves."""
    folder = ROOT / "experiments" / name
    if name in CURVES:
        exponents = exponent_claims(folder / "results.csv", *LAWS[name]) if name in LAWS else []
        noise = noise_claims(folder / "noise_scale.csv") if name in NOISE else []
        arms = paired_claims(folder / "results.csv", *PAIRED[name]) if name in PAIRED else []
        gaps = gap_claims(folder / "results.csv", *PAIRED[name]) if name in GAPS else []
        gaps += control_claims(folder) if name == "fair_control" else []
        return gaps + sweep_claims(folder / "results.csv", swept(name)) + exponents + noise + arms
    if name in TEXT:
        return claims_of_text(folder, RANGES.get(name, []))
    found = arm_claims(folder / "results.csv", *ARMS[name]) if name in ARMS else []
    found += equal_flops_claims(folder) if name == "pipeline_equal_flops" else []
    tables = {"demo": "results.csv", "mediswift_pipeline": "bag_of_words.csv"}
    return found + (item_claims(folder / tables[name]) if name in tables else [])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def collecting(name: str) -> list[str]:
    """Return the arguments of the ``sparsetrain sweep`` command in the head of an experiment."""
    text = (config_directory() / "experiment" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^#   sparsetrain (sweep .*)$", text, re.MULTILINE)
    return command.split()


def axes(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each setting that is swept."""
    found = OverridesParser.create().parse_overrides(words)
    return {each.get_key_element(): list(each.sweep_string_iterator()) for each in found if each.is_sweep_override()}


def test_every_experiment_has_a_tiny_form_and_a_folder() -> None:
    others = {"mediswift_pipeline"}
    # The donor belongs to arabic_adaptation, a tuning to what it tunes.
    parts = {"arabic_donor", "pipeline_equal_flops_tuning", *INSIDE}
    assert set(options("experiment")) == set(FOLDERS) | others | parts
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/README.md")}
    without_runs = {"kernels", "simulator_here", "simulator_published"}
    assert folders == set(FOLDERS) | others | without_runs


@pytest.mark.parametrize("name", SWEEPS)
def test_the_points_of_a_sweep_can_be_run_and_its_command_can_be_typed(name: str, notes: Path) -> None:
    """Each point of the tiny form is planned, which refuses what a run refuses.

    Of the whole sweep, each value is checked, and the first and the last point are composed; all points would take
    minutes.
    """
    whole = with_sweep("pretrain", [f"experiment={name}"])
    check("pretrain", whole, sweep=True)
    for end in (0, -1):
        point = [f"{key}={values[end]}" for key, values in axes(whole).items()]
        assert isinstance(load("pretrain", [f"experiment={name}", *point]), PretrainConfig)
    tiny = with_sweep("pretrain", [f"experiment={name}", f"data.path={notes}", *SMALL, *TINY[name]])
    refused: list[UserError] = []
    inputs = Inputs()
    planned = [plan_of(config, inputs).runs[0] for config in points("pretrain", tiny, refused.append) if config]
    assert refused == []
    assert len({run.directory for run in planned}) == math.prod(map(len, axes(tiny).values()))
    typed = parsed("sweep", collecting(name)[1:])
    assert typed.search if name in SEARCHES else typed.x == swept(name)


@pytest.mark.parametrize("name", RUN)
def test_a_sweep_runs_and_its_command_collects_it(
    name: str, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    words = ["pretrain", "-m", f"experiment={name}", f"data.path={notes}", *SMALL, *TINY[name]]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert err == ""
    planned = int(re.findall(r"^sweep: (\d+) points, 0 already finished", out, re.MULTILINE)[0])
    assert f"Launching {planned} jobs" in out
    assert out.count("pretrain: complete") == planned == len(list(tmp_path.glob("runs/*/*/result.json")))
    assert main(collecting(name)) == 0
    out = capfd.readouterr().out
    assert f"{planned} finished runs, 0 of them diverged" in out
    written = {path.name for path in (tmp_path / "experiments" / name).iterdir()}
    assert written == {"results.csv", "figure.png"} | (set() if name == "base_tuning" else {"optima.csv"})


@pytest.mark.parametrize("name", [*FOLDERS, "mediswift_pipeline"])
def test_the_commands_of_a_readme_are_valid(name: str) -> None:
    text = (ROOT / "experiments" / name / "README.md").read_text().replace("\\\n", "")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    own = [words[2:] for words in commands if words[0] == "sparsetrain" and f"experiment={name}" in words]
    assert own, "the README does not say how to run its experiment"
    for program, verb, *words in commands:
        if program == "python":
            assert (ROOT / verb).is_file()
        elif verb == "report":
            assert words[-2] == "--out"
            assert words[-1] in (f"experiments/{name}", f"experiments/{name}/tuning")
        elif verb == "sweep" and words[0] == "runs/fair_control_tuned":
            assert words[1:] == ["--search", "--out", f"experiments/{name}/tuned"]
        elif verb == "sweep":
            known = [name, *(part for part, place in INSIDE.items() if place.startswith(f"{name}/"))]
            assert sorted([verb, *words]) in [sorted(collecting(one)) for one in known]
        elif verb == "fit":
            read = (
                ["runs/gns_observed", "law=noise"] if name in NOISE else [f"experiments/{name}/results.csv", "law=tau"]
            )
            assert words == [*read, f"out=experiments/{name}"]
        elif program == "sparsetrain":
            sweep = "-m" in words
            check(verb, as_typed(verb, [word for word in words if word != "-m"], sweep), sweep)


@pytest.mark.parametrize("name", PAGES)
def test_the_number_of_points_in_a_readme_is_that_of_the_sweep(name: str) -> None:
    said = re.findall(r"# (\d+) points", (ROOT / "experiments" / name / "README.md").read_text())
    assert [int(number) for number in said] == [
        math.prod(map(len, axes(with_sweep("pretrain", [f"experiment={name}"])).values()))
    ]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_tiny_form_only_changes_settings_that_the_sweep_has(name: str) -> None:
    whole = {word.partition("=")[0] for word in with_sweep("pretrain", [f"experiment={name}"])}
    small = {word.partition("=")[0] for word in with_sweep("pretrain", [f"experiment={name}", *SMALL, *TINY[name]])}
    assert whole <= small


@pytest.mark.parametrize("name", CURVES)
def test_the_optima_of_an_experiment_follow_from_its_rows(name: str, tmp_path: Path) -> None:
    folder = ROOT / "experiments" / name
    found = read_sweep([folder / "results.csv"])
    extra = [column for column in found.varied if column != swept(name)]
    write_optima(lines_of(found.rows, swept(name), extra), tmp_path / "optima.csv", extra)
    assert (tmp_path / "optima.csv").read_text() == (folder / "optima.csv").read_text()


@pytest.mark.parametrize("name", [*LAWS, *NOISE])
def test_the_laws_of_an_experiment_follow_from_its_rows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "experiments" / name
    table, law = ("noise_scale.csv", "noise") if name in NOISE else ("results.csv", "tau")
    assert main(["fit", str(folder / table), f"law={law}", f"out={tmp_path}"]) == 0
    assert capsys.readouterr().err == ""
    laws = sorted(path.name for path in tmp_path.glob("*.yaml"))
    assert laws == sorted(path.name for path in folder.glob("*.yaml"))
    for law in laws:
        fitted, filed = Law.load(tmp_path / law), Law.load(folder / law)
        assert fitted.parameters == pytest.approx(filed.parameters, rel=1e-9)
        for parameter in fitted.PARAMETERS:
            assert fitted.interval(0.95, parameter) == pytest.approx(filed.interval(0.95, parameter), rel=1e-6)
    for picture in tmp_path.glob("*.png"):
        assert_same_picture(picture, folder / picture.name)


@pytest.mark.parametrize("name", [*ARMS, *TEXT])
def test_table_bars_and_figure_of_arms_follow_from_the_rows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "experiments" / name
    assert main(["report", str(folder / "results.csv"), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    pictures = {"figure.png"} | ({"positions.png"} if (folder / "positions.csv").exists() else set())
    texts = {path.name for path in tmp_path.iterdir()} - pictures
    assert texts == {"results.csv"} | {name for name in ("bars.md", *FURTHER) if (folder / name).exists()}
    for text in texts:
        assert (tmp_path / text).read_bytes() == (folder / text).read_bytes()
    for picture in pictures:
        assert_same_picture(tmp_path / picture, folder / picture)


@pytest.mark.parametrize("name", ["", *CURVES, *ARMS, *TEXT, "base_tuning", "supar_coordinates", *DOCUMENTS])
def test_every_interval_of_a_readme_follows_from_the_rows(name: str) -> None:
    everything = [*CURVES, *ARMS, *TEXT]
    text = (ROOT / name if name in DOCUMENTS else ROOT / "experiments" / name / "README.md").read_text()
    named = re.findall(r"\]\((?:\.\./)?(\w+)/README\.md\)", text)
    sources = [name, *named] if name in everything else everything
    assert unsupported(text, [claim for source in dict.fromkeys(sources) for claim in claims(source)]) == []


def test_an_interval_that_the_rows_do_not_carry_is_found() -> None:
    text = (ROOT / "experiments" / "supar_lr_transfer" / "README.md").read_text()
    assert "+0.37 [0.20, 0.54]" in text
    for other in ("+0.37 [0.29, 0.42]", "+0.73 [0.20, 0.54]"):  # the range of the seeds; another number
        assert unsupported(text.replace("+0.37 [0.20, 0.54]", other), claims("supar_lr_transfer")) == [other]
    assert unsupported("dense is 60.3 ± 2.3, sparse 60.3 ± 1.0", claims("mediswift_pipeline")) == ["60.3 ± 1.0"]


def ratios(per_weight: float, per_nonzero: float) -> str:
    return " / ".join(f"{number:.2g}" if number < 100 else f"{number:.0f}" for number in (per_weight, per_nonzero))


@pytest.mark.parametrize("name", [*CURVES, *ARMS, *TEXT])
def test_tables_say_how_many_tokens_there_are_per_weight_and_per_nonzero(name: str) -> None:
    folder = ROOT / "experiments" / name
    expected = set()
    for row in rows(folder / "results.csv"):
        if row.get("tokens_per_weight") and not row.get("task"):
            expected.add(ratios(*(float(row[f"tokens_per_{one}"]) for one in ("weight", "nonzero"))))
        elif row.get("stage", row.get("how", "pretrain")) == "pretrain":
            # The hidden matrices of a block: four of attention, and two of the MLP with four times as many features.
            per_weight = int(row["tokens"]) / (12 * int(row["width"]) ** 2 * int(row["depth"]))
            density = float(row.get("density") or 1.0 - float(row["sparsity"]))
            expected.add(ratios(per_weight, per_weight / density))
    cells = [
        cell
        for line in (folder / "README.md").read_text().splitlines()
        for cell in line.split("|")
        if re.fullmatch(r" ?[\d.]+ / [\d.]+ ?", cell)
    ]
    assert {cell.strip() for cell in cells} == expected


@pytest.mark.parametrize("name", CURVES)
def test_a_loss_of_fewer_seeds_than_stand_beside_it_is_marked(name: str) -> None:
    folder = ROOT / "experiments" / name
    text = (folder / "README.md").read_text()
    fewer = [
        f"{float(row['loss_at_base_optimum']):.3f} ({row['seeds_at_base_optimum']} seed)"
        for row in rows(folder / "optima.csv")
        if 0 < int(row["seeds_at_base_optimum"]) < int(row["seeds"])
    ]
    assert [loss for loss in fewer if loss not in text] == []
    assert text.count(" seed) |") == len(fewer)


def test_a_sweep_that_was_killed_goes_on(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    words = ["pretrain", "-m", "experiment=dynamic_masks_caveat", f"data.path={notes}", *SMALL, *NARROW]
    words += [*ONE, "seed=0,1", "sparsity=static", "sparsity.evolution.every=1"]
    with monkeypatch.context() as patch:
        on_loss(patch, 3, send(signal.SIGTERM))  # the first step of the second point
        assert main(words) > 2
    capfd.readouterr()
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "sweep: 4 points, 1 already finished, 3 to run" in out
    assert "measured on 1 finished point" in out
    assert "resuming after step 1 of 2" in out


def test_the_stages_of_mediswift_run_and_their_report_has_every_bar(
    small_medline: Wheel, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline has two tasks on the same pre-trained weights, a table, and bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PUBMEDQA_DIR", str(questions))
    words = ["pipeline", "experiment=mediswift_pipeline", "pipeline=mediswift_pubmedqa", "runs_dir=runs", *NARROW]
    words += ["model.n_layers=1", "model.n_heads=2", "data.vocab_size=300", "data.context=48", "budget.steps=1"]
    words += ["budget.batch_size=4", "loop.eval_sequences=2", "task.n_train=8", "task.n_validation=4", "task.n_test=8"]
    stages = [stage.name for stage in load(words[0], words[1:]).stages if stage.name != "pretrain"]
    assert main([*words, *(f"pipeline.stages.{stage}.budget.steps=1" for stage in stages)]) == 0
    assert main(["report", "runs", "--out", "table"]) == 0
    found = {(row["task"], row["arm"], row["stage"]) for row in rows(tmp_path / "table" / "results.csv")}
    tuned = ("finetune", "finetune-sparse", "prompt", "prompt-frozen")
    expected = {
        *(("", arm, "pretrain") for arm in ("dense", "sparse-0.5", "sparse-0.75")),
        *((task, "scratch", "finetune") for task in ("section_roles", "pubmedqa")),
        *(
            (task, arm, stage)
            for task in ("section_roles", "pubmedqa")
            for arm in ("dense", "sparse-0.5", "sparse-0.75")
            for stage in tuned
            if (arm, stage) != ("dense", "finetune-sparse")
        ),
    }
    assert found == expected
    filed = (ROOT / "experiments" / "mediswift_pipeline" / "bars.md").read_text()
    named = [line.split("|")[1] for line in filed.splitlines()]
    assert [line.split("|")[1] for line in (tmp_path / "table" / "bars.md").read_text().splitlines()] == named
