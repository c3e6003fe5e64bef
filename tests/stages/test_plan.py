"""``sparsetrain plan``: its counts equal those of the runs, and it writes nothing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.cli.plan import shown
from sparsetrain.cost.footprint import Workload
from sparsetrain.data import prepare
from sparsetrain.errors import UserError
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.stages import (
    FinetuneConfig,
    PipelineConfig,
    PretrainConfig,
    PromptConfig,
    finetune,
    pipeline,
    pretrain,
    prompt,
    stage,
)
from sparsetrain.stages.estimate import estimate
from sparsetrain.stages.plan import Plan, PlannedRun, plan_of
from sparsetrain.training.state import Interrupted

Configure = Any
OLD = Path(__file__).parents[1] / "data" / "old_runs"
SMALL = {"model.n_layers": 1, "data.context": 32, "sparsity.sparsity": 0.5}
PHASES = [
    {"share": 0.5, "context": 16, "batch_size": 4, "density": 0.25},
    {"share": 0.5, "context": 32, "batch_size": 2, "density": 0.5, "schedule": {"name": "constant"}},
]
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "phases": (PretrainConfig, {"budget.phases": PHASES}),
    "ramp": (PretrainConfig, {"budget": {"steps": 12, "batch_size": {"start": 2, "end": 8, "points": 3}}}),
    "gmp": (PretrainConfig, {"sparsity.evolution": {"rule": "gmp", "every": 2, "start": 0.1, "stop": 0.8}}),
    "rigl": (PretrainConfig, {"sparsity.evolution": {"rule": "rigl", "every": 3}, "loop.accumulation": 2}),
    "further": (PretrainConfig, {"init": True, "sparsity.evolution": {"rule": "gmp", "every": 2}}),
    "dense tuning": (FinetuneConfig, {"init": True, "budget": {"epochs": 0.5, "batch_size": 4}}),
    "sparse tuning": (FinetuneConfig, {"init": True, "mode": "sparse", "schedule": {"warmup_steps": 2}}),
    "from scratch": (FinetuneConfig, {"mode": "sparse"}),
    "frozen prompt": (PromptConfig, {"init": True, "n_tokens": 2}),
    "trained prompt": (PromptConfig, {"init": True, "train": "both", "mode": "sparse"}),
}
VERBS: dict[type, Any] = {
    PretrainConfig: pretrain,
    FinetuneConfig: finetune,
    PromptConfig: prompt,
    PipelineConfig: pipeline,
}


def contents(*places: Path) -> dict[Path, tuple[int, bytes]]:
    """Return time stamp and content of everything below some paths."""
    files = [path for place in places for path in (place, *place.rglob("*")) if path.exists()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in files}


def only(plan: Plan) -> PlannedRun:
    (run,) = plan.runs
    return run


@pytest.fixture
def make(configure: Configure, tmp_path: Path) -> Any:
    def small(kind: type, changes: dict[str, Any] | None = None, **top: Any) -> Any:
        return configure(kind, SMALL | (changes or {}), runs_dir=tmp_path / "runs", **top)

    return small


def agrees(run: PlannedRun, result: dict[str, Any], directory: Path, workload: Workload) -> None:
    """Compare a plan with the run that followed it."""
    assert run.directory == directory
    assert (run.steps, run.tokens) == (result["steps"], result["tokens"])
    assert run.flops == pytest.approx(result["flops"]["total"], rel=1e-12)
    assert run.workload == workload
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "lr" in record]
    first = 0
    for phase in run.phases:
        rates = [record["lr"] for record in records if first < record["step"] <= first + phase.steps]
        assert len(rates) == phase.steps
        assert phase.rates == pytest.approx((min(rates), max(rates)), rel=1e-12)
        first += phase.steps
    if "masks" in result or "pretrained_density" in result:
        assert run.final_densities is not None
        assert run.phases[-1].densities[1] == pytest.approx(result["density"], rel=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_does_what_its_plan_said(
    name: str, make: Any, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = KINDS[name]
    checked: list[Workload] = []
    check = stage.check_memory
    monkeypatch.setattr(stage, "check_memory", lambda load, *rest: (checked.append(load), check(load, *rest)))
    top = {key: changes[key] for key in changes.keys() & {"mode", "train", "n_tokens"}}
    changes = {key: value for key, value in changes.items() if key not in {"init", *top}}
    if KINDS[name][1].get("init"):
        base = make(PretrainConfig, {"budget.steps": 2}, run_dir=tmp_path / "base")
        top["init_from"] = pretrain(base, screen).directory
    elif kind is PretrainConfig:
        # Before its text is prepared, a plan with a length in steps gives the same.
        early = only(plan_of(make(kind, changes)))
        assert "not prepared" in early.notes[0]
        assert not (tmp_path / "cache").exists()
    else:
        pretrain(make(PretrainConfig, {"budget.steps": 1}), screen)  # prepares the text
    config = make(kind, changes, **top)
    plan = only(plan_of(config))
    assert plan.status == "new"
    result = VERBS[kind](config, screen)
    agrees(plan, result.values, result.directory, checked[-1])
    if len(plan.phases) > 1:
        said = [(p.steps, p.tokens, p.context, p.batch_size, pytest.approx(p.flops)) for p in plan.phases]
        keys = ("steps", "tokens", "context", "batch_size", "flops")
        assert [tuple(phase[key] for key in keys) for phase in result["phases"]] == said
        assert name == "ramp" or [phase.densities for phase in plan.phases] == [(0.25, 0.25), (0.5, 0.5)]
    if name == "gmp":
        first, last = plan.phases[0].densities
        assert first > last
    after = only(plan_of(config))
    assert (after.status, after.phases, after.directory) == ("done", plan.phases, plan.directory)
    if kind is PretrainConfig and not top:
        assert (early.directory, early.phases) == (plan.directory, plan.phases)
    assert estimate([(config, after)]).seconds == [None]


def test_a_pipeline_is_planned_before_its_first_run_and_in_the_middle(
    make: Any, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"budget": {"steps": 3, "batch_size": 4}}
    stages = [
        {"name": "pretrain", "budget": {"steps": 4}, "sparsity": {"evolution": {"rule": "gmp", "every": 1}}},
        {"name": "finetune", "from": "pretrain", "mode": "sparse", **run},
        {"name": "prompt", "from": "pretrain", "n_tokens": 2, **run},
        {"name": "scratch", "run": "finetune", "once": True, "sparsity": {"sparsity": 0.0}, **run},
    ]
    section = {"arms": {"sparsity.sparsity": [0.5]}, "stages": stages}

    def config() -> Any:
        return make(PipelineConfig, {"pipeline": section})

    unprepared = plan_of(config())
    assert [bool(run.phases) for run in unprepared.runs] == [True, False, False, False]
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()

    def stop(stage_: Any, *_: Any) -> Any:
        if stage_.kind == "prompt":
            raise Interrupted("stopped", 15)
        return stage.train(stage_)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["sparsetrain.stages.pipeline"], "train", stop)
        prepare(config().data, progress=False)
        plan = plan_of(config())
        assert (plan.status, plan.directory) == ("new", unprepared.directory)
        assert {run.status for run in plan.runs} == {"new"}
        with pytest.raises(Interrupted):
            pipeline(config(), screen)
    middle = plan_of(config())
    assert middle.status == "stopped, 2 of 4 runs done"
    assert [run.status for run in middle.runs] == ["done", "done", "new", "new"]
    assert [run.phases for run in middle.runs] == [run.phases for run in plan.runs]
    times = estimate([(config(), run) for run in middle.runs])
    assert "as the 2 finished runs here" in times.basis
    assert [each is None for each in times.seconds] == [True, True, False, False]
    result = pipeline(config(), screen)
    assert result.directory == plan.directory
    for planned in plan.runs:
        found = json.loads((planned.directory / "result.json").read_text())
        assert (planned.steps, planned.tokens) == (found["steps"], found["tokens"])
        assert planned.flops == pytest.approx(found["flops"]["total"], rel=1e-12)
        assert planned.phases[-1].densities[1] == pytest.approx(found["density"], rel=1e-12)
    assert plan_of(config()).status == "done"


def test_nothing_is_written_whatever_is_planned(shell: Any, tmp_path: Path, notes: Path, questions: Path) -> None:
    plans = [
        ["pretrain", *shell.tiny, "budget.steps=null", "budget.epochs=1"],
        ["pretrain", *shell.tiny, "budget.phases=[{share: 0.4, context: 16}, {share: 0.6}]"],
        ["pretrain", "-m", *shell.tiny, "sparsity.sparsity=0,0.5"],
        ["finetune", *shell.tiny, *shell.task],
        ["pipeline", *shell.tiny, *shell.task],
        ["pipeline", "experiment=demo"],  # its text and its task would be downloaded
    ]
    places = (shell.home, tmp_path / "cache", notes.parent, questions)
    for prepares in (False, True):
        if prepares:
            assert shell.run("data", f"data.path={notes}", "data.tokenizer=bytes", "data.context=48")[0] == 0
        before = contents(*places)
        for words in plans:
            status, out, err = shell.run("plan", *words)
            assert (status, err) == (0, ""), (words, err)
            lines = [line for line in out.split("\n") if str(tmp_path) not in line and "runs/" not in line]
            assert [line for line in lines if len(line) > 120 and not line.startswith("note: ")] == []
            assert ("not prepared yet" in out) == (not prepares or "experiment=demo" in words)
            assert contents(*places) == before
    assert (tmp_path / "cache").exists()


def test_lines_can_be_searched_for_numbers(shell: Any, notes: Path) -> None:
    words = [*shell.tiny, "run_dir=run", "budget.phases=[{tokens: 960, density: 0.5}, {tokens: 1920, density: 1}]"]
    words.remove("budget.steps=3")
    status, out, _ = shell.run("plan", "pretrain", *words)
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "pretrain: run: new"
    rows = [line.split() for line in lines[2:5]]
    assert [row[:3] for row in rows] == [["0", "5", "960"], ["1", "10", "1920"], ["all", "15", "2880"]]
    assert len({len(line) for line in lines[1:5]}) == 1  # columns are aligned
    assert any(line.startswith("memory: about ") and " MiB" in line for line in lines)
    assert any(line.startswith("time: ") and "very roughly, at half the speed of a matrix" in line for line in lines)
    shell.trained()
    status, out, _ = shell.run("plan", "pretrain", "-m", *shell.tiny, "seed=0,1,-1", "runs_dir=runs")
    assert status == 2
    assert out.startswith("points: 3, 1 of them refused\n")
    assert "in all: 2 runs, 6 steps, 1152 tokens" in out
    status, out, _ = shell.run("plan", "pretrain", *shell.tiny, "run_dir=run")
    assert out.startswith("pretrain: run: done\n")
    assert "time: " not in out


@pytest.mark.parametrize(
    "words",
    [
        ["budget.tokens=5", "budget.steps=3"],
        ["stage.epochs=3"],
        ["lr=3"],
        ["data.path=nothere.txt"],
        ["init_from=nowhere"],
        ["data.context=40000"],
        ["budget.phases=[{share: 0.5}, {share: 0.6}]"],
        ["budget.phases=[{share: 0.5, context: 16}, {share: 0.5, context: 4000}]"],
        ["model.positions=learned", "data.context=500"],
        ["schedule.warmup_steps=20"],
        ["sparsity=rigl", "sparsity.evolution.every=2", "sparsity.evolution.accumulation=staggered"],
        ["sparsity=set", "sparsity.evolution.every=2", "sparsity.pattern=block", "sparsity.block=[7,7]"],
        ["run_dir=other"],
    ],
    ids=lambda words: words[-1],
)
def test_input_that_a_run_refuses_is_refused_in_the_same_line(shell: Any, words: list[str]) -> None:
    if words == ["run_dir=other"]:
        shell.trained("seed=1", run_dir="other")
    else:
        shell.run("data", *[word for word in shell.tiny if word.startswith("data.")])
    assert shell.refused("plan", "pretrain", *shell.tiny, *words) == shell.refused("pretrain", *shell.tiny, *words)


def test_what_cannot_be_planned_is_one_line(shell: Any) -> None:
    assert "the following arguments are required: VERB" in shell.refused("plan")
    assert "plan cannot plan 'sweep'; give one of pretrain, adapt, finetune, prompt, pipeline" in shell.refused(
        "plan", "sweep"
    )
    assert "did you mean 'pretrain'?" in shell.refused("plan", "pretrian")
    assert "plan does not take --cfg" in shell.refused("plan", "pretrain", "--cfg", "job")
    assert "init_from is missing" in shell.refused("plan", "prompt")
    missing = shell.refused("plan", "finetune", *shell.tiny, "task=pubmedqa", "task.path=nowhere")
    assert "task.path=nowhere: no ori_pqal.json there" in missing
    status, out, _ = shell.run("plan", "pretrain", "--help")
    assert status == 0
    assert "sparsetrain pretrain --help" in out


def test_old_runs_are_found(shell: Any, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(OLD, tmp_path / "moved"))
    tiny = [
        *("model=tiny", "model.d_model=16", "model.n_layers=1", "data.tokenizer=bytes", "data.context=16"),
        *("parameterization.base_width=8", "budget.batch_size=4", "budget.steps=6", "sparsity.sparsity=0.75"),
        *("loop.log_every=1", "loop.eval_every=3", "loop.eval_sequences=4", "loop.keep_last=1"),
        f"data.path={moved}/notes.txt",
    ]
    rigl = ["sparsity=rigl", "sparsity.sparsity=0.75", "sparsity.evolution.every=2", "model.dropout=0.1"]
    for prepares in (False, True):
        if prepares:
            assert shell.run("data", f"data.path={moved}/notes.txt", "data.tokenizer=bytes")[0] == 0
        for folder, words, status in (("finished", [], "done"), ("stopped", rigl, "stopped at step 3")):
            (run,) = (moved / folder).iterdir()
            code, out, err = shell.run("plan", "pretrain", *tiny, *words, f"runs_dir={moved / folder}")
            assert (code, err) == (0, "")
            assert f"pretrain: {run}: {status}\n" in out
            assert (" for the rest, very roughly" in out) == (status != "done")


def test_a_run_that_memory_has_no_room_for_is_planned_and_says_so(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.stages.plan.memory_fits", lambda *_: False)
    run = only(plan_of(make(PretrainConfig)))
    assert (bool(run.phases), run.fits) == (True, False)
    assert "refused without --force" in run.notes[-1]


def test_a_task_that_is_broken_does_not_matter_once_the_run_is_done(
    make: Any, tmp_path: Path, questions: Path, screen: Console
) -> None:
    task = tmp_path / "task"
    shutil.copytree(questions, task)
    config = make(FinetuneConfig, {"budget.steps": 1, "task.path": str(task)}, run_dir=tmp_path / "tuned")
    finetune(config, screen)
    task.rename(tmp_path / "gone")
    assert only(plan_of(config)).status == "done"
    config.run_dir = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"no ori_pqal\.json there"):
        plan_of(config)


def test_a_scheduled_weight_decay_is_drawn_and_applied(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(
        PretrainConfig,
        {"budget.steps": 5, "optimizer.schedules.weight_decay": [{"shape": "linear", "to": 0.0}]},
    )
    prepare(config.data)
    run = only(plan_of(config))
    decay = config.optimizer.weight_decay
    expected = [decay * (1 - step / 5) for step in range(5)]
    assert run.curves["weight_decay"] == pytest.approx(expected)
    lines = list(shown(Plan([run]), estimate([(config, run)])))
    assert any(line.strip().startswith("weight_decay |") and line.endswith("at last 0.02") for line in lines)
    assert any(line.strip().startswith("lr |") for line in lines)
    applied: list[float] = []
    take_step = torch.optim.AdamW.step

    def watched(optimizer: Any, *arguments: Any) -> Any:
        decayed = next(group for group in optimizer.param_groups if group["initial_weight_decay"] > 0)
        applied.append(decayed["weight_decay"] / decayed["initial_weight_decay"])
        return take_step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    pretrain(config)
    assert applied == pytest.approx([value / decay for value in expected])


def test_a_plan_says_what_is_known_of_a_run_that_the_noise_scale_leads(configure: Configure) -> None:
    size = {"led_by": "gns", "start": 2, "end": 8, "points": 4}
    length = {"steps": None, "tokens": 8 * 1024, "batch_size": size}
    config = configure(PretrainConfig, {**SMALL, "budget": length})
    prepare(config.data)
    run = only(plan_of(config))
    # 128 steps of 64 tokens; at best 32 of them, then 16 of 128 tokens, and the rest of 256.
    assert "The noise scale leads the batch size: the run has between 64 and 128 steps, and what is shown is for 2" in (
        " ".join(run.notes)
    )
    assert (run.steps, run.tokens) == (128, 8 * 1024)
    assert run.workload is not None
    assert run.workload.batch_size == 8
    assert list(run.curves) == ["lr", "batch_size"]
